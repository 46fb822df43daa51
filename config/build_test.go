package config

import (
	"strings"
	"testing"
)

const builtService = minimal + `services:
  - name: hello
    run: [/bin/hello, --quiet]
    build: %BUILD%
    content: ./www
`

func TestServiceBuild(t *testing.T) {
	for _, ok := range []string{"./hello", ".", "../tools/hello", "/opt/hello", "example.com/tools/cmd/hello@v1.2.3", "example.com/x@v0.0.0-20260101000000-0123456789ab"} {
		c := load(t, strings.Replace(builtService, "%BUILD%", ok, 1))
		if s := c.Services[0]; s.Build != ok || s.Content != "./www" || s.ContentDir() != "/srv/hello" {
			t.Errorf("service = %+v", s)
		}
		again, err := Load(c.Clear(), "clear")
		if err != nil || again.Services[0].Build != ok || again.Services[0].Content != "./www" {
			t.Errorf("%s does not come back from Clear: %v", ok, err)
		}
	}
	for _, tt := range []struct{ replace, with, want string }{
		{"%BUILD%", "hello", `cluster.yaml:9:12: services.hello.build: "hello" is neither a path nor an import path; for a folder or file beside cluster.yaml write ./hello`},
		{"%BUILD%", "example.com/hello", "write example.com/hello@v1.2.3"},
		{"%BUILD%", "example.com/hello@latest", "every build might be another program"},
		{"/bin/hello", "/usr/bin/hello", "write /bin/hello"},
		{"    content: ./www", "  - {name: b, run: [/bin/hello], build: ./other}", "the program of service b, of another build, goes to /bin/hello as well"},
	} {
		text := strings.Replace(strings.Replace(builtService, tt.replace, tt.with, 1), "%BUILD%", "./hello", 1)
		_, err := Load([]byte(text), "cluster.yaml")
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("with %s: %v; want %q", tt.with, err, tt.want)
		}
	}
}
