// Package qemu boots virtual machines: an appliance under test, its console as
// lines, its power and reset buttons, its cable. A machine cannot outlive this
// process. Most users want the whole laboratory of package lab; the switch is in
// package vswitch, the client host in package nethost.
//
// # What there is to know
//
// Shown with QEMU 7.2 and Linux 6.12 on two cores that were busy with other work;
// CPU times are of one guest with a small Go init.
//
// Accelerator: that /dev/kvm opens says nothing. On a machine with nested or
// emulated virtualisation a guest of a few instructions ended in 0.14 s under KVM,
// but SeaBIOS took 5.1 s to a boot sector, against 0.2 s under TCG, or never got
// there. See [ChooseAccel].
//
// Machine: q35 needs 1.9 s of CPU time from start to power-off under TCG, microvm
// 1.3 s. But with ACPI (its default) a microvm under TCG hangs: it is
// "hardware-reduced", so the kernel does not look for the 8254, and there is no
// other clock to calibrate the TSC and the local APIC with. Without ACPI it boots,
// but has no power button. On q35 the button reaches the guest at once (60 ms from
// QMP to the end of QEMU), and the guest sees PCI, ACPI and a carrier as on a real
// board.
//
// CPU: -cpu max and qemu64 boot in the same time; so do tb-size=16 MB to 1 GB
// (a boot translates 35 MB of code), thread=single, and q35 with USB, SATA, SMM and
// HPET turned off, or with qboot for SeaBIOS.
//
// Clock: under load the kernel's calibration of the TSC can be far off (a guest
// counted 25 s in 6), and its clock runs that much too fast; with tsc=unstable it
// uses the HPET and is right. This needs CONFIG_HPET_TIMER.
//
// Reset: a guest that is reset inside a running QEMU spends 4.5 s of CPU time
// before its kernel starts, against 0.4 s in a new process, because it writes over
// pages with translated code. Package lab starts a new process.
//
// Network: QEMU 7.2 only prints a warning when a stream netdev cannot connect, does
// not reconnect when the connection ends, and pads nothing. set_link shows the guest
// a lost carrier; frames on their way are dropped by QEMU then.
package qemu
