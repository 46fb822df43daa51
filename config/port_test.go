package config

import "testing"

func TestPortRange(t *testing.T) {
	for _, tt := range []struct {
		text, shown string
		want        PortRange
	}{
		{"80/tcp", "80/tcp", PortRange{80, 80, "tcp"}},
		{"80-80/tcp", "80/tcp", PortRange{80, 80, "tcp"}},
		{"1-65535/udp", "1-65535/udp", PortRange{1, 65535, "udp"}},
	} {
		got, err := parsePortRange(tt.text)
		if err != nil || got != tt.want || got.String() != tt.shown {
			t.Errorf("parsePortRange(%q) = %v, %v; want %v", tt.text, got, err, tt.want)
		}
	}
}

func TestPortRangeOverlaps(t *testing.T) {
	for _, tt := range []struct {
		a, b string
		want bool
	}{
		{"80/tcp", "80/tcp", true},
		{"80/tcp", "80/udp", false},
		{"80/tcp", "81/tcp", false},
		{"80-90/tcp", "90-99/tcp", true},
		{"80-90/tcp", "91-99/tcp", false},
		{"1-65535/tcp", "65535/tcp", true},
		{"80-90/tcp", "85/tcp", true},
	} {
		a, errA := parsePortRange(tt.a)
		b, errB := parsePortRange(tt.b)
		if errA != nil || errB != nil {
			t.Fatal(errA, errB)
		}
		if a.Overlaps(b) != tt.want || b.Overlaps(a) != tt.want {
			t.Errorf("%v and %v overlap: %v, %v; want %v", a, b, a.Overlaps(b), b.Overlaps(a), tt.want)
		}
	}
}
