package bpf

// Forget detaches, and unpins, what a process has left that is no more. Clone0 has to be
// gone.
func Forget(pins string) error { return (&Filter{pins: pins}).Detach() }
