package main

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/gopacket/gopacket/pcapgo"
	"github.com/spf13/cobra"

	"clonecluster/netcore/api"
	"clonecluster/netcore/capture"
)

// mostCaptured is how many nodes one node hands on at a time.
const mostCaptured = 12

func newCaptureCmd() *cobra.Command {
	var a access
	var file, client, verdict string
	var port uint16
	var count, snap int
	var duration time.Duration
	var beacons bool
	cmd := &cobra.Command{
		Use:   "capture [NODE]... -w FILE",
		Short: "Write the frames that nodes see, with the verdict on each",
		Long: `Capture writes what passes the NICs of these nodes, or of all, into one file for
Wireshark and tshark: in the order of time, with the node as the interface
(frame.interface_name) and the verdict of its filter as the comment of each frame
(frame.comment). Each node sees each frame of a client, so with all nodes it is in
the file as often as there are nodes: one accepts it.

Only frames for the cluster and from it are captured, but not those of the
management API at the VIP. They hold what clients say, so it needs a certificate
for control. It ends after --duration, after --count frames, or by Ctrl-C. If a node
does not answer, or its capture ends before that, the file has what there is, and the
exit code is 1.

A node whose filter runs as XDP ("clonectl status" shows it as the datapath) drops
the frames of others' clients before the kernel can copy them: of such a node the
file has what it accepts and sends, but no drop-... from it. The last line says so.
With system.ingress: tc in its configuration it has all.`,
		Example: `  clonectl capture -w demo.pcapng
  clonectl capture web-2 --client 192.0.2.7 --port 80 --duration 5m -w one.pcapng
  clonectl capture --verdict drop-lease,drop-no-socket -w - | tshark -r - -T fields -e frame.interface_name -e frame.comment`,
		ValidArgsFunction: func(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
			return a.nodeNames(cmd)
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			query := url.Values{"duration": {duration.String()}}
			for name, value := range map[string]string{"client": client, "verdict": verdict, "port": strconv.Itoa(int(port)), "count": strconv.Itoa(count), "snap": strconv.Itoa(snap)} {
				if value != "" && (value != "0" || cmd.Flags().Changed(name)) {
					query.Set(name, value)
				}
			}
			if beacons {
				query.Set("beacons", "1")
			}
			if _, err := capture.ParseQuery(query); err != nil {
				return usageError{fmt.Errorf("--%w", err)}
			}
			if file == "" {
				return usageError{errors.New("say where to write it with -w FILE; - is the standard output")}
			}
			c, _, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			defer c.Close()
			return captureInto(cmd, c, file, args, query, count, duration)
		},
	}
	a.add(cmd)
	f := cmd.Flags()
	f.StringVarP(&file, "write", "w", "", "write to `FILE`; - is the standard output")
	f.StringVar(&client, "client", "", "only frames of this client: `ADDRESS[:PORT]`")
	f.Uint16Var(&port, "port", 0, "only frames of this `PORT` of the VIP")
	f.StringVar(&verdict, "verdict", "", "only frames with these verdicts: `NAMES` with commas between them, or the first word of several, as drop")
	f.BoolVar(&beacons, "beacons", false, "the nodes' own frames, too")
	f.IntVar(&count, "count", 0, "end after `N` frames")
	f.DurationVar(&duration, "duration", time.Minute, fmt.Sprintf("end after this time, at most %v", capture.MostDuration))
	f.IntVar(&snap, "snap", 0, "keep so many `BYTES` of each frame")
	cmd.RegisterFlagCompletionFunc("verdict", cobra.FixedCompletions([]string{"accept", "drop", "send", "accept-new", "drop-foreign", "drop-lease", "drop-no-socket", "drop-draining"}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

// captureGrace is how much longer than asked for a node's capture may go on.
const captureGrace = 10 * time.Second

// captureInto captures on these nodes, none: all that there are. If the file lacks a node,
// or the end of what one saw, it is written all the same, and the error says so.
func captureInto(cmd *cobra.Command, c *api.Client, file string, nodes []string, query url.Values, count int, duration time.Duration) (err error) {
	ctx, cancel := context.WithCancel(cmd.Context())
	defer cancel()
	var lacks []error
	names := map[string]string{}
	if len(nodes) == 0 {
		var all api.Cluster
		if err := c.Get(ctx, "/v1/cluster", nil, &all); err != nil {
			return notReached(err)
		}
		for _, n := range all.Nodes {
			switch {
			case n.Status != nil:
				nodes, names[n.Node] = append(nodes, n.Node), n.Name
			case !n.Gone:
				lacks = append(lacks, fmt.Errorf("%s does not answer, and is not in it: %s", cmp.Or(n.Name, n.Node), n.Error))
			}
		}
	}
	if len(nodes) > mostCaptured {
		return fmt.Errorf("there are %d nodes, of which %d can be captured at a time: name those that are meant", len(nodes), mostCaptured)
	}
	m, opened := newMerger(len(nodes), count), 0
	for i, n := range nodes {
		of := url.Values{"node": {n}}
		for k, v := range query {
			of[k] = v
		}
		// One that has died says no end.
		patience, end := context.WithTimeout(ctx, duration+captureGrace)
		stream, err := c.Stream(patience, "/v1/capture", of)
		if err != nil {
			end()
			lacks = append(lacks, fmt.Errorf("%s: %w", cmp.Or(names[n], n), err))
			if e := (*api.Error)(nil); errors.As(err, &e) && e.Code < 500 || i == len(nodes)-1 && opened == 0 {
				return notReached(errors.Join(lacks...))
			}
			continue
		}
		opened++
		m.reading.Go(func() {
			defer end()
			defer stream.Close()
			if err := m.read(ctx, i, stream); err != nil {
				m.failed <- fmt.Errorf("%s: %w", cmp.Or(names[n], n), err)
			}
		})
	}
	go func() {
		m.reading.Wait()
		close(m.frames)
	}()
	w := cmd.OutOrStdout()
	if file != "-" {
		f, err := os.OpenFile(file, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, f.Close()) }()
		w = f
	}
	p := newProgress(os.Stderr)
	defer p.Clear()
	begin := time.Now()
	err = m.write(ctx, w, func(n int) {
		if took := time.Since(begin); took > 2*time.Second {
			p.Status("%s, %v to go; Ctrl-C ends it", plural(n, "frame"), max(0, duration-took).Round(time.Second))
		}
	})
	cancel()
	for range m.frames { // let the readers end
	}
	close(m.failed)
	for e := range m.failed {
		if cmd.Context().Err() == nil { // Ctrl-C is a normal end
			lacks = append(lacks, e)
		}
	}
	if err != nil {
		return errors.Join(append(lacks, err)...)
	}
	p.Done("%s: %s of %s%s%s", file, plural(m.written, "frame"), plural(opened, "node"), m.lostText(), m.withoutText())
	if len(lacks) > 0 {
		return fmt.Errorf("%s is not complete: %w", file, errors.Join(lacks...))
	}
	return nil
}

// captured is a frame of a node, when it came here, or what its capture begins with.
type captured struct {
	node int
	at   time.Time
	head *pcapgo.NgInterface
	capture.Frame
}

// merger puts the captures of several nodes together.
type merger struct {
	count   int // 0: no bound
	frames  chan captured
	failed  chan error
	reading sync.WaitGroup

	mu      sync.Mutex
	lost    uint64
	written int
	without []string // the nodes whose dropped frames no capture sees
}

func newMerger(nodes, count int) *merger {
	return &merger{count: count, frames: make(chan captured, 256), failed: make(chan error, nodes)}
}

// read reads one node's capture until its end, which has to be the one that was asked for,
// or follow from that of ctx.
func (m *merger) read(ctx context.Context, node int, r io.Reader) error {
	lack := errors.New("the capture ended early")
	ng, err := pcapgo.NewNgReader(r, pcapgo.NgReaderOptions{StatisticsCallback: func(_ int, s pcapgo.NgInterfaceStatistics) {
		if lack = nil; strings.HasPrefix(s.Comment, capture.EndedEarly) {
			lack = errors.New("the capture " + s.Comment)
		}
		m.mu.Lock()
		defer m.mu.Unlock()
		m.lost += s.PacketsDropped
	}})
	if err != nil {
		return fmt.Errorf("the capture cannot be read: %w", err)
	}
	first, err := ng.Interface(0)
	if err != nil {
		return fmt.Errorf("the capture cannot be read: %w", err)
	}
	if !m.hand(ctx, captured{node: node, head: &first}) {
		return nil
	}
	for {
		data, ci, opts, err := ng.ReadPacketDataWithOptions()
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, io.EOF):
			return lack
		case err != nil:
			return fmt.Errorf("the capture ended early: %w", err)
		}
		f := capture.Frame{Time: ci.Timestamp, Data: data, Length: ci.Length}
		if opts.Flags != nil {
			f.Left = opts.Flags.Direction == pcapgo.NgEpbFlagDirectionOutbound
		}
		if len(opts.Comments) > 0 {
			f.Comment = opts.Comments[0]
		}
		if !m.hand(ctx, captured{node: node, at: time.Now(), Frame: f}) {
			return nil
		}
	}
}

// hand gives what was read to the writer; false: nobody wants it any more.
func (m *merger) hand(ctx context.Context, c captured) bool {
	select {
	case m.frames <- c:
		return true
	case <-ctx.Done():
		return false
	}
}

// mergeWait is how long a frame waits for earlier ones of other nodes.
const mergeWait = time.Second

// write writes all frames in the order of time, until there are no more, there are
// enough, or ctx ends.
func (m *merger) write(ctx context.Context, w io.Writer, tell func(frames int)) error {
	buf := bufio.NewWriter(w)
	out, err := capture.NewWriter(buf)
	if err != nil {
		return err
	}
	ids := map[int]int{}
	var waiting []captured
	emit := func(all bool) error {
		slices.SortStableFunc(waiting, func(a, b captured) int { return cmp.Or(a.Time.Compare(b.Time), cmp.Compare(a.node, b.node)) })
		n := 0
		for _, f := range waiting {
			if !all && time.Since(f.at) < mergeWait || m.enough() {
				break
			}
			if err := out.Packet(ids[f.node], f.Frame); err != nil {
				return err
			}
			m.written++
			n++
		}
		waiting = waiting[n:]
		return buf.Flush()
	}
	tick := time.NewTicker(mergeWait / 5)
	defer tick.Stop()
	for !m.enough() {
		select {
		case <-ctx.Done():
			return emit(true)
		case f, ok := <-m.frames:
			switch {
			case !ok:
				return emit(true)
			case f.head == nil:
				waiting = append(waiting, f)
			default:
				if strings.Contains(f.head.Description, capture.WithoutDropped) {
					m.without = append(m.without, f.head.Name)
				}
				if ids[f.node], err = out.AddInterface(f.head.Name, f.head.Description, int(f.head.SnapLength)); err != nil {
					return err
				}
			}
		case <-tick.C:
			if err := emit(false); err != nil {
				return err
			}
			tell(m.written)
		}
	}
	return buf.Flush()
}

func (m *merger) enough() bool { return m.count > 0 && m.written >= m.count }

// withoutText says whose frames are not all there; write is to have ended.
func (m *merger) withoutText() string {
	if len(m.without) == 0 {
		return ""
	}
	slices.Sort(m.without)
	return fmt.Sprintf(".\nWhat XDP drops at %s is not in it: that never becomes a packet to copy. With system.ingress: tc it would be", strings.Join(m.without, ", "))
}

func (m *merger) lostText() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.lost == 0 {
		return ""
	}
	return fmt.Sprintf("; %s came faster than they could be read, and are missing", plural(int(m.lost), "frame"))
}
