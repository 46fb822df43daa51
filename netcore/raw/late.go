package raw

import (
	"bytes"
	"context"
	"time"
)

// lateMax bounds the RSTs that wait. The client of one that finds no room sends
// again, and has its RST then.
const lateMax = 1024

// lateReset is a pure RST that leaves only if it still may after a while.
type lateReset struct {
	due   int64 // by the filter's clock
	frame []byte
}

// delay keeps a RST that the filter wants to judge again.
func (d *Datapath) delay(b []byte) {
	select {
	case d.late <- lateReset{d.cfg.Now() + int64(d.cfg.Filter.ResetPatience()), bytes.Clone(b)}:
	default:
		d.cfg.Filter.Discard()
	}
}

// sendLate sends what was delayed, in order: all wait for the same time.
func (d *Datapath) sendLate(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case r := <-d.late:
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(time.Duration(r.due - d.cfg.Now())):
			}
			if d.cfg.Filter.Release(r.frame[vnetHdrLen:], d.cfg.Now()).Send() {
				d.sendFromClone(r.frame)
			}
		}
	}
}
