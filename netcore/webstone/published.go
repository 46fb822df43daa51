package webstone

// A Published point is one of the tables of the idea's evaluation. Of its runs these are the
// ones whose figures are known here; where a figure is not, it is 0.
type Published struct {
	Clients  int
	Mbit     float64 // throughput in Mbit/s
	Response float64 // average response time in seconds
}

// PublishedClients are the numbers of clients of those tables.
func PublishedClients() []int { return []int{10, 30, 50, 70, 90, 110, 130, 140, 150, 170, 200} }

// What was published: WebStone with one machine and with two.
var (
	PublishedOne      = []Published{{110, 20.80, 0}, {150, 7.46, 0}, {200, 1.92, 1.457}}
	PublishedTwo      = []Published{{110, 16.98, 0}} // by which policy is not known
	PublishedByLoad   = []Published{{200, 12.65, 0.254}}
	PublishedByRandom = []Published{{200, 15.86, 0.206}}
)
