package schema

import (
	"encoding/json"
	"strings"
	"testing"
)

func TestGeneratedFilesAreCurrent(t *testing.T) {
	for _, f := range []struct {
		name     string
		have     []byte
		generate func(string) ([]byte, error)
	}{
		{"cluster.schema.json", JSON, GenerateJSON},
		{"cluster.md", Reference, GenerateReference},
	} {
		want, err := f.generate("../..")
		if err != nil {
			t.Fatal(err)
		}
		if string(f.have) != string(want) {
			t.Errorf("%s is not what the types say; run: go generate ./config", f.name)
		}
	}
}

// TestSchemaSaysWhatTheTagsSay spot-checks that the tags and the comments got
// through the generator.
func TestSchemaSaysWhatTheTagsSay(t *testing.T) {
	var top any
	if err := json.Unmarshal(JSON, &top); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ path, want string }{
		{"required", `["cluster","vip"]`},
		{"additionalProperties", "false"},
		{"properties.cluster.required", `["name","key"]`},
		{"properties.management.properties.mode.enum", `["dhcp","static","link-local"]`},
		{"properties.management.properties.mode.default", `"dhcp"`},
		{"properties.services.maxItems", "32"},
		{"properties.services.items.properties.run.minItems", "1"},
		{"properties.services.items.properties.ports.items.pattern", `"^[0-9]{1,5}(-[0-9]{1,5})?/(tcp|udp)$"`},
		{"properties.services.items.properties.health.properties.rise.default", "2"},
		{"properties.cluster.properties.accept-keys.maxItems", "2"},
		{"properties.cluster.properties.detect.description", "Allowed: 100ms to 10s"},
		{"properties.cluster.properties.drain.oneOf", `{"const":0}`},
		{"properties.policy.properties.moves.type", `"integer"`},
		{"properties.policy.properties.moves.maximum", "1024"},
		{"properties.policy.properties.weights.items.required", `["mac","weight"]`},
		{"properties.policy.properties.weights.items.properties.weight.minimum", "1"},
		{"properties.rules.items.properties.affinity.enum", `"disabled"`},
		{"properties.services.items.additionalProperties", "false"},
		{"properties.services.items.properties.health.properties.timeout.description", "Allowed: 10ms to 1h"},
		{"properties.system.properties.watchdog.oneOf", `{"const":0}`},
		{"properties.vip.properties.clone-mac.description", "Left out, it is derived from the VIP"},
	} {
		v := top
		for step := range strings.SplitSeq(tt.path, ".") {
			m, ok := v.(map[string]any)
			if !ok {
				t.Fatalf("%s: nothing at %s", tt.path, step)
			}
			v = m[step]
		}
		var b strings.Builder
		enc := json.NewEncoder(&b)
		enc.SetEscapeHTML(false)
		if err := enc.Encode(v); err != nil || !strings.Contains(b.String(), tt.want) {
			t.Errorf("%s = %s; want %s in it", tt.path, b.String(), tt.want)
		}
	}
}
