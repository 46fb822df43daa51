package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
)

// maxMessage bounds one message of the monitor, in bytes.
const maxMessage = 1 << 20

// QMP is a client of QEMU's monitor (docs/interop/qmp-spec of QEMU). Its methods
// may be called concurrently.
type QMP struct {
	conn    net.Conn
	onEvent func(Event)
	done    chan struct{} // the reader has ended
	err     error         // why; valid after done

	write sync.Mutex // one command at a time on the connection

	mu      sync.Mutex
	seq     uint64
	waiting map[uint64]chan qmpMessage // by id of the command
}

// Event is something QEMU reports by itself.
type Event struct {
	Name string          `json:"event"`
	Data json.RawMessage `json:"data"`
}

// QMPError is QEMU's refusal of a command.
type QMPError struct {
	Class string `json:"class"`
	Desc  string `json:"desc"`
}

func (e *QMPError) Error() string { return e.Desc }

type qmpMessage struct {
	Greeting *json.RawMessage `json:"QMP"`
	Return   json.RawMessage  `json:"return"`
	Err      *QMPError        `json:"error"`
	ID       *uint64          `json:"id"`
	Event
}

type qmpCommand struct {
	Execute   string `json:"execute"`
	Arguments any    `json:"arguments,omitempty"`
	ID        uint64 `json:"id"`
}

// NewQMP takes over a connection to a monitor and negotiates with it. onEvent may
// be nil; it runs on the client's goroutine and must not use the client. Close
// the client to end that goroutine.
func NewQMP(ctx context.Context, conn net.Conn, onEvent func(Event)) (*QMP, error) {
	q := &QMP{conn: conn, onEvent: onEvent, done: make(chan struct{}), waiting: make(map[uint64]chan qmpMessage)}
	greeted := make(chan struct{})
	go q.read(greeted)
	select {
	case <-greeted:
	case <-q.done:
		return nil, fmt.Errorf("waiting for the monitor's greeting: %w", q.err)
	case <-ctx.Done():
		q.Close()
		return nil, fmt.Errorf("waiting for the monitor's greeting: %w", context.Cause(ctx))
	}
	if err := q.Execute(ctx, "qmp_capabilities", nil, nil); err != nil {
		q.Close()
		return nil, err
	}
	return q, nil
}

// Close ends the connection and the client's goroutine.
func (q *QMP) Close() {
	q.conn.Close()
	<-q.done
}

func (q *QMP) read(greeted chan<- struct{}) {
	defer close(q.done)
	lines := bufio.NewScanner(q.conn)
	lines.Buffer(make([]byte, 0, 4096), maxMessage)
	for lines.Scan() {
		var m qmpMessage
		if q.err = json.Unmarshal(lines.Bytes(), &m); q.err != nil {
			q.err = fmt.Errorf("reading from the monitor: %w", q.err)
			q.conn.Close()
			return
		}
		switch {
		case m.Greeting != nil:
			if greeted != nil {
				close(greeted)
				greeted = nil
			}
		case m.Name != "":
			if q.onEvent != nil {
				q.onEvent(m.Event)
			}
		case m.ID != nil:
			q.answer(m)
		}
	}
	if q.err = lines.Err(); q.err == nil {
		q.err = io.EOF
	}
	q.conn.Close()
}

// answer hands a reply to whoever waits for it. A command that was given up has
// nobody.
func (q *QMP) answer(m qmpMessage) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if c := q.waiting[*m.ID]; c != nil {
		delete(q.waiting, *m.ID)
		c <- m
	}
}

// Execute runs a command and decodes what it returns into out, unless out is
// nil. A refusal is a *[QMPError].
func (q *QMP) Execute(ctx context.Context, command string, args, out any) error {
	if err := q.execute(ctx, command, args, out); err != nil {
		return fmt.Errorf("monitor command %s: %w", command, err)
	}
	return nil
}

func (q *QMP) execute(ctx context.Context, command string, args, out any) error {
	reply := make(chan qmpMessage, 1)
	q.mu.Lock()
	q.seq++
	id := q.seq
	q.waiting[id] = reply
	q.mu.Unlock()
	defer func() {
		q.mu.Lock()
		defer q.mu.Unlock()
		delete(q.waiting, id)
	}()
	if err := q.send(ctx, qmpCommand{command, args, id}); err != nil {
		return err
	}
	var m qmpMessage
	select {
	case m = <-reply:
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-q.done:
		select {
		case m = <-reply: // a quitting QEMU may answer and hang up at once
		default:
			return q.err
		}
	}
	switch {
	case m.Err != nil:
		return m.Err
	case out == nil:
		return nil
	}
	return json.Unmarshal(m.Return, out)
}

func (q *QMP) send(ctx context.Context, c qmpCommand) error {
	b, err := json.Marshal(c)
	if err != nil {
		return err
	}
	q.write.Lock()
	defer q.write.Unlock()
	deadline, _ := ctx.Deadline() // none is the zero time, which is no deadline
	q.conn.SetWriteDeadline(deadline)
	_, err = q.conn.Write(append(b, '\n'))
	return err
}

// Status is the run state of the machine: "running", "paused", "shutdown", …
func (q *QMP) Status(ctx context.Context) (string, error) {
	var s struct {
		Status string `json:"status"`
	}
	err := q.Execute(ctx, "query-status", nil, &s)
	return s.Status, err
}

// SetLink gives NIC i (from 0) a carrier or takes it away, as the guest sees it.
func (q *QMP) SetLink(ctx context.Context, nic int, up bool) error {
	return q.Execute(ctx, "set_link", map[string]any{"name": fmt.Sprintf("nic%d", nic), "up": up}, nil)
}

// Stop freezes the guest's CPUs: a paused machine, as a live migration makes it.
func (q *QMP) Stop(ctx context.Context) error { return q.Execute(ctx, "stop", nil, nil) }

// Cont lets a stopped guest go on.
func (q *QMP) Cont(ctx context.Context) error { return q.Execute(ctx, "cont", nil, nil) }

// PowerButton presses the ACPI power button.
func (q *QMP) PowerButton(ctx context.Context) error {
	return q.Execute(ctx, "system_powerdown", nil, nil)
}

// Reset presses the reset button.
func (q *QMP) Reset(ctx context.Context) error { return q.Execute(ctx, "system_reset", nil, nil) }

// Quit ends QEMU at once, as if the power had failed.
func (q *QMP) Quit(ctx context.Context) error {
	err := q.Execute(ctx, "quit", nil, nil)
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}
