package openapi_test

import (
	"bytes"
	"os"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"

	"clonecluster/cmd/internal/openapi"
	"clonecluster/netcore/api"
)

const file = "../../../docs/openapi.yaml"

func TestDescriptionIsUpToDate(t *testing.T) {
	want, err := openapi.Generate("../../..")
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Error("docs/openapi.yaml is not what is generated: go generate ./netcore/api")
	}
}

// TestDescription reads the file as a stranger does: every route is in it, and
// nothing else, and every reference leads somewhere.
func TestDescription(t *testing.T) {
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var doc struct {
		OpenAPI string
		Paths   map[string]map[string]struct {
			OperationID string `yaml:"operationId"`
			Parameters  []struct{ Name, In string }
			Security    []map[string][]string
		}
		Components struct{ Schemas map[string]any }
	}
	if err := yaml.Unmarshal(text, &doc); err != nil {
		t.Fatal(err)
	}
	if doc.OpenAPI != "3.1.0" {
		t.Errorf("openapi is %q", doc.OpenAPI)
	}
	routes := map[string]api.Route{}
	for _, r := range api.Routes {
		routes[strings.ToLower(r.Method)+" "+r.Path] = r
	}
	described := 0
	for path, methods := range doc.Paths {
		for method, op := range methods {
			described++
			r, ok := routes[method+" "+path]
			if !ok {
				t.Errorf("%s %s is described, and not served", method, path)
				continue
			}
			if op.OperationID != r.Name || len(op.Parameters) != len(r.Query()) {
				t.Errorf("%s %s is %s with %d parameters; want %s with %d", method, path, op.OperationID, len(op.Parameters), r.Name, len(r.Query()))
			}
			if open := len(op.Security) == 0; open != (r.Path == "/v1/health") {
				t.Errorf("%s %s is open: %v", method, path, open)
			}
		}
	}
	if described != len(routes) {
		t.Errorf("%d routes are described; want %d", described, len(routes))
	}
	for line := range strings.Lines(string(text)) {
		if _, name, ok := strings.Cut(line, "#/components/schemas/"); ok {
			name = strings.Trim(strings.TrimSpace(name), `'"`)
			if doc.Components.Schemas[name] == nil {
				t.Errorf("a reference to %s leads nowhere", name)
			}
		}
	}
}
