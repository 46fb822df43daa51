// Package openapi describes the management API in the words of OpenAPI 3.1,
// generated from the routes and types of package api and their comments. It is
// apart from api so that the node's binary does not carry the generator.
package openapi

import (
	"encoding/json"
	"fmt"
	"path"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"github.com/goccy/go-yaml"
	"github.com/invopop/jsonschema"

	"clonecluster/netcore/api"
)

const about = `The management API of a clonecluster node: HTTPS (TLS 1.3, HTTP/1.1) on port management.port of
cluster.yaml, at every node's own addresses and at the VIP, where one of the nodes answers for all.

Both sides show certificates of an authority that is derived from the cluster's key; "clonectl key issue"
makes a client's, for the role read-only or control. The names in a node's certificate are the cluster's,
the host's, and the address that was asked:

    curl --cacert ca.pem --cert client.pem --key client.key --connect-to ::10.77.0.10:9264 https://demo:9264/v1/status

A body is at most 4 KiB. Answers besides those listed: 400 for a query or body that cannot be read, 401
without a certificate, 403 with one that is not for this, 404 for a node that is not there, 413, 429 for
more than 50 requests a second on one connection, 502 if another node that was meant does not answer, 503
if too many clients are connected.`

// Generate makes the text of docs/openapi.yaml. The comments come from the Go files
// below root, the folder of go.mod.
func Generate(root string) ([]byte, error) {
	schemas, err := newSchemas(root)
	if err != nil {
		return nil, err
	}
	paths := yaml.MapSlice{}
	for _, r := range api.Routes {
		op, err := operation(r, schemas)
		if err != nil {
			return nil, err
		}
		entry := yaml.MapItem{Key: strings.ToLower(r.Method), Value: op}
		if i := slices.IndexFunc(paths, func(i yaml.MapItem) bool { return i.Key == r.Path }); i >= 0 {
			paths[i].Value = append(paths[i].Value.(yaml.MapSlice), entry)
		} else {
			paths = append(paths, yaml.MapItem{Key: r.Path, Value: yaml.MapSlice{entry}})
		}
	}
	if _, err := schemas.ref(api.Problem{}); err != nil {
		return nil, err
	}
	doc := yaml.MapSlice{
		{Key: "openapi", Value: "3.1.0"},
		{Key: "info", Value: yaml.MapSlice{
			{Key: "title", Value: "clonecluster management API"}, {Key: "version", Value: "v1"}, {Key: "description", Value: about},
			{Key: "license", Value: yaml.MapSlice{{Key: "name", Value: "BSD-3-Clause"}, {Key: "identifier", Value: "BSD-3-Clause"}}},
		}},
		{Key: "servers", Value: []any{yaml.MapSlice{
			{Key: "url", Value: "https://{address}:{port}"},
			{Key: "variables", Value: yaml.MapSlice{
				{Key: "address", Value: yaml.MapSlice{{Key: "default", Value: "10.77.0.10"}, {Key: "description", Value: "the VIP, or a node's own address"}}},
				{Key: "port", Value: yaml.MapSlice{{Key: "default", Value: "9264"}}},
			}},
		}}},
		{Key: "paths", Value: paths},
		{Key: "components", Value: yaml.MapSlice{
			{Key: "securitySchemes", Value: yaml.MapSlice{{Key: "certificate", Value: yaml.MapSlice{
				{Key: "type", Value: "mutualTLS"}, {Key: "description", Value: "its organisational unit is the role: read-only or control"},
			}}}},
			{Key: "schemas", Value: schemas.all()},
		}},
	}
	text, err := yaml.MarshalWithOptions(doc, yaml.IndentSequence(true), yaml.UseLiteralStyleIfMultiline(true))
	if err != nil {
		return nil, fmt.Errorf("writing the description: %w", err)
	}
	return append([]byte("# Generated from netcore/api by \"go generate ./netcore/api\"; do not edit.\n"), text...), nil
}

func operation(r api.Route, s *schemas) (yaml.MapSlice, error) {
	mediaType, answer := "application/json", yaml.MapSlice{{Key: "type", Value: "string"}}
	switch {
	case r.Type == "":
		var err error
		if answer, err = s.ref(r.Answer); err != nil {
			return nil, err
		}
	case strings.HasPrefix(r.Type, "text/"):
		mediaType = r.Type
	default:
		mediaType, answer = r.Type, append(answer, yaml.MapItem{Key: "format", Value: "binary"})
	}
	content := yaml.MapSlice{{Key: mediaType, Value: yaml.MapSlice{{Key: "schema", Value: answer}}}}
	if r.Events != nil {
		event, err := s.ref(r.Events)
		if err != nil {
			return nil, err
		}
		content = append(content, yaml.MapItem{Key: "text/event-stream", Value: yaml.MapSlice{{Key: "schema", Value: yaml.MapSlice{
			{Key: "description", Value: "the data of each event, as JSON"}, {Key: "allOf", Value: []any{event}},
		}}}})
	}
	op := yaml.MapSlice{{Key: "operationId", Value: r.Name}, {Key: "summary", Value: r.Summary}}
	if r.Role == "" {
		op = append(op, yaml.MapItem{Key: "security", Value: []any{}})
	} else {
		op = append(op, yaml.MapItem{Key: "security", Value: []any{yaml.MapSlice{{Key: "certificate", Value: []any{string(r.Role)}}}}})
	}
	var params []any
	for _, p := range r.Query() {
		params = append(params, yaml.MapSlice{
			{Key: "name", Value: p.Name}, {Key: "in", Value: "query"}, {Key: "required", Value: p.Required}, {Key: "description", Value: p.About},
			{Key: "schema", Value: yaml.MapSlice{{Key: "type", Value: "string"}}},
		})
	}
	if params != nil {
		op = append(op, yaml.MapItem{Key: "parameters", Value: params})
	}
	if r.Body != nil {
		body, err := s.ref(r.Body)
		if err != nil {
			return nil, err
		}
		op = append(op, yaml.MapItem{Key: "requestBody", Value: yaml.MapSlice{
			{Key: "required", Value: false}, {Key: "content", Value: yaml.MapSlice{{Key: "application/json", Value: yaml.MapSlice{{Key: "schema", Value: body}}}}},
		}})
	}
	responses := yaml.MapSlice{{Key: "200", Value: yaml.MapSlice{{Key: "description", Value: "done"}, {Key: "content", Value: content}}}}
	for _, code := range r.Also {
		what := yaml.MapSlice{{Key: "$ref", Value: "#/components/schemas/Problem"}}
		if r.Role == "" {
			what = answer
		}
		responses = append(responses, yaml.MapItem{Key: strconv.Itoa(code), Value: yaml.MapSlice{
			{Key: "description", Value: "see above"}, {Key: "content", Value: yaml.MapSlice{{Key: "application/json", Value: yaml.MapSlice{{Key: "schema", Value: what}}}}},
		}})
	}
	responses = append(responses, yaml.MapItem{Key: "default", Value: yaml.MapSlice{
		{Key: "description", Value: "an error"},
		{Key: "content", Value: yaml.MapSlice{{Key: "application/json", Value: yaml.MapSlice{{Key: "schema", Value: yaml.MapSlice{{Key: "$ref", Value: "#/components/schemas/Problem"}}}}}}},
	}})
	return append(op, yaml.MapItem{Key: "responses", Value: responses}), nil
}

// schemas collects the types that are spoken of.
type schemas struct {
	reflector *jsonschema.Reflector
	found     map[string]any
}

func newSchemas(root string) (*schemas, error) {
	r := &jsonschema.Reflector{Anonymous: true, AllowAdditionalProperties: true}
	for _, dir := range []string{"netcore/api", "netcore/membership", "netcore/finding"} {
		if err := r.AddGoComments("clonecluster", path.Join(root, dir), jsonschema.WithFullComment()); err != nil {
			return nil, fmt.Errorf("reading the comments of %s: %w", dir, err)
		}
	}
	// The generator names a package by the path it was found at, "../../netcore/api".
	comments := map[string]string{}
	for k, v := range r.CommentMap {
		if i := strings.Index(k, "netcore/"); i >= 0 {
			comments["clonecluster/"+k[i:]] = strings.Join(strings.Fields(v), " ")
		}
	}
	r.CommentMap = comments
	return &schemas{r, map[string]any{}}, nil
}

// ref gives a reference to the schema of v's type.
func (s *schemas) ref(v any) (yaml.MapSlice, error) {
	name := reflect.TypeOf(v).Name()
	if _, ok := s.found[name]; !ok {
		text, err := json.Marshal(s.reflector.Reflect(v))
		if err != nil {
			return nil, fmt.Errorf("describing %s: %w", name, err)
		}
		var doc struct {
			Defs map[string]any `json:"$defs"`
		}
		text = []byte(strings.ReplaceAll(string(text), "#/$defs/", "#/components/schemas/"))
		if err := json.Unmarshal(text, &doc); err != nil {
			return nil, fmt.Errorf("describing %s: %w", name, err)
		}
		for k, def := range doc.Defs {
			s.found[k] = def
		}
	}
	return yaml.MapSlice{{Key: "$ref", Value: "#/components/schemas/" + name}}, nil
}

func (s *schemas) all() yaml.MapSlice {
	var all yaml.MapSlice
	for k, v := range s.found {
		all = append(all, yaml.MapItem{Key: k, Value: ordered(v)})
	}
	slices.SortFunc(all, func(a, b yaml.MapItem) int { return strings.Compare(a.Key.(string), b.Key.(string)) })
	return all
}

// ordered makes maps come out the same each time.
func ordered(v any) any {
	switch v := v.(type) {
	case map[string]any:
		var all yaml.MapSlice
		for k, x := range v {
			all = append(all, yaml.MapItem{Key: k, Value: ordered(x)})
		}
		slices.SortFunc(all, func(a, b yaml.MapItem) int { return strings.Compare(a.Key.(string), b.Key.(string)) })
		return all
	case []any:
		for i := range v {
			v[i] = ordered(v[i])
		}
	}
	return v
}
