package config

import (
	"encoding/base64"
	"reflect"
	"strconv"
	"strings"
)

// Clear is the configuration as the text of a cluster.yaml that Load reads back
// to the same values, with the overrides and the derived values in it, and with
// the key in clear: for handing the effective configuration to another program
// of the same node, in a file that only root can read.
func (c *Config) Clear() []byte {
	var b strings.Builder
	writeMap(&b, reflect.ValueOf(c).Elem())
	b.WriteByte('\n')
	return []byte(b.String())
}

// writeMap writes flow style, in which every text is quoted: there is nothing
// to get wrong about what a plain text would mean.
func writeMap(b *strings.Builder, v reflect.Value) {
	b.WriteByte('{')
	first := true
	for _, f := range reflect.VisibleFields(v.Type()) {
		key, value := f.Tag.Get("yaml"), v.FieldByIndex(f.Index)
		if key == "" || value.IsZero() && f.Tag.Get("default") == "" && f.Tag.Get("required") == "" {
			continue
		}
		if !first {
			b.WriteString(", ")
		}
		first = false
		b.WriteString(key + ": ")
		writeValue(b, value)
	}
	b.WriteByte('}')
}

func writeValue(b *strings.Builder, v reflect.Value) {
	switch {
	case v.Type() == typeOf[Key]():
		k := v.Interface().(Key)
		b.WriteString(strconv.Quote(base64.StdEncoding.EncodeToString(k[:])))
	case isScalar(v.Type()):
		b.WriteString(strconv.Quote(scalarText(v)))
	case v.Kind() == reflect.Struct:
		writeMap(b, v)
	case v.Kind() == reflect.Map:
		env, _ := v.Interface().(map[string]string)
		var items []string
		for _, k := range sortedKeys(env) {
			items = append(items, k+": "+strconv.Quote(env[k]))
		}
		b.WriteString("{" + strings.Join(items, ", ") + "}")
	default:
		b.WriteByte('[')
		for i := range v.Len() {
			if i > 0 {
				b.WriteString(", ")
			}
			writeValue(b, v.Index(i))
		}
		b.WriteByte(']')
	}
}
