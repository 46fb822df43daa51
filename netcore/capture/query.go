package capture

import (
	"fmt"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"time"

	"clonecluster/netcore/filter"
)

// Query says which frames are wanted, and how many. The zero value is not valid:
// ParseQuery gives the defaults.
type Query struct {
	Client   netip.AddrPort          // port 0: any; not valid: any client
	Port     uint16                  // of the VIP; 0: any
	Verdicts map[filter.Verdict]bool // empty: any
	Beacons  bool                    // the nodes' own frames, too
	Count    int                     // ends after so many; 0: no bound
	Duration time.Duration           // ends after so long
	Snap     int                     // bytes of each frame that are kept; 0: all
}

// The bounds of a query.
const (
	MostDuration     = 10 * time.Minute
	defaultDuration  = time.Minute
	mostSnap         = 1 << 16
	mostCount        = 1 << 30
	mostVerdictNames = 64
)

// ParseQuery reads the parameters client, port, verdict (names with commas between
// them, or the beginning of several, "drop"), beacons, count, duration and snap.
func ParseQuery(v url.Values) (q Query, err error) {
	q.Duration = defaultDuration
	if text := v.Get("client"); text != "" {
		if a, err := netip.ParseAddr(text); err == nil {
			q.Client = netip.AddrPortFrom(a.Unmap(), 0)
		} else if ap, err := netip.ParseAddrPort(text); err == nil {
			q.Client = netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
		}
		if !q.Client.IsValid() || q.Client.Addr().Zone() != "" {
			return q, fmt.Errorf("client %q: want an address, or an address and a port, as 192.0.2.1:40000 or [2001:db8::1]:40000", text)
		}
	}
	if text := v.Get("port"); text != "" {
		n, err := strconv.ParseUint(text, 10, 16)
		if err != nil || n == 0 {
			return q, fmt.Errorf("port %q: want a number of 1 to 65535", text)
		}
		q.Port = uint16(n)
	}
	if text := v.Get("verdict"); text != "" {
		if q.Verdicts, err = parseVerdicts(text); err != nil {
			return q, err
		}
	}
	switch v.Get("beacons") {
	case "", "0":
	default:
		q.Beacons = true
	}
	for _, n := range []struct {
		name string
		into *int
		most int
	}{{"count", &q.Count, mostCount}, {"snap", &q.Snap, mostSnap}} {
		text := v.Get(n.name)
		if text == "" {
			continue
		}
		if *n.into, err = strconv.Atoi(text); err != nil || *n.into < 1 || *n.into > n.most {
			return q, fmt.Errorf("%s %q: want a number of 1 to %d", n.name, text, n.most)
		}
	}
	if text := v.Get("duration"); text != "" {
		if q.Duration, err = time.ParseDuration(text); err != nil || q.Duration <= 0 || q.Duration > MostDuration {
			return q, fmt.Errorf("duration %q: want a time of at most %v, as 30s", text, MostDuration)
		}
	}
	return q, nil
}

// parseVerdicts reads names, of which one that is none may be the first words of
// several.
func parseVerdicts(text string) (map[filter.Verdict]bool, error) {
	want := map[filter.Verdict]bool{}
	names := strings.Split(text, ",")
	for _, name := range names[:min(len(names), mostVerdictNames)] {
		found := false
		for v := filter.Verdict(1); int(v) < filter.Verdicts; v++ {
			if v.String() == name || strings.HasPrefix(v.String(), name+"-") {
				want[v], found = true, true
			}
		}
		if !found {
			return nil, fmt.Errorf("verdict %q: want names as drop-foreign, accept-new or send, or the first word of several, as drop", name)
		}
	}
	return want, nil
}

// wants reports whether a frame is wanted.
func (q Query) wants(seen filter.Seen) bool {
	switch {
	case len(q.Verdicts) > 0 && !q.Verdicts[seen.Verdict]:
	case q.Client.IsValid() && q.Client.Addr() != seen.Tuple.Client.Addr():
	case q.Client.Port() != 0 && q.Client.Port() != seen.Tuple.Client.Port():
	case q.Port != 0 && q.Port != seen.Tuple.VIP.Port():
	default:
		return true
	}
	return false
}
