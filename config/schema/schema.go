// Package schema describes cluster.yaml for editors and people: a JSON schema
// and a reference page, both generated from the types of package config and
// their comments. It is apart from config so that the node's binary does not
// carry the generator.
package schema

import (
	_ "embed"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"path"
	"reflect"
	"strings"
	"time"

	"github.com/invopop/jsonschema"

	"clonecluster/config"
)

// JSON is the JSON schema of cluster.yaml (draft 2020-12).
//
//go:embed cluster.schema.json
var JSON []byte

// Reference is the reference page of cluster.yaml, in Markdown.
//
//go:embed cluster.md
var Reference []byte

// GenerateJSON makes the text of JSON. The comments come from the Go files of
// package config below root, the folder of go.mod.
func GenerateJSON(root string) ([]byte, error) {
	top, err := reflectTypes(root)
	if err != nil {
		return nil, err
	}
	text, err := json.MarshalIndent(top, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("writing the schema: %w", err)
	}
	return append(text, '\n'), nil
}

func reflectTypes(root string) (*jsonschema.Schema, error) {
	r := &jsonschema.Reflector{
		FieldNameTag:               "yaml",
		Anonymous:                  true,
		DoNotReference:             true,
		ExpandedStruct:             true,
		RequiredFromJSONSchemaTags: true,
		Mapper:                     mapType,
	}
	if err := r.AddGoComments("clonecluster", path.Join(root, "config"), jsonschema.WithFullComment()); err != nil {
		return nil, fmt.Errorf("reading the comments of package config: %w", err)
	}
	// The generator names a package by the path it was found at, "../config".
	comments := map[string]string{}
	for k, v := range r.CommentMap {
		if i := strings.LastIndex("/"+k, "/config."); i >= 0 {
			comments["clonecluster"+("/" + k)[i:]] = strings.Join(strings.Fields(v), " ")
		}
	}
	r.CommentMap = comments
	top := r.Reflect(&config.Config{})
	top.Title = "cluster.yaml"
	refine(reflect.TypeFor[config.Config](), top, comments)
	return top, nil
}

// mapType describes the types that are written as one scalar.
func mapType(t reflect.Type) *jsonschema.Schema {
	switch t {
	case reflect.TypeFor[netip.Prefix]():
		return &jsonschema.Schema{Type: "string", Pattern: `^[0-9a-fA-F.:]+/[0-9]{1,3}$`}
	case reflect.TypeFor[netip.Addr]():
		return &jsonschema.Schema{Type: "string", Pattern: `^[0-9a-fA-F.:]+$`}
	case reflect.TypeFor[net.HardwareAddr]():
		return &jsonschema.Schema{Type: "string", Pattern: `^([0-9a-fA-F]{2}:){5}[0-9a-fA-F]{2}$`}
	case reflect.TypeFor[config.Key]():
		return &jsonschema.Schema{Type: "string", Pattern: `^[A-Za-z0-9+/]{43}=$`}
	case reflect.TypeFor[config.PortRange]():
		return &jsonschema.Schema{Type: "string", Pattern: `^[0-9]{1,5}(-[0-9]{1,5})?/(tcp|udp)$`}
	case reflect.TypeFor[time.Duration]():
		return &jsonschema.Schema{Type: "string", Pattern: `^([0-9]+(\.[0-9]+)?(ms|s|m|h))+$`}
	case reflect.TypeFor[config.Detect]():
		return &jsonschema.Schema{Type: "string", Pattern: `^(normal|fast|relaxed|([0-9]+(\.[0-9]+)?(ms|s|m|h))+)$`}
	}
	return nil
}

// refine adds what the struct tags of package config say, and makes the
// comments speak of keys instead of Go's names.
func refine(t reflect.Type, s *jsonschema.Schema, comments map[string]string) {
	for f := range fields(t) {
		p, ok := s.Properties.Get(f.key)
		if !ok {
			continue
		}
		if f.required {
			s.Required = append(s.Required, f.key)
		}
		if p.Description == "" {
			p.Description = comments[f.typ.PkgPath()+"."+f.typ.Name()]
		}
		p.Description = strings.Replace(p.Description, f.name+" ", f.key+" ", 1)
		leaf := p
		switch {
		case p.Items != nil:
			leaf = p.Items
			p.MaxItems, p.MinItems = count(f.tag.Get("max")), count(f.tag.Get("min"))
		case f.typ.Kind() == reflect.Map:
			leaf = p.AdditionalProperties
			p.MaxProperties = count(f.tag.Get("max"))
			p.PropertyNames = &jsonschema.Schema{Pattern: `^[A-Za-z_][A-Za-z0-9_]{0,63}$`}
		}
		if format, ok := config.Formats[f.tag.Get("format")]; ok {
			leaf.Pattern = format.Pattern
		}
		for _, value := range f.enum {
			p.Enum = append(p.Enum, value)
		}
		if d := f.tag.Get("default"); d != "" {
			p.Default = d
		}
		if f.typ.Kind() == reflect.Int {
			p.Minimum, p.Maximum = json.Number(f.tag.Get("min")), json.Number(f.tag.Get("max"))
			if p.Default != nil {
				p.Default = json.Number(f.tag.Get("default"))
			}
		}
		if f.tag.Get("zero") != "" {
			p.OneOf = []*jsonschema.Schema{{Type: "string", Pattern: p.Pattern}, {Const: 0}}
			p.Type, p.Pattern = "", ""
		}
		if f.allowed != "" {
			p.Description = strings.TrimSuffix(p.Description, ".") + ". Allowed: " + f.allowed + "."
		}
		if leaf != nil && leaf.Properties != nil {
			elem := f.typ
			if elem.Kind() == reflect.Slice {
				elem = elem.Elem()
			}
			refine(elem, leaf, comments)
		}
	}
}

func count(tag string) *uint64 {
	var n uint64
	if _, err := fmt.Sscan(tag, &n); err != nil {
		return nil
	}
	return &n
}

// field is what a struct field says of its key.
type field struct {
	key      string
	name     string // Go's
	typ      reflect.Type
	tag      reflect.StructTag
	required bool
	enum     []string
	allowed  string // the range of a duration or number
}

func fields(t reflect.Type) func(yield func(field) bool) {
	return func(yield func(field) bool) {
		for _, sf := range reflect.VisibleFields(t) {
			key := sf.Tag.Get("yaml")
			if key == "" {
				continue
			}
			f := field{key: key, name: sf.Name, typ: sf.Type, tag: sf.Tag, required: sf.Tag.Get("required") != ""}
			if e := sf.Tag.Get("enum"); e != "" {
				f.enum = strings.Split(e, ",")
			}
			switch sf.Type {
			case reflect.TypeFor[time.Duration](), reflect.TypeFor[config.Detect](), reflect.TypeFor[int]():
				f.allowed = sf.Tag.Get("min") + " to " + sf.Tag.Get("max")
				if z := sf.Tag.Get("zero"); z != "" {
					f.allowed = "0 (" + z + ") or " + f.allowed
				}
			}
			if !yield(f) {
				return
			}
		}
	}
}

// GenerateReference makes the text of Reference; root as for GenerateJSON.
func GenerateReference(root string) ([]byte, error) {
	top, err := reflectTypes(root)
	if err != nil {
		return nil, err
	}
	var b strings.Builder
	b.WriteString(`# cluster.yaml

<!-- Generated from the types of package config by "go generate ./config". -->

The one configuration file of a cluster; every node gets the same. It is YAML
without anchors, aliases, tags and merge keys, at most 1 MiB, and it is read
strictly: an unknown key or a value out of range is an error that names its line.

Every value can be overridden by a kernel parameter, ` + "`clonecluster.PATH=VALUE`" + `:
` + "`clonecluster.system.log-level=debug`" + `, ` + "`clonecluster.services.web.affinity=client`" + `.
Lists are written with commas. Of a list of maps a parameter names one entry by its
number, from 0; the number after the last makes a new entry:
` + "`clonecluster.policy.weights[0].mac=* clonecluster.policy.weights[0].weight=50`" + `.
A parameter that is not right is reported on the console and ignored.

A commented example:

` + "```yaml\n" + string(config.DemoYAML) + "```\n")
	section(&b, reflect.TypeFor[config.Config](), top, "")
	return []byte(b.String()), nil
}

// section writes the table of the values of a struct, then its sections.
func section(b *strings.Builder, t reflect.Type, s *jsonschema.Schema, at string) {
	type below struct {
		t  reflect.Type
		s  *jsonschema.Schema
		at string
	}
	var later []below
	if at != "" {
		fmt.Fprintf(b, "\n## `%s`\n\n%s\n", at, s.Description)
	}
	header := "\n| key | default | meaning |\n|---|---|---|\n"
	for f := range fields(t) {
		p, ok := s.Properties.Get(f.key)
		if !ok {
			continue
		}
		switch {
		case p.Items != nil && p.Items.Properties != nil:
			later = append(later, below{f.typ.Elem(), p.Items, strings.TrimPrefix(at+".", ".") + f.key + "[]"})
			continue
		case p.Properties != nil:
			later = append(later, below{f.typ, p, strings.TrimPrefix(at+".", ".") + f.key})
			continue
		}
		value := "–"
		if d := f.tag.Get("default"); d != "" {
			value = "`" + d + "`"
		}
		if f.required {
			value = "required"
		}
		meaning := strings.NewReplacer("|", `\|`, "*", `\*`).Replace(p.Description)
		if f.enum != nil {
			meaning += " One of `" + strings.Join(f.enum, "`, `") + "`."
		}
		fmt.Fprintf(b, "%s| `%s` | %s | %s |\n", header, f.key, value, meaning)
		header = ""
	}
	for _, l := range later {
		section(b, l.t, l.s, l.at)
	}
}
