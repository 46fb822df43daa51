package api

import "slices"

// Route is one thing that can be asked. The list below is what the server serves
// and what the description (docs/openapi.yaml) describes.
type Route struct {
	Method, Path string
	Name         string // operationId
	Summary      string
	Role         Role // that is needed at least; "": none
	Params       []Param
	Body         any // an example of its type; nil: none
	Answer       any
	Also         []int // further codes besides 200
	// OfNode: ?node= asks another node, through the one that is asked.
	OfNode bool
	// Events is what the server-sent events of this route carry; nil: it has none.
	Events any
	// Type is the answer's media type if that is not JSON.
	Type string
	// Streams: the answer goes on until its end is asked for.
	Streams bool
}

// Query are all its parameters.
func (r Route) Query() []Param {
	if r.OfNode {
		return append(slices.Clone(r.Params), nodeParam)
	}
	return r.Params
}

// Param is a parameter of the query.
type Param struct {
	Name, About string
	Required    bool
}

var (
	sinceParam  = Param{Name: "since", About: "only what came after the event or line with this number, or from this time on (RFC 3339), or for so long (10m)"}
	followParam = Param{Name: "follow", About: "1: go on with what comes, as server-sent events; the header Accept: text/event-stream says the same. A comment (: lost 12) says that the node no longer has so many of those that would be next"}
	burstParam  = Param{Name: "burst", About: "how many frames a second a burst to the clone MAC goes up to, to find storm control; 250 to 16000; left out or 0: none"}
	nodeParam   = Param{Name: "node", About: "the node that is meant, by wire MAC, by the end of it (02:03) or by host name; left out: the one that is asked"}
)

// Routes are all there are.
var Routes = []Route{
	{Method: "GET", Path: "/v1/health", Name: "health", Summary: "Does this node take new connections? The only thing that needs no certificate", Answer: Health{}, Also: []int{503}},
	{Method: "GET", Path: "/v1/status", Name: "status", Summary: "What a node does, and what it knows of the others", Role: RoleReadOnly, Answer: Status{}, OfNode: true},
	{Method: "GET", Path: "/v1/cluster", Name: "cluster", Summary: "The status of all nodes, and who did not answer", Role: RoleReadOnly, Answer: Cluster{}},
	{Method: "GET", Path: "/v1/findings", Name: "findings", Summary: "What all nodes have noticed and somebody should look at", Role: RoleReadOnly, Answer: Findings{}},
	{Method: "GET", Path: "/v1/offered", Name: "offered", Summary: "What clients send, by bucket, whoever takes it: each node sees all of it", Role: RoleReadOnly, Answer: OfferedBuckets{}, OfNode: true},
	{Method: "GET", Path: "/v1/live", Name: "live", Summary: "What all nodes do and what happens, as the dashboard shows it", Role: RoleReadOnly, Answer: Live{}, Events: Live{}, Params: []Param{followParam}},
	{Method: "GET", Path: "/v1/which", Name: "which", Summary: "Which node takes a client's connection, and why", Role: RoleReadOnly, Answer: Which{}, Params: []Param{
		{Name: "client", About: "the client's address, with its port if it is known: 192.0.2.1:40000, [2001:db8::1]:40000", Required: true},
		{Name: "port", About: "the port of the VIP", Required: true},
		{Name: "proto", About: "tcp or udp; left out: tcp"},
		{Name: "alone", About: "1: without asking the other nodes"},
	}},
	{Method: "GET", Path: "/v1/events", Name: "events", Summary: "What changed, when and why, as a node saw it", Role: RoleReadOnly, Answer: Events{}, Events: Event{}, Params: []Param{sinceParam, followParam}, OfNode: true},
	{Method: "GET", Path: "/v1/logs", Name: "logs", Summary: "The last lines that a node logged", Role: RoleReadOnly, Answer: Logs{}, Events: LogLine{}, Params: []Param{
		sinceParam, followParam, {Name: "source", About: "only the lines of engine, of init, or of a service"},
	}, OfNode: true},
	{Method: "GET", Path: "/v1/capture", Name: "capture", Summary: "The cluster's frames as they pass a node's NIC, as pcapng, with the verdict on each as its comment. The comment of the statistics at the end begins with \"complete: \" or \"ended early: \"", Role: RoleControl, Params: []Param{
		{Name: "client", About: "only this client's frames: an address, or one with a port"},
		{Name: "port", About: "only those of this port of the VIP"},
		{Name: "verdict", About: "only those with these verdicts: names with commas between them, or the first word of several, as drop or accept"},
		{Name: "beacons", About: "1: the nodes' own frames, too"},
		{Name: "count", About: "end after so many frames"},
		{Name: "duration", About: "end after this time, as 30s; left out: 1m; at most 10m"},
		{Name: "snap", About: "keep so many bytes of each frame; left out: all"},
	}, Type: "application/x-pcapng", Streams: true, OfNode: true},
	{Method: "GET", Path: "/v1/boot", Name: "boot", Summary: "How an appliance booted, and what it runs; 404 from an engine on an ordinary host", Role: RoleReadOnly, Answer: Boot{}, Also: []int{404}, OfNode: true},
	{Method: "GET", Path: "/v1/doctor", Name: "examination", Summary: "Will the network cooperate? What a node knows of it, and how far the examination is that runs", Role: RoleReadOnly, Answer: Examination{}, OfNode: true},
	{Method: "POST", Path: "/v1/doctor", Name: "examine", Summary: "Have a node examine the network now, and all others with it; it takes some seconds. One that runs goes on; a burst cannot be added to it (409)", Role: RoleControl, Answer: Examination{}, Params: []Param{burstParam}, OfNode: true},
	{Method: "GET", Path: "/metrics", Name: "metrics", Summary: "What Prometheus asks for, in its text format or another that the header Accept names", Role: RoleReadOnly, Type: "text/plain", OfNode: true},
	{Method: "POST", Path: "/v1/drain", Name: "drain", Summary: "Give a node's share to the others; its connections go on. It stays so until it is resumed, but over a restart of the machine", Role: RoleControl, Body: Order{}, Answer: Status{}, OfNode: true},
	{Method: "POST", Path: "/v1/resume", Name: "resume", Summary: "Have a drained node take its share again", Role: RoleControl, Body: Order{}, Answer: Status{}, OfNode: true},
	{Method: "GET", Path: "/v1/policy", Name: "policy", Summary: "Who gets how many buckets: the balance and the weights that hold", Role: RoleReadOnly, Answer: Policy{}, OfNode: true},
	{Method: "POST", Path: "/v1/policy", Name: "setPolicy", Summary: "Change the balance and the weights of all nodes at run time. It holds until it is changed again, or until no node runs any more: then the configuration holds again", Role: RoleControl, Body: PolicyOrder{}, Answer: Policy{}},
	{Method: "POST", Path: "/v1/reboot", Name: "reboot", Summary: "Restart an appliance: its engine gives its share to the others, its connections have the time of cluster.drain, and what it boots is what is served or on its disk then. 404 from an engine on an ordinary host", Role: RoleControl, Body: Order{}, Answer: Status{}, Also: []int{404, 409}, OfNode: true},
}
