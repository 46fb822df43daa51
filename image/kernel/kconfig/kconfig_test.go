package kconfig

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func mustParse(t *testing.T, name, text string) Fragment {
	t.Helper()
	f, err := Parse(name, []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func TestMergeLastCounts(t *testing.T) {
	base := mustParse(t, "base", "# comment\nCONFIG_A=y\nCONFIG_B=y\nCONFIG_S=\"x=y\"\n")
	board := mustParse(t, "board", "# CONFIG_B is not set\n\nCONFIG_C=250\n")
	want := "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=250\nCONFIG_S=\"x=y\"\n"
	if diff := cmp.Diff(want, string(Merge(base, board).Bytes())); diff != "" {
		t.Errorf("Merge (-want +got):\n%s", diff)
	}
}

func TestParseRefuses(t *testing.T) {
	for text, want := range map[string]string{
		"CONFIG_A=y\nCONFIG_B":       "f:2: \"CONFIG_B\" is neither",
		"A=y":                        "f:1: \"A\" is no symbol",
		"CONFIG_=y":                  "is no symbol",
		"CONFIG_A=n":                 "# CONFIG_A is not set",
		"CONFIG_A=":                  "has no value",
		"CONFIG_A=\"x":               "closing quote",
		"CONFIG_A=y\nCONFIG_A=m":     "f:2: CONFIG_A again, first at f:1",
		"# CONFIG_A=B is not set":    "is no symbol",
		"CONFIG_A=y\n CONFIG_B=y\n ": "is no symbol",
	} {
		_, err := Parse("f", []byte(text))
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Parse(%q) = %v; want an error with %q", text, err, want)
		}
	}
}

func TestCheckNamesDroppedSymbols(t *testing.T) {
	f := mustParse(t, "boards/x", "CONFIG_A=y\nCONFIG_B=y\n# CONFIG_C is not set\n# CONFIG_D is not set\nCONFIG_E=y\n")
	err := f.Check([]byte("CONFIG_A=y\nCONFIG_B=m\nCONFIG_C=y\n# CONFIG_E is not set\n"))
	var dropped *DroppedError
	if !errors.As(err, &dropped) {
		t.Fatalf("Check = %v; want a DroppedError", err)
	}
	for _, want := range []string{
		"boards/x:2: want CONFIG_B=y, got CONFIG_B=m",
		"boards/x:3: want # CONFIG_C is not set, got CONFIG_C=y",
		"boards/x:5: want CONFIG_E=y, got # CONFIG_E is not set",
	} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("error lacks %q:\n%v", want, err)
		}
	}
	if len(dropped.Dropped) != 3 {
		t.Errorf("%d symbols dropped; want 3: %v", len(dropped.Dropped), err)
	}
	if err := f.Check([]byte("CONFIG_A=y\nCONFIG_B=y\n# CONFIG_C is not set\nCONFIG_E=y\n")); err != nil {
		t.Errorf("Check of a fulfilled fragment: %v", err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte("CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=\"a b\"\n# text\n"))
	f.Add([]byte("# CONFIG_ is not set"))
	f.Add([]byte("CONFIG_A=\""))
	f.Fuzz(func(t *testing.T, data []byte) {
		frag, err := Parse("f", data)
		if err != nil {
			return
		}
		text := frag.Bytes()
		again, err := Parse("again", text)
		if err != nil {
			t.Fatalf("Parse of own output %q: %v", text, err)
		}
		if got := again.Bytes(); !bytes.Equal(got, text) {
			t.Errorf("round trip: %q; want %q", got, text)
		}
		if err := frag.Check(text); err != nil {
			t.Errorf("Check of own output: %v", err)
		}
	})
}
