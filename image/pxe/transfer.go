package pxe

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"net"
	"net/http"
	"net/netip"
	"time"

	"golang.org/x/net/netutil"

	"clonecluster/image/pxe/tftp"
)

const (
	maxConns     = 256
	stallTimeout = 30 * time.Second // for each part of an answer
)

// archOf is what a machine said it is when it was told of its file.
func (s *Server) archOf(mac [6]byte) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.arch[mac]
}

// find gives a machine's file by the path that it was told, and reports what it
// cannot have.
func (s *Server) find(name string) (mac [6]byte, file string, f tftp.File, err error) {
	mac, file, ok := s.tokens.machine(name)
	if !ok {
		return mac, "", nil, tftp.ErrNotFound
	}
	f, err = s.open(mac, s.archOf(mac), file)
	if err != nil && !errors.Is(err, tftp.ErrNotFound) || errors.Is(err, fs.ErrNotExist) {
		s.with(func(t *timeline, now time.Time) {
			t.refuse(t.get(mac, now, true), "it asks for "+file+": "+err.Error(), now)
		})
	}
	return mac, file, f, err
}

func (s *Server) openTFTP(name string, client netip.AddrPort) (tftp.File, error) {
	if !s.opts.Addr.Contains(client.Addr()) {
		return nil, tftp.ErrNotFound // a false sender: no file for somebody far away
	}
	_, _, f, err := s.find(name)
	return f, err
}

func (s *Server) doneTFTP(name string, client netip.AddrPort, bytes int64, took time.Duration, err error) {
	mac, file, ok := s.tokens.machine(name)
	if !ok {
		return
	}
	all := bytes
	if err != nil {
		all++
	}
	s.with(func(t *timeline, now time.Time) { t.done(mac, file, "TFTP", bytes, all, took, client.Addr(), now) })
}

func (s *Server) serveHTTP(ctx context.Context, l net.Listener) error {
	srv := &http.Server{
		Handler:           s,
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    8 << 10,
		ErrorLog:          log.New(io.Discard, "", 0), // of what strangers send
	}
	// A transfer does not end by itself in any time that one would wait.
	stop := context.AfterFunc(ctx, func() { srv.Close() })
	defer stop()
	if err := srv.Serve(netutil.LimitListener(l, maxConns)); err != nil && ctx.Err() == nil {
		return err
	}
	return nil
}

// ServeHTTP hands out the files of a machine, also in parts.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		w.Header().Set("Allow", "GET, HEAD")
		http.Error(w, "this server only sends", http.StatusMethodNotAllowed)
		return
	}
	mac, name, f, err := s.find(r.URL.Path)
	if errors.Is(err, tftp.ErrNotFound) {
		http.NotFound(w, r)
		return
	} else if err != nil {
		http.Error(w, "the server cannot read that file", http.StatusInternalServerError)
		return
	}
	defer f.Close()
	from, _ := netip.ParseAddrPort(r.RemoteAddr)
	client := from.Addr().Unmap()
	w.Header().Set("Content-Type", contentType(name))
	w.Header().Set("Cache-Control", "no-store") // it has the cluster's key in it
	if r.Method == http.MethodHead {
		http.ServeContent(w, r, "", time.Time{}, section(f))
		return
	}
	count := &counter{ResponseWriter: w, control: http.NewResponseController(w), progress: func(n int64) {
		s.with(func(t *timeline, now time.Time) { t.loading(mac, name, n, client, now) })
	}}
	start := time.Now()
	http.ServeContent(count, r, "", time.Time{}, section(f))
	if count.status == http.StatusOK || count.status == http.StatusPartialContent && count.last(f.Size()) {
		all := f.Size()
		if count.status == http.StatusPartialContent {
			all = count.bytes // the rest came before
		}
		if count.failed {
			all = count.bytes + 1
		}
		s.with(func(t *timeline, now time.Time) {
			t.done(mac, name, "HTTP", count.bytes, all, time.Since(start), client, now)
		})
	}
}

// contentType is what UEFI's HTTP boot tells an EFI program by, where the name
// does not say it.
func contentType(name string) string {
	switch name {
	case efiFile:
		return "application/efi"
	case scriptFile:
		return "text/plain"
	}
	return "application/octet-stream"
}

// counter is a response that counts its bytes, and ends when a client takes none.
type counter struct {
	http.ResponseWriter
	control  *http.ResponseController
	progress func(int64)
	status   int
	bytes    int64
	failed   bool
}

func (c *counter) WriteHeader(status int) {
	c.status = status
	c.ResponseWriter.WriteHeader(status)
}

func (c *counter) Write(b []byte) (int, error) {
	if c.status == 0 {
		c.status = http.StatusOK
	}
	c.control.SetWriteDeadline(time.Now().Add(stallTimeout))
	n, err := c.ResponseWriter.Write(b)
	c.bytes += int64(n)
	c.failed = c.failed || err != nil
	if n > 0 {
		c.progress(int64(n))
	}
	return n, err
}

// last says whether the part that was sent is the end of the file.
func (c *counter) last(size int64) bool {
	var first, end, all int64
	n, err := fmt.Sscanf(c.Header().Get("Content-Range"), "bytes %d-%d/%d", &first, &end, &all)
	return err == nil && n == 3 && end == size-1
}
