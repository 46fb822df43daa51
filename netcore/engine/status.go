package engine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"clonecluster/netcore/filter"
	"clonecluster/netcore/presence"
	"clonecluster/netcore/raw"
)

// Status is the answer to GET /v1/status.
type Status struct {
	NIC       string   `json:"nic"`
	Driver    string   `json:"driver,omitempty"`
	WireMAC   string   `json:"wire_mac"`
	CloneMAC  string   `json:"clone_mac"`
	VIP       []string `json:"vip"`
	Datapath  string   `json:"datapath"` // "raw"
	UptimeSec float64  `json:"uptime_seconds"`

	State   string   `json:"state"`   // listening, serving or leaving
	Slot    int      `json:"slot"`    // place among the serving nodes, from 1; 0: none
	Nodes   []string `json:"nodes"`   // the serving nodes, by wire MAC
	Heard   []string `json:"heard"`   // the other nodes, serving or not
	Agreed  bool     `json:"agreed"`  // all serving nodes go by the same set
	Buckets Buckets  `json:"buckets"` // how many are in which state

	Verdicts map[string]uint64 `json:"verdicts"` // frames by verdict, without zeros
	Counters raw.Counters      `json:"datapath_counters"`
	Presence presence.Counters `json:"presence_counters"`
}

// Buckets counts the buckets by state.
type Buckets struct {
	Foreign  int `json:"foreign"`
	Settled  int `json:"settled"`
	Shared   int `json:"shared"`
	Draining int `json:"draining"`
}

func (e *engine) status() Status {
	view, table, verdicts := e.node.View(), e.filter.Table(), e.filter.Counters()
	place, _ := slot(view)
	s := Status{
		NIC: e.nic.Name, Driver: e.nic.Driver, Datapath: "raw",
		WireMAC: e.path.WireMAC().String(), CloneMAC: e.opt.Config.VIP.CloneMAC.String(),
		UptimeSec: time.Since(e.start).Seconds(),
		State:     view.State.String(), Slot: place, Agreed: view.Adopted,
		Nodes: []string{}, Heard: []string{}, Verdicts: map[string]uint64{},
		Counters: e.path.Counters(), Presence: e.node.Counters(),
	}
	for _, v := range e.vips {
		s.VIP = append(s.VIP, v.String())
	}
	for _, p := range view.Serving {
		s.Nodes = append(s.Nodes, p.ID.String())
	}
	for _, p := range view.Live {
		s.Heard = append(s.Heard, p.ID.String())
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

// serveStatus serves the status until ctx ends.
func serveStatus(ctx context.Context, l net.Listener, status func() Status) error {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		_ = enc.Encode(status())
	})
	srv := &http.Server{Handler: mux, ReadTimeout: 5 * time.Second, WriteTimeout: 5 * time.Second, MaxHeaderBytes: 8 << 10}
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		<-ctx.Done()
		_ = srv.Close()
	}()
	err := srv.Serve(l)
	if ctx.Err() == nil {
		return fmt.Errorf("serving the status: %w", err)
	}
	<-stopped
	return nil
}
