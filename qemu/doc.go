// Package qemu boots virtual machines.
package qemu
