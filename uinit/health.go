package uinit

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"strings"
	"time"

	"clonecluster/config"
)

// probe asks a service once whether it works. HTTP is spoken by hand, one
// request and the first line of the answer: net/http would parse whatever the
// service says in goroutines of its own, where a panic could not be caught.
func probe(ctx context.Context, h config.Health) error {
	ctx, cancel := context.WithTimeout(ctx, h.Timeout)
	defer cancel()
	if h.TCP != "" {
		conn, err := new(net.Dialer).DialContext(ctx, "tcp", h.TCP)
		if err != nil {
			return unwrapped(err)
		}
		return conn.Close()
	}
	u, err := url.Parse(h.HTTP)
	if err != nil {
		return err
	}
	port := u.Port()
	if port == "" {
		port = "80"
	}
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", net.JoinHostPort(u.Hostname(), port))
	if err != nil {
		return unwrapped(err)
	}
	defer conn.Close()
	deadline, _ := ctx.Deadline()
	if err := conn.SetDeadline(deadline); err != nil {
		return err
	}
	if _, err := fmt.Fprintf(conn, "GET %s HTTP/1.0\r\nHost: %s\r\nUser-Agent: clonecluster-health\r\nConnection: close\r\n\r\n", u.RequestURI(), u.Host); err != nil {
		return unwrapped(err)
	}
	line, err := bufio.NewReaderSize(io.LimitReader(conn, 512), 512).ReadString('\n')
	if err != nil {
		if errors.Is(err, io.EOF) {
			return errors.New("the answer is not HTTP")
		}
		return unwrapped(err)
	}
	return statusLine(line)
}

// statusLine is the error that the first line of an HTTP answer tells.
func statusLine(line string) error {
	version, rest, _ := strings.Cut(strings.TrimRight(line, "\r\n"), " ")
	if !strings.HasPrefix(version, "HTTP/") || len(rest) < 3 || strings.Trim(rest[:3], "0123456789") != "" || len(rest) > 3 && rest[3] != ' ' {
		return errors.New("the answer is not HTTP")
	}
	if rest[0] != '2' {
		return fmt.Errorf("the answer is %s", printable(rest[:min(len(rest), 40)]))
	}
	return nil
}

// unwrapped is a network error without the addresses that the reader knows.
func unwrapped(err error) error {
	var t interface{ Timeout() bool }
	if errors.As(err, &t) && t.Timeout() {
		return errors.New("no answer in time")
	}
	for {
		inner := errors.Unwrap(err)
		if inner == nil {
			return err
		}
		err = inner
	}
}

// probeFast is how often a service is asked until it is healthy for the first
// time: its start should not be seen an interval late.
const probeFast = 100 * time.Millisecond

// probes asks a service again and again until ctx ends.
func probes(ctx context.Context, h config.Health, tell func(error)) {
	well := false
	for {
		start := time.Now()
		err := probe(ctx, h)
		if ctx.Err() != nil {
			return
		}
		well = well || err == nil
		tell(err)
		wait := h.Interval
		if !well {
			wait = min(wait, probeFast)
		}
		t := time.NewTimer(max(0, wait-time.Since(start)))
		select {
		case <-ctx.Done():
			t.Stop()
			return
		case <-t.C:
		}
	}
}
