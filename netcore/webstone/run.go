package webstone

import (
	"context"
	"crypto/tls"
	"errors"
	"math/rand/v2"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// pause is what a client of a closed loop waits after an error, so that it does not spin
	// on a refusal.
	pause = 10 * time.Millisecond
	// late is when a request of an open loop has begun late.
	late = 10 * time.Millisecond
	// bufferSize is of the memory that a client reads into.
	bufferSize = 16 << 10
)

// Run measures until all windows have passed. If ctx ends, it gives what was measured so
// far, with the cause.
func Run(ctx context.Context, cfg Config) (*Result, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	if cfg.Host == "" {
		cfg.Host = cfg.Target.String()
	}
	r := &run{cfg: cfg, heads: requests(&cfg), end: cfg.WarmUp + time.Duration(cfg.Windows)*cfg.Window}
	if cfg.TLS {
		name, _, err := net.SplitHostPort(cfg.Host)
		if err != nil {
			name = cfg.Host
		}
		r.tls = &tls.Config{ServerName: name, InsecureSkipVerify: true, SessionTicketsDisabled: true, MinVersion: tls.VersionTLS12,
			// A client's part is to be small: without a share for a key exchange that few servers know yet.
			CurvePreferences: []tls.CurveID{tls.X25519, tls.CurveP256}}
	}
	r.begin = time.Now()
	if cfg.Rate > 0 {
		r.schedule = &schedule{rate: cfg.Rate, constant: cfg.Constant, random: rand.New(rand.NewPCG(cfg.Seed, 1<<63))}
	}
	for range cfg.Windows {
		r.windows = append(r.windows, &Window{Seconds: cfg.Window.Seconds(), Errors: map[Kind]uint64{}, Examples: map[Kind]string{}})
	}
	// Without the deadline of ctx, which a dialer would take for its own timeout.
	clientsCtx, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	defer context.AfterFunc(ctx, stop)()
	all := make([]*client, cfg.Clients)
	var working sync.WaitGroup
	for i := range all {
		c := &client{run: r, files: cfg.Workload.chooser(cfg.Seed, i), buf: make([]byte, bufferSize)}
		c.dialer.KeepAlive = -1
		if len(cfg.Sources) > 0 {
			c.dialer.LocalAddr = &net.TCPAddr{IP: cfg.Sources[i%len(cfg.Sources)].AsSlice()}
			c.dialer.Control = portLate
		}
		all[i] = c
		working.Go(func() { c.work(clientsCtx, i) })
	}
	passed := r.watch(ctx)
	if r.schedule == nil || ctx.Err() != nil {
		stop()
		for _, c := range all {
			c.interrupt()
		}
	}
	interrupted := context.AfterFunc(ctx, func() {
		for _, c := range all {
			c.interrupt()
		}
	})
	working.Wait()
	interrupted()

	res := &Result{Workload: cfg.Workload.Name, Clients: cfg.Clients, KeepAlive: cfg.KeepAlive, Rate: cfg.Rate, Windows: r.windows}
	if passed < cfg.Windows {
		res.Interrupted = true
		res.Windows = r.windows[:passed]
		if part := r.stopped - r.from(passed); part > 0 {
			w := r.windows[passed]
			w.Seconds = part.Seconds()
			res.Windows = r.windows[:passed+1]
		}
		return res, ctx.Err()
	}
	return res, nil
}

// portLate lets the kernel choose the local port when it knows the target, so that two
// connections may have the same to different ones (IP_BIND_ADDRESS_NO_PORT, ip(7)).
func portLate(_, _ string, c syscall.RawConn) (err error) {
	if e := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1) }); e != nil {
		return e
	}
	return err
}

// requests are the requests for each file of the workload.
func requests(cfg *Config) (all [][]byte) {
	version := "HTTP/1.0"
	if cfg.KeepAlive {
		version = "HTTP/1.1"
	}
	for _, f := range cfg.Workload.Files {
		all = append(all, []byte(http.MethodGet+" "+cfg.Prefix+f.Name()+" "+version+"\r\nHost: "+cfg.Host+"\r\nUser-Agent: clonectl-bench\r\n\r\n"))
	}
	return all
}

// run is one run of all clients. Its times count from its beginning.
type run struct {
	cfg      Config
	heads    [][]byte
	begin    time.Time
	end      time.Duration // of the last window
	schedule *schedule     // nil: closed loop
	tls      *tls.Config   // nil: plain

	stopped time.Duration // when ctx ended

	mu      sync.Mutex // of what is in the windows
	windows []*Window
}

func (r *run) from(window int) time.Duration {
	return r.cfg.WarmUp + time.Duration(window)*r.cfg.Window
}

// watch waits for the end of all windows and notes what each took of the processors. It
// gives how many passed before ctx ended.
func (r *run) watch(ctx context.Context) (passed int) {
	until := func(d time.Duration) bool {
		timer := time.NewTimer(time.Until(r.begin.Add(d)))
		defer timer.Stop()
		select {
		case <-ctx.Done():
			r.stopped = time.Since(r.begin)
			return false
		case <-timer.C:
			return true
		}
	}
	if !until(r.cfg.WarmUp) {
		return 0
	}
	for i := range r.windows {
		used, at := processors(), time.Now()
		ok := until(r.from(i + 1))
		w := r.windows[i]
		r.mu.Lock()
		w.CPU = per((processors() - used).Seconds(), time.Since(at).Seconds())
		r.mu.Unlock()
		if !ok {
			return i
		}
	}
	return len(r.windows)
}

// processors is the time that this process has taken of them.
func processors() time.Duration {
	var u unix.Rusage
	if unix.Getrusage(unix.RUSAGE_SELF, &u) != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// windowAt is the one in which a time is; nil in none.
func (r *run) windowAt(at time.Duration) *Window {
	if at < r.cfg.WarmUp || at >= r.end {
		return nil
	}
	return r.windows[int((at-r.cfg.WarmUp)/r.cfg.Window)]
}

// A try is one request as it went.
type try struct {
	intended, begin, end time.Duration
	connect              time.Duration // 0: there was a connection
	size                 int64
	reconnected          bool
	err                  error
}

// busy counts what was under way in each window for as long as it was.
func (r *run) busy(t try) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i, w := range r.windows {
		if from, to := max(t.begin, r.from(i)), min(t.end, r.from(i+1)); to > from {
			w.Busy += (to - from).Seconds()
		}
	}
}

// note enters it into the windows.
func (r *run) note(t try) {
	r.busy(t)
	r.mu.Lock()
	defer r.mu.Unlock()
	if w := r.windowAt(t.end); w != nil && t.err == nil {
		w.Requests++
		w.Bytes += uint64(t.size)
	}
	at, since := t.end, t.begin
	if r.schedule != nil {
		at, since = t.intended, t.intended
	}
	w := r.windowAt(at)
	if w == nil {
		return
	}
	if t.connect > 0 {
		w.Connect.Add(t.connect)
	}
	if t.reconnected {
		w.Reconnects++
	}
	if r.schedule != nil && t.begin-t.intended > late {
		w.Late++
	}
	if t.err != nil {
		kind := kindOf(t.err)
		w.Errors[kind]++
		if w.Examples[kind] == "" {
			w.Examples[kind] = t.err.Error()
		}
		return
	}
	w.Latency.Add(t.end - since)
}

// schedule says when the requests of an open loop are to begin.
type schedule struct {
	rate     float64
	constant bool

	mu     sync.Mutex
	random *rand.Rand
	n      uint64
	next   float64 // seconds
}

func (s *schedule) take() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.constant {
		s.n++
		s.next = float64(s.n) / s.rate
	} else {
		s.next += s.random.ExpFloat64() / s.rate
	}
	return time.Duration(s.next * 1e9)
}

// client does one request after the other.
type client struct {
	run    *run
	files  *chooser
	dialer net.Dialer
	buf    []byte

	conn    net.Conn                 // kept from the last request
	current atomic.Pointer[net.Conn] // its TCP connection, which interrupt interrupts
	stopped atomic.Bool
}

// interrupt ends what the client waits for.
func (c *client) interrupt() {
	c.stopped.Store(true)
	if conn := c.current.Load(); conn != nil {
		_ = (*conn).SetDeadline(time.Unix(1, 0))
	}
}

// work does requests until the run is over or ctx ends.
func (c *client) work(ctx context.Context, number int) {
	defer c.hangUp()
	r := c.run
	if r.schedule == nil {
		// Not all at the same moment.
		if !c.sleep(ctx, r.cfg.WarmUp/2*time.Duration(number)/time.Duration(r.cfg.Clients)) {
			return
		}
	}
	for ctx.Err() == nil {
		var t try
		if r.schedule != nil {
			if t.intended = r.schedule.take(); t.intended >= r.end {
				return
			}
			if !c.sleep(ctx, t.intended-time.Since(r.begin)) {
				return
			}
			t.begin = time.Since(r.begin)
		} else {
			t.begin = time.Since(r.begin)
			t.intended = t.begin
		}
		file := c.files.next()
		t.size = c.files.files[file].Size
		c.request(ctx, &t, file)
		t.end = time.Since(r.begin)
		if c.stopped.Load() || ctx.Err() != nil {
			r.busy(t) // how it ended says nothing
			return
		}
		r.note(t)
		if t.err != nil {
			c.hangUp()
			if r.schedule == nil && !c.sleep(ctx, pause) {
				return
			}
		}
	}
}

func (c *client) sleep(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return ctx.Err() == nil
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}

// errUnsent is a request whose client would have given up before it began.
var errUnsent = errors.Join(errors.New("no client was free in time"), context.DeadlineExceeded)

// request asks for a file.
func (c *client) request(ctx context.Context, t *try, file int) {
	// Whoever comes at a rate waits from when it has come.
	deadline := c.run.begin.Add(t.intended + c.run.cfg.Timeout)
	if !time.Now().Before(deadline) {
		t.err = errUnsent
		return
	}
	for kept := c.conn != nil; ; kept = false {
		if c.conn == nil {
			before := time.Now()
			if t.err = c.dial(ctx, deadline); t.err != nil {
				return
			}
			t.connect = max(time.Since(before), 1)
		}
		_ = c.conn.SetDeadline(deadline)
		if c.stopped.Load() { // interrupt may have come before that deadline
			t.err = context.Canceled
			return
		}
		var h head
		var any bool
		_, t.err = c.conn.Write(c.run.heads[file])
		if t.err == nil {
			h, any, t.err = readAnswer(c.conn, c.buf, t.size, !c.run.cfg.KeepAlive)
		}
		if kept && !any && t.err != nil && kindOf(t.err) != Timeout {
			// The server may close a connection between two requests; then the client asks
			// again (RFC 9112, 9.3.1).
			c.hangUp()
			t.reconnected = true
			continue
		}
		if t.err != nil || !c.run.cfg.KeepAlive || h.close {
			c.hangUp()
		}
		return
	}
}

func (c *client) dial(ctx context.Context, deadline time.Time) error {
	c.dialer.Deadline = deadline
	conn, err := c.dialer.DialContext(ctx, "tcp", c.run.cfg.Target.String())
	if err != nil {
		return err
	}
	c.conn = conn
	c.current.Store(&conn)
	if c.run.tls == nil {
		return nil
	}
	_ = conn.SetDeadline(deadline)
	if c.stopped.Load() { // as in request
		return context.Canceled
	}
	secure := tls.Client(conn, c.run.tls)
	if err := secure.Handshake(); err != nil {
		if kindOf(err) == Other {
			return protocolError(err.Error())
		}
		return err
	}
	c.conn = secure
	return nil
}

// hangUp closes the connection. As a browser, it says no goodbye of TLS's to a server that
// has said its own.
func (c *client) hangUp() {
	if c.conn != nil {
		_ = (*c.current.Load()).Close()
		c.conn = nil
		c.current.Store(nil)
	}
}
