package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"clonecluster/config"
	"clonecluster/image/bundle"
	"clonecluster/image/pxe"
	"clonecluster/image/uki"
)

// serveOptions are the flags of "serve".
type serveOptions struct {
	folders             []string
	iface, dhcp, router string
	machines            []string
	httpPort            int
	ipxe, append        string
	public              string
	asJSON              bool

	noEFI error // why there is no unified image
}

// efiName is the unified kernel image's name in an output folder.
const efiName = "clonecluster.efi"

// undionlyPath is where Debian's package ipxe has iPXE for BIOSes.
const undionlyPath = "/usr/lib/ipxe/undionly.kpxe"

func newServeCmd() *cobra.Command {
	var o serveOptions
	cmd := &cobra.Command{
		Use:   "serve [FOLDER...]",
		Short: "Boot machines from the network (PXE, UEFI HTTP boot, iPXE)",
		Long: `Serve hands out the image in FOLDER (default build/pc-x86_64) to machines that
boot from the network, and shows how far each has come until its node answers.
For machines of several architectures name a folder for each.

It stands beside the network's own DHCP server, which goes on giving out the
addresses. On a segment without one, --dhcp makes it the DHCP server; it does
not begin if it hears another.

What it hands out is what the build has made: before it begins it compares the
files with manifest.json, and with --public-key the manifest with its signature.
A file that changes later is not handed out: start serve again after a build.

The machines need nothing but network boot, first in their boot order: BIOS or
UEFI, PXE or HTTP boot. This computer needs UDP ports 67, 69 and 4011 and the
HTTP port, open in its firewall, on the segment of the machines.

initrd.img and clonecluster.efi hold the cluster's key, and network boot sends
them in the clear: whoever can listen on the segment, or pretend to be one of
the machines, has the key then. --machine narrows who is answered, but a MAC
address is no secret.

Ctrl-C ends it; machines that run need it no more.`,
		Example: `  clonectl build --board pc-x86_64 --config cluster.yaml
  sudo build/bin/clonectl serve                              # beside the network's DHCP server
  sudo build/bin/clonectl serve --interface eno2 --dhcp 10.9.0.100-10.9.0.150
  sudo build/bin/clonectl serve --machine 52:54:00:77:00:01 --machine 52:54:00:77:00:02
  sudo build/bin/clonectl serve --public-key cluster.key.pub # only what that key has signed
  sudo build/bin/clonectl serve --json | tee boots.jsonl     # an object for each event`,
		RunE: func(cmd *cobra.Command, args []string) error {
			o.folders = args
			if len(args) == 0 {
				o.folders = []string{filepath.Join("build", "pc-x86_64")}
			}
			return runServe(cmd.Context(), o, cmd.OutOrStdout())
		},
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			return nil, cobra.ShellCompDirectiveFilterDirs
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.iface, "interface", "", "network `INTERFACE` of the machines' segment (default: the only one with an IPv4 address)")
	f.StringVar(&o.dhcp, "dhcp", "", "be the segment's DHCP server, and give out the addresses of `RANGE`, as 10.9.0.100-10.9.0.150")
	f.StringVar(&o.router, "router", "", "with --dhcp: the `ADDRESS` of the machines' gateway (default: none)")
	f.StringArrayVar(&o.machines, "machine", nil, "answer only the machine with that `MAC` address; may be repeated")
	f.IntVar(&o.httpPort, "http-port", pxe.DefaultHTTPPort, "TCP `PORT` for files")
	f.StringVar(&o.ipxe, "ipxe", undionlyPath, "`FILE` that BIOSes without iPXE of their own load first (Debian package ipxe)")
	f.StringVar(&o.append, "append", "", "more for the kernel command line, `WORDS` such as clonecluster.system.log-level=debug; what clonecluster.efi has in it stays as it is")
	addPublicKey(f, &o.public)
	f.BoolVar(&o.asJSON, "json", false, "print each event as a JSON object, one per line")
	cmd.RegisterFlagCompletionFunc("interface", func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		all, _ := net.Interfaces()
		var names []string
		for _, i := range all {
			if i.Flags&net.FlagLoopback == 0 {
				names = append(names, i.Name)
			}
		}
		return names, cobra.ShellCompDirectiveNoFileComp
	})
	for _, name := range []string{"dhcp", "router", "machine", "http-port", "append"} {
		cmd.RegisterFlagCompletionFunc(name, cobra.NoFileCompletions)
	}
	return cmd
}

// options is the server that the flags ask for, but for where its events go.
func (o *serveOptions) options(ctx context.Context, p *progress) (pxe.Options, error) {
	var s pxe.Options
	if o.httpPort < 1 || o.httpPort > 65535 {
		return s, usageError{fmt.Errorf("--http-port %d: want 1 to 65535", o.httpPort)}
	}
	s.HTTPPort = uint16(o.httpPort)
	var err error
	if s.Allow, err = parseMACs(o.machines); err != nil {
		return s, usageError{err}
	}
	if s.Pool, err = parsePool(o.dhcp, o.router); err != nil {
		return s, usageError{err}
	}
	var cfg *config.Config
	for _, dir := range o.folders {
		known, err := compareFolder(ctx, dir, o.public, p)
		if err != nil {
			return s, err
		}
		b, err := openImage(dir, o.append)
		if err != nil {
			return s, explainRights(err)
		}
		var words []string
		for _, c := range b.board.Consoles {
			words = append(words, "console="+c)
		}
		cmdline := strings.TrimSpace(strings.Join(append(words, "quiet", "panic=10", o.append), " "))
		img := pxe.Image{Arch: b.board.Arch, Folder: dir, Cmdline: cmdline, Known: known, Build: serveBuild(dir, b.board.Name)}
		if known[efiName] == nil {
			// Without the stub machines with UEFI get nothing, as they are told.
			img.EFI, o.noEFI = unified(b, cmdline, known)
		}
		s.Images = append(s.Images, img)
		if b.config.PublishedKey() {
			p.Done("warning: %s: %s", dir, publishedKey)
		}
		if vip := b.config.VIP.IPv4.Addr(); vip.IsValid() {
			s.VIPs = append(s.VIPs, vip)
		}
		if cfg == nil {
			cfg = b.config
		}
	}
	s.Health = healthURL(cfg)
	switch cfg.Management.Mode {
	case config.ManagementStatic:
		s.Static = func(mac net.HardwareAddr) netip.Addr {
			p, _ := cfg.ManagementAddress(mac)
			return p.Addr()
		}
		s.Silent = s.Health == ""
	case config.ManagementLinkLocal:
		s.Silent = true
	}
	if fi, err := os.Stat(o.ipxe); err == nil && fi.Mode().IsRegular() {
		s.Undionly = o.ipxe
	} else if o.ipxe != undionlyPath && o.ipxe != "" {
		return s, fmt.Errorf("there is no iPXE %s: Debian's package ipxe (apt-get install ipxe) has %s, which is taken without --ipxe", o.ipxe, undionlyPath)
	}
	i, err := pxe.FindInterface(o.iface)
	if err != nil {
		return s, err
	}
	s.Network, s.Addr = i, i.Addr
	return s, nil
}

func servedNames() []string { return append(bundle.KernelFiles(), initrdName, efiName) }

// servedFiles are those of a folder as they are now.
func servedFiles(dir string) map[string]fs.FileInfo {
	files := map[string]fs.FileInfo{}
	for _, name := range servedNames() {
		if fi, err := os.Stat(filepath.Join(dir, name)); err == nil {
			files[name] = fi
		}
	}
	return files
}

// compareFolder compares what machines are given of a folder with its manifest, and
// tells how those files are now.
func compareFolder(ctx context.Context, dir, public string, p *progress) (map[string]fs.FileInfo, error) {
	if fi, err := os.Stat(dir); err == nil && !fi.IsDir() {
		return nil, fmt.Errorf("%s is a file; give the folder that clonectl build has made", dir)
	}
	known := servedFiles(dir)
	o, err := verifyOptions(public, p)
	if err != nil {
		return nil, err
	}
	o.Files = append(servedNames(), configName) // that says how to ask a node whether it is up
	r, _, err := bundle.Verify(ctx, dir, o)
	p.Clear()
	switch {
	case errors.Is(err, fs.ErrNotExist) && len(known) > 0:
		return nil, fmt.Errorf("%s has no %s, which says what its files have to be: copy it there from the build, or build again with %q", dir, manifestName, serveBuild(dir, ""))
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("%s holds no image; build one with %q", dir, serveBuild(dir, ""))
	case err != nil:
		return nil, explainRights(err)
	}
	if err := reportError(dir, r); err != nil {
		problems := problemsError(slices.Concat(r.Problems, r.Unread))
		switch {
		case r.Unsigned(o):
			return nil, fmt.Errorf("%s is not signed by the public key of --public-key, and is not handed out: %w", dir, problems)
		case len(r.Problems) > 0:
			return nil, fmt.Errorf("%s is not what its manifest says, and is not handed out: build it again with %q, or copy it again\n%w", dir, serveBuild(dir, r.Board), problems)
		}
		return nil, fmt.Errorf("%w\n%w", err, problems)
	}
	p.Done("compared   %s: %s as the manifest says; cluster %q, board %s; signature: %s", dir, plural(r.Files, "file"), r.Cluster, r.Board, r.Signature)
	for _, n := range r.Notes {
		p.Done("           %s", n)
	}
	return known, nil
}

// serveBuild is the command that makes a folder to be served.
func serveBuild(dir, board string) string {
	return buildCommand("clonectl build --config cluster.yaml", dir, cmp.Or(board, boardOf(dir), "pc-x86_64"))
}

// unified is a unified kernel image of a folder that has none, in memory.
func unified(b bootable, cmdline string, known map[string]fs.FileInfo) ([]byte, error) {
	var more []string // where make stub-arm puts that of another architecture
	if cache, err := cacheDir(); err == nil {
		more = append(more, filepath.Join(cache, "stub"))
	}
	stub, _, err := uki.Stub(b.board.Arch, more...)
	if err != nil {
		return nil, err
	}
	linux, err := readKnown(b.kernel(), known)
	if err != nil {
		return nil, err
	}
	initrd, err := readKnown(b.path(initrdName), known)
	if err != nil {
		return nil, err
	}
	return uki.Build(uki.Options{
		Stub: stub, Linux: linux, Initrd: initrd, Cmdline: cmdline, OSRelease: "NAME=clonecluster\nID=clonecluster\n",
	})
}

// readKnown reads a file that is still the one that was compared.
func readKnown(path string, known map[string]fs.FileInfo) ([]byte, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	if now, err := os.Stat(path); err != nil || !pxe.Unchanged(known[filepath.Base(path)], now) {
		return nil, fmt.Errorf("%s was changed after it was compared with the manifest: start serve again", path)
	}
	return data, nil
}

func parseMACs(words []string) ([]net.HardwareAddr, error) {
	var all []net.HardwareAddr
	for _, w := range words {
		mac, err := net.ParseMAC(w)
		if err != nil || len(mac) != 6 {
			return nil, fmt.Errorf("--machine %q: want a MAC address, as 52:54:00:77:00:01", w)
		}
		all = append(all, mac)
	}
	return all, nil
}

func parsePool(words, router string) (*pxe.Pool, error) {
	if words == "" {
		if router != "" {
			return nil, errors.New("--router goes with --dhcp")
		}
		return nil, nil
	}
	first, last, _ := strings.Cut(words, "-")
	var p pxe.Pool
	var err error
	if p.First, err = netip.ParseAddr(strings.TrimSpace(first)); err == nil {
		p.Last, err = netip.ParseAddr(strings.TrimSpace(last))
	}
	if err != nil || !p.First.Is4() || !p.Last.Is4() {
		return nil, fmt.Errorf("--dhcp %q: want two IPv4 addresses, as 10.9.0.100-10.9.0.150", words)
	}
	if router != "" {
		if p.Router, err = netip.ParseAddr(router); err != nil || !p.Router.Is4() {
			return nil, fmt.Errorf("--router %q: want an IPv4 address", router)
		}
	}
	return &p, nil
}

// healthURL is where a node is asked whether it is up, on its own address: the
// port and path of the first HTTP check of its services; "" if there is none.
func healthURL(c *config.Config) string {
	for _, s := range c.Services {
		u, err := url.Parse(s.Health.HTTP)
		if s.Health.HTTP == "" || err != nil || u.Scheme != "http" {
			continue
		}
		port := u.Port()
		if port == "" {
			port = "80"
		}
		if _, err := strconv.ParseUint(port, 10, 16); err != nil {
			continue
		}
		return ":" + port + u.RequestURI()
	}
	return ""
}

func runServe(ctx context.Context, o serveOptions, stdout io.Writer) error {
	opts, err := o.options(ctx, newProgress(os.Stderr))
	if err != nil {
		return err
	}
	show := &serveView{stdout: stdout, asJSON: o.asJSON, view: newView(os.Stderr), begin: time.Now()}
	opts.OnEvent = show.event
	s, err := pxe.New(opts)
	if err != nil {
		return err
	}
	defer s.Close()
	show.title = serveTitle(opts)
	show.start(opts, o.noEFI)
	stop := show.follow(ctx, s)
	err = pxe.Explain(ctx, s.Run(ctx))
	stop()
	return err
}

func serveTitle(o pxe.Options) string {
	how := "beside the network's DHCP server"
	if o.Pool != nil {
		how = fmt.Sprintf("as its DHCP server, %v to %v", o.Pool.First, o.Pool.Last)
	}
	where := o.Addr.String()
	if i, ok := o.Network.(pxe.Interface); ok {
		where += " on " + i.Name
	}
	return fmt.Sprintf("network boot from %s, %s", where, how)
}

// serveView shows events: as lines, or on a terminal as a picture of all machines
// with the lines that say what to do above it.
type serveView struct {
	stdout io.Writer
	asJSON bool
	title  string
	begin  time.Time

	mu   sync.Mutex
	view *view
}

func (v *serveView) live() bool { return v.view.tty && !v.asJSON }

// say prints a line for people that stays.
func (v *serveView) say(format string, args ...any) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.view.erase()
	fmt.Fprintf(v.view.f, format+"\n", args...)
}

// start says what is served, and what an operator has to know before.
func (v *serveView) start(o pxe.Options, noEFI error) {
	v.say("%s", v.title)
	for _, img := range o.Images {
		v.say("  %s: %s", img.Arch, img.Folder)
	}
	if noEFI != nil {
		v.say("  without a unified image machines with UEFI get nothing: %v", noEFI)
	}
	if o.Undionly == "" {
		v.say("  there is no %s: BIOSes without iPXE of their own get nothing; apt-get install ipxe brings it", undionlyPath)
	}
	for _, vip := range o.VIPs {
		if o.Pool != nil && o.Pool.First.Compare(vip) <= 0 && vip.Compare(o.Pool.Last) <= 0 {
			v.say("  %v is the cluster's own address, and is given to no machine", vip)
		}
	}
	v.say("the image holds the cluster's key, and is sent in the clear: whoever listens on this segment can read it")
}

func (v *serveView) event(e pxe.Event) {
	v.mu.Lock()
	defer v.mu.Unlock()
	switch {
	case v.asJSON:
		json.NewEncoder(v.stdout).Encode(e)
	case !v.live():
		fmt.Fprintf(v.stdout, "%s %s\n", e.Time.Format(time.TimeOnly), e)
	case e.Event == pxe.Refused || e.Event == pxe.Stuck || e.Event == pxe.Rival || e.Event == pxe.Note || e.Event == pxe.Aborted:
		v.view.erase()
		fmt.Fprintf(v.view.f, "%s %s\n", e.Time.Format(time.TimeOnly), e)
	}
}

// follow draws until the end of ctx or the call of what it returns, which waits.
func (v *serveView) follow(ctx context.Context, s *pxe.Server) func() {
	if !v.live() {
		return func() {}
	}
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() {
		tick := time.NewTicker(drawInterval)
		defer tick.Stop()
		for {
			machines := s.Machines()
			v.mu.Lock()
			v.view.draw(servePicture{v.title, time.Since(v.begin), machines})
			v.mu.Unlock()
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
		}
	})
	return func() { cancel(); wg.Wait() }
}

type servePicture struct {
	title    string
	elapsed  time.Duration
	machines []pxe.Machine
}

func (p servePicture) render(width int) []string {
	out, add := linesOf(width)
	add(bold, "%s  %s", p.title, seconds(p.elapsed))
	add("", "")
	if len(p.machines) == 0 {
		add("", "  no machine has asked yet; switch one on that boots from the network first")
	}
	for _, m := range p.machines {
		style, state := "", string(m.Stage)
		switch {
		case m.Refused != "":
			style, state = red, "gets nothing: "+m.Refused
		case m.Stuck != "":
			style, state = red, "stuck: "+m.Stuck
		case m.Stage == pxe.Up:
			style, state = green, "up"
		case m.Loading != "":
			state = fmt.Sprintf("loads %s, %.1f MB", m.Loading, megabytes(m.Loaded))
		}
		addr := ""
		if m.Address.IsValid() {
			addr = m.Address.String()
		}
		add(style, "  %s  %-15s %s", m.MAC, addr, state)
		add(dim, "      %s: %s", m.Client, steps(m.Steps))
	}
	add("", "")
	add(dim, "Ctrl-C ends it; machines that run need it no more")
	return *out
}

// steps writes a boot's stages, "discover 0.0s · offer 0.1s · bzImage 4.1s (7.2 MB)".
func steps(all []pxe.Step) string {
	var parts []string
	for _, s := range all {
		part := string(s.Stage)
		switch {
		case s.Stage == pxe.File:
			part = s.File
		case s.Stage == pxe.Discover && s.File != "":
			part = s.File + " asks"
		case s.Stage == pxe.Offer && s.File != "undionly.kpxe" && s.File != "boot.ipxe":
			part = "offer"
		}
		part += " " + seconds(s.At)
		if s.Stage == pxe.File {
			part += fmt.Sprintf(" (%.1f MB)", megabytes(s.Bytes))
		}
		parts = append(parts, part)
	}
	return strings.Join(parts, " · ")
}
