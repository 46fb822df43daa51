package main

import (
	"context"
	"crypto/sha256"
	"fmt"
	"hash"
	"io"
	"log/slog"
	"net/http"
	"slices"
	"sync"
	"time"

	"clonecluster/cmd/internal/webd"
	"clonecluster/config"
	"clonecluster/qemu/lab"
	"clonecluster/qemu/lab/crowd"
)

// How the loss of a node is shown. Emulated processors stall for a second now and
// then: what has to be waited for is waited for generously, and what is reported
// is what was seen.
const (
	normalTime = 10 * time.Second // of the live view before it begins
	crowdTime  = 2 * time.Second  // of the crowd before the power is cut
	awayTime   = 5 * time.Second  // without the node, at least
	// quietTime without a lost SYN means that there will be no more. It is longer
	// than one that is sent again may wait.
	quietTime    = 4 * time.Second
	awayTimeout  = 40 * time.Second
	backTime     = 2 * time.Second  // of the crowd after the node's first answer
	hurryTimeout = 10 * time.Second // for the rest of one download
	pollInterval = 50 * time.Millisecond

	// A download lasts longer than a boot, and is more than the buffers of both ends
	// take. A much slower one webd would take for a client that has stopped.
	downloadSize    = 4_000_000
	downloadRate    = 64 << 10 // bytes per second
	downloadChatter = 200 * time.Millisecond
	downloadGap     = 100 * time.Millisecond // between two beginnings, which fill buffers
	fewDownloads    = 10
	manyDownloads   = 60
	lostDownloads   = 2 // of the node that is killed, if they can be had
)

// scene is the loss of a node and its return, before a crowd of clients.
type scene struct {
	u         *up
	crowd     *crowd.Crowd
	asking    *crowd.Asking
	downloads []*crowd.Download
	victim    *lab.Machine
	pace      time.Duration
	spread    bool // a client's connections are shared among the nodes

	mu                 sync.Mutex // of what the live view reads meanwhile
	cutAt, onAt, endAt time.Time
}

// killAndRejoin cuts the power of a node while clients ask and download, gives it
// back, and says what the clients saw. It needs two nodes.
func (u *up) killAndRejoin(ctx context.Context) (*killReport, error) {
	ctx, cancel := context.WithCancel(ctx)
	s := &scene{u: u, pace: u.asker.pace(), spread: u.target.affinity == config.AffinityNone}
	s.crowd = crowd.New(crowd.Config{
		Host: u.lab.Client(), Switch: u.lab.Switch(), Target: u.target.AddrPort, OnRequest: u.asker.enter,
	})
	defer s.crowd.Close()
	s.asking = s.crowd.Ask(ctx, s.pace)
	defer s.end(cancel)
	u.show(s)
	defer u.show(nil)

	if err := s.load(ctx); err != nil {
		return nil, err
	}
	r := &killReport{Node: s.victim.Name()}
	r.Rejoin.Shares = s.spread
	if err := s.cut(ctx, r); err != nil {
		return nil, err
	}
	if err := s.rejoin(ctx, r); err != nil {
		return nil, err
	}
	return r, nil
}

// end stops what still runs.
func (s *scene) end(cancel func()) {
	cancel()
	s.asking.Stop()
	for _, d := range s.downloads {
		d.Wait(context.Background()) // at once: their context has ended
	}
}

// load starts downloads, and chooses the node that is to die: the second, or with
// an affinity the one that has this client's connections.
func (s *scene) load(ctx context.Context) error {
	sum, err := benchSum(downloadSize)
	if err != nil {
		return err
	}
	s.victim = s.u.lab.Node(1)
	cfg := crowd.DownloadConfig{Path: fmt.Sprintf("/bench/%d", downloadSize), Size: downloadSize, Sum: sum, Rate: downloadRate, Chatter: downloadChatter}
	for held := 0; len(s.downloads) < fewDownloads || held < lostDownloads && len(s.downloads) < manyDownloads; {
		d, err := s.crowd.Download(ctx, cfg)
		if err != nil {
			return err
		}
		if !s.spread && len(s.downloads) == 0 {
			s.victim = s.machine(d.Holder())
		}
		if d.Holder() == s.victim.Name() {
			held++
		}
		s.downloads = append(s.downloads, d)
		if err := sleep(ctx, downloadGap); err != nil {
			return err
		}
	}
	return sleep(ctx, crowdTime)
}

func (s *scene) machine(port string) *lab.Machine {
	all := s.u.lab.Nodes()
	return all[max(0, slices.IndexFunc(all, func(m *lab.Machine) bool { return m.Name() == port }))]
}

// of are the downloads of the victim, or of the others.
func (s *scene) of(victim bool) []*crowd.Download {
	return slices.DeleteFunc(slices.Clone(s.downloads), func(d *crowd.Download) bool {
		return (d.Holder() == s.victim.Name()) != victim
	})
}

// cut takes the victim's power and watches until its clients have learned of it
// and its share is answered again.
func (s *scene) cut(ctx context.Context, r *killReport) error {
	others, lost := s.of(false), s.of(true)
	s.u.say("%d requests a second, and %d long downloads, %d of them from %s, which now loses its power",
		time.Second/s.pace, len(s.downloads), len(lost), r.Node)
	cutAt := s.mark(&s.cutAt)
	if !s.victim.Running() {
		return fmt.Errorf("%s is down already", r.Node)
	}
	s.u.expect(r.Node)
	s.victim.Kill()
	s.u.say("%s: power cut", r.Node)

	for time.Since(cutAt) < awayTimeout {
		if err := sleep(ctx, pollInterval); err != nil {
			return err
		}
		o := s.judge(cutAt, time.Now())
		if running(lost) == 0 && time.Since(cutAt) > max(awayTime, o.Unanswered+quietTime) {
			break
		}
	}
	r.Others.Begun, r.Others.GoOn, r.Lost = len(others), whole(others), lostOf(lost, cutAt)
	now := time.Now()
	r.Away = newSpanReport(s.judge(cutAt, now), now.Sub(cutAt))
	for _, line := range r.awayLines() {
		s.u.say("%s", line)
	}
	return nil
}

// rejoin gives the victim its power back and watches until it answers, and the
// other nodes' downloads have ended.
func (s *scene) rejoin(ctx context.Context, r *killReport) error {
	onAt := s.mark(&s.onAt)
	s.u.say("%s: power on", r.Node)
	err := s.comeBack(ctx, r, onAt)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		r.Rejoin.Problem = firstLine(err)
	} else if err := sleep(ctx, backTime); err != nil {
		return err
	}
	endAt := s.mark(&s.endAt)
	all := s.asking.Stop()
	// Again, since now what was under way then has ended, too.
	r.Away = newSpanReport(s.crowd.Judge(all, s.cutAt, onAt, r.Node), onAt.Sub(s.cutAt))
	// A connection that the node breaks from now on is a failure.
	begun := slices.DeleteFunc(slices.Clone(all), func(q crowd.Request) bool { return q.Begin.Before(onAt) })
	back := s.crowd.Judge(begun, onAt, endAt, "")
	// Nobody asked while the last ones were waited for, which is no gap.
	ended := slices.DeleteFunc(all, func(q crowd.Request) bool { return q.End.After(endAt) })
	back.LongestGap = crowd.Judge(ended, onAt, endAt, "").LongestGap
	r.Back = newSpanReport(back, endAt.Sub(onAt))
	r.Doubles = len(s.crowd.Doubles())

	hurryCtx, cancel := context.WithTimeout(ctx, time.Duration(len(s.downloads))*hurryTimeout)
	defer cancel()
	for _, d := range s.of(false) {
		d.Hurry() // one after the other: the nodes have other work
		if err := d.Wait(hurryCtx); err == nil {
			r.Others.Right++
		} else if r.Others.Problem == "" {
			r.Others.Problem = err.Error()
		}
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	for _, line := range r.backLines() {
		s.u.say("%s", line)
	}
	return nil
}

// comeBack starts the victim and waits for its first answer to a request that
// began after that.
func (s *scene) comeBack(ctx context.Context, r *killReport, onAt time.Time) error {
	ctx, cancel := context.WithTimeout(ctx, bootTimeout)
	defer cancel()
	if err := s.victim.Start(); err != nil {
		return err
	}
	if _, err := s.victim.WaitStage(ctx, "ready"); err != nil {
		return err
	}
	r.Rejoin.Ready = time.Since(onAt).Seconds()
	if !s.spread {
		return nil
	}
	for {
		all := s.asking.Requests()
		if i := slices.IndexFunc(all, func(q crowd.Request) bool {
			return q.Err == nil && q.Begin.After(onAt) && q.Node == s.victim.MAC().String()
		}); i >= 0 {
			r.Rejoin.FirstAnswer = all[i].End.Sub(onAt).Seconds()
			return nil
		}
		if err := sleep(ctx, pollInterval); err != nil {
			return fmt.Errorf("it is ready, and has answered none of %d requests", len(all))
		}
	}
}

func (s *scene) mark(at *time.Time) time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	*at = time.Now()
	return *at
}

func (s *scene) judge(since, until time.Time) crowd.Outcome {
	return s.crowd.Judge(s.asking.Requests(), since, until, s.victim.Name())
}

// lines are what the live view shows of it.
func (s *scene) lines() []string {
	s.mu.Lock()
	cutAt, onAt, endAt := s.cutAt, s.onAt, s.endAt
	s.mu.Unlock()
	now := time.Now()
	var title string
	switch {
	case cutAt.IsZero():
		return []string{"a crowd of clients comes: one of the nodes is about to lose its power"}
	case onAt.IsZero():
		title = fmt.Sprintf("%s has had no power for %.1fs", s.victim.Name(), now.Sub(cutAt).Seconds())
	case endAt.IsZero():
		title = fmt.Sprintf("%s had no power for %.1fs, and is on again for %.1fs", s.victim.Name(), onAt.Sub(cutAt).Seconds(), now.Sub(onAt).Seconds())
	default:
		now = endAt
		title = "the crowd goes; the downloads may end"
	}
	o := newSpanReport(s.judge(cutAt, now), now.Sub(cutAt))
	return []string{title,
		fmt.Sprintf("  %v; longest gap %.2fs", o, o.LongestGap),
		fmt.Sprintf("  downloads: of the other nodes %d go on, of %s %d", whole(s.of(false)), s.victim.Name(), running(s.of(true)))}
}

// running is how many of the downloads have not ended, as far as their clients
// know.
func running(ds []*crowd.Download) (n int) {
	for _, d := range ds {
		if _, _, ended := d.Ended(); !ended {
			n++
		}
	}
	return n
}

// whole is how many of the downloads go on, or have come to their right end.
func whole(ds []*crowd.Download) (n int) {
	for _, d := range ds {
		if _, err, _ := d.Ended(); err == nil {
			n++
		}
	}
	return n
}

// lostOf says when the clients of downloads learned that these were lost.
func lostOf(ds []*crowd.Download, cutAt time.Time) lostReport {
	r := lostReport{Begun: len(ds)}
	for _, d := range ds {
		at, err, ended := d.Ended()
		if !ended || err == nil {
			continue
		}
		after := at.Sub(cutAt).Seconds()
		if r.Known == 0 || after < r.First {
			r.First = after
		}
		r.Last = max(r.Last, after)
		r.Known++
	}
	return r
}

// benchSum is the hash of a generated file, by the code that the nodes run.
func benchSum(size int64) (sum [sha256.Size]byte, err error) {
	srv, err := webd.New(webd.Options{Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		return sum, err
	}
	defer srv.Close()
	req, err := http.NewRequest(http.MethodGet, fmt.Sprintf("/bench/%d", size), nil)
	if err != nil {
		return sum, err
	}
	w := &sumWriter{header: http.Header{}, sum: sha256.New()}
	srv.Handler().ServeHTTP(w, req)
	if w.n != size {
		return sum, fmt.Errorf("making /bench/%d: got %d bytes", size, w.n)
	}
	return [sha256.Size]byte(w.sum.Sum(nil)), nil
}

// sumWriter hashes an answer.
type sumWriter struct {
	header http.Header
	sum    hash.Hash
	n      int64
}

var _ http.ResponseWriter = &sumWriter{}
var _ io.Writer = &sumWriter{}

func (w *sumWriter) Header() http.Header { return w.header }
func (w *sumWriter) WriteHeader(int)     {}
func (w *sumWriter) Write(b []byte) (int, error) {
	w.n += int64(len(b))
	return w.sum.Write(b)
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
