package main

import (
	"slices"
	"strings"
	"testing"
)

func TestDispatch(t *testing.T) {
	for _, tc := range []struct {
		args []string
		want string // program and its arguments
		code int
	}{
		{[]string{"/init"}, "init", 10},
		{[]string{"init", "text"}, "init text", 10},
		{[]string{"/bin/webd", "--listen", ":80"}, "webd --listen :80", 11},
		{[]string{"./node", "webd", "--help"}, "webd --help", 11},
		{[]string{"webd", "init"}, "webd init", 11},
		{[]string{"node"}, "", 2},
		{[]string{"node", "x", "webd"}, "", 2},
		{[]string{"/bin/sh"}, "", 2},
		{[]string{""}, "", 2},
		{nil, "", 2},
	} {
		var ran string
		fake := func(name string, code int) func([]string) int {
			return func(args []string) int {
				ran = strings.Join(append([]string{name}, args...), " ")
				return code
			}
		}
		var out strings.Builder
		code := run(tc.args, map[string]func([]string) int{"init": fake("init", 10), "webd": fake("webd", 11)}, &out)
		if ran != tc.want || code != tc.code {
			t.Errorf("run(%q) ran %q, exit code %d; want %q, %d", tc.args, ran, code, tc.want, tc.code)
		}
		if want := "programs: [init webd]"; code == 2 && !strings.Contains(out.String(), want) {
			t.Errorf("run(%q) said %q; want %q", tc.args, &out, want)
		}
	}
}

// What the image links to must exist.
func TestPrograms(t *testing.T) {
	var names []string
	for name := range programs {
		names = append(names, name)
	}
	slices.Sort(names)
	if want := []string{"cloned", "init", "webd"}; !slices.Equal(names, want) {
		t.Errorf("programs = %v; want %v (and image/build.go to link to each)", names, want)
	}
}
