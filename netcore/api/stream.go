package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"clonecluster/netcore/capture"
)

func follows(r *http.Request) bool {
	f := r.URL.Query().Get("follow")
	return f != "" && f != "0" || strings.Contains(r.Header.Get("Accept"), "text/event-stream")
}

// since reads from where on something is wanted. A browser that has lost its
// connection says the last id that it had, which counts if it is of this run.
func since(r *http.Request, run string) (Since, error) {
	if theirs, id, ok := strings.Cut(r.Header.Get("Last-Event-Id"), "."); ok && theirs == run {
		if n, err := strconv.ParseUint(id, 10, 64); err == nil {
			return Since{ID: n}, nil
		}
	}
	from, err := ParseSince(r.URL.Query().Get("since"), time.Now())
	if err != nil {
		return from, problem{http.StatusBadRequest, err}
	}
	return from, nil
}

func (s *Server) events(w http.ResponseWriter, r *http.Request) (any, error) {
	record := s.backend.Events()
	from, err := since(r, record.Run())
	if err != nil {
		return nil, err
	}
	id, _ := s.backend.Self()
	want := func(e Event) bool { return e.Time.After(from.Time) }
	if follows(r) {
		next := func(after uint64) ([]Event, uint64, <-chan struct{}, error) {
			some, lost, more := record.After(after)
			return some, lost, more, nil
		}
		return nil, follow(s, w, r, record.Run(), from.ID, next, want, func(e Event) (uint64, string) { return e.ID, e.Kind })
	}
	some, lost, _ := record.After(from.ID)
	some = keep(some, want)
	if !from.Time.IsZero() || from.ID == 0 { // the beginning is not wanted, or whatever there is
		lost = 0
	}
	return Events{Node: id, Run: record.Run(), Events: some, Lost: lost}, nil
}

func (s *Server) logs(w http.ResponseWriter, r *http.Request) (any, error) {
	ctx := r.Context()
	source := r.URL.Query().Get("source")
	_, run, _, _, err := s.backend.Logs(ctx, ^uint64(0)>>1)
	if err != nil {
		return nil, problem{http.StatusBadGateway, err}
	}
	from, err := since(r, run)
	if err != nil {
		return nil, err
	}
	id, _ := s.backend.Self()
	next := func(after uint64) ([]LogLine, uint64, <-chan struct{}, error) {
		some, _, lost, more, err := s.backend.Logs(ctx, after)
		return some, lost, more, err
	}
	want := func(l LogLine) bool { return l.Time.After(from.Time) && (source == "" || l.Source == source) }
	if follows(r) {
		return nil, follow(s, w, r, run, from.ID, next, want, func(l LogLine) (uint64, string) { return l.ID, "line" })
	}
	some, lost, _, err := next(from.ID)
	if err != nil {
		return nil, problem{http.StatusBadGateway, err}
	}
	if !from.Time.IsZero() || from.ID == 0 {
		lost = 0
	}
	return Logs{Node: id, Run: run, Lines: keep(some, want), Lost: lost}, nil
}

func keep[T any](some []T, want func(T) bool) []T {
	kept := make([]T, 0, len(some))
	for _, t := range some {
		if want(t) {
			kept = append(kept, t)
		}
	}
	return kept
}

const (
	pollInterval = 500 * time.Millisecond // where nobody says that there is more
	keepAlive    = 10 * time.Second
)

// lostComment begins the comment that says how many of those that come next are lost.
const lostComment = ": lost "

// follow sends what there is and what comes, if it is wanted, as server-sent events (HTML
// standard, 9.2), until the client or the server ends. What there was before that, and is
// lost, counts only for who names the last that was had.
func follow[T any](s *Server, w http.ResponseWriter, r *http.Request, run string, after uint64,
	next func(after uint64) ([]T, uint64, <-chan struct{}, error), want func(T) bool, label func(T) (id uint64, kind string),
) error {
	leave, err := s.door.stream(guestOf(r))
	if err != nil {
		return err
	}
	defer leave()
	control := http.NewResponseController(w)
	// The server's limits are for requests; this is one that goes on.
	if err := control.SetReadDeadline(time.Time{}); err != nil {
		return fmt.Errorf("following: %w", err)
	}
	w.Header().Set("Content-Type", "text/event-stream")
	w.WriteHeader(http.StatusOK)
	said := time.Now()
	for begun := after > 0; ; begun = true {
		some, lost, more, err := next(after)
		_ = control.SetWriteDeadline(time.Now().Add(s.limits.Answer))
		if err != nil {
			return nil // the client asks again, and is told then
		}
		if lost > 0 && begun {
			if _, err := fmt.Fprintf(w, "%s%d\n\n", lostComment, lost); err != nil {
				return nil
			}
		}
		for _, t := range some {
			id, kind := label(t)
			if after = max(after, id); !want(t) {
				continue
			}
			data, err := json.Marshal(t)
			if err != nil {
				return nil
			}
			if _, err := fmt.Fprintf(w, "id: %s.%d\nevent: %s\ndata: %s\n\n", run, id, kind, data); err != nil {
				return nil
			}
			said = time.Now()
		}
		if time.Since(said) >= keepAlive {
			if _, err := fmt.Fprint(w, ": \n\n"); err != nil {
				return nil
			}
			said = time.Now()
		}
		if control.Flush() != nil {
			return nil
		}
		wait := keepAlive
		if more == nil {
			wait = pollInterval
		}
		t := time.NewTimer(wait)
		select {
		case <-r.Context().Done():
		case <-s.ended:
		case <-more:
		case <-t.C:
		}
		t.Stop()
		// A certificate ends also for who is connected.
		if r.Context().Err() != nil || s.isEnded() || s.roleOf(r) == "" {
			return nil
		}
	}
}

// errEnds is why what goes on comes to its end with the engine.
var errEnds = errors.New("this node's engine ends")

// untilEnd gives a context that ends with the engine, too.
func (s *Server) untilEnd(ctx context.Context) (_ context.Context, cancel func()) {
	ctx, end := context.WithCancelCause(ctx)
	go func() {
		select {
		case <-s.ended:
			end(errEnds)
		case <-ctx.Done():
		}
	}()
	return ctx, func() { end(nil) }
}

// breakOff ends an answer that has begun and is not whole so that the client sees that.
func breakOff() { panic(http.ErrAbortHandler) }

func (s *Server) isEnded() bool {
	select {
	case <-s.ended:
		return true
	default:
		return false
	}
}

// mostCaptures is how many may capture on a node at a time.
const mostCaptures = 2

// capture sends the node's frames as they come.
func (s *Server) capture(w http.ResponseWriter, r *http.Request) (any, error) {
	q, err := capture.ParseQuery(r.URL.Query())
	if err != nil {
		return nil, problem{http.StatusBadRequest, err}
	}
	select {
	case s.captures <- struct{}{}:
		defer func() { <-s.captures }()
	default:
		return nil, problem{http.StatusServiceUnavailable, errors.New("too many captures run on this node already")}
	}
	leave, err := s.door.stream(guestOf(r))
	if err != nil {
		return nil, err
	}
	defer leave()
	ctx, cancel := s.untilEnd(r.Context())
	defer cancel()
	control := http.NewResponseController(w)
	if err := control.SetReadDeadline(time.Time{}); err != nil {
		return nil, fmt.Errorf("capturing: %w", err)
	}
	out := &captureAnswer{w: w, control: control, patience: s.limits.Answer}
	if err := s.backend.Capture(ctx, q, out, control.Flush); err != nil && !out.begun {
		return nil, err
	} else if err != nil {
		breakOff()
	}
	return nil, nil
}

// captureAnswer is an answer that begins with the first that is written.
type captureAnswer struct {
	w        http.ResponseWriter
	control  *http.ResponseController
	patience time.Duration
	begun    bool
}

func (a *captureAnswer) Write(b []byte) (int, error) {
	if !a.begun {
		a.begun = true
		a.w.Header().Set("Content-Type", "application/x-pcapng")
	}
	_ = a.control.SetWriteDeadline(time.Now().Add(a.patience))
	return a.w.Write(b)
}
