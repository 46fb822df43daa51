package engine_test

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"clonecluster/netcore/netnstest"
)

// downloads are long ones that are in flight together. Each goes on for as long
// as the test wants, at the pace of a client that reads a little at a time out
// of a small buffer, so that segments and acknowledgements never cease. Every
// byte is compared.
type downloads struct {
	f    *failover
	all  []*download
	done sync.WaitGroup
}

type download struct {
	holder   string
	conn     *os.File
	in       *bufio.Reader
	received atomic.Int64
	closing  atomic.Bool

	mu  sync.Mutex
	err error // what broke it
	at  time.Time
}

const (
	downloadPiece = 4096
	downloadPause = 200 * time.Millisecond // between two pieces
	// downloadStall is without a byte what a user calls broken.
	downloadStall = 30 * time.Second
)

// startDownloads opens n of them from a host, and more until every one of the
// nodes holds its part of them.
func (f *failover) startDownloads(from *netnstest.Host, n int, nodes ...*node) *downloads {
	f.t.Helper()
	d := &downloads{f: f}
	f.t.Cleanup(d.close)
	held := map[string]int{}
	enough := func() bool {
		for _, node := range nodes {
			if held[node.Name] < n/len(nodes)/3 {
				return false
			}
		}
		return len(d.all) >= n
	}
	for !enough() {
		if len(d.all) > 3*n+100 {
			f.t.Fatalf("%d downloads, all held by %v", len(d.all), held)
		}
		one, err := openDownload(from)
		if err != nil {
			f.t.Fatalf("starting a download: %v", err)
		}
		held[one.holder]++
		d.all = append(d.all, one)
		d.done.Go(one.run)
	}
	return d
}

func openDownload(from *netnstest.Host) (d *download, err error) {
	d = &download{}
	if err := from.Do(func() (err error) {
		d.conn, err = connect(netip.MustParseAddrPort(vip4+":80"), 2*downloadPiece)
		return err
	}); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			d.conn.Close()
		}
	}()
	if err := d.conn.SetDeadline(time.Now().Add(downloadStall)); err != nil {
		return nil, err
	}
	d.in = bufio.NewReaderSize(d.conn, downloadPiece)
	resp, err := d.get("/whoami")
	if err != nil {
		return nil, err
	}
	name, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, err
	}
	d.holder = strings.TrimSpace(string(name))
	_, err = d.get(fmt.Sprintf("/download/%d", int64(1)<<50))
	return d, err
}

func (d *download) get(path string) (*http.Response, error) {
	if _, err := fmt.Fprintf(d.conn, "GET %s HTTP/1.1\r\nHost: vip\r\n\r\n", path); err != nil {
		return nil, err
	}
	return http.ReadResponse(d.in, nil)
}

func (d *download) run() {
	var got, want [downloadPiece]byte
	source := &pattern{}
	for err := error(nil); err == nil && !d.closing.Load(); {
		if err = d.conn.SetReadDeadline(time.Now().Add(downloadStall)); err != nil {
			break
		}
		if _, err = io.ReadFull(d.in, got[:]); err == nil {
			if _, _ = source.Read(want[:]); got != want {
				err = fmt.Errorf("wrong content after %d bytes", d.received.Load())
			}
		}
		if err != nil && !d.closing.Load() {
			d.mu.Lock()
			d.err, d.at = err, time.Now()
			d.mu.Unlock()
			return
		}
		d.received.Add(downloadPiece)
		time.Sleep(downloadPause)
	}
}

func (d *download) broken() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.err
}

// of gives those that are held by the nodes.
func (d *downloads) of(nodes ...*node) *downloads {
	part := &downloads{f: d.f}
	for _, one := range d.all {
		for _, n := range nodes {
			if one.holder == n.Name {
				part.all = append(part.all, one)
			}
		}
	}
	return part
}

// mustGoOn waits until each of them that is not closed, having come through
// whatever was, gets several pieces more, and fails the test for each that is broken.
func (d *downloads) mustGoOn(when string) {
	d.f.t.Helper()
	before := make([]int64, len(d.all))
	for i, one := range d.all {
		before[i] = one.received.Load()
	}
	broken, explained := 0, 0
	for i, one := range d.all {
		for !one.closing.Load() && one.broken() == nil && one.received.Load() < before[i]+3*downloadPiece {
			time.Sleep(downloadPause / 4)
		}
		if err := one.broken(); err != nil {
			if broken++; d.f.stood(one.at) {
				explained++
			}
			if broken <= 5 {
				d.f.t.Logf("%s: a download of %d bytes so far, held by %s, broke at %s: %v",
					when, one.received.Load(), one.holder, one.at.Format("15:04:05.000"), err)
			}
		}
	}
	d.f.judge(broken, explained)
	if broken > 0 {
		d.f.t.Errorf("%s: %d of %d downloads broke", when, broken, len(d.all))
	}
}

// countBroken is how many are broken by now.
func (d *downloads) countBroken() (n int) {
	for _, one := range d.all {
		if one.broken() != nil {
			n++
		}
	}
	return n
}

// close ends those that are in flight: they are done.
func (d *downloads) close() {
	for _, one := range d.all {
		one.closing.Store(true)
		one.conn.Close()
	}
	d.done.Wait()
}

func (d *downloads) String() string {
	held := map[string]int{}
	var total int64
	for _, one := range d.all {
		held[one.holder]++
		total += one.received.Load()
	}
	return fmt.Sprintf("%d downloads held by %v, %d MB so far", len(d.all), held, total>>20)
}

// TestDownloadNotices shows that a download that is tampered with is noticed.
func TestDownloadNotices(t *testing.T) {
	good := make([]byte, 3*downloadPiece)
	_, _ = (&pattern{}).Read(good)
	lost := append(bytes.Clone(good[:5000]), good[5100:]...)
	for name, tt := range map[string]struct {
		data []byte
		want string
	}{
		"cut short":  {good[:2*downloadPiece+1], "unexpected EOF"},
		"piece lost": {lost, "wrong content after 4096 bytes"},
	} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		d := &download{conn: r, in: bufio.NewReaderSize(r, downloadPiece)}
		go func() { _, _ = w.Write(tt.data); w.Close() }()
		d.run()
		r.Close()
		if err := d.broken(); err == nil || err.Error() != tt.want {
			t.Errorf("%s: %v; want %s", name, err, tt.want)
		}
	}
}
