// Package chromiumtest is for tests that look at a page as its readers do: in
// Chromium, of which every complaint fails the test.
package chromiumtest

import (
	"context"
	_ "embed"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/cdproto/accessibility"
	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/page"
	"github.com/chromedp/chromedp"
)

// patience is for one step of a browser on a busy machine.
const patience = 2 * time.Minute

// Page is a tab.
type Page struct {
	t   testing.TB
	ctx context.Context

	mu         sync.Mutex
	complaints []string
}

// look measures contrast and layout shifts; see look.js.
//
//go:embed look.js
var look string

// Open starts Chromium, as wide and high as that, with a page.
func Open(t testing.TB, url string, width, height int) *Page {
	t.Helper()
	program, err := exec.LookPath("chromium")
	if err != nil {
		t.Skip("needs Debian's package chromium")
	}
	flags := append(chromedp.DefaultExecAllocatorOptions[:], chromedp.ExecPath(program), chromedp.WindowSize(width, height), chromedp.DisableGPU)
	if os.Geteuid() == 0 {
		flags = append(flags, chromedp.NoSandbox)
	}
	ctx, cancel := chromedp.NewExecAllocator(context.WithoutCancel(t.Context()), flags...)
	t.Cleanup(cancel)
	// What the protocol has that this client does not know is no matter.
	ctx, cancel = chromedp.NewContext(ctx, chromedp.WithErrorf(func(string, ...any) {}))
	t.Cleanup(cancel)
	p := &Page{t: t, ctx: ctx}
	console := chromedp.Console(ctx)
	go func() {
		for m, err := range console {
			if err != nil {
				return
			}
			p.mu.Lock()
			p.complaints = append(p.complaints, fmt.Sprintf("%s: %s (%s)", m.Type, m.Text, m.URL))
			p.mu.Unlock()
		}
	}()
	p.do(chromedp.Func(func(ctx context.Context, _ *chromedp.Target) error {
		_, err := chromedp.Call(ctx, page.AddScriptToEvaluateOnNewDocument, page.AddScriptToEvaluateOnNewDocumentParams{Source: look})
		return err
	}), chromedp.Navigate(url))
	return p
}

// Complaints are the lines in the browser's console until now.
func (p *Page) Complaints() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]string(nil), p.complaints...)
}

// NoComplaints fails the test if there are any, and if nobody would have heard of them.
func (p *Page) NoComplaints() {
	p.t.Helper()
	const canary = "whoever reads this listens"
	Eval[bool](p, fmt.Sprintf("console.log(%q), true", canary))
	is := func(line string) bool { return strings.Contains(line, canary) }
	for deadline := time.Now().Add(patience); !slices.ContainsFunc(p.Complaints(), is); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			p.t.Fatal("the browser's console is not heard, so that it may have complained")
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.complaints = slices.DeleteFunc(p.complaints, is); len(p.complaints) > 0 {
		p.t.Errorf("the browser complains:\n%s", strings.Join(p.complaints, "\n"))
	}
}

func (p *Page) do(actions ...chromedp.Action[chromedp.Void]) {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.ctx, patience)
	defer cancel()
	if err := chromedp.Do(ctx, actions...); err != nil {
		p.t.Fatalf("in Chromium: %v", err)
	}
}

// get gives what an action gives.
func get[T any](p *Page, action chromedp.Action[T]) T {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.ctx, patience)
	defer cancel()
	v, err := chromedp.Run(ctx, action)
	if err != nil {
		p.t.Fatalf("in Chromium: %v", err)
	}
	return v
}

// Eval gives the value of an expression, of a promise what it becomes.
func Eval[T any](p *Page, expression string) T {
	p.t.Helper()
	return get(p, chromedp.Evaluate[T](expression, chromedp.EvalAwaitPromise))
}

// Text gives the text of the page as it is seen.
func (p *Page) Text() string {
	p.t.Helper()
	return Eval[string](p, `document.body.innerText`)
}

// Await waits until an expression is true.
func (p *Page) Await(what, expression string, atMost time.Duration) {
	p.t.Helper()
	for deadline := time.Now().Add(atMost); ; time.Sleep(100 * time.Millisecond) {
		if Eval[bool](p, "!!("+expression+")") {
			return
		}
		if time.Now().After(deadline) {
			p.Shot("failed")
			p.t.Fatalf("%s: not so after %v; the page says\n%s\nand the browser %q", what, atMost, p.Text(), p.Complaints())
		}
	}
}

// AwaitText waits until the page shows all of these texts.
func (p *Page) AwaitText(atMost time.Duration, texts ...string) {
	p.t.Helper()
	for _, text := range texts {
		quoted, _ := json.Marshal(text) // of a string
		p.Await("the page shows "+text, fmt.Sprintf("document.body.innerText.includes(%s)", quoted), atMost)
	}
}

// Be makes the window as large as that, of a phone or not, and its user one who likes
// light or dark.
func (p *Page) Be(width, height int64, phone, dark bool) {
	p.t.Helper()
	scale, scheme := 1.0, "light"
	if phone {
		scale = 2
	}
	if dark {
		scheme = "dark"
	}
	p.do(chromedp.EmulateViewport(width, height, chromedp.EmulateScale(scale), func(m *emulation.SetDeviceMetricsOverrideParams, _ *emulation.SetTouchEmulationEnabledParams) {
		m.Mobile = phone
	}),
		media("prefers-color-scheme", scheme))
}

// StandStill asks for less motion.
func (p *Page) StandStill() {
	p.t.Helper()
	p.do(media("prefers-reduced-motion", "reduce"))
}

func media(name, value string) chromedp.Action[chromedp.Void] {
	return chromedp.Func(func(ctx context.Context, _ *chromedp.Target) error {
		_, err := chromedp.Call(ctx, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{Features: []*emulation.MediaFeature{{Name: name, Value: value}}})
		return err
	})
}

// Shot keeps a picture of the whole page in build/screenshots, for people to look at.
func (p *Page) Shot(name string) (file string) {
	p.t.Helper()
	p.do(aside("true"))
	png := get(p, chromedp.FullScreenshot(100))
	p.do(aside("false"))
	dir := filepath.Join(root(p.t), "build", "screenshots")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		p.t.Fatal(err)
	}
	file = filepath.Join(dir, strings.ReplaceAll(p.t.Name(), "/", "-")+"-"+name+".png")
	if err := os.WriteFile(file, png, 0o644); err != nil {
		p.t.Fatal(err)
	}
	return file
}

// aside has the page not count what moves while its window grows for a picture.
func aside(on string) chromedp.Action[chromedp.Void] {
	return chromedp.Evaluate[chromedp.Void]("look.lookAside("+on+")", chromedp.EvalAwaitPromise)
}

// root is the folder of go.mod.
func root(t testing.TB) string {
	t.Helper()
	dir, err := os.Getwd()
	for err == nil {
		if _, serr := os.Stat(filepath.Join(dir, "go.mod")); serr == nil {
			return dir
		}
		if up := filepath.Dir(dir); up != dir {
			dir = up
			continue
		}
		err = os.ErrNotExist
	}
	t.Fatal(err)
	return ""
}

// CheckContrast fails the test for texts that WCAG 2.2 calls too faint (1.4.3, AA).
func (p *Page) CheckContrast() {
	p.t.Helper()
	for _, text := range Eval[[]string](p, "look.faint()") {
		p.t.Errorf("too faint: %s", text)
	}
}

// CheckWidth fails the test if one has to scroll sideways.
func (p *Page) CheckWidth() {
	p.t.Helper()
	for _, text := range Eval[[]string](p, "look.wide()") {
		p.t.Errorf("wider than the window: %s", text)
	}
}

// CheckShift fails the test if what was there has moved by itself, by more than "good"
// of the Web Vitals.
func (p *Page) CheckShift() {
	p.t.Helper()
	shift := Eval[struct {
		Sum  float64  `json:"sum"`
		Who  []string `json:"who"`
		Seen bool     `json:"seen"`
	}](p, "look.shift()")
	if shift.Sum > 0.1 || !shift.Seen {
		p.t.Errorf("the layout shifted by %.3f: %q (observed: %v)", shift.Sum, shift.Who, shift.Seen)
	}
}

// CheckNames fails the test for anything of which a screen reader could not say what
// it is, by the browser's own accessibility tree.
func (p *Page) CheckNames() {
	p.t.Helper()
	named := map[string]bool{
		"button": true, "link": true, "textbox": true, "image": true, "img": true, "region": true, "dialog": true,
		"heading": true, "RootWebArea": true, "columnheader": true,
	}
	tree := get(p, func(ctx context.Context, _ *chromedp.Target) (accessibility.GetFullAXTreeResult, error) {
		return chromedp.Call(ctx, accessibility.GetFullAXTree, accessibility.GetFullAXTreeParams{})
	})
	seen := map[string]int{}
	for _, n := range tree.Nodes {
		if n.Ignored {
			continue
		}
		role, name := text(n.Role), text(n.Name)
		seen[role]++
		focusable := slices.ContainsFunc(n.Properties, func(p *accessibility.Property) bool {
			return p.Name == accessibility.PropertyNameFocusable && string(p.Value.Value) == "true"
		})
		if (named[role] || focusable) && strings.TrimSpace(name) == "" {
			p.t.Errorf("a %s has no name (node %d)", role, n.BackendDOMNodeID)
		}
	}
	if seen["RootWebArea"] == 0 || seen["heading"] == 0 {
		p.t.Errorf("the page has the roles %v; want headings", seen)
	}
}

// text is the value of a property that is a text.
func text(v *accessibility.Value) (s string) {
	if v != nil {
		_ = json.Unmarshal(v.Value, &s) // what is none has no name
	}
	return s
}

// Key types keys to whatever has the focus.
func (p *Page) Key(keys string) {
	p.t.Helper()
	p.do(chromedp.KeyEvent(keys))
}

// Focus gives an element the focus, by its CSS selector.
func (p *Page) Focus(selector string) {
	p.t.Helper()
	p.do(chromedp.Focus(selector))
}
