package bpf

// Forget takes off a NIC, and unpins, what a process has left that is no more. Clone0
// has to be gone.
func Forget(pins string, nic int) error { return (&Filter{pins: pins}).Detach(nic) }
