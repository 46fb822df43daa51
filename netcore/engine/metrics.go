package engine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/common/expfmt"

	"clonecluster/netcore/api"
	"clonecluster/netcore/filter"
	"clonecluster/netcore/membership"
)

// metrics are what Prometheus is told. Most of it is the status, asked for when it is
// wanted; what that does not remember is counted here.
type metrics struct {
	registry *prometheus.Registry
	events   *prometheus.CounterVec
	requests *prometheus.CounterVec
}

func newMetrics(sources ...prometheus.Collector) *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(),
		events: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "clonecluster_events_total", Help: "What happened, by kind, as GET /v1/events lists it: map counts other maps, drain orders to drain, lost dead nodes.",
		}, []string{"kind"}),
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "clonecluster_api_requests_total", Help: "Requests to the management API, by route (none: refused before) and HTTP code.",
		}, []string{"route", "code"}),
	}
	for _, kind := range api.EventKinds {
		m.events.WithLabelValues(kind)
	}
	m.registry.MustRegister(m.events, m.requests, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	m.registry.MustRegister(sources...)
	return m
}

// write writes all in the format that the header of a request asks for, and gives its
// media type.
func (m *metrics) write(w io.Writer, accept http.Header) (mediaType string, err error) {
	families, err := m.registry.Gather()
	if err != nil {
		return "", fmt.Errorf("gathering the metrics: %w", err)
	}
	format := expfmt.NegotiateAccept(accept, expfmt.DefaultAcceptedFormats()...)
	enc := expfmt.NewEncoder(w, format)
	for _, f := range families {
		if err := enc.Encode(f); err != nil {
			return "", fmt.Errorf("writing the metrics: %w", err)
		}
	}
	return string(format), nil
}

func (m *metrics) asked(route string, code int) {
	m.requests.WithLabelValues(route, strconv.Itoa(code)).Inc()
}

// Metrics is that of api.Backend.
func (b backend) Metrics(w io.Writer, accept http.Header) (string, error) {
	return b.metrics.write(w, accept)
}

// statusMetrics is the status as metrics.
type statusMetrics struct {
	status   func() Status
	refused  func() uint64 // connections to the API
	services []string
	// stages are those of the boot; nil as long as it is not known, or never.
	stages func() []api.BootStage
	booted time.Time
}

// The metrics that come from the status. Buckets, flows and load are of this node
// alone: a sum over the nodes is the cluster's.
var (
	metricDescs []*prometheus.Desc

	buildInfo      = desc("build_info", "Which program this node runs; always 1.", "build", "goversion")
	nodeInfo       = desc("node_info", "Who this node is and how it works; always 1.", "cluster", "node", "name", "nic", "driver", "datapath", "ingress", "policy", "rules")
	nodeState      = desc("node_state", "1 for the state that the node is in.", "state")
	membersInState = desc("members", "Nodes that this one and that hear each other, this one too, by state.", "state")
	membersDeaf    = desc("members_deaf", "Nodes that this one hears and that do not hear it.")
	leader         = desc("leader", "1 if this node makes the maps.")
	agreed         = desc("agreed", "1 if all live nodes go by the same map.")
	fenced         = desc("fenced", "1 if the node takes no new connections, as another may not know of it.")
	draining       = desc("draining", "1 if the node gives its share away, as it was told to or as it stops.")
	failOpen       = desc("fail_open", "1 if the services of all nodes fail and the cluster serves on.")
	mapVersion     = desc("map_version", "The version of the map of buckets that the node goes by.")
	mapBuckets     = desc("map_buckets", "Buckets, of 1024, that the map gives this node.")
	buckets        = desc("buckets", "Buckets by what this node is to them.", "state")
	weight         = desc("weight", "The node's weight; 100 is usual.")
	busy           = desc("busy_ratio", "Share of the processors that were busy, 0 to 1.")
	flows          = desc("flows", "TCP connections of the VIP that this node has.")
	drainFlows     = desc("drain_flows", "Connections that a drain or stop of this node would wait for.")
	frames         = desc("frames_total", "Frames by what the filter said of them.", "verdict")
	offeredFrames  = desc("offered_frames_total", "Segments and datagrams that clients sent to the VIP, whoever took them. Each node sees all: not to be added up.")
	offeredSYNs    = desc("offered_syns_total", "SYNs that clients sent to services, whoever took them. Each node sees all.")
	offeredAgain   = desc("offered_syn_retransmissions_total", "SYNs among these that clients sent again, since nobody answered.")
	offeredUnowned = desc("offered_unowned_frames_total", "Frames to buckets that no live node has. What an owner drops without a lease is in clonecluster_frames_total, drop-lease.")
	pathErrors     = desc("datapath_errors_total", "Frames that the datapath could not handle, by reason.", "reason")
	guarded        = desc("guarded_frames_total", "Frames that were about to leave with the clone MAC as their source; the guard mended them.")
	beaconsSent    = desc("beacons_sent_total", "Beacons that this node sent.")
	beaconsHeard   = desc("beacons_heard_total", "Authentic frames of the protocol that came from other nodes.")
	beaconsMissed  = desc("beacons_missed_total", "Frames of other nodes that did not come, by the gaps in their numbers.")
	beaconsRefused = desc("beacons_refused_total", "Frames of the protocol that had no effect, by reason.", "reason")
	serviceHealthy = desc("service_healthy", "1 if the service passes its check.", "service")
	findingsNow    = desc("finding", "1 for each finding that is current.", "code", "level")
	apiRefused     = desc("api_connections_refused_total", "Connections to the management API that its limits ended.")
	bootTime       = desc("boot_time_seconds", "When the machine was started, in seconds of Unix time.")
	bootStage      = desc("boot_stage_seconds", "When the appliance reached each stage of its boot, in seconds after its kernel started.", "stage")
)

func desc(name, help string, labels ...string) *prometheus.Desc {
	d := prometheus.NewDesc("clonecluster_"+name, help, labels, nil)
	metricDescs = append(metricDescs, d)
	return d
}

func (c *statusMetrics) Describe(to chan<- *prometheus.Desc) {
	for _, d := range metricDescs {
		to <- d
	}
}

func (c *statusMetrics) Collect(to chan<- prometheus.Metric) {
	s := c.status()
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		to <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	count := func(d *prometheus.Desc, n uint64, labels ...string) {
		to <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(n), labels...)
	}
	yes := func(d *prometheus.Desc, is bool, labels ...string) {
		gauge(d, map[bool]float64{true: 1}[is], labels...)
	}
	gauge(buildInfo, 1, s.Build, goVersion())
	gauge(nodeInfo, 1, s.Cluster, s.WireMAC, s.Name, s.NIC, s.Driver, s.Datapath, s.Ingress, s.Policy, s.Rules)
	live, deaf, self := map[string]int{}, 0, Member{}
	for _, m := range s.Members {
		if m.Live {
			live[m.State]++
		} else {
			deaf++
		}
		if m.Self {
			self = m
		}
	}
	for state := membership.Listening; state <= membership.Restarting; state++ {
		yes(nodeState, s.State == state.String(), state.String())
		gauge(membersInState, float64(live[state.String()]), state.String())
	}
	gauge(membersDeaf, float64(deaf))
	yes(leader, s.Leader == s.WireMAC)
	yes(agreed, s.Agreed)
	yes(fenced, s.Fenced)
	yes(draining, s.Drain.Draining)
	yes(failOpen, s.FailOpen)
	gauge(mapVersion, float64(s.Map))
	gauge(mapBuckets, float64(self.Buckets))
	for state, n := range map[filter.State]int{
		filter.Foreign: s.Buckets.Foreign, filter.Settled: s.Buckets.Settled, filter.Shared: s.Buckets.Shared, filter.Draining: s.Buckets.Draining,
	} {
		gauge(buckets, float64(n), state.String())
	}
	gauge(weight, float64(self.Weight))
	gauge(busy, self.Busy)
	gauge(flows, float64(self.Flows))
	gauge(drainFlows, float64(s.Drain.Flows))
	for v := filter.AcceptNew; int(v) < filter.Verdicts; v++ {
		count(frames, s.Verdicts[v.String()], v.String())
	}
	count(offeredFrames, s.Offered.Frames)
	count(offeredSYNs, s.Offered.SYNs)
	count(offeredAgain, s.Offered.SYNsAgain)
	count(offeredUnowned, s.Offered.Unowned)
	for name, n := range s.Counters {
		if name != guardedCounter {
			count(pathErrors, n, kebab(name))
		}
	}
	count(guarded, s.Counters[guardedCounter])
	count(beaconsSent, s.Beacons.Sent)
	count(beaconsHeard, s.Beacons.Heard)
	count(beaconsMissed, s.Beacons.Missed)
	for reason, n := range map[membership.RefusalKind]uint64{
		membership.RefusedMalformed: s.Beacons.Malformed, membership.RefusedVersion: s.Beacons.OtherVersion, membership.RefusedCluster: s.Beacons.OtherCluster,
		membership.RefusedKey: s.Beacons.Unauthentic, "ignored": s.Beacons.Ignored,
	} {
		count(beaconsRefused, n, string(reason))
	}
	for _, name := range c.services {
		yes(serviceHealthy, !slices.ContainsFunc(s.Unwell, func(why string) bool { return strings.HasPrefix(why, name+": ") }), name)
	}
	for _, f := range s.Findings {
		gauge(findingsNow, 1, f.Code, f.Level.String())
	}
	count(apiRefused, c.refused())
	gauge(bootTime, float64(c.booted.UnixMilli())/1000)
	for _, stage := range c.stages() {
		gauge(bootStage, stage.At, stage.Stage)
	}
}

// guardedCounter is the one of Status.Counters that counts no error.
const guardedCounter = "Guarded"

// kebab gives "rx-no-buffer" for RxNoBuffer.
func kebab(name string) string {
	var b strings.Builder
	for i, c := range name {
		if c >= 'A' && c <= 'Z' {
			if i > 0 {
				b.WriteByte('-')
			}
			c += 'a' - 'A'
		}
		b.WriteRune(c)
	}
	return b.String()
}

var goVersion = sync.OnceValue(func() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return ""
	}
	return info.GoVersion
})

// openMetrics makes the engine's.
func (e *engine) openMetrics() {
	var names []string
	for _, s := range e.opt.Config.Services {
		names = append(names, s.Name)
	}
	e.metrics = newMetrics(&statusMetrics{
		status: e.status, refused: e.refusedConnections, services: names, stages: e.bootStages(), booted: time.Now().Add(-sinceBoot()),
	})
}

func (e *engine) refusedConnections() uint64 {
	if s := e.server.Load(); s != nil {
		return s.Refused()
	}
	return 0
}

// bootStages gives a function that asks the appliance's init until its boot is over.
func (e *engine) bootStages() func() []api.BootStage {
	var mu sync.Mutex
	var stages []api.BootStage
	done := e.opt.InitSocket == ""
	return func() []api.BootStage {
		mu.Lock()
		defer mu.Unlock()
		if !done {
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			defer cancel()
			b, err := backend{engine: e}.Boot(ctx)
			if err == nil {
				stages = b.Timeline
			}
			done = b.Ready || errors.Is(err, api.ErrNoBoot)
		}
		return stages
	}
}
