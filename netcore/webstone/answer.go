package webstone

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"syscall"
)

// Kind is why a request failed.
type Kind string

// The kinds.
const (
	Refused     Kind = "refused"       // the connection was (RST to a SYN)
	Reset       Kind = "reset"         // RST in a connection
	Timeout     Kind = "timeout"       // of the whole request, or the kernel's
	Short       Kind = "short body"    // the end came early, or before anything
	Status      Kind = "status"        // not 200
	Protocol    Kind = "protocol"      // not an answer, or not of that length
	Unreachable Kind = "unreachable"   // the network has said so, or there is none
	NoPort      Kind = "no local port" // too many connections from one address
	Other       Kind = "other"
)

var (
	errShort  = errors.New("the connection ended before the answer did")
	errStatus = errors.New("status")
)

// A protocolError says what is wrong with an answer.
type protocolError string

func (e protocolError) Error() string { return string(e) }

func kindOf(err error) Kind {
	var netErr net.Error
	switch {
	case errors.Is(err, errStatus):
		return Status
	case errors.As(err, new(protocolError)):
		return Protocol
	case errors.Is(err, errShort), errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return Short
	case errors.Is(err, syscall.ECONNREFUSED):
		return Refused
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE), errors.Is(err, syscall.ECONNABORTED):
		return Reset
	case errors.Is(err, syscall.EADDRNOTAVAIL), errors.Is(err, syscall.EADDRINUSE):
		return NoPort
	case errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH):
		return Unreachable
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, context.DeadlineExceeded), errors.Is(err, syscall.ETIMEDOUT),
		errors.As(err, &netErr) && netErr.Timeout():
		return Timeout
	}
	return Other
}

// maxHead bounds what comes before a body.
const maxHead = 8 << 10

// head is what a client wants to know of an answer (RFC 9112).
type head struct {
	status int
	length int64 // of the body; -1: up to the end of the connection
	close  bool  // the server closes the connection
}

// parseHead parses what has come so far. n is where the body begins, 0 if more is needed.
func parseHead(b []byte) (h head, n int, err error) {
	end := bytes.Index(b, []byte("\r\n\r\n"))
	if end < 0 {
		if len(b) >= maxHead {
			return h, 0, protocolError(fmt.Sprintf("no end of the header in %d octets", maxHead))
		}
		if len(b) >= 5 && !bytes.HasPrefix(b, []byte("HTTP/")) {
			return h, 0, protocolError(fmt.Sprintf("an answer that begins with %.16q", b))
		}
		return h, 0, nil
	}
	line, rest, _ := bytes.Cut(b[:end], []byte("\r\n"))
	// "HTTP/1.1 200 OK"
	if bytes.ContainsAny(line, "\r\n") || len(line) < 12 || !bytes.HasPrefix(line, []byte("HTTP/1.")) || line[8] != ' ' || len(line) > 12 && line[12] != ' ' {
		return h, 0, protocolError(fmt.Sprintf("an answer that begins with %.16q", line))
	}
	h.length, h.close = -1, line[7] == '0'
	if h.status, err = strconv.Atoi(string(line[9:12])); err != nil || h.status < 100 {
		return h, 0, protocolError(fmt.Sprintf("status %q", line[9:12]))
	}
	for len(rest) > 0 {
		line, rest, _ = bytes.Cut(rest, []byte("\r\n"))
		if bytes.ContainsAny(line, "\r\n") {
			return h, 0, protocolError(fmt.Sprintf("a line that ends halfway: %.32q", line))
		}
		name, value, _ := bytes.Cut(line, []byte(":"))
		value = bytes.TrimSpace(value)
		switch {
		case bytes.EqualFold(name, []byte("Content-Length")):
			// Digits only, and not twice with two values (RFC 9112, 6.3).
			length, err := strconv.ParseUint(string(value), 10, 62)
			if err != nil || h.length >= 0 && h.length != int64(length) {
				return h, 0, protocolError(fmt.Sprintf("Content-Length %.32q", value))
			}
			h.length = int64(length)
		case bytes.EqualFold(name, []byte("Transfer-Encoding")):
			return h, 0, protocolError(fmt.Sprintf("Transfer-Encoding %.32q: a file is wanted with its length", value))
		case bytes.EqualFold(name, []byte("Connection")):
			if bytes.EqualFold(value, []byte("close")) {
				h.close = true
			} else if bytes.EqualFold(value, []byte("keep-alive")) {
				h.close = false
			}
		}
	}
	return h, end + 4, nil
}

// readAnswer reads an answer of a body of size octets, and with toEnd up to the end of the
// connection. buf is of maxHead octets or more. any says whether anything has come.
func readAnswer(r io.Reader, buf []byte, size int64, toEnd bool) (h head, any bool, err error) {
	have, body := 0, 0
	for body == 0 {
		n, err := r.Read(buf[have:])
		have += n
		any = any || n > 0
		if n > 0 {
			if h, body, err = parseHead(buf[:have]); err != nil {
				return h, any, err
			}
			continue
		}
		if err == io.EOF {
			err = errShort
		}
		if err != nil {
			return h, any, err
		}
	}
	if h.status != 200 {
		return h, any, fmt.Errorf("%w %d", errStatus, h.status)
	}
	if h.length >= 0 && h.length != size {
		return h, any, protocolError(fmt.Sprintf("a body of %d octets: want %d", h.length, size))
	}
	// One octet more than there should be is looked for, too.
	got := int64(have - body)
	toEnd = toEnd || h.length < 0
	for got < size || toEnd && got == size {
		n, err := r.Read(buf)
		got += int64(n)
		if err == io.EOF {
			if got < size {
				return h, any, fmt.Errorf("%w: %d octets of %d", errShort, got, size)
			}
			break
		}
		if err != nil {
			return h, any, err
		}
	}
	if got > size {
		return h, any, protocolError(fmt.Sprintf("a body of %d octets or more: want %d", got, size))
	}
	return h, any, nil
}
