package capture

import (
	"bytes"
	"context"
	"errors"
	"net/url"
	"reflect"
	"testing"
	"time"

	"github.com/gopacket/gopacket/pcapgo"

	"clonecluster/netcore/filter"
)

// TestWriter: what is written, somebody else's reader reads.
func TestWriter(t *testing.T) {
	var b bytes.Buffer
	w, err := NewWriter(&b)
	if err != nil {
		t.Fatal(err)
	}
	at := time.Unix(1_700_000_000, 123_456_789)
	frames := []Frame{
		{Time: at, Data: []byte("sixty bytes, of which these are the first fourteen and more.."), Length: 900, Comment: "drop-foreign, bucket 17 is foreign"},
		{Time: at.Add(time.Nanosecond), Data: []byte("fourteen bytes"), Length: 14, Left: true},
	}
	for i, name := range []string{"web-1", "web-2"} {
		if id, err := w.AddInterface(name, "about "+name, 96); err != nil || id != i {
			t.Fatal(id, err)
		}
	}
	for i, f := range frames {
		if err := w.Packet(1-i, f); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Statistics(1, at, 7, 3, "complete: enough"); err != nil {
		t.Fatal(err)
	}
	var dropped uint64
	r, err := pcapgo.NewNgReader(&b, pcapgo.NgReaderOptions{StatisticsCallback: func(id int, s pcapgo.NgInterfaceStatistics) {
		if id == 1 && s.PacketsReceived == 7 && s.Comment == "complete: enough" {
			dropped = s.PacketsDropped
		}
	}})
	if err != nil {
		t.Fatal(err)
	}
	for i, f := range frames {
		data, ci, opts, err := r.ReadPacketDataWithOptions()
		if err != nil {
			t.Fatal(err)
		}
		got := Frame{Time: ci.Timestamp, Data: data, Length: ci.Length, Left: opts.Flags.Direction == pcapgo.NgEpbFlagDirectionOutbound}
		if len(opts.Comments) > 0 {
			got.Comment = opts.Comments[0]
		}
		f.Time = f.Time.UTC()
		got.Time = got.Time.UTC()
		if ci.InterfaceIndex != 1-i || !reflect.DeepEqual(got, f) {
			t.Errorf("frame %d of interface %d is %+v; want %+v", i, ci.InterfaceIndex, got, f)
		}
	}
	if _, _, err := r.ReadPacketData(); err == nil || dropped != 3 {
		t.Errorf("at the end: %v, %d dropped; want 3", err, dropped)
	}
	if ifi, err := r.Interface(1); err != nil || ifi.Name != "web-2" || ifi.Description != "about web-2" || ifi.SnapLength != 96 {
		t.Errorf("the second interface is %+v, %v", ifi, err)
	}
}

// TestEnded: the end says whether it is the one that was asked for.
func TestEnded(t *testing.T) {
	gone, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("the engine ends"))
	q := Query{Count: 5, Duration: time.Minute}
	for _, tt := range []struct {
		ctx     context.Context
		written int
		failed  error
		want    string
	}{
		{t.Context(), 4, nil, "complete: the time that was asked for, 1m0s"},
		{t.Context(), 5, nil, "complete: the number of frames that was asked for, 5"},
		{gone, 5, nil, "complete: the number of frames that was asked for, 5"},
		{gone, 4, nil, "ended early: the engine ends"},
		{t.Context(), 4, errors.New("no such device"), "ended early: no such device"},
	} {
		if got := ended(tt.ctx, q, tt.written, tt.failed); got != tt.want {
			t.Errorf("after %d frames, %v, %v: %q; want %q", tt.written, tt.ctx.Err(), tt.failed, got, tt.want)
		}
	}
}

func TestParseQuery(t *testing.T) {
	q, err := ParseQuery(url.Values{"client": {"192.0.2.7:4000"}, "port": {"80"}, "verdict": {"drop,accept-new"}, "count": {"5"}, "duration": {"3s"}, "snap": {"96"}})
	if err != nil {
		t.Fatal(err)
	}
	if !q.Verdicts[filter.DropLease] || !q.Verdicts[filter.AcceptNew] || q.Verdicts[filter.AcceptFlow] {
		t.Errorf("the verdicts are %v", q.Verdicts)
	}
	for _, bad := range []string{"client=x", "client=fe80::1%25eth0", "port=0", "port=65536", "verdict=dro", "verdict=drop,", "count=0", "count=-1", "duration=11m", "duration=0s", "snap=65537"} {
		v, _ := url.ParseQuery(bad)
		if _, err := ParseQuery(v); err == nil {
			t.Errorf("%s is taken", bad)
		}
	}
}

func FuzzParseQuery(f *testing.F) {
	f.Add("client=192.0.2.7:4000&port=80&verdict=drop&count=5&duration=3s&snap=96&beacons=1")
	f.Fuzz(func(t *testing.T, text string) {
		v, err := url.ParseQuery(text)
		if err != nil {
			return
		}
		q, err := ParseQuery(v)
		if err == nil && (q.Duration <= 0 || q.Duration > MostDuration || q.Snap < 0 || q.Count < 0) {
			t.Errorf("%q gives %+v", text, q)
		}
	})
}

// TestRing: what nobody takes is bounded, and the oldest goes.
func TestRing(t *testing.T) {
	r := ring{more: make(chan struct{}, 1)}
	const n = 100
	for i := range n {
		r.add(Frame{Time: time.Unix(0, int64(i)), Data: make([]byte, 64<<10)})
	}
	all := r.take()
	if len(all) != ringBytes/(64<<10) || all[len(all)-1].Time != time.Unix(0, n-1) || r.lost != n-uint64(len(all)) {
		t.Errorf("%d frames are kept, the last of %v, %d are lost", len(all), all[len(all)-1].Time, r.lost)
	}
	r.add(Frame{Time: time.Unix(1, 0)})
	r.add(Frame{Time: time.Unix(1, 0).Add(ringTime + 1)})
	if all = r.take(); len(all) != 1 {
		t.Errorf("%d frames are kept, of which one is too old", len(all))
	}
}
