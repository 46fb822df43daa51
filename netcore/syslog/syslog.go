// Package syslog sends log lines to a collector as RFC 5424 describes them: each in a
// datagram (RFC 5426), or by TCP with its length before it (RFC 6587, 3.4.1).
package syslog

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// Message is one line.
type Message struct {
	Time  time.Time
	Host  string // who sends it
	App   string // the program that said it
	Level slog.Level
	Text  string
}

// The limits of RFC 5424: 6.1 for the whole, 6 for the parts.
const (
	MaxLength = 2048
	mostHost  = 255
	mostApp   = 48
)

// daemon is the facility, RFC 5424, 6.2.1.
const daemon = 3

// severity is that of RFC 5424, 6.2.1.
func severity(l slog.Level) int {
	switch {
	case l >= slog.LevelError:
		return 3
	case l >= slog.LevelWarn:
		return 4
	case l >= slog.LevelInfo:
		return 6
	}
	return 7
}

// Append appends the message. What it may not have in its header is left out, control
// characters in the text become spaces, and what is too long is cut.
func (m Message) Append(b []byte) []byte {
	begin := len(b)
	b = fmt.Appendf(b, "<%d>1 %s %s %s - - - ", daemon*8+severity(m.Level), m.Time.Format("2006-01-02T15:04:05.000000Z07:00"), name(m.Host, mostHost), name(m.App, mostApp))
	text := strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, m.Text)
	if room := MaxLength - (len(b) - begin); len(text) > room {
		text = text[:room]
	}
	return append(b, strings.ToValidUTF8(text, "")...)
}

// name is a part of the header: printable ASCII without spaces, or "-" for none.
func name(s string, most int) string {
	s = strings.Map(func(r rune) rune {
		if r <= ' ' || r > '~' {
			return -1
		}
		return r
	}, s)
	if s == "" {
		return "-"
	}
	return s[:min(len(s), most)]
}

// ParseURL reads where to send to, udp://192.0.2.5:514 or tcp://[2001:db8::5]:514.
func ParseURL(text string) (network, address string, err error) {
	u, err := url.Parse(text)
	if err != nil || u.Scheme != "udp" && u.Scheme != "tcp" || u.Host == "" {
		return "", "", fmt.Errorf("%q: want udp:// or tcp:// with an address and a port", text)
	}
	return u.Scheme, u.Host, nil
}

// patience is how long connecting and sending may take.
const patience = 5 * time.Second

// A Sender sends to one collector. It is for one goroutine.
type Sender struct {
	network, address string
	conn             net.Conn
	buf              []byte
}

// NewSender prepares one; nothing is sent yet.
func NewSender(network, address string) *Sender { return &Sender{network: network, address: address} }

// Send sends a message, over the connection that there is or another one. With UDP an
// error may be of the message before.
func (s *Sender) Send(ctx context.Context, m Message) error {
	if s.conn == nil {
		conn, err := (&net.Dialer{Timeout: patience}).DialContext(ctx, s.network, s.address)
		if err != nil {
			return fmt.Errorf("connecting to the syslog collector: %w", err)
		}
		s.conn = conn
		if s.network == "tcp" { // a collector says nothing: what comes is its end
			go func() {
				_, _ = io.Copy(io.Discard, conn)
				_ = conn.Close()
			}()
		}
	}
	s.buf = m.Append(s.buf[:0])
	if s.network == "tcp" {
		s.buf = append([]byte(strconv.Itoa(len(s.buf))+" "), s.buf...)
	}
	_ = s.conn.SetWriteDeadline(time.Now().Add(patience))
	if _, err := s.conn.Write(s.buf); err != nil {
		s.Close()
		return fmt.Errorf("sending to the syslog collector: %w", err)
	}
	return nil
}

// Close ends the connection; Send makes another.
func (s *Sender) Close() {
	if s.conn != nil {
		_ = s.conn.Close()
		s.conn = nil
	}
}
