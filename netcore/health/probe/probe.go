// Package probe asks once whether a service of this machine works. It is apart
// from package health because PID 1 asks too, which starts no programs but its
// children and in which a panic ends the machine (docs/decisions/0010-pid-1.md).
package probe

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
	"unicode"
	"unicode/utf8"
)

// TCP connects to an address and port. The error is a reason for the log.
func TCP(ctx context.Context, address string) error {
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", address)
	if err != nil {
		return unwrapped(err)
	}
	return conn.Close()
}

// HTTP gets an http:// URL, which has to answer 2xx. The error is a reason for
// the log.
//
// HTTP is spoken by hand, one request and the first line of the answer: net/http
// would parse whatever the service says in goroutines of its own, where a panic
// could not be caught.
func HTTP(ctx context.Context, target string) error {
	u, err := url.Parse(target)
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
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
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
		return fmt.Errorf("the answer is %s", Printable(rest[:min(len(rest), 40)]))
	}
	return nil
}

// ErrLate is the reason of a service that did not answer in time.
var ErrLate = errors.New("no answer in time")

// unwrapped is a network error without the addresses that the reader knows.
func unwrapped(err error) error {
	var t interface{ Timeout() bool }
	if errors.As(err, &t) && t.Timeout() {
		return ErrLate
	}
	for {
		inner := errors.Unwrap(err)
		if inner == nil {
			return err
		}
		err = inner
	}
}

// Printable is what a service says as it may stand in a reason: characters that
// neither steer a terminal nor hide, and at most 200 bytes of the text.
func Printable(text string) string {
	return strings.Map(func(r rune) rune {
		if r == utf8.RuneError || !unicode.IsPrint(r) {
			return '·'
		}
		return r
	}, text[:min(len(text), 200)])
}
