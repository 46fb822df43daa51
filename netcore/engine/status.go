package engine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"clonecluster/netcore/api"
	"clonecluster/netcore/filter"
	"clonecluster/netcore/finding"
	"clonecluster/netcore/membership"
)

// The answer to GET /v1/status, on the status socket and by the API.
type (
	Status  = api.Status
	Member  = api.Member
	Drain   = api.Drain
	Buckets = api.Buckets
)

func (e *engine) status() Status {
	view, table, verdicts := e.node.View(), e.filter.Table(), e.filter.Counters()
	e.verdicts.Store(&verdicts)
	place, owners := slot(view)
	progress := e.node.Progress()
	s := Status{
		Cluster: e.opt.Config.Cluster.Name, Name: e.host, Build: e.buildID(), Rules: fmt.Sprintf("%016x", e.rules), Policy: policyName(e.opt.Config),
		NIC: e.nic.Name, Driver: e.nic.Driver, Datapath: e.datapath, Ingress: e.ingress(),
		WireMAC: e.path.WireMAC().String(), CloneMAC: e.opt.Config.VIP.CloneMAC.String(),
		UptimeSec: time.Since(e.start).Seconds(), Goroutines: runtime.NumGoroutine(),
		State: view.State.String(), Slot: place, Agreed: view.Agreed, Fenced: view.Fenced, Map: view.Map.Version,
		Nodes: owners, Heard: []string{}, Unwell: []string{}, Members: []Member{}, Verdicts: map[string]uint64{},
		FailOpen: view.AllSick && !policy(e.opt.Config).StopWhenSick,
		Drain:    Drain{Draining: progress.Draining || view.State > membership.Serving, Aside: e.aside.Load(), Owned: progress.Owned, Flows: progress.Flows},
		Findings: append([]finding.Finding{}, e.findings.Current()...), Refused: append([]membership.Refusal{}, e.node.Refused()...),
		Offered: e.offering.rates(), Counters: e.pathCounters(), Beacons: e.node.Counters(),
	}
	s.Balance = balanceNames[view.Balance]
	if set := view.Settings; set != nil {
		s.PolicyVersion, s.PolicyAuthor = set.Version, set.Author.String()
	}
	if unwell := e.unwell.Load(); unwell != nil {
		s.Unwell = append(s.Unwell, *unwell...)
	}
	if view.Leader != (membership.NodeID{}) {
		s.Leader = view.Leader.String()
	}
	for _, m := range view.Members {
		name, build := e.cardOf(m.ID)
		s.Members = append(s.Members, Member{
			Node: m.ID.String(), Name: name, Build: build, Self: m.Self, State: m.State.String(), Live: m.Live, Unwell: m.Sick, Weight: m.Weight,
			Busy: float64(m.Busy) / 1000, Flows: m.Flows, Buckets: m.Buckets, Map: m.Map.Version,
		})
		if m.Live && !m.Self {
			s.Heard = append(s.Heard, m.ID.String())
		}
	}
	for _, v := range e.vips {
		s.VIP = append(s.VIP, v.String())
	}
	for _, state := range table {
		switch state {
		case filter.Settled:
			s.Buckets.Settled++
		case filter.Shared:
			s.Buckets.Shared++
		case filter.Draining:
			s.Buckets.Draining++
		default:
			s.Buckets.Foreign++
		}
	}
	for v, n := range verdicts {
		if n > 0 {
			s.Verdicts[filter.Verdict(v).String()] = n
		}
	}
	for _, a := range e.ownAddresses() {
		s.Addresses = append(s.Addresses, netip.AddrPortFrom(a, uint16(e.opt.Config.Management.Port)).String())
	}
	return s
}

// ErrStatusSocketBusy is matched by the error of Run when somebody answers on
// the status socket.
var ErrStatusSocketBusy = errors.New("the status socket is another engine's: stop that one, or give this one a --status-socket of its own")

// listenStatus opens the status socket. It replaces one that a crashed engine
// left, on which nobody answers, and nothing else.
func listenStatus(ctx context.Context, path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("making the status socket's directory: %w", err)
	}
	switch info, err := os.Lstat(path); {
	case errors.Is(err, os.ErrNotExist):
	case err != nil:
		return nil, fmt.Errorf("looking for a former status socket: %w", err)
	case info.Mode().Type() != os.ModeSocket:
		return nil, fmt.Errorf("the status socket's path %s is taken by something that is no socket", path)
	default:
		if conn, err := (&net.Dialer{}).DialContext(ctx, "unix", path); err == nil {
			_ = conn.Close()
			return nil, fmt.Errorf("%w (%s)", ErrStatusSocketBusy, path)
		} else if !errors.Is(err, unix.ECONNREFUSED) && !errors.Is(err, unix.ENOENT) {
			return nil, fmt.Errorf("asking who has the status socket: %w", err)
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("removing the former status socket: %w", err)
		}
	}
	l, err := (&net.ListenConfig{}).Listen(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("opening the status socket: %w", err)
	}
	return l, nil
}

// serveStatus serves the status and the orders of this machine's root until ctx
// ends.
func (e *engine) serveStatus(ctx context.Context) error {
	mux := http.NewServeMux()
	answer := func(w http.ResponseWriter) {
		w.Header().Set("Content-Type", "application/json")
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		_ = enc.Encode(e.status())
	}
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, _ *http.Request) { answer(w) })
	mux.HandleFunc("POST /v1/drain", func(w http.ResponseWriter, _ *http.Request) {
		e.drain(ctx, api.Order{}, localRoot)
		answer(w)
	})
	mux.HandleFunc("POST /v1/resume", func(w http.ResponseWriter, _ *http.Request) {
		e.resume(ctx, api.Order{}, localRoot)
		answer(w)
	})
	srv := &http.Server{Handler: mux, ReadTimeout: 5 * time.Second, WriteTimeout: 5 * time.Second, MaxHeaderBytes: 8 << 10}
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		<-ctx.Done()
		// What answers must have ended before the datapath is closed, of which it tells.
		patience, end := context.WithTimeout(context.WithoutCancel(ctx), srv.WriteTimeout)
		defer end()
		if srv.Shutdown(patience) != nil {
			_ = srv.Close()
		}
	}()
	err := srv.Serve(e.socket)
	if ctx.Err() == nil {
		return fmt.Errorf("serving the status: %w", err)
	}
	<-stopped
	return nil
}
