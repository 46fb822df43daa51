// Package local gives a browser on this computer the dashboard of a cluster: a server
// on a loopback address, which has the certificate that the cluster asks for. The
// browser needs none, but a link that works once.
package local

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync/atomic"
	"time"

	"clonecluster/netcore/api"
	"clonecluster/netcore/dashboard"
)

const (
	// patience is how long the cluster may say nothing, of which two messages come in
	// a second, until another connection is tried: a node without power says nothing.
	patience = 2 * time.Second
	// againAfter is the time between two tries.
	againAfter = 300 * time.Millisecond
	// mostViewers is more than the tabs of one person, and less than a node takes.
	mostViewers = 8
	mostBody    = 4 << 10
	mostPage    = 4 << 20
	cookieName  = "clonecluster"
)

// Proxy serves the dashboard of one cluster to one browser. All that it serves is below
// a folder with a name that cannot be guessed, which also keeps its cookie from other
// servers on this computer: cookies know no ports.
type Proxy struct {
	client  *api.Client
	control bool
	host    string // address and port, as browsers name it
	folder  string
	session string
	token   atomic.Pointer[string] // nil: used
	viewers chan struct{}
	csrf    *http.CrossOriginProtection
	mux     *http.ServeMux
}

// New makes a proxy that is reached at host, "127.0.0.1:9265". With control it hands on
// orders, too, if the client's certificate is good for that.
func New(client *api.Client, host string, control bool) *Proxy {
	token := rand.Text()
	p := &Proxy{
		client: client, control: control, host: host, folder: "/" + rand.Text() + "/", session: rand.Text(), viewers: make(chan struct{}, mostViewers),
		csrf: http.NewCrossOriginProtection(), mux: http.NewServeMux(),
	}
	p.token.Store(&token)
	p.mux.HandleFunc("GET "+dashboard.Root, p.page)
	p.mux.HandleFunc("GET /v1/live", p.live)
	p.mux.HandleFunc("POST /v1/drain", p.order)
	p.mux.HandleFunc("POST /v1/resume", p.order)
	return p
}

// Link opens the dashboard, once.
func (p *Proxy) Link() string {
	link := "http://" + p.host + p.folder
	if t := p.token.Load(); t != nil {
		link += "?token=" + *t
	}
	return link
}

// ServeHTTP lets in who has come by the link, and nobody by another name of this
// computer, which somebody's DNS may have given it.
func (p *Proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	h := w.Header()
	h.Set("Cache-Control", "no-store")
	h.Set("Referrer-Policy", "no-referrer")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Content-Security-Policy", dashboard.Policy)
	rest, ours := strings.CutPrefix(r.URL.Path, p.folder)
	if r.Host != p.host || !ours {
		http.Error(w, "there is nothing here", http.StatusNotFound)
		return
	}
	if rest == "" && r.Method == http.MethodGet {
		p.enter(w, r)
		return
	}
	if !p.known(r) {
		http.Error(w, `this browser has not come by the link that "clonectl dashboard" printed`, http.StatusForbidden)
		return
	}
	if err := p.csrf.Check(r); err != nil {
		fail(w, http.StatusForbidden, err)
		return
	}
	http.StripPrefix(strings.TrimSuffix(p.folder, "/"), p.mux).ServeHTTP(w, r)
}

// enter takes the token for a cookie.
func (p *Proxy) enter(w http.ResponseWriter, r *http.Request) {
	if token := p.token.Load(); token != nil && same(r.URL.Query().Get("token"), *token) && p.token.CompareAndSwap(token, nil) {
		http.SetCookie(w, &http.Cookie{Name: cookieName, Value: p.session, Path: p.folder, HttpOnly: true, SameSite: http.SameSiteStrictMode})
	} else if !p.known(r) {
		http.Error(w, `this link has been used; start "clonectl dashboard" again for another one`, http.StatusForbidden)
		return
	}
	http.Redirect(w, r, strings.TrimSuffix(p.folder, "/")+dashboard.Root, http.StatusSeeOther)
}

func (p *Proxy) known(r *http.Request) bool {
	c, err := r.Cookie(cookieName)
	return err == nil && same(c.Value, p.session)
}

func same(a, b string) bool { return subtle.ConstantTimeCompare([]byte(a), []byte(b)) == 1 }

// page hands on the page of the node that answers: it fits that node's API.
func (p *Proxy) page(w http.ResponseWriter, r *http.Request) {
	var data []byte
	var kind string
	err := p.untilAnswered(r.Context(), func(ctx context.Context) error {
		resp, err := p.client.Open(ctx, r.URL.Path)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		kind = resp.Header.Get("Content-Type")
		data, err = io.ReadAll(io.LimitReader(resp.Body, mostPage))
		return err
	})
	if err != nil {
		http.Error(w, fmt.Sprintf("no node of the cluster gives its dashboard: %v", err), code(err))
		return
	}
	w.Header().Set("Content-Type", kind)
	_, _ = w.Write(data)
}

// untilAnswered tries again if a node has gone while it was asked.
func (p *Proxy) untilAnswered(ctx context.Context, ask func(context.Context) error) (err error) {
	for range 3 {
		one, cancel := context.WithTimeout(ctx, patience)
		err = ask(one)
		cancel()
		if err == nil || errors.As(err, new(*api.Error)) || ctx.Err() != nil {
			return err
		}
	}
	return err
}

// code is what an error is to the browser.
func code(err error) int {
	if e := new(api.Error); errors.As(err, &e) {
		return e.Code
	}
	return http.StatusBadGateway
}

// live hands on what the cluster does, from whichever node says it. The browser's
// connection outlives that node.
func (p *Proxy) live(w http.ResponseWriter, r *http.Request) {
	select {
	case p.viewers <- struct{}{}:
		defer func() { <-p.viewers }()
	default:
		fail(w, http.StatusServiceUnavailable, errors.New("too many windows show this dashboard"))
		return
	}
	control := http.NewResponseController(w)
	w.Header().Set("Content-Type", "text/event-stream")
	send := func(event string, data []byte) error {
		if _, err := fmt.Fprintf(w, "event: %s\ndata: %s\n\n", event, data); err != nil {
			return err
		}
		return control.Flush()
	}
	role := api.RoleReadOnly
	if p.control {
		role = api.RoleControl
	}
	if send("limit", fmt.Appendf(nil, `{"role":%q}`, role)) != nil {
		return
	}
	for r.Context().Err() == nil {
		ctx, cancel := context.WithCancel(r.Context())
		silent := time.AfterFunc(patience, cancel)
		err := p.client.Follow(ctx, "/v1/live", nil, func(data []byte) error {
			silent.Reset(patience)
			return send("live", data)
		})
		silent.Stop()
		cancel()
		text, _ := json.Marshal(api.Problem{Error: err.Error()}) // a struct of one string
		if errors.As(err, new(*api.Error)) && send("problem", text) != nil {
			return
		}
		select {
		case <-r.Context().Done():
		case <-time.After(againAfter):
		}
	}
}

// order hands on a drain or resume, once: an order is not given twice.
func (p *Proxy) order(w http.ResponseWriter, r *http.Request) {
	if !p.control {
		fail(w, http.StatusForbidden, errors.New("this dashboard only looks; start it with --control to give orders"))
		return
	}
	if r.Header.Get("Content-Type") != "application/json" { // which no form of another site sends
		fail(w, http.StatusUnsupportedMediaType, errors.New("an order is JSON"))
		return
	}
	order, err := api.ParseOrder(http.MaxBytesReader(w, r.Body, mostBody))
	if err != nil {
		fail(w, http.StatusBadRequest, err)
		return
	}
	var status api.Status
	query := url.Values{"node": {r.URL.Query().Get("node")}}
	if err := p.client.Post(r.Context(), r.URL.Path, query, order, &status); err != nil {
		fail(w, code(err), err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(status)
}

func fail(w http.ResponseWriter, code int, err error) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(api.Problem{Error: err.Error()})
}
