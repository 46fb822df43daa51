package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"clonecluster/config"
)

// TestSetThatIsWrong: what a node would ignore at its boot is an error here, and
// in the words of this command line.
func TestSetThatIsWrong(t *testing.T) {
	cmd := newConfigCheckCmd()
	cmd.SetIn(bytes.NewReader(config.DemoYAML))
	_, err := readConfig(cmd, []string{"-"}, []string{"system.log-level=debug", "vip.ipv5=10.0.0.9/24"})
	if err == nil || !strings.HasPrefix(err.Error(), `--set vip.ipv5: vip: unknown name "ipv5"`) || strings.Contains(err.Error(), "ignored") {
		t.Errorf("readConfig = %v", err)
	}
}

// TestConfigShowsWhereValuesComeFrom has a value of each origin.
func TestConfigShowsWhereValuesComeFrom(t *testing.T) {
	cmd := newConfigShowCmd()
	cmd.SetIn(bytes.NewReader(config.DemoYAML))
	cmd.SetArgs([]string{"-", "--json", "--set", "policy.weights[0].mac=*:01", "--set", "policy.weights[0].weight=50", "--set", "cluster.drain=0"})
	var out bytes.Buffer
	cmd.SetOut(&out)
	if err := cmd.Execute(); err != nil {
		t.Fatal(err)
	}
	var entries []config.Entry
	if err := json.Unmarshal(out.Bytes(), &entries); err != nil {
		t.Fatal(err)
	}
	shown := map[string]config.Entry{}
	for _, e := range entries {
		shown[e.Path] = e
	}
	for _, want := range []config.Entry{
		{Path: "cluster.flow-key", Value: "(secret)", Source: "derived"},
		{Path: "cluster.drain", Value: "0s", Source: "cmdline"},
		{Path: "policy.balance", Value: "even", Source: "derived"},
		{Path: "policy.weights[0].mac", Value: "*:01", Source: "cmdline"},
		{Path: "policy.weights[0].weight", Value: "50", Source: "cmdline"},
		{Path: "rules", Value: "[]", Source: "default"},
	} {
		if got := shown[want.Path]; got != want {
			t.Errorf("%s is shown as %+v; want %+v", want.Path, got, want)
		}
	}
	if e := shown["cluster.detect"]; e.Value != "relaxed" || !strings.HasPrefix(e.Source, "standard input:") {
		t.Errorf("cluster.detect is shown as %+v; want relaxed, and its line", e)
	}
}

func TestConfigCheckWarns(t *testing.T) {
	cmd := newConfigCheckCmd()
	cmd.SetIn(bytes.NewReader(config.DemoYAML))
	cmd.SetArgs([]string{"-"})
	var out, warnings bytes.Buffer
	cmd.SetOut(&out)
	cmd.SetErr(&warnings)
	if err := cmd.Execute(); err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(out.String(), `ok: cluster "demo"`) || !strings.HasPrefix(warnings.String(), "warning: cluster.key is the published key") {
		t.Errorf("check prints %q and warns %q", out.String(), warnings.String())
	}
}

// A program that the image would not have is no fault: on hosts it is theirs.
func TestConfigCheckPrograms(t *testing.T) {
	head, _, _ := strings.Cut(string(config.DemoYAML), "\nservices:\n")
	for _, tt := range []struct{ services, want string }{
		{"{name: web, run: [/bin/webd], ports: [80/tcp]}", ""},
		{"{name: web, run: [/bin/nosuch], ports: [80/tcp]}", "warning: services.web.run: the image has no program /bin/nosuch; it has /bin/cloned, /bin/webd; say with build where it comes from (of no matter on hosts"},
		{"{name: web, run: [/bin/webd], ports: [80/tcp], health: {exec: [/bin/check]}}", "warning: services.web.health.exec: the image has no program /bin/check;"},
		{"{name: shop, run: [/bin/shop], build: example.com/shop@v1.2.3, ports: [81/tcp]}, {name: web, run: [/bin/webd], ports: [80/tcp], health: {exec: [/bin/shop]}}", ""},
		{"{name: shop, run: [/bin/shop], build: example.com/shop@v1.2.3, ports: [81/tcp]}, {name: web, run: [/w], ports: [80/tcp]}", "it has /bin/cloned, /bin/webd, /bin/shop; say"},
	} {
		cmd := newConfigCheckCmd()
		cmd.SetIn(strings.NewReader(head + "\nservices: [" + tt.services + "]\n"))
		cmd.SetArgs([]string{"-"})
		var out, warnings bytes.Buffer
		cmd.SetOut(&out)
		cmd.SetErr(&warnings)
		if err := cmd.Execute(); err != nil || !strings.HasPrefix(out.String(), "ok: ") {
			t.Errorf("%s: %v, %q", tt.services, err, out.String())
		}
		if got := warnings.String(); !strings.Contains(got, tt.want) || tt.want == "" && strings.Contains(got, "no program") {
			t.Errorf("%s: warnings %q; want %q", tt.services, got, tt.want)
		}
	}
}

// What services are built from is looked for beside the file, which is named as it
// was given.
func TestConfigCheckSources(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	write := func(name, text string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("shop/prog/main.go", "package main\n\nfunc main() {}\n")
	write("shop/lib/lib.go", "package lib\n")
	write("shop/script", "#!/bin/sh\n")
	write("shop/www/index.html", "hello")
	for _, tt := range []struct{ build, content, want string }{
		{"./prog", "www", ""},
		{"example.com/x/cmd/y@v1.2.3", "./www", ""},
		{"./none", "www", `shop/cluster.yaml:LINE:12: services.shop.build: shop/none does not exist; paths that begin with a dot`},
		{"./lib", "www", "services.shop.build: shop/lib is package lib; a program is package main"},
		{"./www", "www", "services.shop.build: shop/www has no Go files; build names the folder"},
		{"./script", "www", "services.shop.build: shop/script is a script"},
		{"./prog", "none", "services.shop.content: there is no folder shop/none"},
		{"./prog", "script", "services.shop.content: shop/script is a file; content is a folder"},
		{"prog", "www", `shop/cluster.yaml:LINE:12: services.shop.build: "prog" is neither a path nor an import path`},
	} {
		head, rest, _ := strings.Cut(string(config.DemoYAML), "\nservices:\n")
		head += "\nservices:\n  - name: shop\n    run: [/bin/shop]\n"
		write("shop/cluster.yaml", head+"    build: "+tt.build+"\n    content: "+tt.content+"\n    ports: [8082/tcp]\n"+rest)
		want := strings.ReplaceAll(tt.want, "LINE", strconv.Itoa(1+strings.Count(head, "\n")))
		_, err := clonectl(t, "config", "check", "shop/cluster.yaml")
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("build %s, content %s: %v; want %q", tt.build, tt.content, err, want)
		}
	}
}
