package qemutest

import (
	"context"
	"testing"

	"clonecluster/qemu/lab"
)

// Lab starts a laboratory for a test and closes it at its end. A frame that breaks
// I1, or a capture with a hole, fails the test, and a test that fails shows the
// consoles. Kernel and accelerator are filled in if they are empty, and so is the
// initramfs, with the test guest.
func Lab(t testing.TB, cfg lab.Config) *lab.Lab {
	t.Helper()
	if cfg.Accel == "" {
		cfg.Accel = Accel(t)
	}
	if cfg.Kernel == "" {
		cfg.Kernel = Kernel(t)
	}
	if cfg.Initrd == nil {
		cfg.Initrd = []string{Initrd(t)}
	}
	// Not t.Context: that ends before the clean-ups, which may want a live lab.
	l, err := lab.Start(context.Background(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	l.Switch().FailOnViolation(t)
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(l.Report())
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}
