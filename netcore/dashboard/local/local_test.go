package local_test

import (
	"bufio"
	"encoding/json"
	"io"
	"net/http"
	"net/http/cookiejar"
	"net/url"
	"strings"
	"testing"
	"time"

	"clonecluster/netcore/api"
	"clonecluster/netcore/dashboard"
)

// TestDoor: who gets in, and what another site could have a browser do.
func TestDoor(t *testing.T) {
	c := startCluster(t, 2)
	p := c.proxy(api.RoleControl, true, c.nodes[0])
	link := p.Link()
	at, err := url.Parse(link)
	if err != nil {
		t.Fatal(err)
	}
	base := strings.TrimSuffix(link, "?"+at.RawQuery)
	ask := func(cl *http.Client, method, link, body string, header ...string) *http.Response {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), method, link, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		for i := 0; i < len(header); i += 2 {
			if header[i] == "Host" {
				req.Host = header[i+1]
			} else {
				req.Header.Set(header[i], header[i+1])
			}
		}
		resp, err := cl.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { resp.Body.Close() })
		return resp
	}
	browser := func() *http.Client {
		jar, _ := cookiejar.New(nil) // with nil it never fails
		return &http.Client{Jar: jar, Timeout: 20 * time.Second}
	}
	ours, other := browser(), browser()
	want := func(what string, resp *http.Response, code int) {
		t.Helper()
		if resp.StatusCode != code {
			t.Errorf("%s: %s; want %d", what, resp.Status, code)
		}
	}
	want("a wrong token", ask(other, "GET", base+"?token=x", ""), 403)
	want("no token", ask(other, "GET", base, ""), 403)
	want("another folder", ask(other, "GET", "http://"+at.Host+"/dashboard/", ""), 404)
	want("another name of this computer", ask(other, "GET", link, "", "Host", "evil.example:80"), 404)
	resp := ask(ours, "GET", link, "")
	want("the link", resp, 200)
	for h, v := range map[string]string{"Content-Security-Policy": dashboard.Policy, "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Content-Type": "text/html; charset=utf-8"} {
		if got := resp.Header.Get(h); got != v {
			t.Errorf("%s is %q; want %q", h, got, v)
		}
	}
	cookie := ours.Jar.Cookies(resp.Request.URL)
	if len(cookie) != 1 || len(ours.Jar.Cookies(&url.URL{Scheme: "http", Host: "127.0.0.1", Path: "/"})) != 0 {
		t.Errorf("cookies %v; want one, of this folder alone", cookie)
	}
	want("the link again, in the same browser", ask(ours, "GET", link, ""), 200)
	want("the link again, in another", ask(other, "GET", link, ""), 403)
	want("a part of the page, in another", ask(other, "GET", base+"dashboard/style.css", ""), 403)
	for _, path := range dashboard.Paths() {
		want(path, ask(ours, "GET", base+strings.TrimPrefix(path, "/"), ""), 200)
	}
	want("what there is not", ask(ours, "GET", base+"dashboard/nothing.js", ""), 404)
	want("more of the API than the page needs", ask(ours, "GET", base+"v1/logs", ""), 404)

	drain := base + "v1/drain?node=node2"
	origin := "http://" + at.Host
	kind := []string{"Content-Type", "application/json"}
	want("an order from another browser", ask(other, "POST", drain, "{}", kind...), 403)
	want("an order from another site", ask(ours, "POST", drain, "{}", append(kind, "Sec-Fetch-Site", "cross-site")...), 403)
	want("an order from another server of this computer", ask(ours, "POST", drain, "{}", append(kind, "Sec-Fetch-Site", "same-site")...), 403)
	want("the same of an old browser", ask(ours, "POST", drain, "{}", append(kind, "Origin", "http://127.0.0.1:1")...), 403)
	want("an order that a form sends", ask(ours, "POST", drain, "{}", "Content-Type", "text/plain", "Origin", origin), 415)
	want("an order that is none", ask(ours, "POST", drain, `{"reason":1}`, append(kind, "Origin", origin)...), 400)
	if o := c.nodes[1].ordered(); len(o) > 0 {
		t.Fatalf("and it did %q", o)
	}
	want("an order", ask(ours, "POST", drain, `{"reason":"ours"}`, append(kind, "Origin", origin, "Sec-Fetch-Site", "same-origin")...), 200)
	want("an order for nobody", ask(ours, "POST", base+"v1/drain?node=nobody", `{}`, append(kind, "Origin", origin)...), 404)
	if o := c.nodes[1].ordered(); len(o) != 1 {
		t.Errorf("node2 was told %q; want one order", o)
	}
	for _, tt := range []struct {
		name    string
		role    api.Role
		control bool
	}{{"that only looks", api.RoleControl, false}, {"whose certificate only looks", api.RoleReadOnly, true}} {
		looks := c.proxy(tt.role, tt.control, c.nodes[0])
		cl := browser()
		base, _, _ := strings.Cut(looks.Link(), "?")
		want("the link", ask(cl, "GET", looks.Link(), ""), 200)
		want("an order to one "+tt.name, ask(cl, "POST", base+"v1/drain?node=node2", "{}", kind...), 403)
	}
}

// TestLiveGoesOn: the browser's stream outlives the node that it is told by, and there
// are so many at most.
func TestLiveGoesOn(t *testing.T) {
	c := startCluster(t, 3)
	p := c.proxy(api.RoleReadOnly, false, c.nodes[0], c.nodes[1])
	jar, _ := cookiejar.New(nil) // with nil it never fails
	browser := &http.Client{Jar: jar}
	resp, err := browser.Get(p.Link())
	if err != nil {
		t.Fatal(err)
	}
	_, _ = io.Copy(io.Discard, resp.Body)
	resp.Body.Close()
	base, _, _ := strings.Cut(p.Link(), "?")
	open := func() *http.Response {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), "GET", base+"v1/live", nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := browser.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { resp.Body.Close() })
		return resp
	}
	stream := open()
	lines := bufio.NewScanner(stream.Body)
	lines.Buffer(nil, 1<<20)
	toldBy := func(other string) string {
		t.Helper()
		for begin := time.Now(); lines.Scan(); {
			var l api.Live
			if data, ok := strings.CutPrefix(lines.Text(), "data: "); ok && json.Unmarshal([]byte(data), &l) == nil && l.Asked != "" && l.Asked != other {
				return l.Asked
			}
			if time.Since(begin) > 20*time.Second {
				break
			}
		}
		t.Fatalf("nobody tells any more: %v", lines.Err())
		return ""
	}
	first := toldBy("")
	for i, n := range c.nodes {
		if n.id == first {
			begin := time.Now()
			c.kill(i)
			second := toldBy(first)
			t.Logf("%s went on after %v", second, time.Since(begin))
		}
	}
	codes := map[int]int{}
	for range 10 {
		codes[open().StatusCode]++
	}
	if codes[200] != 7 || codes[503] != 3 {
		t.Errorf("ten more who look: %v; want that three are too many", codes)
	}
}
