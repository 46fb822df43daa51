package pxe

import (
	"cmp"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// Stage is how far a machine has come. What an event reports has the same names.
type Stage string

// The stages of a boot, in order.
const (
	Discover Stage = "discover" // the firmware asks for an address and a file
	Offer    Stage = "offer"    // it has been told which
	Ask      Stage = "ask"      // it has asked again at port 4011
	Load     Stage = "load"     // it loads a file
	File     Stage = "file"     // it has a file in full
	Kernel   Stage = "kernel"   // the node's init speaks: it asks for an address
	Address  Stage = "address"  // it takes one
	Up       Stage = "up"       // its service answers
)

// What else an event can report.
const (
	Refused Stage = "refused" // a machine that gets nothing, and why
	Aborted Stage = "aborted" // a transfer that ended early
	Stuck   Stage = "stuck"   // no next stage in time, and what to look at
	Rival   Stage = "rival"   // another DHCP server that is in the way
	Note    Stage = "note"    // of the server itself
)

var order = []Stage{Discover, Offer, Ask, Load, File, Kernel, Address, Up}

func (s Stage) rank() int { return slices.Index(order, s) }

// Event is something that happened.
type Event struct {
	Time    time.Time `json:"time"`
	Event   Stage     `json:"event"`
	Machine string    `json:"machine,omitempty"` // MAC address
	Client  string    `json:"client,omitempty"`  // what asks: "UEFI PXE, amd64"
	// Since is the time from the first sign of this boot, in seconds.
	Since   float64 `json:"since_seconds"`
	File    string  `json:"file,omitempty"`
	By      string  `json:"by,omitempty"` // HTTP or TFTP
	Bytes   int64   `json:"bytes,omitempty"`
	Seconds float64 `json:"seconds,omitempty"` // that the file took
	Address string  `json:"address,omitempty"`
	// Text says what an operator should know: for refused, stuck, rival and note
	// what to do.
	Text string `json:"text,omitempty"`
}

// String is the event in one line, without its time.
func (e Event) String() string {
	var s string
	switch e.Event {
	case Discover:
		s = "asks: " + e.Client
	case Offer:
		s = "is offered " + e.File
	case Ask:
		s = "asks at port 4011 for its file: " + e.File
	case File:
		s = fmt.Sprintf("has loaded %s: %s in %.1f s by %s", e.File, size(e.Bytes), e.Seconds, e.By)
	case Aborted:
		s = fmt.Sprintf("stopped loading %s after %s by %s", e.File, size(e.Bytes), e.By)
	case Kernel:
		s = "runs: its init asks for an address"
	case Address:
		s = "takes the address " + e.Address
	case Up:
		s = "is up: answers at " + e.Address
	default:
		s = string(e.Event)
	}
	if e.Text != "" {
		s += ": " + e.Text
	}
	if e.Machine == "" {
		return s
	}
	return fmt.Sprintf("%s %s (+%.1f s)", e.Machine, s, e.Since)
}

func size(n int64) string {
	if n < 100_000 {
		return fmt.Sprintf("%.1f kB", float64(n)/1e3)
	}
	return fmt.Sprintf("%.1f MB", float64(n)/1e6)
}

// Machine is where one machine is.
type Machine struct {
	MAC     net.HardwareAddr
	Client  Client
	Address netip.Addr // the last that is known, of the firmware or the node
	Stage   Stage
	Begin   time.Time // of this boot
	Last    time.Time // sign of it
	// Loading is the file that is on its way, "" for none.
	Loading string
	Loaded  int64  // bytes of it
	Stuck   string // why it is thought to be, "" if not
	Refused string // why, "" if not
	Steps   []Step // of this boot
}

// Step is a stage that was reached: the first time of each, and each file.
type Step struct {
	Stage Stage
	File  string
	Bytes int64
	Took  time.Duration // of a file
	At    time.Duration // since Begin
}

// The patience with each stage, from the last sign on.
const (
	patienceOffer   = 20 * time.Second // firmware asks for three other boot ways, or a person
	patienceLoad    = 15 * time.Second
	patienceFile    = 30 * time.Second // until the next file, where there is one to come
	patienceKernel  = 2 * time.Minute
	patienceAddress = 30 * time.Second
	patienceUp      = time.Minute
	forgetBoot      = 5 * time.Minute // after it, a machine that asks begins anew
)

const maxMachines = 1024

// timeline is what is known of all machines: no clock, socket or goroutine in it.
type timeline struct {
	machines map[[6]byte]*record
	report   func(Event)
	// final is the stage after which nothing more is expected: Up, or Address if
	// nobody can ask the node's service, or File if nodes do not use DHCP.
	final Stage
}

type record struct {
	Machine
	got   map[string]bool // files in full
	stuck map[Stage]bool  // reported
	told  map[string]bool // refusals reported
}

func newTimeline(final Stage, report func(Event)) *timeline {
	return &timeline{machines: make(map[[6]byte]*record), report: report, final: final}
}

// get is the record of a machine; nil if it has none and is not to get one.
func (t *timeline) get(mac [6]byte, now time.Time, create bool) *record {
	r := t.machines[mac]
	if r == nil && create {
		if len(t.machines) >= maxMachines {
			t.forget()
		}
		r = &record{Machine: Machine{MAC: slices.Clone(mac[:])}}
		r.restart(now)
		t.machines[mac] = r
	}
	return r
}

// forget drops the machine that was silent longest, first of those that only
// asked: whoever invents addresses does not drive out the ones that boot.
func (t *timeline) forget() {
	var worst *record
	for _, r := range t.machines {
		if worst == nil || cmp.Or(cmp.Compare(min(r.Stage.rank(), Load.rank()), min(worst.Stage.rank(), Load.rank())), r.Last.Compare(worst.Last)) < 0 {
			worst = r
		}
	}
	delete(t.machines, [6]byte(worst.MAC))
}

func (r *record) restart(now time.Time) {
	r.Begin, r.Last, r.Stage, r.Steps = now, now, "", nil
	r.Loading, r.Loaded, r.Stuck, r.Refused = "", 0, "", ""
	r.got, r.stuck, r.told = map[string]bool{}, map[Stage]bool{}, map[string]bool{}
}

// emit reports an event of a machine.
func (t *timeline) emit(r *record, now time.Time, e Event) {
	e.Time, e.Machine, e.Since = now, r.MAC.String(), now.Sub(r.Begin).Seconds()
	if e.Client == "" && r.Client.Kind != NoBoot {
		e.Client = r.Client.String()
	}
	t.report(e)
}

// reach takes a machine to a stage, and reports it unless that is known.
func (t *timeline) reach(r *record, now time.Time, e Event) {
	r.Last, r.Stuck = now, ""
	known := e.Event != File && slices.ContainsFunc(r.Steps, func(s Step) bool { return s.Stage == e.Event && s.File == e.File })
	r.Stage = e.Event
	if known {
		return
	}
	if len(r.Steps) < 64 {
		r.Steps = append(r.Steps, Step{e.Event, e.File, e.Bytes, time.Duration(e.Seconds * float64(time.Second)), now.Sub(r.Begin)})
	}
	t.emit(r, now, e)
}

// discover is a machine that asks for a file. It gives its record, to be told what
// came of it.
func (t *timeline) discover(mac [6]byte, c Client, now time.Time) *record {
	r := t.get(mac, now, true)
	switch {
	case now.Sub(r.Last) > forgetBoot, // long ago
		r.Stage.rank() >= Kernel.rank(),                          // it ran
		c.Kind != IPXE && r.Client.Kind == IPXE,                  // the firmware again
		c.Kind == r.Client.Kind && r.Stage == File && r.loaded(): // with what it needs, but it asks again
		r.restart(now)
	}
	r.Client = c
	// iPXE that came from us is one step more: its file says which.
	t.reach(r, now, Event{Event: Discover, File: map[bool]string{true: "iPXE"}[c.Kind == IPXE && r.got[undionly]], Client: c.String()})
	return r
}

// loaded says whether a machine has all files of its kind.
func (r *record) loaded() bool {
	switch {
	case r.Client.Kind == IPXE && !r.Client.EFI:
		return r.got[kernelFile] && r.got[initrdFile]
	case r.Client.Kind == BIOS:
		return false // iPXE comes next
	}
	return r.got[efiFile]
}

func (t *timeline) offer(r *record, file string, now time.Time) {
	t.reach(r, now, Event{Event: Offer, File: file})
}

func (t *timeline) ask(r *record, file string, now time.Time) {
	t.reach(r, now, Event{Event: Ask, File: file})
}

// refuse reports a machine that gets nothing, once per boot and reason.
func (t *timeline) refuse(r *record, why string, now time.Time) {
	r.Last, r.Refused = now, why
	if r.told[why] {
		return
	}
	r.told[why] = true
	t.emit(r, now, Event{Event: Refused, Text: why})
}

// loading is a part of a file that a machine has got.
func (t *timeline) loading(mac [6]byte, file string, bytes int64, from netip.Addr, now time.Time) {
	r := t.get(mac, now, true)
	if r.Loading != file {
		r.Loading, r.Loaded = file, 0
	}
	r.Loaded += bytes
	r.Last, r.Stage, r.Stuck, r.Address = now, Load, "", from
}

// done is the end of a transfer: of bytes out of all.
func (t *timeline) done(mac [6]byte, file, by string, bytes, all int64, took time.Duration, from netip.Addr, now time.Time) {
	r := t.get(mac, now, true)
	r.Address = from
	if r.Loading == file {
		r.Loading, r.Loaded = "", 0
	}
	e := Event{Event: File, File: file, By: by, Bytes: bytes, Seconds: took.Seconds(), Address: from.String()}
	switch {
	case bytes >= all:
		r.got[file] = true
		t.reach(r, now, e)
	case bytes > 0:
		// UEFI opens a file once to learn its size: that has no bytes.
		e.Event = Aborted
		r.Last = now
		t.emit(r, now, e)
	}
}

// node is a DHCP message of a node's init: it takes addr, if that is valid.
func (t *timeline) node(mac [6]byte, addr netip.Addr, now time.Time) {
	r := t.get(mac, now, false)
	if r == nil || r.Stage.rank() < File.rank() && r.Stage != Load {
		return // it did not boot from us
	}
	if r.Stage.rank() >= Up.rank() {
		return // it renews
	}
	if r.Stage.rank() < Kernel.rank() {
		t.reach(r, now, Event{Event: Kernel})
	}
	if addr.IsValid() {
		r.Address = addr
		t.reach(r, now, Event{Event: Address, Address: addr.String()})
	}
}

func (t *timeline) up(mac [6]byte, where string, now time.Time) {
	if r := t.get(mac, now, false); r != nil && r.Stage != Up {
		t.reach(r, now, Event{Event: Up, Address: where})
	}
}

// awaited are the machines whose service should be asked now, and where; static
// gives the address of nodes that do not use DHCP.
func (t *timeline) awaited(static func(net.HardwareAddr) netip.Addr, now time.Time) map[[6]byte]netip.Addr {
	all := map[[6]byte]netip.Addr{}
	for mac, r := range t.machines {
		if now.Sub(r.Last) > forgetBoot {
			continue
		}
		switch {
		case r.Stage == Address:
			all[mac] = r.Address
		case r.Stage == File && r.loaded() && static != nil:
			if a := static(r.MAC); a.IsValid() {
				all[mac] = a
			}
		}
	}
	return all
}

// check reports the machines that have not come further in time.
func (t *timeline) check(now time.Time) {
	for _, r := range t.machines {
		if r.Stage == "" || r.Stage.rank() >= t.final.rank() || r.stuck[r.Stage] || r.Refused != "" {
			continue
		}
		patience, why := r.expect(t.final)
		if patience == 0 || now.Sub(r.Last) < patience {
			continue
		}
		r.stuck[r.Stage], r.Stuck = true, why
		t.emit(r, now, Event{Event: Stuck, File: r.Loading, Bytes: r.Loaded, Text: why})
	}
}

// expect says how long a machine may be silent now, 0 for ever, and what it means
// if it is.
func (r *record) expect(final Stage) (time.Duration, string) {
	switch r.Stage {
	case Discover:
		return patienceOffer, "it asked, and could not be answered"
	case Offer, Ask:
		what := "UDP ports 67, 69 and 4011"
		if r.Client.Kind == UEFIHTTP || r.Client.Kind == IPXE {
			what = "its HTTP port"
		}
		return patienceOffer, "it has not come for the file. Does it get an address from the network's DHCP server? " +
			"Does a firewall on this computer let in " + what + "? Is network boot what its firmware tries next?"
	case Load:
		return patienceLoad, fmt.Sprintf("%s stopped after %s: a cable, a switch port that went down, or a machine that was switched off", r.Loading, size(r.Loaded))
	case File:
		if !r.loaded() {
			return patienceFile, "it has loaded " + strings.Join(slices.Sorted(maps.Keys(r.got)), " and ") +
				", and does not come for the rest; its screen says why"
		}
		if final == File {
			return 0, ""
		}
		why := "it has all files, but no kernel has asked for an address. Look at its screen or serial console"
		if r.Client.Kind == UEFI || r.Client.Kind == UEFIHTTP {
			why += "; Secure Boot refuses an image that is not signed with a key of its own"
		}
		return patienceKernel, why + "; or the board's kernel lacks the driver of its network card"
	case Kernel:
		return patienceAddress, "its init asks for an address, and takes none: is there a DHCP server with free addresses, and is the range not that of the VIP?"
	case Address:
		if final != Up {
			return 0, ""
		}
		return patienceUp, "the node has " + r.Address.String() + ", but its service does not answer there; its console says why"
	}
	return 0, ""
}

// list is all machines, by the time of their boot.
func (t *timeline) list() []Machine {
	var all []Machine
	for _, r := range t.machines {
		m := r.Machine
		m.Steps = slices.Clone(m.Steps)
		all = append(all, m)
	}
	slices.SortFunc(all, func(a, b Machine) int {
		return cmp.Or(a.Begin.Compare(b.Begin), slices.Compare(a.MAC, b.MAC))
	})
	return all
}
