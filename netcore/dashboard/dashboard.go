// Package dashboard is the page that shows a cluster live. Every node serves it; it
// asks for GET /v1/live and needs nothing from anywhere else.
// docs/decisions/0024-dashboard.md says how a browser gets in.
package dashboard

import (
	"bytes"
	"embed"
	"io/fs"
	"net/http"
	"path"
	"strings"
	"time"
)

// Root is the folder that the page is served in.
const Root = "/dashboard/"

//go:embed page
var files embed.FS

// Policy is the Content-Security-Policy of the page: nothing but what the same server
// gives, and no text that becomes code.
const Policy = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; " +
	"base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"

var types = map[string]string{
	".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml",
}

// Paths are those of the page and its parts.
func Paths() []string {
	all := []string{Root}
	entries, _ := fs.ReadDir(files, "page") // it is there, or this would not build
	for _, e := range entries {
		if e.Name() != "index.html" {
			all = append(all, Root+e.Name())
		}
	}
	return all
}

// Serve answers with what is at one of Paths.
func Serve(w http.ResponseWriter, r *http.Request) {
	name := strings.TrimPrefix(r.URL.Path, Root)
	if name == "" {
		name = "index.html"
	}
	data, err := files.ReadFile("page/" + name)
	if err != nil {
		http.NotFound(w, r)
		return
	}
	h := w.Header()
	h.Set("Content-Type", types[path.Ext(name)])
	h.Set("Content-Security-Policy", Policy)
	h.Set("Referrer-Policy", "no-referrer")
	h.Set("Cross-Origin-Opener-Policy", "same-origin")
	h.Set("Cross-Origin-Resource-Policy", "same-origin")
	http.ServeContent(w, r, name, time.Time{}, bytes.NewReader(data))
}
