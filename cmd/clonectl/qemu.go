package main

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"clonecluster/boards"
	"clonecluster/config"
	"clonecluster/image"
	"clonecluster/image/bundle"
	"clonecluster/qemu"
	"clonecluster/qemu/lab"
	"clonecluster/qemu/nethost"
	"clonecluster/qemu/vswitch"
)

func newQEMUCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "qemu",
		Short: "Run a cluster in virtual machines",
		Args:  usageArgs(cobra.NoArgs),
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newQEMUUpCmd())
	return cmd
}

// upOptions are the flags of "qemu up".
type upOptions struct {
	nodes                     int
	image, listen, pcap, logs string
	api                       string
	accel, machine, append    string
	once, asJSON, verbose     bool
	noKill                    bool
	requests                  int
}

func (o upOptions) validate() error {
	if o.nodes < 1 || o.nodes > 64 {
		return fmt.Errorf("--nodes %d: want 1 to 64", o.nodes)
	}
	if o.requests < 1 || o.requests > 1_000_000 {
		return fmt.Errorf("--requests %d: want 1 to 1000000", o.requests)
	}
	if o.asJSON && !o.once {
		return errors.New("--json goes with --once")
	}
	if !slices.Contains([]string{"auto", "kvm", "tcg"}, o.accel) {
		return fmt.Errorf("--accel %q: want auto, kvm or tcg", o.accel)
	}
	if !slices.Contains([]string{"", "q35", "microvm", "virt"}, o.machine) {
		return fmt.Errorf("--machine %q: want q35, microvm or virt", o.machine)
	}
	if o.listen != "" {
		if _, _, err := net.SplitHostPort(o.listen); err != nil {
			return fmt.Errorf("--listen %q: want an address and a port, as 127.0.0.1:8080", o.listen)
		}
	}
	if o.api != "" {
		if _, _, err := net.SplitHostPort(o.api); err != nil {
			return fmt.Errorf("--api %q: want an address and a port, as 127.0.0.1:9264", o.api)
		}
	}
	return nil
}

func newQEMUUpCmd() *cobra.Command {
	var o upOptions
	cmd := &cobra.Command{
		Use:   "up",
		Short: "Boot a cluster on a virtual switch and watch it answer",
		Long: `Up boots N nodes from one image, connects them to a learning switch that is part
of this program, and forwards a port of this computer to the cluster's address.
It needs no root and touches no network interface. It shows which node answers,
and what the switch has learnt (never the clone MAC). After some fifteen
seconds one node loses its power and gets it back: what clients see of that is printed. Then the
view stays until Ctrl-C.

With --once it asks a number of times, kills a node and starts it again, checks
what must hold, stops the nodes by their power buttons, and ends: with exit code
0 only if every check held.`,
		Example: `  clonectl qemu up                                  # three nodes, http://127.0.0.1:8080/
  clonectl qemu up --nodes 5 --listen 127.0.0.1:9000
  clonectl qemu up --once --pcap demo.pcapng        # check, and keep every frame`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := o.validate(); err != nil {
				return usageError{err}
			}
			if o.once && !cmd.Flags().Changed("listen") {
				o.listen = "" // nobody would have the time to use it
			}
			if o.once && !cmd.Flags().Changed("api") {
				o.api = ""
			}
			return runUp(cmd.Context(), o, cmd.OutOrStdout())
		},
	}
	f := cmd.Flags()
	f.IntVar(&o.nodes, "nodes", 3, "how many nodes, 1 to 64")
	f.StringVar(&o.image, "image", filepath.Join("build", demoBoard), "`FOLDER` with an image, from \"clonectl image\"")
	f.StringVar(&o.listen, "listen", "127.0.0.1:8080", "`ADDRESS` of this computer that leads to the cluster")
	f.StringVar(&o.api, "api", "127.0.0.1:9264", "`ADDRESS` of this computer that leads to the cluster's management API, for \"clonectl status\" and its like; empty: none")
	f.StringVar(&o.pcap, "pcap", "", "write every frame that crosses the switch to `FILE`: pcapng, each frame once, on the port where it came in")
	f.StringVar(&o.logs, "logs", "", "keep the nodes' console logs in `FOLDER`")
	f.StringVar(&o.accel, "accel", "auto", "kvm, tcg, or auto: KVM if a trial guest runs under it")
	f.StringVar(&o.machine, "machine", "", "q35, microvm or virt (default: the board's)")
	f.StringVar(&o.append, "append", "", "more for the nodes' kernel command line, `WORDS` such as clonecluster.system.log-level=debug")
	f.BoolVar(&o.once, "once", false, "check, then end; exit code 0 if every check held")
	f.IntVar(&o.requests, "requests", 30, "with --once: how many requests to each address")
	f.BoolVar(&o.noKill, "no-kill", false, "kill no node (one node alone is never killed)")
	f.BoolVar(&o.asJSON, "json", false, "with --once: print the checks as JSON")
	f.BoolVar(&o.verbose, "verbose", false, "print the QEMU command lines")
	cmd.MarkFlagDirname("image")
	cmd.MarkFlagDirname("logs")
	for flag, values := range map[string][]string{"accel": {"auto", "kvm", "tcg"}, "machine": {"q35", "microvm", "virt"}} {
		cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp))
	}
	return cmd
}

// bootable is an output folder of "clonectl image", ready to boot.
type bootable struct {
	dir      string
	manifest *image.Manifest
	board    boards.Board
	config   *config.Config
}

// openImage reads what is in an output folder. The configuration is what nodes
// with that kernel command line will have.
func openImage(dir, cmdline string) (bootable, error) {
	b := bootable{dir: dir}
	m, err := image.ReadManifest(filepath.Join(dir, manifestName))
	if errors.Is(err, os.ErrNotExist) {
		return b, fmt.Errorf("%s holds no image; build one with %q", dir, buildCommand("clonectl image", dir, cmp.Or(boardOf(dir), demoBoard)))
	} else if errors.Is(err, unix.ENOTDIR) {
		return b, fmt.Errorf("%s is no folder; give one that %q has made", dir, "clonectl image")
	} else if err != nil {
		return b, err
	}
	b.manifest = m
	if b.board, err = boards.Get(m.Board); err != nil {
		return b, err
	}
	yaml, err := configIn(filepath.Join(dir, configName))
	if err != nil {
		return b, fmt.Errorf("reading the configuration in the image: %w; build it again with %q", err, buildCommand("clonectl image", dir, m.Board))
	}
	var ignored config.Problems
	if b.config, ignored, err = config.LoadWithCmdline(yaml, "cluster.yaml", cmdline); err == nil && len(ignored) > 0 {
		err = ignored
	}
	return b, err
}

// buildCommand adds the board and the folder to a command that builds.
func buildCommand(command, dir, board string) string {
	command += " --board " + board
	if filepath.Clean(dir) != filepath.Join("build", board) {
		command += " --out " + dir
	}
	return command
}

// boardOf is the board that an output folder has its name from, as those of clonectl
// build have; "" if there is no such board.
func boardOf(dir string) string {
	b, err := boards.Get(filepath.Base(dir))
	if err != nil {
		return ""
	}
	return b.Name
}

func (b bootable) path(name string) string { return filepath.Join(b.dir, name) }

func (b bootable) kernel() string { return b.path(bundle.KernelFile(b.board)) }

// configIn takes cluster.yaml out of a config.cpio.
func configIn(path string) ([]byte, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	members, err := image.Members(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	for _, m := range members {
		if m.Name == image.ConfigFile {
			return m.Data, nil
		}
	}
	return nil, fmt.Errorf("%s has no %s", path, image.ConfigFile)
}

// labConfig is the laboratory for an image: the client host is the VIP's gateway,
// and the segment's DHCP server.
func labConfig(b bootable, o upOptions, cache string) (lab.Config, error) {
	c := lab.Demo(o.nodes)
	c.Kernel, c.Initrd = b.kernel(), []string{b.path(initrdName)}
	c.Cmdline = "console=" + b.board.Serial() + " quiet panic=10"
	if o.append != "" {
		c.Cmdline += " " + o.append
	}
	c.MemoryMB, c.CacheDir, c.Dir, c.PCAP = b.board.QEMU.MemoryMiB, cache, o.logs, o.pcap
	c.Machine = qemu.Machine(b.board.QEMU.Machine)
	if o.machine != "" {
		c.Machine = qemu.Machine(o.machine)
	}
	if o.accel != "auto" {
		c.Accel = qemu.Accel(o.accel)
	}
	vip := b.config.VIP
	c.Switch = vswitch.Config{Guard: []net.HardwareAddr{vip.CloneMAC}}
	client := &nethost.Config{MAC: c.Client.MAC}
	if vip.IPv4.IsValid() {
		client.Addrs = append(client.Addrs, hostIn(vip.IPv4, vip.IPv4Gateway))
		client.DHCP = dhcpIn(vip.IPv4)
	}
	if vip.IPv6.IsValid() {
		client.Addrs = append(client.Addrs, hostIn(vip.IPv6, vip.IPv6Gateway))
	}
	c.Client = client
	to, err := webAddress(b.config)
	if err != nil {
		return c, err
	}
	if o.listen != "" {
		c.Forwards = []lab.Forward{{Listen: o.listen, To: to.AddrPort}}
	}
	if port := b.config.Management.Port; o.api != "" && port != 0 {
		c.Forwards = append(c.Forwards, lab.Forward{Listen: o.api, To: netip.AddrPortFrom(to.Addr(), uint16(port))})
	}
	return c, nil
}

// hostIn is the gateway or, where there is none, the first address of the
// subnet that is not the VIP's.
func hostIn(vip netip.Prefix, gateway netip.Addr) netip.Prefix {
	host := gateway
	if !host.IsValid() || !vip.Contains(host) {
		host = vip.Masked().Addr().Next()
		if host == vip.Addr() {
			host = host.Next()
		}
	}
	return netip.PrefixFrom(host, vip.Bits())
}

// dhcpIn is a range for the nodes' management addresses, .100 to .199 of a /24
// or what is larger; nil if the subnet is smaller, or the VIP is in it.
func dhcpIn(vip netip.Prefix) *nethost.DHCP {
	if vip.Bits() > 24 {
		return nil
	}
	a := vip.Masked().Addr().As4()
	first, last := a, a
	first[3], last[3] = 100, 199
	d := &nethost.DHCP{First: netip.AddrFrom4(first), Last: netip.AddrFrom4(last)}
	if vip.Addr().Compare(d.First) >= 0 && vip.Addr().Compare(d.Last) <= 0 {
		first[3], last[3] = 200, 250
		d.First, d.Last = netip.AddrFrom4(first), netip.AddrFrom4(last)
	}
	return d
}

// target is where clonectl asks, and how the answers may be spread.
type target struct {
	netip.AddrPort
	affinity config.Affinity
}

// webAddress is where the reference service answers: only of that one does
// clonectl know how to ask who it is.
func webAddress(c *config.Config) (target, error) {
	vip := c.VIP.IPv4.Addr()
	if !vip.IsValid() {
		vip = c.VIP.IPv6.Addr()
	}
	for _, s := range c.Services {
		i := slices.IndexFunc(s.Ports, func(p config.PortRange) bool { return p.Protocol == "tcp" })
		if i >= 0 && s.Run[0] == config.Webd {
			return target{netip.AddrPortFrom(vip, s.Ports[i].First), s.Affinity}, nil
		}
	}
	return target{}, errors.New("the configuration has no service that runs /bin/webd on a TCP port, which is what is asked here")
}
