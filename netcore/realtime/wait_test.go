package realtime

import (
	"errors"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestWaiter: a wait ends by what comes, by a wake before or during it, and by its time.
func TestWaiter(t *testing.T) {
	pipe := make([]int, 2)
	if err := unix.Pipe2(pipe, unix.O_NONBLOCK|unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pipe[0])
	defer unix.Close(pipe[1])
	w, err := NewWaiter(pipe[0])
	if err != nil {
		t.Fatal(err)
	}
	wait := func(d time.Duration) time.Duration {
		begin := time.Now()
		w.Wait(d)
		return time.Since(begin)
	}
	const long = 20 * time.Second
	w.Wake()
	w.Wake()
	if took := wait(long); took > long/2 {
		t.Errorf("woken before, a wait took %v", took)
	}
	if took := wait(20 * time.Millisecond); took < 20*time.Millisecond {
		t.Errorf("a wait of 20ms took %v: two wakes are one", took)
	}
	time.AfterFunc(20*time.Millisecond, w.Wake)
	if took := wait(long); took < 10*time.Millisecond || took > long/2 {
		t.Errorf("woken after 20ms, a wait took %v", took)
	}
	if n := testing.AllocsPerRun(100, func() { w.Wake(); w.Wait(long) }); n != 0 {
		t.Errorf("a wait allocates %v times", n)
	}
	if _, err := unix.Write(pipe[1], []byte{1}); err != nil {
		t.Fatal(err)
	}
	for range 2 { // as nobody reads it
		if took := wait(long); took > long/2 {
			t.Errorf("with something to read, a wait took %v", took)
		}
	}
	if err := w.Close(); err != nil {
		t.Error(err)
	}
	w.Wake()
	if err := w.Close(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("closed twice: %v", err)
	}
}

// TestUnpolled: the socket goes on, and does not wait.
func TestUnpolled(t *testing.T) {
	conn, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Skipf("needs a loopback: %v", err)
	}
	at := conn.LocalAddr().(*net.UDPAddr)
	fd, err := Unpolled(conn)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := conn.Close(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("the former descriptor is still open: %v", err)
	}
	b := make([]byte, 10)
	if _, err := unix.Read(fd, b); err != unix.EAGAIN {
		t.Errorf("reading nothing: %v; want EAGAIN", err)
	}
	from, err := net.DialUDP("udp4", nil, at)
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	if _, err := from.Write([]byte("frame")); err != nil {
		t.Fatal(err)
	}
	if n, err := unix.Read(fd, b); err != nil || string(b[:n]) != "frame" {
		t.Errorf("read %q, %v", b[:max(n, 0)], err)
	}
}
