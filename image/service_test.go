package image

import (
	"archive/zip"
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"clonecluster/config"
)

// withServices is the demo with these services in place of its own.
func withServices(t *testing.T, services string) *config.Config {
	t.Helper()
	text, _, _ := strings.Cut(string(config.DemoYAML), "\nservices:")
	c, err := config.Load([]byte(text+"\nservices:\n"+services), "cluster.yaml")
	if err != nil {
		t.Fatal(err)
	}
	return c
}

const hello = "  - {name: hello, run: [/bin/hello], build: ./testdata/hello}\n"

func TestBuildServices(t *testing.T) {
	if testing.Short() {
		t.Skip("compiles a service: not with -short")
	}
	o := ServiceOptions{Config: withServices(t, hello), Arch: "amd64", Dir: ".", OutDir: t.TempDir()}
	s, err := BuildServices(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	packed, err := os.ReadFile(s.Path)
	if err != nil {
		t.Fatal(err)
	}
	records := unpack(t, packed)
	if d := cmp.Diff([]string{"040755 bin", "100755 bin/hello"}, listing(t, records)); d != "" {
		t.Error(d)
	}
	if s.File != NewFile(ServicesName, packed) || s.Reused || len(s.Programs) != 1 || s.Programs[0] != NewFile("/bin/hello", []byte(content(t, records, "bin/hello"))) {
		t.Errorf("services = %+v", s)
	}
	var names []string
	for _, f := range s.Inputs {
		names = append(names, f.Name)
	}
	if d := cmp.Diff([]string{"service/hello/go.mod", "service/hello/main.go"}, names); d != "" {
		t.Error(d)
	}

	// A program that was built is a static binary; it is taken as one, too.
	binary := filepath.Join(t.TempDir(), "as-is")
	if err := os.WriteFile(binary, []byte(content(t, records, "bin/hello")), 0o755); err != nil {
		t.Fatal(err)
	}
	o2 := o
	o2.OutDir = t.TempDir()
	o2.Config = withServices(t, "  - {name: a, run: [/bin/a], build: "+binary+"}\n  - {name: b, run: [/bin/a, --other], build: "+binary+"}\n  - {name: web, run: [/bin/webd], health: {exec: [/bin/a]}}\n")
	if s, err = BuildServices(t.Context(), o2); err != nil || len(s.Programs) != 1 || s.Programs[0].Name != "/bin/a" || s.Services[0].Go != "" {
		t.Errorf("of a binary: %+v, %v", s, err)
	}

	// The member of before is taken again, unless something is different.
	m := &Manifest{Recipe: Recipe, Arch: "amd64", Services: s.Services, Inputs: s.Inputs, Outputs: append(s.Programs, s.File)}
	o2.Before, o2.BeforeDir = m, o2.OutDir
	if s, err = BuildServices(t.Context(), o2); err != nil || !s.Reused || s.Programs[0].Name != "/bin/a" {
		t.Errorf("again: %+v, %v", s, err)
	}
	if err := os.Truncate(filepath.Join(o2.OutDir, ServicesName), 100); err != nil {
		t.Fatal(err)
	}
	if s, err = BuildServices(t.Context(), o2); err != nil || s.Reused {
		t.Errorf("a damaged member: %+v, %v", s, err)
	}
	arm := o
	arm.Arch, arm.Before, arm.BeforeDir = "arm64", m, o2.OutDir
	if s, err = BuildServices(t.Context(), arm); err != nil || s.Reused || s.Programs[0].SHA256 == m.Outputs[0].SHA256 {
		t.Errorf("for arm64: %+v, %v", s, err)
	}
}

// A service by its import path comes through the module proxy, at its version.
func TestFetchService(t *testing.T) {
	if testing.Short() {
		t.Skip("compiles a service: not with -short")
	}
	const module, version = "example.com/tools", "v1.2.3"
	proxy := t.TempDir()
	write := func(name string, data []byte) {
		t.Helper()
		if err := WriteFile(filepath.Join(proxy, module, "@v", name), data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	mod := []byte("module " + module + "\n\ngo 1.24\n")
	var archive bytes.Buffer
	z := zip.NewWriter(&archive)
	for name, text := range map[string]string{
		"go.mod":            string(mod),
		"cmd/hello/main.go": "package main\n\nfunc main() { println(\"hello\") }\n",
	} {
		w, err := z.Create(module + "@" + version + "/" + name)
		if err != nil {
			t.Fatal(err)
		}
		w.Write([]byte(text))
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	write(version+".info", []byte(`{"Version":"`+version+`"}`))
	write(version+".mod", mod)
	write(version+".zip", archive.Bytes())
	write("list", []byte(version+"\n"))
	t.Setenv("GOPROXY", "file://"+proxy)
	t.Setenv("GONOSUMDB", module)
	t.Setenv("GOTOOLCHAIN", "local")
	t.Setenv("GOMODCACHE", t.TempDir())
	t.Cleanup(func() { exec.Command("go", "clean", "-modcache").Run() }) // nobody may write there

	service := func(build string) ServiceOptions {
		return ServiceOptions{Config: withServices(t, "  - {name: hello, run: [/bin/hello], build: "+build+"}\n"), Arch: "amd64", OutDir: t.TempDir(), TempDir: t.TempDir()}
	}
	o := service(module + "/cmd/hello@" + version)
	s, err := BuildServices(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if m := s.Services[0].Modules; len(s.Services) != 1 || len(m) != 1 || m[0].Path != module || m[0].Version != version || !strings.HasPrefix(m[0].Sum, "h1:") {
		t.Errorf("services = %+v", s.Services)
	}
	packed, err := os.ReadFile(s.Path)
	if err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(t.TempDir(), "hello")
	if err := os.WriteFile(program, []byte(content(t, unpack(t, packed), "bin/hello")), 0o755); err != nil {
		t.Fatal(err)
	}
	if runtime.GOARCH == "amd64" {
		if out, err := exec.Command(program).CombinedOutput(); err != nil || string(out) != "hello\n" {
			t.Errorf("it says %q, %v", out, err)
		}
	}
	o.Before = &Manifest{Recipe: Recipe, Arch: "amd64", Services: s.Services, Inputs: s.Inputs, Outputs: append(s.Programs, s.File)}
	o.BeforeDir = o.OutDir
	t.Setenv("GOPROXY", "off") // nothing is asked for again
	if s, err = BuildServices(t.Context(), o); err != nil || !s.Reused {
		t.Errorf("again: %+v, %v", s, err)
	}
	t.Setenv("GOPROXY", "file://"+proxy)
	for build, want := range map[string]string{
		module + "/cmd/hello@v1.2.4": "services.hello.build: fetching " + module + "/cmd/hello@v1.2.4: ",
		module + "/cmd/none@v1.2.3":  "does not contain package " + module + "/cmd/none",
	} {
		if _, err := BuildServices(t.Context(), service(build)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("of %s: %v; want an error with %q", build, err, want)
		}
	}
}

func TestBuildServicesErrors(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	write("script", "#!/bin/sh\necho\n")
	write("text", "hello\n")
	write("nomod/main.go", "package main\n\nfunc main() {}\n")
	write("lib/go.mod", "module example.com/lib\n\ngo 1.24\n")
	write("lib/lib.go", "package lib\n")
	write("empty/README", "nothing\n")
	write("empty/go.mod", "module example.com/empty\n")
	write("broken/go.mod", "module example.com/broken\n\ngo 1.24\n")
	write("broken/main.go", "package main\n\nfunc main() { nonsense() }\n")
	write("cgo/go.mod", "module example.com/cgo\n\ngo 1.24\n")
	write("cgo/main.go", "package main\n\nimport \"C\"\n\nfunc main() {}\n")
	for _, tc := range []struct{ name, build, run, want string }{
		{"nothing there", "./none", "/bin/a", "none does not exist; paths that begin with a dot are relative to the folder of cluster.yaml"},
		{"a program of the image", "./text", "/bin/webd", "/bin/webd is a program of the image itself"},
		{"script", "./script", "/bin/a", "script is a script, and the image has no interpreter"},
		{"text", "./text", "/bin/a", "text is no Linux program"},
		{"no module", "./nomod", "/bin/a", "go mod init"},
		{"library", "./lib", "/bin/a", "is package lib; a program is package main"},
		{"no Go files", "./empty", "/bin/a", "build names the folder of a Go main package"},
		{"compiler", "./broken", "/bin/a", "main.go:3:15: undefined: nonsense"},
		{"cgo", "./cgo", "/bin/a", "without cgo"},
		{"dynamic", "/bin/true", "/bin/a", "/bin/true is linked dynamically and needs libc.so.6, which the image has not"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			o := ServiceOptions{Config: withServices(t, "  - {name: a, run: ["+tc.run+"], build: "+tc.build+"}\n"), Dir: dir, Arch: "amd64", OutDir: t.TempDir()}
			_, err := BuildServices(t.Context(), o)
			if err == nil || !strings.Contains(err.Error(), tc.want) || !strings.Contains(err.Error(), "services.a.") {
				t.Errorf("BuildServices = %v; want an error with %q", err, tc.want)
			}
			if left, _ := os.ReadDir(o.OutDir); len(left) > 0 {
				t.Errorf("a failed build left %v", left)
			}
		})
	}
	t.Run("no such program", func(t *testing.T) {
		o := ServiceOptions{Config: withServices(t, "  - {name: a, run: [/bin/other]}\n"), Arch: "amd64"}
		if _, err := BuildServices(t.Context(), o); err == nil || !strings.Contains(err.Error(), "the image has no program /bin/other; it has /bin/cloned, /bin/webd") {
			t.Errorf("BuildServices = %v", err)
		}
	})
	t.Run("another machine", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "hello")
		cmd := exec.Command("go", "build", "-o", file, ".")
		cmd.Dir, cmd.Env = "testdata/hello", append(os.Environ(), "GOARCH=arm64", "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatal(err, string(out))
		}
		if err := CheckStatic(file, "amd64"); err == nil || !strings.Contains(err.Error(), "is for EM_AARCH64; the board needs EM_X86_64 (amd64)") {
			t.Errorf("CheckStatic = %v", err)
		}
		if err := CheckStatic(file, "arm64"); err != nil {
			t.Error(err)
		}
	})
}
