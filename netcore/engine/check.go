package engine

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"slices"
	"time"

	"github.com/mdlayher/packet"

	"clonecluster/config"
	"clonecluster/netcore/hostcheck"
	"clonecluster/netcore/membership"
	"clonecluster/netcore/nic"
)

const (
	// askedAtStart is how long an engine that starts waits for others to say that they
	// have the VIP.
	askedAtStart = 250 * time.Millisecond
	// askedByHand is the same for "cloned check", which is in no hurry.
	askedByHand = 1500 * time.Millisecond
)

// ErrRefused is matched by the error of Run when the machine or its segment would
// not stand, or not do with, a node: nothing has been changed then.
var ErrRefused = hostcheck.ErrRefused

// CheckHost gives a check for Options.Check that refuses what would do harm, and logs
// what may. A datapath other than "" is meant instead of the configuration's. Where clone0 is there already it does not ask the segment: the VIP's
// connections wait, and were started after somebody had asked.
func CheckHost(cfg *config.Config, datapath string, log *slog.Logger) func(context.Context, nic.NIC) error {
	return func(ctx context.Context, n nic.NIC) error {
		w := hostcheck.WantOf(cfg)
		w.Datapath = cmp.Or(datapath, w.Datapath)
		m, err := hostcheck.Look(func() (nic.NIC, error) { return n, nil }, w)
		if err != nil {
			return fmt.Errorf("looking at this machine: %w", err)
		}
		findings := hostcheck.Judge(m, w)
		if n.Carrier && !m.Running() && hostcheck.Refuse(findings) == nil {
			claims, err := hostcheck.Probe(ctx, n, w, askedAtStart)
			if err != nil {
				log.Warn("whether somebody else has the VIP cannot be told", "error", err)
			}
			findings = append(findings, hostcheck.JudgeClaims(withoutDirector(ctx, claims, cfg, n), w, false)...)
		}
		for _, f := range findings {
			if f.Level == hostcheck.Warn {
				log.Warn(f.What, "check", f.Check, "fix", f.Fix)
			}
		}
		return hostcheck.Refuse(findings)
	}
}

// directorHeard is how long a node that answers for the VIP with its own address, as the
// director does in directed mode, may take to prove by a beacon that it is a node.
const directorHeard = 2 * time.Second

// withoutDirector takes out of the claims those of nodes of this cluster.
func withoutDirector(ctx context.Context, claims []hostcheck.Claim, cfg *config.Config, n nic.NIC) []hostcheck.Claim {
	foreign := func(c hostcheck.Claim) bool { return c.MAC.String() != cfg.VIP.CloneMAC.String() }
	if cfg.Network.Mode == config.ModeFlooded || !slices.ContainsFunc(claims, foreign) {
		return claims
	}
	conn, err := packet.Listen(&net.Interface{Index: n.Index, Name: n.Name}, packet.Raw, membership.EtherType, nil)
	if err != nil {
		return claims
	}
	defer conn.Close()
	if conn.JoinGroup(membership.Group[:]) != nil || conn.SetReadDeadline(time.Now().Add(directorHeard)) != nil {
		return claims
	}
	codec, buf := newCodec(cfg), make([]byte, membership.MaxFrame+1)
	for ctx.Err() == nil && slices.ContainsFunc(claims, foreign) {
		size, _, err := conn.ReadFrom(buf)
		if err != nil {
			break
		}
		if b, _, err := codec.Decode(buf[:size]); err == nil && b != nil {
			claims = slices.DeleteFunc(claims, func(c hostcheck.Claim) bool { return membership.NodeID(c.MAC) == b.ID })
		}
	}
	return claims
}

// check is the verb "check": it looks at this machine as an engine does that starts,
// and changes nothing. The result is the exit code.
func check(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	flags := flag.NewFlagSet("cloned check", flag.ContinueOnError)
	flags.SetOutput(stderr)
	file := flags.String("config", DefaultConfig, "the cluster's configuration `file`")
	iface := flags.String("interface", "", "`name` of the network interface (default: as the configuration says)")
	datapath := flags.String("datapath", "", "auto, native, bpf or raw (default: as the configuration says)")
	bpffs := flags.String("bpffs", DefaultBPFFS, "`folder` of the BPF file system")
	asJSON := flags.Bool("json", false, "print the findings as JSON")
	flags.Usage = func() {
		fmt.Fprint(stderr, "Usage: cloned check [flags]\n\nLooks whether this machine can be a node, asks the segment who has the VIP, and\nchanges nothing.\n\nFlags:\n")
		flags.PrintDefaults()
		fmt.Fprint(stderr, "\nExit codes: 0 all is well, 1 look at what is marked warn, 2 cloned would refuse to\nstart, or wrong use.\n")
	}
	if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
		return 0
	} else if err != nil {
		return 2
	}
	if flags.NArg() > 0 {
		fmt.Fprintf(stderr, "cloned check: unexpected argument %q\n", flags.Arg(0))
		return 2
	}
	findings := findings(ctx, *file, *iface, *datapath, *bpffs)
	if *asJSON {
		enc := json.NewEncoder(stdout)
		enc.SetIndent("", "  ")
		enc.SetEscapeHTML(false)
		_ = enc.Encode(findings)
	} else {
		for _, f := range findings {
			fmt.Fprintf(stdout, "%-8s %-14s %s\n", f.Level, f.Check, f.What)
			if f.Fix != "" {
				fmt.Fprintf(stdout, "%-8s %-14s fix: %s\n", "", "", f.Fix)
			}
		}
	}
	worst := hostcheck.OK
	for _, f := range findings {
		worst = max(worst, f.Level)
	}
	return int(worst - hostcheck.OK)
}

// findings looks at the configuration, the machine and the segment, as far as each
// lets the next be looked at.
func findings(ctx context.Context, file, iface, datapath, bpffs string) []hostcheck.Finding {
	failed := func(check string, err error, fix string) hostcheck.Finding {
		return hostcheck.Finding{Check: check, Level: hostcheck.Refused, What: err.Error(), Fix: fix}
	}
	cfg, err := config.LoadFile(file)
	if err != nil {
		return []hostcheck.Finding{failed("config", err, "mend "+file+" (\"clonectl config check\" says more)")}
	}
	var all []hostcheck.Finding
	for _, w := range cfg.Warnings() {
		all = append(all, hostcheck.Finding{Check: "config", Level: hostcheck.Warn, What: w, Fix: "mend " + file})
	}
	if len(all) == 0 {
		all = append(all, hostcheck.Finding{Check: "config", Level: hostcheck.OK, What: file + " is right"})
	}
	want := cfg.Interface
	if iface != "" {
		want = config.Interface{Name: iface}
	}
	w := hostcheck.WantOf(cfg)
	w.Datapath = cmp.Or(datapath, w.Datapath)
	m, err := hostcheck.Look(func() (nic.NIC, error) { return nic.Find(want) }, w)
	if err != nil {
		return append(all, failed("machine", err, "run it as root"))
	}
	all = append(all, hostcheck.Judge(m, w)...)
	all = append(all, datapathFinding(w.Datapath, bpffs))
	switch {
	case m.NICErr != nil:
	case !m.NIC.Carrier:
		all = append(all, hostcheck.Finding{Check: "segment", Level: hostcheck.Warn, What: "without a carrier nobody can be asked who has the VIP", Fix: cmp.Or(m.NIC.Name, "the NIC") + ": see above"})
	default:
		claims, err := hostcheck.Probe(ctx, m.NIC, w, askedByHand)
		if err != nil {
			all = append(all, failed("segment", err, "run it as root"))
			break
		}
		all = append(all, hostcheck.JudgeClaims(withoutDirector(ctx, claims, cfg, m.NIC), w, m.Running())...)
	}
	return all
}

// datapathFinding says which datapath an engine would take, and why.
func datapathFinding(want, bpffs string) hostcheck.Finding {
	const fix = "Linux 5.18 or later, a BPF file system (mount -t bpf bpf /sys/fs/bpf), and the rights of root"
	name, why, err := chooseDatapath(want, bpffs)
	f := hostcheck.Finding{Check: "datapath", Level: hostcheck.OK, What: name + ": " + why}
	switch {
	case err != nil:
		f.Level, f.What, f.Fix = hostcheck.Refused, err.Error(), "--datapath auto, or "+fix
	case name == datapathRaw && want != datapathRaw:
		f.Level, f.What, f.Fix = hostcheck.Warn, "raw, which takes about twice the processor time: "+why, fix
	}
	return f
}
