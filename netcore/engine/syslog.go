package engine

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"clonecluster/netcore/api"
	"clonecluster/netcore/syslog"
)

const (
	// logPoll is the time between two looks at a log that does not say when there is
	// more, which is that of the appliance's init.
	logPoll = time.Second
	// The time before a collector that is not reached is tried again.
	shortWait, longWait = time.Second, 30 * time.Second
	// bootTail: an engine that starts so long after the machine is not the first, and
	// what was logged before it has been sent.
	bootTail = 2 * time.Minute
)

// sendLogs sends the lines that the API gives to a syslog collector until ctx ends. The
// queue is what the node keeps of its log anyway, so nobody who logs waits for it; what
// is gone before it could be sent is said.
func (e *engine) sendLogs(ctx context.Context, url string) error {
	network, address, err := syslog.ParseURL(url)
	if err != nil {
		return err
	}
	b := backend{engine: e, parts: ctx}
	sender := syslog.NewSender(network, address)
	defer sender.Close()
	skip := time.Time{}
	if sinceBoot() > bootTail && b.opt.InitSocket != "" {
		skip = e.start
	}
	var after uint64
	known, wait, down := "", shortWait, false
	for ctx.Err() == nil {
		lines, run, lost, more, err := b.Logs(ctx, after)
		if run != known && err == nil {
			known, lost = run, 0
			if after > 0 { // numbers begin anew
				after = 0
				continue
			}
		}
		if lost > 0 {
			text := fmt.Sprintf("level=WARN msg=\"log lines were lost on the way to the syslog collector\" lost=%d", lost)
			lines = append([]api.LogLine{{ID: after, Time: time.Now(), Source: "engine", Text: text}}, lines...)
		}
		for _, l := range lines {
			if l.Time.After(skip) {
				err = sender.Send(ctx, syslog.Message{Time: l.Time, Host: e.host, App: l.Source, Level: levelOf(l.Text), Text: l.Text})
			}
			if err != nil {
				break
			}
			after = max(after, l.ID)
		}
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			if !down {
				e.log.Warn("logs do not reach the syslog collector", "address", address, "error", err)
			}
			down, more = true, nil
			wait = min(2*wait, longWait)
		default:
			if down {
				e.log.Info("logs reach the syslog collector again", "address", address)
			}
			down, wait = false, logPoll
		}
		t := time.NewTimer(wait)
		select {
		case <-ctx.Done():
		case <-more:
		case <-t.C:
		}
		t.Stop()
	}
	return nil
}

// levelOf is the level that a line of slog begins with; that of others is Info.
func levelOf(line string) slog.Level {
	_, text, ok := strings.Cut(line[:min(len(line), 80)], "level=")
	if !ok {
		return slog.LevelInfo
	}
	text, _, _ = strings.Cut(text, " ")
	var l slog.Level
	if l.UnmarshalText([]byte(text)) != nil {
		return slog.LevelInfo
	}
	return l
}
