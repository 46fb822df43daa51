package crowd

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"time"
)

// ErrBytes says that a download came to its end with other bytes than it should.
var ErrBytes = errors.New("wrong bytes")

var errLate = errors.New("the answer did not begin in time")

// DownloadConfig says what is fetched and how.
type DownloadConfig struct {
	Path string // "/bench/4M"
	Size int64
	Sum  [sha256.Size]byte // of the right bytes
	// Rate is how many bytes per second the client takes until it is told to
	// hurry. What it does not take fills the buffers of both ends, up to 1 MB.
	Rate int
	// Chatter is the interval in which the client sends a byte of its next
	// request; 0 means never. Who only receives has nothing to retransmit, and so
	// never learns that the other end has died. Not for a download that is to
	// outlive a graceful stop: a server that closes a connection with unread bytes
	// resets it.
	Chatter time.Duration
}

// Download is a download under way.
type Download struct {
	cfg    DownloadConfig
	conn   net.Conn
	body   io.Reader
	node   string
	holder string

	hurry     chan struct{}
	hurryOnce sync.Once
	done      chan struct{}

	mu  sync.Mutex
	end time.Time // zero while it goes on
	err error
}

// Download starts a download and returns when its answer has begun, which tells
// who holds it. It goes on until all has come, it breaks, or ctx ends.
func (c *Crowd) Download(ctx context.Context, cfg DownloadConfig) (_ *Download, err error) {
	ctx, cancelCause := context.WithCancelCause(ctx)
	cancel := func() { cancelCause(nil) }
	defer func() {
		if err != nil {
			if cause := context.Cause(ctx); cause != nil {
				err = cause // rather than what it made of the connection
			}
			cancel()
			err = fmt.Errorf("downloading %s: %w", cfg.Path, err)
		}
	}()
	late := time.AfterFunc(c.cfg.Timeout, func() { cancelCause(errLate) })
	conn, release, err := c.dial(ctx)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			release()
			conn.Close()
		}
	}()
	d := &Download{cfg: cfg, conn: conn, holder: c.attempt(conn).Holder(), hurry: make(chan struct{}), done: make(chan struct{})}
	if _, err := conn.Write(c.head(cfg.Path, "")); err != nil {
		return nil, err
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK || resp.ContentLength != cfg.Size {
		return nil, fmt.Errorf("got %s, %d bytes; want %d", resp.Status, resp.ContentLength, cfg.Size)
	}
	if !late.Stop() {
		return nil, errLate
	}
	d.body, d.node = resp.Body, resp.Header.Get(nodeHeader)
	go func() {
		defer close(d.done)
		defer conn.Close()
		defer release()
		defer cancel()
		var chatter sync.WaitGroup
		if cfg.Chatter > 0 {
			chatter.Go(func() { d.chat(ctx, []byte(c.head("/whoami", "X-Next: "))) })
		}
		d.conclude(d.fetch(ctx))
		cancel()
		chatter.Wait()
	}()
	return d, nil
}

// Node is the wire MAC of the node that sends, and Holder its port of the switch.
func (d *Download) Node() string { return d.node }

// Holder is the port of the switch behind which the connection is held.
func (d *Download) Holder() string { return d.holder }

// Hurry takes the rest as fast as it comes.
func (d *Download) Hurry() { d.hurryOnce.Do(func() { close(d.hurry) }) }

// Ended says when the client knew that the download was over, and why: nil if all
// bytes came and were right. ok is false while it goes on.
func (d *Download) Ended() (at time.Time, err error, ok bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.end, d.err, !d.end.IsZero()
}

// Wait waits for the end and returns why it ended, nil if all bytes came and were
// right.
func (d *Download) Wait(ctx context.Context) error {
	select {
	case <-d.done:
		_, err, _ := d.Ended()
		return err
	case <-ctx.Done():
		return fmt.Errorf("waiting for the end of a download: %w", context.Cause(ctx))
	}
}

// conclude enters the end. The first one to know it counts.
func (d *Download) conclude(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.end.IsZero() {
		d.end, d.err = time.Now(), err
	}
}

// steps is how often in a second a slow client takes something.
const steps = 10

// fetch takes the body, at first slowly.
func (d *Download) fetch(ctx context.Context) error {
	tick := time.NewTicker(time.Second / steps)
	defer tick.Stop()
	sum := sha256.New()
	buf := make([]byte, 64<<10)
	for got, budget := int64(0), 0; got < d.cfg.Size; {
		want := len(buf)
		select {
		case <-d.hurry:
		default:
			if budget <= 0 {
				select {
				case <-tick.C:
					budget += max(1, d.cfg.Rate/steps)
				case <-d.hurry:
				case <-ctx.Done():
					return context.Cause(ctx)
				}
				continue
			}
			want = min(want, budget)
		}
		n, err := d.body.Read(buf[:want])
		sum.Write(buf[:n])
		got += int64(n)
		budget -= n
		if err != nil && got < d.cfg.Size {
			return fmt.Errorf("after %d of %d bytes: %w", got, d.cfg.Size, err)
		}
	}
	if !bytes.Equal(sum.Sum(nil), d.cfg.Sum[:]) {
		return ErrBytes
	}
	return nil
}

// chat sends the head of the next request byte by byte and goes on with its last
// one, a header's value that never ends.
func (d *Download) chat(ctx context.Context, head []byte) {
	head = bytes.TrimRight(head, "\r\n")
	tick := time.NewTicker(d.cfg.Chatter)
	defer tick.Stop()
	for i := 0; ; i++ {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		b := []byte{'.'}
		if i < len(head) {
			b[0] = head[i]
		}
		if _, err := d.conn.Write(b); err != nil && ctx.Err() == nil {
			// Told apart from the end of the data, which may wait in the buffer for
			// a slow client for long.
			d.conclude(fmt.Errorf("sending: %w", err))
			d.conn.SetDeadline(time.Unix(1, 0))
			return
		}
	}
}
