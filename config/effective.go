package config

import (
	"reflect"
	"slices"
)

// Entry is one effective value and where it came from.
type Entry struct {
	Path string `json:"path"` // "vip.ipv4", "services.web.run", "policy.weights[0].mac"
	// Value is as written in the file, lists in YAML's flow style; empty for
	// a value that is not set and has no default. Keys are masked.
	Value string `json:"value"`
	// Source is "default", "cmdline", "derived" or "file:line".
	Source string `json:"source"`
}

// Where is the place that a value has: "file:line:column", or the name of the
// parameter that gave it; empty for a default.
func (c *Config) Where(path string) string { return c.origins[path].where }

// Effective lists every value in the order of the types.
func (c *Config) Effective() []Entry {
	b := &builder{config: c}
	return b.entriesOf(reflect.ValueOf(c).Elem(), "", nil)
}

func (b *builder) entriesOf(v reflect.Value, path string, list []Entry) []Entry {
	for _, f := range reflect.VisibleFields(v.Type()) {
		key := f.Tag.Get("yaml")
		if key == "" {
			continue
		}
		p, value := join(path, key), v.FieldByIndex(f.Index)
		add := func(path, text string) {
			source := b.config.origins[path].label
			if source == "" {
				source = fromDefault
			}
			list = append(list, Entry{Path: path, Value: text, Source: source})
		}
		switch {
		case isScalar(value.Type()):
			add(p, scalarText(value))
		case value.Kind() == reflect.Struct:
			list = b.entriesOf(value, p, list)
		case isRecords(value.Type()) && value.Len() > 0:
			for i := range value.Len() {
				list = b.entriesOf(value.Index(i), b.recordPath(p, value.Type(), i), list)
			}
		case value.Kind() == reflect.Map:
			env, _ := value.Interface().(map[string]string)
			for _, name := range sortedKeys(env) {
				add(join(p, name), env[name])
			}
		default:
			if value.Len() > 0 {
				add(p, listText(value.Interface()))
			} else {
				add(p, "[]")
			}
		}
	}
	return slices.Clip(list)
}
