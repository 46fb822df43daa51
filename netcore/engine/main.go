package engine

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"runtime"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"clonecluster/config"
	"clonecluster/netcore/api"
	"clonecluster/netcore/nic"
)

// The defaults of cloned's flags.
const (
	DefaultConfig       = "/etc/clonecluster/cluster.yaml"
	DefaultStatusSocket = "/run/clonecluster/cloned.sock"
	DefaultInitSocket   = "/run/clonecluster/init.sock"
)

// exitRefused tells a service manager that trying again is of no use.
const exitRefused = 4

const usage = `cloned - one node's data plane of a cluster that shares one address

Usage:
  cloned [flags]
  cloned check [flags]                    can this machine be a node?
  cloned status|drain|resume [flags]      of the cloned that runs here
  cloned clean [flags]                    after one that was killed

It takes this machine's share of the frames for the cluster's address (the VIP)
and runs until it gets SIGTERM. A graceful stop gives this node's share to the
others, waits for its connections to end, and takes everything back that it set
up. On SIGHUP it ends at once and leaves its connections in place: for a restart
or an upgrade, which no client sees. After a crash, start it again: established
connections go on.

Flags:
`

const examples = `
Examples:
  cloned
        join the cluster of /etc/clonecluster/cluster.yaml
  cloned check
        see whether it would, and if not, why and what to do; changes nothing
  cloned --interface eth1 --log-level debug
        use eth1, whatever the file says, and tell more
  cloned --datapath raw
        move the frames in this process, whatever the kernel could do
  cloned status
        see what the running one does, and what it knows of the others
  cloned drain --wait 5m && reboot
        give this node's share to the others and wait for its connections to end
  cloned resume
        take a share again
  cloned clean
        remove what one has left that was killed and is not started again

Exit codes: 0 stopped as asked, 1 could not go on, 2 wrong use, 3 the time of
"drain --wait" ran out, 4 refused: the configuration or the machine has to be
mended first. Those of "cloned check": 0 ok, 1 warnings, 2 refused.
`

// Main is the program cloned: args are its arguments without the name, and the
// result is its exit code. It reads NOTIFY_SOCKET and WATCHDOG_USEC as
// sd_notify(3) describes them.
func Main(args []string) int {
	return run(context.Background(), args, os.Getenv, os.Stderr)
}

func run(ctx context.Context, args []string, getenv func(string) string, stderr io.Writer) int {
	if len(args) > 0 {
		if _, ok := verbs[args[0]]; ok {
			return ask(ctx, args[0], args[1:], os.Stdout, stderr)
		}
		switch args[0] {
		case "check":
			return check(ctx, args[1:], os.Stdout, stderr)
		case "clean":
			return clean(args[1:], os.Stdout, stderr)
		}
	}
	flags := flag.NewFlagSet("cloned", flag.ContinueOnError)
	flags.SetOutput(stderr)
	file := flags.String("config", DefaultConfig, "the cluster's configuration `file`")
	cmdline := flags.String("cmdline", "", "`file` with kernel parameters that override the configuration, /proc/cmdline")
	iface := flags.String("interface", "", "`name` of the network interface (default: as the configuration says)")
	status := flags.String("status-socket", DefaultStatusSocket, "`path` of the unix socket for the status; empty: none")
	path := flags.String("datapath", "", "native, bpf, raw or auto (default: as the configuration says)")
	ingress := flags.String("ingress", "", "xdp, tc or auto, for native and bpf (default: as the configuration says)")
	bpffs := flags.String("bpffs", DefaultBPFFS, "`folder` of the BPF file system, for what outlives this process")
	initSocket := flags.String("init-socket", DefaultInitSocket, "`path` of the socket of the appliance's init; nobody there: an ordinary host")
	level := flags.String("log-level", "", "debug, info, warn or error (default: as the configuration says)")
	checked := flags.Bool("check", true, "refuse to start where \"cloned check\" would")
	drain := flags.Duration("drain", -1, "how long a stop waits for this node's connections to end; less than 0: as the configuration says")
	flags.Usage = func() {
		fmt.Fprint(stderr, usage)
		flags.PrintDefaults()
		fmt.Fprint(stderr, examples)
	}
	if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
		return 0
	} else if err != nil {
		return 2
	}
	if flags.NArg() > 0 {
		fmt.Fprintf(stderr, "cloned: unexpected argument %q; see cloned --help\n", flags.Arg(0))
		return 2
	}
	if !slices.Contains([]string{"", ingressAuto, ingressXDP, ingressTC}, *ingress) {
		fmt.Fprintf(stderr, "cloned: --ingress %q: want xdp, tc or auto\n", *ingress)
		return 2
	}
	if !slices.Contains([]string{"", datapathAuto, datapathNative, datapathBPF, datapathRaw}, *path) {
		fmt.Fprintf(stderr, "cloned: --datapath %q: want native, bpf, raw or auto\n", *path)
		return 2
	}
	cfg, err := loadConfig(*file, *cmdline)
	if err != nil {
		fmt.Fprintf(stderr, "cloned: %v\n", err)
		return exitRefused
	}
	min := cfg.System.Level()
	if *level != "" {
		if err := min.UnmarshalText([]byte(*level)); err != nil {
			fmt.Fprintf(stderr, "cloned: --log-level %q: want debug, info, warn or error\n", *level)
			return 2
		}
	}
	kept := api.NewLog()
	lines := newOutlet(io.MultiWriter(stderr, keeper{kept}), 1024, lostLines)
	defer lines.close(time.Second)
	log := newLogger(lines, isTerminal(stderr), min)
	notify, told, err := newNotifier(getenv("NOTIFY_SOCKET"))
	if err != nil {
		log.Warn("no supervisor to report to", "error", err)
	}
	defer told()
	lockMemory(log)
	runtime.GOMAXPROCS(runtime.GOMAXPROCS(0) + spare)
	ctx, stop := stopSignals(ctx)
	defer stop()
	var check func(context.Context, nic.NIC) error
	if *checked {
		check = CheckHost(cfg, *path, log)
	}
	err = Run(ctx, Options{
		Check: check, Config: cfg, Interface: *iface, Logger: log, Log: kept, StatusSocket: *status, InitSocket: *initSocket, Drain: *drain,
		Datapath: *path, Ingress: *ingress, BPFFS: *bpffs, Notify: notify, Heartbeat: heartbeat(getenv("WATCHDOG_USEC")),
	})
	switch {
	case err == nil:
	case ctx.Err() != nil && errors.Is(err, context.Canceled): // while it waited for a NIC
		log.Info("stopped before it ran")
	default:
		log.Error("cannot go on", "error", err)
		if errors.Is(err, ErrRefused) || errors.Is(err, ErrDatapath) || errors.Is(err, nic.ErrPort) {
			return exitRefused
		}
		return 1
	}
	return 0
}

// spare is how many more of its goroutines Go may run at a time than there are
// processors. The beacon thread returns from the kernel only into a free one of
// these places, and on a busy machine the others are held by goroutines whose threads
// wait for a processor.
const spare = 2

func loadConfig(file, cmdline string) (*config.Config, error) {
	if cmdline == "" {
		return config.LoadFile(file)
	}
	data, err := config.ReadFile(file)
	if err != nil {
		return nil, err
	}
	params, err := os.ReadFile(cmdline)
	if err != nil {
		return nil, fmt.Errorf("reading kernel parameters: %w", err)
	}
	// What is ignored, init has told already.
	cfg, _, err := config.LoadWithCmdline(data, file, string(params))
	return cfg, err
}

// lockMemory keeps what the engine has in memory there, so that a machine short
// of it does not make this node look dead.
func lockMemory(log *slog.Logger) {
	// Not what Go has only reserved.
	if err := unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE | unix.MCL_ONFAULT); err != nil {
		log.Warn("the engine's memory cannot be locked", "error", err)
	}
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// newLogger leaves the time to whoever collects the lines, unless that is a
// person at a terminal.
func newLogger(w io.Writer, terminal bool, level slog.Level) *slog.Logger {
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{
		Level: level,
		ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
			if a.Key == slog.TimeKey && len(groups) == 0 && !terminal {
				return slog.Attr{}
			}
			return a
		},
	}))
}

func lostLines(lost uint64) []byte {
	return fmt.Appendf(nil, "level=WARN msg=\"log lines were lost: whoever reads them is too slow\" lost=%d\n", lost)
}

// newNotifier gives a function that sends to the supervisor's socket, which may
// be a path or an abstract name that begins with @, and one that waits until all is
// sent. No socket: the first is nil.
func newNotifier(socket string) (notify func(string), flush func(), err error) {
	if socket == "" {
		return nil, func() {}, nil
	}
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		return nil, func() {}, fmt.Errorf("connecting to NOTIFY_SOCKET: %w", err)
	}
	messages := newOutlet(patient{conn}, 64, nil)
	return func(state string) { _, _ = messages.Write([]byte(state)) }, func() {
		messages.close(time.Second)
		_ = conn.Close()
	}, nil
}

// patient waits for a supervisor that does not read, but not for ever.
type patient struct{ net.Conn }

func (p patient) Write(b []byte) (int, error) {
	_ = p.SetWriteDeadline(time.Now().Add(time.Second))
	return p.Conn.Write(b)
}

// heartbeat is half of what the supervisor allows, at most 1 s.
func heartbeat(watchdogMicros string) time.Duration {
	us, err := strconv.ParseInt(watchdogMicros, 10, 64)
	if err != nil || us <= 0 {
		return time.Second
	}
	return max(10*time.Millisecond, min(time.Second, time.Duration(us)*time.Microsecond/2))
}
