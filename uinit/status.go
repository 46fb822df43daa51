package uinit

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"clonecluster/config"
	"clonecluster/uinit/stick"
)

// Status is what GET /v1/status answers. Times are seconds since the kernel
// started.
type Status struct {
	Cluster  string         `json:"cluster"`
	Hostname string         `json:"hostname"`
	Node     string         `json:"node"` // the wire MAC
	NIC      string         `json:"nic"`
	Address  string         `json:"management_address"` // empty: none (yet)
	VIP      []string       `json:"vip"`
	Uptime   float64        `json:"uptime_seconds"`
	Ready    bool           `json:"ready"`
	Ending   string         `json:"ending,omitempty"` // "power off", "restart", "halt"
	Timeline []StageStatus  `json:"timeline"`
	Children []ChildStatus  `json:"children"`
	Watchdog WatchdogStatus `json:"watchdog"`
	Memory   MemoryStatus   `json:"memory"`
	Config   ConfigStatus   `json:"config"`
	// LostLines is how many lines the console was too slow to show.
	LostLines int `json:"lost_lines"`
	// Orphans is how many processes were reaped that were no children of ours,
	// Strangers how many notify messages came from such.
	Orphans   int `json:"orphans"`
	Strangers int `json:"strangers"`
}

// StageStatus is one stage of the boot.
type StageStatus struct {
	Stage string  `json:"stage"`
	At    float64 `json:"at_seconds"`
}

// ChildStatus is one supervised process.
type ChildStatus struct {
	Name     string  `json:"name"`
	State    string  `json:"state"` // waiting, starting, ready, backoff, crash-loop, stopping, stopped
	Since    float64 `json:"since_seconds"`
	PID      int     `json:"pid,omitempty"`
	Restarts int     `json:"restarts"`
	LastExit string  `json:"last_exit,omitempty"`
	Status   string  `json:"status,omitempty"` // its own words
	// Healthy is the last answer of the health check; null without one.
	Healthy *bool   `json:"healthy"`
	Health  string  `json:"health,omitempty"` // why not
	Beat    float64 `json:"heartbeat_seconds,omitempty"`
	RSS     int64   `json:"rss_bytes,omitempty"`
}

// WatchdogStatus is the watchdog that resets the machine.
type WatchdogStatus struct {
	Device   string  `json:"device,omitempty"`
	Identity string  `json:"identity,omitempty"`
	Timeout  float64 `json:"timeout_seconds,omitempty"`
	Fed      float64 `json:"fed_at_seconds,omitempty"`
	Off      string  `json:"off,omitempty"` // why there is none
}

// MemoryStatus is memory in bytes. RSS counts the pages of the program file,
// which every program of the node shares and which the initramfs holds anyhow;
// Private is what a process costs on top.
type MemoryStatus struct {
	Init          int64 `json:"init_rss_bytes"`
	InitPrivate   int64 `json:"init_private_bytes"`
	Engine        int64 `json:"engine_rss_bytes"`
	EnginePrivate int64 `json:"engine_private_bytes"`
	Free          int64 `json:"available_bytes"` // of the machine
}

// ConfigStatus is the configuration with where each value came from.
type ConfigStatus struct {
	File string `json:"file"`
	// Stick is the disk whose cluster.yaml is looked at before File, StickError
	// why that is not used: then File is.
	Stick      string         `json:"stick,omitempty"`
	StickError string         `json:"stick_error,omitempty"`
	Error      string         `json:"error,omitempty"`
	Ignored    []string       `json:"ignored_parameters,omitempty"`
	Values     []config.Entry `json:"values,omitempty"`
}

func (p *pid1) status() Status {
	now := sinceBoot()
	s := Status{
		Node: p.card.MAC.String(), NIC: p.card.Name, Uptime: now.Seconds(),
		Ready: p.sup.ready, LostLines: p.journal.lost(), Orphans: p.orphans, Strangers: p.strangers,
		Config: ConfigStatus{File: p.env.configFile},
	}
	s.Hostname, _ = os.Hostname()
	if p.address.IsValid() {
		s.Address = p.address.String()
	}
	if p.sup.phase != phaseRun {
		s.Ending = p.sup.how.String()
	}
	if p.stick != nil {
		s.Config.Stick = p.stick.Disk
		if p.stickErr == nil {
			s.Config.File = stick.ConfigFile
		}
	}
	if p.stickErr != nil {
		s.Config.StickError = p.stickErr.Error()
	}
	if p.configErr != nil {
		s.Config.Error = p.configErr.Error()
	}
	for _, i := range p.ignored {
		s.Config.Ignored = append(s.Config.Ignored, i.Error())
	}
	if p.config != nil {
		s.Cluster = p.config.Cluster.Name
		s.Config.Values = p.config.Effective()
		if v := p.config.VIP.IPv4; v.IsValid() {
			s.VIP = append(s.VIP, v.String())
		}
		if v := p.config.VIP.IPv6; v.IsValid() {
			s.VIP = append(s.VIP, v.String())
		}
	}
	for _, st := range p.timeline {
		s.Timeline = append(s.Timeline, StageStatus{st.Name, st.At.Seconds()})
	}
	for _, c := range p.sup.children {
		cs := ChildStatus{
			Name: c.Name, State: c.state.String(), Since: c.since.Seconds(), PID: c.pid,
			Restarts: c.restarts, LastExit: c.lastExit, Status: c.status, Health: c.health,
		}
		if c.Checked && c.probed {
			healthy := c.healthy
			cs.Healthy = &healthy
		}
		if c.pid != 0 {
			cs.RSS = residentBytes("/proc", strconv.Itoa(c.pid))
		}
		if c.Engine {
			cs.Beat = c.beat.Seconds()
			s.Memory.Engine = cs.RSS
			s.Memory.EnginePrivate = privateBytes("/proc", strconv.Itoa(c.pid))
		}
		s.Children = append(s.Children, cs)
	}
	s.Watchdog = WatchdogStatus{Off: p.dogErr}
	if p.dog != nil {
		s.Watchdog = WatchdogStatus{Device: p.dog.Device, Identity: p.dog.Identity, Timeout: p.dog.Timeout.Seconds(), Fed: p.sup.fed.Seconds()}
	}
	s.Memory.Init = residentBytes("/proc", "self")
	s.Memory.InitPrivate = privateBytes("/proc", "self")
	s.Memory.Free = availableBytes("/proc/meminfo")
	return s
}

// startStatus serves the status to programs of the same machine.
func (p *pid1) startStatus() {
	path := filepath.Join(p.env.runDir, filepath.Base(StatusSocket))
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		p.log.Error("making the status socket", "error", err)
	}
	l, err := net.Listen("unix", path)
	if err == nil {
		err = os.Chmod(path, 0o600)
	}
	if err != nil {
		p.log.Error("making the status socket", "error", err)
		return
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, r *http.Request) {
		s, err := p.askStatus(r.Context())
		if err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		_ = enc.Encode(s)
	})
	mux.HandleFunc("POST /v1/reboot", func(w http.ResponseWriter, r *http.Request) {
		if err := p.askReboot(r.Context()); err != nil {
			http.Error(w, err.Error(), http.StatusConflict)
			return
		}
		w.WriteHeader(http.StatusNoContent)
	})
	run := strconv.FormatInt(time.Now().UnixNano(), 36)
	mux.HandleFunc("GET /v1/log", func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Get("format") == "json" { // for the engine, which tells it to whoever may know
			after, _ := strconv.ParseUint(r.URL.Query().Get("after"), 10, 64)
			lines, lost := p.journal.after(after)
			w.Header().Set("Content-Type", "application/json")
			_ = json.NewEncoder(w).Encode(map[string]any{"run": run, "lines": lines, "lost": lost})
			return
		}
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		for _, e := range p.journal.lines(r.URL.Query().Get("name")) {
			if _, err := fmt.Fprintf(w, "[%8s] %s\n", seconds(e.At), e.Text); err != nil {
				return
			}
		}
	})
	server := &http.Server{
		Handler: mux, ReadTimeout: 5 * time.Second, WriteTimeout: 10 * time.Second, IdleTimeout: 10 * time.Second, MaxHeaderBytes: 8 << 10,
	}
	p.keep("the status server", func() {
		if err := server.Serve(limited(l, 16)); err != nil {
			p.log.Error("serving the status", "error", err)
		}
	})
}

// askStatus asks the loop, which alone knows.
func (p *pid1) askStatus(ctx context.Context) (Status, error) { return askLoop(ctx, p, p.status) }

// askReboot has the machine restart as Ctrl-Alt-Del does, but a second time is an
// error and not a reason to hurry.
func (p *pid1) askReboot(ctx context.Context) error {
	refused, err := askLoop(ctx, p, func() error {
		if p.sup.phase != phaseRun {
			return fmt.Errorf("the machine is already going to %v", p.sup.how)
		}
		p.log.Info("a reboot was ordered by the engine")
		p.sup.stop(endRestart, sinceBoot())
		return nil
	})
	return errors.Join(refused, err)
}

// askLoop gives what the loop says, within 5 s.
func askLoop[T any](ctx context.Context, p *pid1, say func() T) (said T, err error) {
	answer := make(chan T, 1)
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	select {
	case p.events <- func() { answer <- say() }:
	case <-ctx.Done():
		return said, ctx.Err()
	}
	select {
	case said = <-answer:
		return said, nil
	case <-ctx.Done():
		return said, ctx.Err()
	}
}

// limited is l with at most n connections at a time.
func limited(l net.Listener, n int) net.Listener {
	return &limitedListener{Listener: l, slots: make(chan struct{}, n)}
}

type limitedListener struct {
	net.Listener
	slots chan struct{}
}

func (l *limitedListener) Accept() (net.Conn, error) {
	l.slots <- struct{}{}
	c, err := l.Listener.Accept()
	if err != nil {
		<-l.slots
		return nil, err
	}
	return &limitedConn{Conn: c, slots: l.slots}, nil
}

type limitedConn struct {
	net.Conn
	slots chan struct{}
	once  sync.Once
}

func (c *limitedConn) Close() error {
	err := c.Conn.Close()
	c.once.Do(func() { <-c.slots })
	return err
}
