package bpf

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/cilium/ebpf/ringbuf"
)

// ReadLate gives the RSTs that have to wait, as Ethernet frames, until ctx ends (nil).
// The frame is only valid in the call.
func (f *Filter) ReadLate(ctx context.Context, got func(frame []byte)) error {
	r, err := ringbuf.NewReader(f.objects.Late)
	if err != nil {
		return fmt.Errorf("opening the ring of delayed RSTs: %w", err)
	}
	defer r.Close()
	defer context.AfterFunc(ctx, func() { _ = r.Flush() })() // wakes it
	var record ringbuf.Record
	for ctx.Err() == nil {
		err := r.ReadInto(&record)
		switch {
		case errors.Is(err, ringbuf.ErrFlushed):
			continue
		case err != nil:
			return fmt.Errorf("reading delayed RSTs: %w", err)
		}
		if frame, ok := lateFrame(record.RawSample); ok {
			got(frame)
		}
	}
	return nil
}

// lateFrame reads a layout.Late.
func lateFrame(b []byte) ([]byte, bool) {
	if len(b) < 4 {
		return nil, false
	}
	n := binary.NativeEndian.Uint32(b)
	if uint64(n) > uint64(len(b)-4) {
		return nil, false
	}
	return b[4 : 4+n], true
}
