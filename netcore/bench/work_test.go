package bench

import (
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	"clonecluster/netcore/netnstest"
)

// A work is something that a client has done.
type work struct {
	name string
	do   func(m *measurer, w *way) (cost, Run)
}

func works() []work {
	return []work{
		{KeepAlive, func(m *measurer, w *way) (cost, Run) { return m.wrk(w) }},
		// The server closes, so the client sees the end of each connection as it reads.
		{Connection, func(m *measurer, w *way) (cost, Run) { return m.wrk(w, "-H", "Connection: close") }},
		{Download, (*measurer).download},
		{Upload, (*measurer).upload},
	}
}

var (
	wrkRequests = regexp.MustCompile(`(\d+) requests in `)
	wrkP99      = regexp.MustCompile(`(?m)^\s+99%\s+([0-9.]+)(us|ms|s)$`)
	wrkErrors   = regexp.MustCompile(`Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)|Non-2xx.*`)
)

// wrk asks for a time, as it cannot for a number of requests; it knows whole seconds only.
func (m *measurer) wrk(w *way, args ...string) (cost, Run) {
	m.t.Helper()
	var out string
	args = append([]string{"-t1", "-c16", "-d1h", "--latency"}, append(args, w.small())...)
	c := m.spent(w.bed, func() (ended time.Duration) {
		out, ended = m.client(w.client, m.scale.requests, "wrk", args...)
		return ended
	})
	requests, p99 := wrkRequests.FindStringSubmatch(out), wrkP99.FindStringSubmatch(out)
	if requests == nil || p99 == nil {
		m.fatal("%s: wrk says\n%s", w.name, out)
	}
	if e := wrkErrors.FindString(out); e != "" {
		m.t.Errorf("%s: %s", w.name, e)
	}
	n, err := strconv.ParseFloat(requests[1], 64)
	if err != nil || n == 0 {
		m.fatal("%s: wrk says\n%s", w.name, out)
	}
	latency, err := time.ParseDuration(p99[1] + p99[2])
	if err != nil {
		m.t.Fatal(err)
	}
	r := perUnit(c, n)
	r.P99 = float64(latency)
	return c, r
}

func (m *measurer) download(w *way) (cost, Run) {
	return m.transfer(w, func() []string { return []string{"-o", "/dev/null", w.big()} })
}

func (m *measurer) upload(w *way) (cost, Run) {
	return m.transfer(w, func() []string { return []string{"-o", "/dev/null", "-T", m.files.big, w.sink()} })
}

// transfer moves the big file again and again, each time by a connection of its own, so
// that all nodes get some of them.
func (m *measurer) transfer(w *way, one func() []string) (cost, Run) {
	m.t.Helper()
	args := []string{"-sSf", "--max-time", "120", "-H", "Connection: close", "-H", "Expect:", "-w", "%{size_download} %{size_upload}\n"}
	for range m.scale.files {
		args = append(args, one()...)
	}
	var out string
	c := m.spent(w.bed, func() (ended time.Duration) { out, ended = m.client(w.client, 0, "curl", args...); return ended })
	if moved := strings.Count(out, strconv.FormatInt(m.files.octets, 10)); moved != m.scale.files {
		m.fatal("%s: of %d files of %d octets there came\n%s", w.name, m.scale.files, m.files.octets, out)
	}
	return c, perUnit(c, float64(m.files.octets)*float64(m.scale.files))
}

// client runs a program at the client, and gives its processor time. With a duration it is
// interrupted when that has passed.
func (m *measurer) client(h *netnstest.Host, d time.Duration, name string, args ...string) (out string, cpu time.Duration) {
	m.t.Helper()
	p := h.StartCommand(name, args...)
	var over <-chan time.Time
	if d > 0 {
		over = time.After(d)
	}
	for ended := false; !ended; {
		select {
		case <-p.Done():
			ended = true
		case <-over:
			p.Signal(syscall.SIGINT)
		case <-m.ctx.Done():
			p.Kill()
		}
	}
	if err := p.Wait(); err != nil {
		m.fatal("%s %s: %v\n%s", name, strings.Join(args, " "), err, p.Output())
	}
	return p.Output(), p.Used()
}

// perUnit is a run of n requests, octets or frames.
func perUnit(c cost, n float64) Run {
	return Run{CPU: float64(c.own) / n, All: float64(c.all-c.extra) / n, Rate: n / c.wall.Seconds()}
}
