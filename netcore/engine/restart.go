package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"clonecluster/netcore/api"
)

// ErrRestart, as the cause of the end of Run's context, asks for an end that the
// clients do not see because another engine is started at once: the others take
// the new connections meanwhile and leave alone those that this node holds, which
// with clone0 and the VIP stay as they are.
var ErrRestart = errors.New("another engine takes over")

func restarting(ctx context.Context) bool { return errors.Is(context.Cause(ctx), ErrRestart) }

// stopSignals gives a context that SIGTERM and SIGINT end for a graceful stop, and
// SIGHUP for a restart: the signal that a service manager sends before it starts the
// service again (RestartKillSignal= in systemd.kill(5)).
func stopSignals(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, end := context.WithCancelCause(ctx)
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	go func() {
		select {
		case <-ctx.Done():
		case sig := <-signals:
			if sig == syscall.SIGHUP {
				end(ErrRestart)
			}
			end(nil)
		}
	}()
	return ctx, func() {
		signal.Stop(signals)
		end(nil)
	}
}

// leave ends this node's part, gracefully or for a restart.
func (e *engine) leave(ctx, parts context.Context) {
	e.happened(func() api.Event {
		why := "it was asked to stop"
		if restarting(ctx) {
			why = "another engine takes over on this machine"
		}
		return api.Event{Kind: "stopping", Text: "the engine ends", Why: why}
	})
	if restarting(ctx) {
		e.log.Info("ending for a restart: connections on this node wait for the next engine")
		e.node.Restart(parts)
		return
	}
	e.log.Info("leaving", "drain", e.opt.Drain)
	limit := max(e.opt.Drain, e.opt.Config.Cluster.Detect.Dead())
	// How long that takes is this engine's to say, not its unit file's.
	e.opt.Notify(fmt.Sprintf("EXTEND_TIMEOUT_USEC=%d", (limit + takeDown).Microseconds()))
	drain, cancel := context.WithTimeout(parts, limit)
	defer cancel()
	// Only then may whoever waits for it stop the services.
	e.node.Leave(drain, func() { e.opt.Notify("STOPPING=1") })
}

// takeDown is more than what comes after a drain takes.
const takeDown = 15 * time.Second

// close leaves the machine as it was, or, for a restart, as it is.
func (e *engine) close(ctx context.Context) error {
	if restarting(ctx) {
		e.path.Abandon()
		return nil
	}
	return errors.Join(e.path.Close(), e.rememberDrain(false))
}

// drainNote is the path of the file that says that an operator has drained this
// node, which another engine, after a crash or an upgrade, has no business to undo.
func (e *engine) drainNote() string { return e.opt.StatusSocket + ".drained" }

func (e *engine) rememberDrain(on bool) error {
	if e.opt.StatusSocket == "" {
		return nil
	}
	if on {
		if err := os.WriteFile(e.drainNote(), nil, 0o600); err != nil {
			return fmt.Errorf("noting the drain for a restart: %w", err)
		}
		return nil
	}
	if err := os.Remove(e.drainNote()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("removing the note of a drain: %w", err)
	}
	return nil
}

// noteDrain is rememberDrain for what goes on without it.
func (e *engine) noteDrain(on bool) {
	if err := e.rememberDrain(on); err != nil {
		e.log.Warn("a restart will not know of this", "error", err)
	}
}

// drainAgain goes on with a drain that a former engine was told.
func (e *engine) drainAgain(ctx context.Context) {
	if e.opt.StatusSocket == "" {
		return
	}
	if _, err := os.Lstat(e.drainNote()); err == nil {
		e.log.Info("this node was drained before the restart and stays so until it is told: cloned resume")
		e.node.Drain(ctx)
	}
}
