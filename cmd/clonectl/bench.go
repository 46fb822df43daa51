package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"clonecluster/image"
	"clonecluster/netcore/evaluation"
	"clonecluster/netcore/webstone"
)

// benchFlags say what is measured.
type benchFlags struct {
	workload, arrivals          string
	clients                     []int
	keepAlive, asJSON           bool
	warmUp, duration, timeout   time.Duration
	repeat                      int
	rate                        float64
	seed                        uint64
	sources                     []string
	content, report, out, label string
	svg                         string
}

func newBenchCmd() *cobra.Command {
	var f benchFlags
	cmd := &cobra.Command{
		Use:   "bench URL",
		Short: "Measure a web server as WebStone does",
		Long: `Bench has so many clients ask a web server for files at the same time, and prints
its throughput and how long its answers took, with one line for each number of
clients. A client asks anew as soon as it has its answer, on a connection of its
own for each request (HTTP/1.0) or, with --keep-alive, on the same one.

The workloads:

  standard   the file mix of WebStone 2: 500 to 5248000 octets, 19.8 kB on average
  2k         one file of 2000 octets

A file's name is its size, so below URL there are 500, 5125, 51250, 512500,
5248000 and 2000. The reference web service has them at /bench/; for any other
server, --write-content makes a folder of them.

With https each connection is that of a new client: it resumes no session, and does
not look at the server's certificate.

With --rate, requests begin at that rate whatever becomes of those before, and
their time counts from when they should have begun, so that a server which
stands still is not asked less. --clients is then how many may be under way.

Throughput is that of the bodies. Little is how many requests were under way on
average: without errors it is the number of clients, or the figures are wrong
(WebStone prints the same). CPU is how many processors this program took: if
that is about what there is, it is this program that was measured. After an
error a client waits for 10 ms.

Ctrl-C prints what was measured so far. The exit code is 1 if there was no answer
with some number of clients.`,
		Example: `  clonectl bench http://10.77.0.10/bench/
  clonectl bench http://10.77.0.10/bench/ --workload 2k --clients 10,110,200 --duration 30s --repeat 3
  clonectl bench http://10.77.0.10/bench/ --keep-alive --rate 500 --json
  clonectl bench https://www.example.com/bench/ --workload 2k
  clonectl bench http://10.77.0.10/bench/ --svg bench.svg     # beside what was published
  clonectl bench --write-content www                          # for another server`,
		Args: usageArgs(cobra.MaximumNArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			switch {
			case f.content != "" || f.report != "":
				if len(args) > 0 {
					return usageError{errors.New("--write-content and --report measure nothing: leave the URL out")}
				}
				if f.content != "" {
					return webstone.WriteContent(f.content)
				}
				return writeEvaluation(cmd.OutOrStdout(), f.report, f.out)
			case len(args) == 0:
				return usageError{fmt.Errorf("of what? Give a URL; see %q", cmd.CommandPath()+" --help")}
			}
			cfg, err := f.config(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return f.run(cmd.Context(), cmd.OutOrStdout(), cfg, newProgress(os.Stderr))
		},
	}
	fs := cmd.Flags()
	fs.StringVar(&f.workload, "workload", "standard", "standard or 2k")
	fs.IntSliceVar(&f.clients, "clients", webstone.PublishedClients(), "how `MANY` at a time, one measurement each")
	fs.BoolVar(&f.keepAlive, "keep-alive", false, "a client keeps its connection")
	fs.DurationVar(&f.warmUp, "warm-up", 2*time.Second, "not measured")
	fs.DurationVar(&f.duration, "duration", 10*time.Second, "of a measurement")
	fs.IntVar(&f.repeat, "repeat", 1, "measurements with each number of clients")
	fs.DurationVar(&f.timeout, "timeout", 10*time.Second, "of a request")
	fs.Float64Var(&f.rate, "rate", 0, "requests a second, whatever becomes of those before")
	fs.StringVar(&f.arrivals, "arrivals", "poisson", "how requests come with --rate: poisson or constant")
	fs.StringSliceVar(&f.sources, "source", nil, "the clients' own `ADDRESS`es, in turn")
	fs.Uint64Var(&f.seed, "seed", 1, "of the choice of files and of arrivals")
	fs.BoolVar(&f.asJSON, "json", false, "print all there is, as JSON")
	fs.StringVar(&f.svg, "svg", "", "draw throughput and response time into `FILE`, beside what was published")
	fs.StringVar(&f.label, "label", "measured", "the name of the line in that drawing")
	fs.StringVar(&f.content, "write-content", "", "only write the files of the workloads into `FOLDER`")
	fs.StringVar(&f.report, "report", "", "only write evaluation.md and its drawings, of the results in `FILE`")
	fs.StringVar(&f.out, "out", "docs", "`FOLDER` for --report")
	cmd.MarkFlagDirname("write-content")
	cmd.MarkFlagDirname("out")
	cmd.MarkFlagFilename("report", "json")
	cmd.MarkFlagFilename("svg", "svg")
	cmd.MarkFlagsMutuallyExclusive("write-content", "report")
	for name, values := range map[string][]string{"workload": {"standard", "2k"}, "arrivals": {"poisson", "constant"}} {
		cmd.RegisterFlagCompletionFunc(name, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp))
	}
	return cmd
}

// config checks the flags and finds the server. Clients are still to be set.
func (f *benchFlags) config(ctx context.Context, target string) (cfg webstone.Config, err error) {
	cfg = webstone.Config{KeepAlive: f.keepAlive, Timeout: f.timeout, WarmUp: f.warmUp, Window: f.duration, Windows: f.repeat, Rate: f.rate, Seed: f.seed}
	usage := func(format string, args ...any) (webstone.Config, error) {
		return cfg, usageError{fmt.Errorf(format, args...)}
	}
	if cfg.Workload, err = webstone.WorkloadNamed(f.workload); err != nil {
		return usage("--workload: %w", err)
	}
	switch f.arrivals {
	case "poisson":
	case "constant":
		cfg.Constant = true
	default:
		return usage("--arrivals %q: want poisson or constant", f.arrivals)
	}
	for flag, d := range map[string]time.Duration{"duration": f.duration, "timeout": f.timeout} {
		if d <= 0 {
			return usage("--%s %v: want more than 0", flag, d)
		}
	}
	if f.repeat < 1 || f.warmUp < 0 || f.rate < 0 || len(f.clients) == 0 || slices.Min(f.clients) < 1 {
		return usage("--repeat, --clients: want 1 or more; --warm-up, --rate: 0 or more")
	}
	for _, s := range f.sources {
		a, err := netip.ParseAddr(s)
		if err != nil {
			return usage("--source %q: want an address of this machine", s)
		}
		cfg.Sources = append(cfg.Sources, a)
	}
	u, err := url.Parse(target)
	if err != nil || u.Host == "" || u.RawQuery != "" || u.Fragment != "" {
		return usage("%q: want a URL such as http://10.77.0.10/bench/", target)
	}
	port := uint64(80)
	switch u.Scheme {
	case "http":
	case "https":
		cfg.TLS, port = true, 443
	default:
		return usage("%s: only http and https can be measured", target)
	}
	cfg.Host, cfg.Prefix = u.Host, strings.TrimSuffix(u.EscapedPath(), "/")+"/"
	if p := u.Port(); p != "" {
		if port, err = strconv.ParseUint(p, 10, 16); err != nil {
			return usage("%s: no port %s", target, p)
		}
	}
	// Once: it is not the resolver that is measured.
	addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", u.Hostname())
	if err != nil {
		return cfg, err
	}
	cfg.Target = netip.AddrPortFrom(addrs[0].Unmap(), uint16(port))
	return cfg, nil
}

// run measures with each number of clients.
func (f *benchFlags) run(ctx context.Context, w io.Writer, cfg webstone.Config, p *progress) error {
	var results []*webstone.Result
	var failed error
	for i, n := range f.clients {
		cfg.Clients = n
		r, err := f.measure(ctx, cfg, p, fmt.Sprintf("%d of %d: %d clients", i+1, len(f.clients), n))
		if r != nil && len(r.Windows) > 0 {
			results = append(results, r)
		}
		if err != nil {
			failed = err
			break
		}
		if t := r.Total(); t.Requests == 0 && failed == nil {
			failed = fmt.Errorf("with %d clients there was no answer%s", n, firstExample(t))
		}
	}
	p.Clear()
	if len(results) == 0 {
		return failed
	}
	if f.asJSON {
		if err := printJSON(w, results); err != nil {
			return err
		}
	} else if err := printBench(w, results); err != nil {
		return err
	}
	if f.svg != "" {
		drawing := evaluation.Drawing("WebStone, "+cfg.Workload.Title, []evaluation.Line{evaluation.LineOf(f.label, results)})
		if err := image.WriteFile(f.svg, drawing, 0o644); err != nil {
			return err
		}
	}
	return failed
}

// measure is one measurement, with its progress.
func (f *benchFlags) measure(ctx context.Context, cfg webstone.Config, p *progress, what string) (*webstone.Result, error) {
	begin, all := time.Now(), cfg.WarmUp+time.Duration(cfg.Windows)*cfg.Window
	showing, stop := context.WithCancel(ctx)
	shown := make(chan struct{})
	go func() {
		defer close(shown)
		tick := time.NewTicker(500 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-showing.Done():
				return
			case <-tick.C:
				p.Status("measuring: %s, %.0f s of %.0f", what, time.Since(begin).Seconds(), all.Seconds())
			}
		}
	}()
	r, err := webstone.Run(ctx, cfg)
	stop()
	<-shown
	return r, err
}

func firstExample(w *webstone.Window) string {
	for _, text := range w.Examples {
		return ": " + text
	}
	return ""
}

// printBench prints a table that is markdown, too.
func printBench(w io.Writer, results []*webstone.Result) error {
	t := tabwriter.NewWriter(w, 0, 0, 1, ' ', 0)
	fmt.Fprintln(t, "| clients\t| Mbit/s\t| requests/s\t| mean s\t| p50\t| p90\t| p99\t| p99.9\t| max\t| Little\t| CPU\t| errors\t|")
	fmt.Fprintln(t, strings.Repeat("|--\t", 12)+"|")
	for _, r := range results {
		m := r.Total()
		l := &m.Latency
		s := func(d time.Duration) string { return fmt.Sprintf("%.4f", d.Seconds()) }
		fmt.Fprintf(t, "| %d\t| %.2f\t| %.1f\t| %s\t| %s\t| %s\t| %s\t| %s\t| %s\t| %.1f\t| %.2f\t| %s\t|\n", r.Clients,
			r.Median((*webstone.Window).Throughput), r.Median((*webstone.Window).Rate), s(l.Mean()), s(l.Quantile(.5)), s(l.Quantile(.9)),
			s(l.Quantile(.99)), s(l.Quantile(.999)), s(l.Max()), m.Load(), m.CPU, evaluation.Errors(m))
	}
	return t.Flush()
}

// writeEvaluation writes the report of "make evaluation".
func writeEvaluation(w io.Writer, results, folder string) error {
	data, err := os.ReadFile(results)
	if err != nil {
		return err
	}
	var r evaluation.Report
	if err := json.Unmarshal(data, &r); err != nil {
		return fmt.Errorf("%s: %w", results, err)
	}
	files, err := r.Files()
	if err != nil {
		return err
	}
	for name, data := range files {
		if err := image.WriteFile(filepath.Join(folder, name), data, 0o644); err != nil {
			return err
		}
	}
	fmt.Fprintf(w, "written: %s and %d drawings\n", filepath.Join(folder, evaluation.Document), len(files)-1)
	return nil
}
