package local_test

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"clonecluster/netcore/api"
	"clonecluster/netcore/dashboard/chromiumtest"
	"clonecluster/netcore/finding"
)

// TestPage: the page as its readers see it, of a cluster of four that has trouble.
func TestPage(t *testing.T) {
	if testing.Short() {
		t.Skip("starts a browser: not with -short")
	}
	c := startCluster(t, 4)
	troubles := []finding.Finding{
		{Code: "no-flooding", Level: finding.Critical, Node: c.nodes[1].id, What: "this node gets only some of the frames for the clone MAC", Fix: "allow unknown unicast flooding on its port", Since: time.Now(), Count: 3},
		{Code: "programs-differ", Level: finding.Info, Node: c.nodes[1].id, What: "the nodes run 2 different programs", Fix: "roll the older ones out again", Since: time.Now(), Count: 1},
	}
	c.find(1, troubles)
	p := chromiumtest.Open(t, c.proxy(api.RoleControl, true, c.nodes[0], c.nodes[1]).Link(), 1360, 900)
	p.AwaitText(60*time.Second, "4 of 4 nodes serve, but: no-flooding.", "Node2 gets only some of the frames", "accept-new", "ready after 2.9 s")
	headline := func(grade, text string) {
		t.Helper()
		p.Await(grade+": "+text, fmt.Sprintf(`document.querySelector('#now').className === %q && document.querySelector('#headline').textContent === %q`, grade, text), 10*time.Second)
	}
	headline("bad", "4 of 4 nodes serve, but: no-flooding.")
	c.find(1, []finding.Finding{
		{Code: "no-flooding", Level: finding.Warning, Node: c.nodes[1].id, What: "this node gets only some of the frames for the clone MAC", Since: time.Now(), Count: 1},
		{Code: "directed-mode", Level: finding.Info, Node: c.nodes[1].id, What: "the cluster is in directed mode: node1 takes all frames", Since: time.Now(), Count: 1},
	})
	headline("ok", "All 4 nodes serve, in directed mode.")
	p.AwaitText(time.Second, "The cluster is in directed mode: node1 takes")
	c.find(1, troubles[1:])
	headline("ok", "All 4 nodes serve.")
	c.find(1, troubles)
	p.Await("the ring has the colours of four nodes", `new Set([...document.querySelectorAll('#ring .b')].map((b) => b.getAttribute('class'))).size === 4`, 5*time.Second)
	time.Sleep(8 * time.Second) // for something in the graphs
	p.AwaitText(time.Second, "Newly accepted per second", "UDP datagrams and pings", "newly accepted/s")

	for _, look := range []struct {
		name          string
		width, height int64
		phone, dark   bool
	}{{"light", 1360, 900, false, false}, {"dark", 1360, 900, false, true}, {"phone", 390, 844, true, false}, {"phone-dark", 390, 844, true, true}, {"tablet", 820, 1180, false, false}, {"narrow", 320, 700, true, false}} {
		p.Be(look.width, look.height, look.phone, look.dark)
		time.Sleep(time.Second)
		p.CheckContrast()
		p.CheckWidth()
		p.CheckNames()
		p.Shot(look.name)
		if t.Failed() {
			t.Fatalf("when it is %s", look.name)
		}
	}
	p.Be(1360, 900, false, false)

	c.kill(2)
	p.AwaitText(10*time.Second, "node3 has failed", "Its buckets are with node1", "No beacon for 300ms", "seen by node1, node2 and node4")
	p.Shot("killed")
	p.CheckContrast()
	c.revive(2)
	p.AwaitText(10*time.Second, "node3 is here")

	// An order needs a second thought, and the keyboard is enough for it.
	p.Focus(`[aria-label="Drain node2"]`)
	p.Key("\r")
	p.AwaitText(5*time.Second, "Drain node2?")
	p.CheckContrast()
	p.CheckNames()
	p.Shot("asked")
	p.Key("\x1b")
	p.Await("Escape leaves it", `!document.querySelector('dialog').open`, 5*time.Second)
	if o := c.nodes[1].ordered(); len(o) > 0 {
		t.Fatalf("nothing was ordered, and it did %q", o)
	}
	p.Key("\r")
	p.Await("the reason has the focus", `document.activeElement.id === 'askwhy'`, 5*time.Second)
	p.Key("a new disk\r")
	p.AwaitText(10*time.Second, "node2 is drained", "a new disk")
	if o := c.nodes[1].ordered(); !slices.Equal(o, []string{"drain by tester: a new disk"}) && !slices.Equal(o, []string{"drain by tester by way of " + c.nodes[0].id + ": a new disk"}) {
		t.Errorf("node2 was told %q", o)
	}
	p.AwaitText(5*time.Second, "Resume…")
	p.CheckShift()
	p.NoComplaints()

	// The node that tells it all goes: the next one does.
	c.kill(0)
	p.AwaitText(15*time.Second, "node1 has failed", "live, from node2")
	p.NoComplaints()

	p.StandStill()
	moving := chromiumtest.Eval[int](p, `[...document.querySelectorAll('body *')].filter((e) => { const s = getComputedStyle(e); return parseFloat(s.transitionDuration) > 0 && s.transitionProperty !== 'none' && s.transitionDuration !== '0s' || s.animationName !== 'none'; }).length`)
	if moving > 0 {
		t.Errorf("%d elements move for somebody who asked for less motion", moving)
	}
}

// TestPageOfMany: more nodes than there are colours are told apart, and small shares have
// their names.
func TestPageOfMany(t *testing.T) {
	if testing.Short() {
		t.Skip("starts a browser: not with -short")
	}
	const n = 18
	c := startCluster(t, n)
	p := chromiumtest.Open(t, c.proxy(api.RoleReadOnly, false, c.nodes[0]).Link(), 1360, 900)
	p.AwaitText(60*time.Second, "All 18 nodes serve")
	owners := chromiumtest.Eval[int](p, `document.querySelectorAll('#ring g > path:not(.hatch)').length`) // here some have nothing
	if owners < 16 {
		t.Fatalf("%d nodes own buckets; that is too few to try", owners)
	}
	for _, dark := range []bool{false, true} {
		p.Be(1360, 900, false, dark)
		time.Sleep(time.Second) // the colours change slowly
		looks := chromiumtest.Eval[int](p, `new Set([...document.querySelectorAll('#ring .b')].map((b) => { const s = getComputedStyle(b); return s.fill + s.fillOpacity; })).size`)
		if looks != owners {
			t.Errorf("dark %v: the buckets of %d nodes have %d looks", dark, owners, looks)
		}
		p.CheckContrast()
		p.CheckWidth()
		p.CheckNames()
		p.Shot(map[bool]string{false: "many", true: "many-dark"}[dark])
	}
	if got := chromiumtest.Eval[int](p, `new Set([...document.querySelectorAll('#ring g > path:not(.hatch) > title')].map((t) => t.textContent).filter((t) => /^node\d+: \d+ buckets?, \d+ %$/.test(t))).size`); got != owners {
		t.Errorf("%d shares say whose they are and how large; want %d", got, owners)
	}
	if got := chromiumtest.Eval[int](p, `document.querySelectorAll('#ring .hatch').length`); got < owners-8 {
		t.Errorf("%d shares are hatched; want those of all but eight nodes", got)
	}
	// Few are left, and so have labels on what is hatched.
	for i := range 12 {
		c.kill(17 - i - 5*(i/6))
	}
	p.Be(1360, 900, false, false)
	p.Await("hatched shares have labels", `document.querySelectorAll('#ring text[class*=again]').length > 0`, 20*time.Second)
	p.CheckContrast()
	p.Shot("few-left")
	p.NoComplaints()
}

// TestPageOnlyLooks: without --control there is nothing to press.
func TestPageOnlyLooks(t *testing.T) {
	if testing.Short() {
		t.Skip("starts a browser: not with -short")
	}
	c := startCluster(t, 2)
	p := chromiumtest.Open(t, c.proxy(api.RoleControl, false, c.nodes[0]).Link(), 800, 600)
	p.AwaitText(60*time.Second, "All 2 nodes serve")
	buttons := chromiumtest.Eval[int](p, `document.querySelectorAll('main button').length`)
	if buttons > 0 {
		t.Errorf("%d buttons", buttons)
	}
	// What the policy of the page forbids.
	ran := chromiumtest.Eval[bool](p, `(() => {
		try { document.body.insertAdjacentHTML('beforeend', '<img src="x" onerror="window.ran = true">'); return true; } catch { return !!window.ran; }
	})()`)
	if ran {
		t.Error("a text became code")
	}
}
