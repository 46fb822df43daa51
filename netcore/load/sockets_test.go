package load

import "testing"

func TestParseSockets(t *testing.T) {
	for _, tt := range []struct {
		name, text string
		want       int
		bad        bool
	}{
		{"IPv4", "sockets: used 291\nTCP: inuse 5 orphan 0 tw 2 alloc 6 mem 1\nUDP: inuse 1 mem 0\n", 5, false},
		{"IPv6", "TCP6: inuse 7\nUDP6: inuse 2\n", 7, false},
		{"no TCP", "UDP: inuse 1\n", 0, true},
		{"cut off", "TCP: inuse\n", 0, true},
		{"no number", "TCP: inuse many\n", 0, true},
		{"negative", "TCP: inuse -1\n", 0, true},
		{"empty", "", 0, true},
	} {
		got, err := parseSockets([]byte(tt.text))
		if got != tt.want || (err != nil) != tt.bad {
			t.Errorf("%s: %d, %v; want %d, error %v", tt.name, got, err, tt.want, tt.bad)
		}
	}
}

func FuzzParseSockets(f *testing.F) {
	f.Add("TCP: inuse 5 orphan 0\n")
	f.Fuzz(func(t *testing.T, text string) {
		if n, err := parseSockets([]byte(text)); n < 0 || err != nil && n != 0 {
			t.Errorf("%d, %v", n, err)
		}
	})
}
