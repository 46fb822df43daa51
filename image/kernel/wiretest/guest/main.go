// Command guest is the PID 1 of the virtual machine in which the kernel's wire
// address is tried: see package wiretest. It needs no network card; the wire is
// a veth pair whose far end is in a namespace of its own.
package main

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"clonecluster/image/kernel/wiretest"
)

func main() {
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "guest: this is the init of a test guest")
		os.Exit(2)
	}
	if err := run(); err != nil {
		fmt.Println("wiretest: failed:", err)
	} else {
		fmt.Println("wiretest: done")
	}
	unix.Sync()
	if err := unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF); err != nil {
		fmt.Println("wiretest:", err)
	}
	select {} // PID 1 must not end
}

// bench is the state of the whole run.
type bench struct {
	report wiretest.Report
	out    *tar.Writer
	far    *namespace
}

func run() error {
	for _, m := range []struct{ fs, dir string }{{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}} {
		if err := os.MkdirAll(m.dir, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.fs, m.dir, m.fs, 0, ""); err != nil && err != unix.EBUSY {
			return fmt.Errorf("mounting %s: %w", m.dir, err)
		}
	}
	port, err := openPort(wiretest.Port)
	if err != nil {
		return err
	}
	b := &bench{out: tar.NewWriter(port)}
	if b.far, err = newNamespace(); err != nil {
		return err
	}
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return err
	}
	b.report.Kernel = unix.ByteSliceToString(uts.Release[:])

	err = b.scenario()
	b.check("the guest ran to its end", err)
	data, err := json.Marshal(b.report)
	if err != nil {
		return err
	}
	if err := b.file(wiretest.ReportFile, data); err != nil {
		return err
	}
	if err := b.out.Close(); err != nil {
		return err
	}
	return port.Close()
}

func (b *bench) scenario() error {
	if err := b.netpoll(); err != nil {
		return fmt.Errorf("network console: %w", err)
	}
	if err := b.attribute(); err != nil {
		return fmt.Errorf("attribute: %w", err)
	}
	if err := b.neighbours(); err != nil {
		return fmt.Errorf("neighbours: %w", err)
	}
	if err := b.duplicates(); err != nil {
		return fmt.Errorf("duplicates: %w", err)
	}
	if err := b.fibLookup(); err != nil {
		return fmt.Errorf("bpf_fib_lookup: %w", err)
	}
	for _, k := range kinds {
		if err := b.device(k); err != nil {
			return fmt.Errorf("%s: %w", k.name, err)
		}
		fmt.Println("wiretest: tried", k.name)
	}
	return nil
}

// file adds a file to the archive.
func (b *bench) file(name string, data []byte) error {
	if err := b.out.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(data))}); err != nil {
		return err
	}
	_, err := b.out.Write(data)
	return err
}

// check records what err says of a check.
func (b *bench) check(name string, err error) {
	c := wiretest.Check{Name: name, OK: err == nil}
	if err != nil {
		c.Detail = err.Error()
	}
	b.report.Checks = append(b.report.Checks, c)
}

func (b *bench) equal(name string, got, want any) {
	var err error
	if fmt.Sprint(got) != fmt.Sprint(want) {
		err = fmt.Errorf("got %v; want %v", got, want)
	}
	b.check(name, err)
}

// openPort finds a virtio-serial port by its name.
func openPort(name string) (*os.File, error) {
	deadline := time.Now().Add(10 * time.Second)
	for {
		names, _ := filepath.Glob("/sys/class/virtio-ports/*/name")
		for _, n := range names {
			if text, err := os.ReadFile(n); err == nil && strings.TrimSpace(string(text)) == name {
				return os.OpenFile("/dev/"+filepath.Base(filepath.Dir(n)), os.O_WRONLY, 0)
			}
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("no virtio-serial port %q", name)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func attributeFile(dev string) string { return "/sys/class/net/" + dev + "/wire_address" }

func setWire(dev, address string) error {
	return os.WriteFile(attributeFile(dev), []byte(address+"\n"), 0)
}

func getWire(dev string) string {
	text, err := os.ReadFile(attributeFile(dev))
	if err != nil {
		return err.Error()
	}
	return string(text)
}

// kernelSaid counts the lines of the kernel's log so far that contain text.
func kernelSaid(text string) int {
	buf := make([]byte, 1<<20)
	n, err := unix.Klogctl(unix.SYSLOG_ACTION_READ_ALL, buf)
	if err != nil {
		return -1
	}
	return bytes.Count(buf[:n], []byte(text))
}

func mac(s string) net.HardwareAddr {
	m, err := net.ParseMAC(s)
	if err != nil {
		panic(err) // a constant of this program
	}
	return m
}
