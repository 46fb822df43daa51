package membership

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"clonecluster/netcore/filter"
)

// mapMaker is what a leader remembers.
type mapMaker struct {
	madeAt     int64
	balancedAt int64
	// shares are how many buckets, and parts of one, the load gives to the members
	// of the map sharesOf. Of any other map they are what it says.
	shares   []float64
	sharesOf MapID
	meanLoad float64 // of the members, when the shares were last looked at
}

// candidate is a node that a map may give buckets to.
type candidate struct {
	id     NodeID
	weight int
	busy   float64 // 0 to 1
	flows  float64
}

// lead makes a map if this node is the leader and the present one will not do.
func (m *Machine) lead(now int64, a *Actions) bool {
	if !m.unsettled && now < m.nextLook {
		return false
	}
	m.nextLook = math.MaxInt64
	if allSick := m.everybodySick(); allSick != m.allSick {
		m.allSick = allSick
		switch {
		case !allSick:
			a.note(Recovered, m.self)
		case m.cfg.Policy.StopWhenSick:
			a.note(AllFailed, m.self)
		default:
			a.note(FailOpen, m.self)
		}
	}
	if !m.state.takesPart() || m.leader != m.self.ID || m.fence {
		return false
	}
	chosen := m.candidates()
	quotas, why := m.wanted(chosen, now)
	if why == "" {
		return false
	}
	// Two leaders that do not see each other as such must not fill the segment.
	if least := int64(m.cfg.Params.Interval) / 4; now < m.madeAt+least {
		m.nextLook = m.madeAt + least
		return false
	}
	m.madeAt = now
	next := &Map{MapID: MapID{m.highest() + 1, m.self.ID}, Rules: m.cfg.Rules, Members: make([]NodeID, len(chosen))}
	if m.cur != nil {
		next.Parent = m.cur.MapID
	}
	for i, c := range chosen {
		next.Members[i] = c.id
	}
	next.Owner = assign(m.cur, next.Members, quotas)
	a.Notes = append(a.Notes, Note{What: NewMap, Peer: m.self, Map: next.MapID, Why: why})
	if why == whyLoad {
		m.sharesOf = next.MapID
	}
	m.adopt(next, now, a)
	m.mapSent = 0
	return true
}

// everybodySick reports whether there are nodes that serve, and the services of
// all of them fail their checks.
func (m *Machine) everybodySick() bool {
	rules, serving := m.commonRules(), false
	if m.state == Serving && m.cfg.Rules == rules {
		if !m.unwell() {
			return false
		}
		serving = true
	}
	for _, p := range m.live {
		if p.state == Serving && p.rules == rules {
			if !p.sick {
				return false
			}
			serving = true
		}
	}
	return serving
}

// candidates gives the nodes that shall own buckets, by id: those that serve and
// whose services are well, or else those that serve, or else those that drain,
// of which the well ones come first, too; somebody has to.
func (m *Machine) candidates() []candidate {
	rules := m.commonRules()
	var well, sick, drain, last []candidate
	add := func(id NodeID, s State, unwell bool, weight, busy, flows int) {
		c := candidate{id, max(weight, 1), float64(busy) / 1000, float64(flows)}
		switch {
		case s == Draining && unwell:
			last = append(last, c)
		case s == Draining:
			drain = append(drain, c)
		case s == Serving && unwell:
			sick = append(sick, c)
		case s == Serving:
			well = append(well, c)
		}
	}
	if m.cfg.Rules == rules {
		add(m.self.ID, m.state, m.unwell(), m.weight(m.self.ID, m.cfg.Weight), int(m.busy), int(m.flows))
	}
	for _, p := range m.live {
		if p.rules == rules {
			add(p.ID, p.state, p.sick, m.weight(p.ID, int(p.weight)), int(p.busy), int(p.flows))
		}
	}
	chosen := well
	switch {
	case len(well) > 0:
	case len(sick) > 0 && m.cfg.Policy.StopWhenSick:
		return nil
	case len(sick) > 0:
		chosen = sick
	case len(drain) > 0:
		chosen = drain
	default:
		chosen = last
	}
	slices.SortFunc(chosen, func(a, b candidate) int { return a.id.Compare(b.id) })
	return chosen[:min(len(chosen), MaxNodes)]
}

// highest is the highest version that this node has heard of.
func (m *Machine) highest() (v uint64) {
	if m.cur != nil {
		v = m.cur.Version
	}
	for _, p := range m.all {
		if p.proven {
			v = max(v, p.mapID.Version)
		}
	}
	return v
}

// wanted gives how many buckets each candidate shall have, and why the present
// map will not do; "" if it will.
func (m *Machine) wanted(chosen []candidate, now int64) (quotas []int, why string) {
	fair := make([]float64, len(chosen))
	for i, c := range chosen {
		fair[i] = float64(c.weight)
	}
	if m.cur == nil {
		return apportion(fair), "the first"
	}
	var count [256]int
	for _, o := range m.cur.Owner {
		count[o]++
	}
	have := make([]float64, len(chosen))
	known := true
	for i, c := range chosen {
		if j := m.cur.index(c.id); j != Nobody {
			have[i] = float64(count[j])
		} else {
			known = false
		}
	}
	shares := fair
	balance := m.balance() == Load && len(chosen) > 0
	if balance {
		shares = carryOver(have, fair, func(i int) bool { return m.cur.index(chosen[i].id) != Nobody })
	}
	switch {
	case !known || len(m.cur.Members) != len(chosen) || m.cur.Rules != m.cfg.Rules || count[Nobody] > 0 && len(chosen) > 0:
		why = m.membersChanged(chosen)
	case m.cur.Version < m.highest() || m.higherMap():
		why = "to bring maps together"
	}
	if why != "" {
		m.balancedAt = now
		return apportion(shares), why
	}
	// What was set begins from the static shares, also where the load moves them then.
	if !balance || m.reweighted {
		m.reweighted = false
		quotas = apportion(fair)
		for i := range quotas {
			if quotas[i] != int(have[i]) {
				m.balancedAt = now
				return quotas, whyWeights
			}
		}
		if !balance {
			return nil, ""
		}
	}
	if due := m.balancedAt + int64(time.Second); now < due {
		m.nextLook = due
		return nil, ""
	}
	elapsed := min(float64(now-m.balancedAt)/1e9, 2)
	m.balancedAt = now
	m.nextLook = now + int64(time.Second)
	if m.sharesOf != m.cur.MapID || len(m.shares) != len(have) { // two maps may have one id
		m.shares, m.sharesOf, m.meanLoad = have, m.cur.MapID, 0
	}
	var idle bool
	m.shares, m.meanLoad, idle = rebalance(chosen, m.shares, fair, m.meanLoad, elapsed)
	if quotas = towards(m.shares, have, m.cfg.Policy.Moves, idle); quotas == nil {
		return nil, ""
	}
	for i, q := range quotas { // what may not move yet is asked for again, if need be
		m.shares[i] = min(max(m.shares[i], float64(q-1)), float64(q+1))
	}
	return quotas, whyLoad
}

// The reasons of maps that move nothing but what the load, or the weights, ask for.
const (
	whyLoad    = "load"
	whyWeights = "weights"
)

// higherMap reports whether a live peer goes by a map of the same version as
// the present one, and another.
func (m *Machine) higherMap() bool {
	for _, p := range m.live {
		if c := p.mapID.Compare(m.cur.MapID); c > 0 || c == 0 && !m.goesBy(p) {
			return true
		}
	}
	return false
}

func (m *Machine) membersChanged(chosen []candidate) string {
	var what []string
	in := func(id NodeID) bool { return slices.ContainsFunc(chosen, func(c candidate) bool { return c.id == id }) }
	for _, c := range chosen {
		if m.cur.index(c.id) == Nobody {
			what = append(what, "takes part: "+c.id.String())
		}
	}
	for _, id := range m.cur.Members {
		if !in(id) {
			what = append(what, "no more: "+id.String())
		}
	}
	if len(what) == 0 {
		return "other rules"
	}
	if most := 8; len(what) > most {
		what = append(what[:most], fmt.Sprintf("and %d more", len(what)-most))
	}
	return strings.Join(what, ", ")
}

// apportion divides the buckets by share, exactly but for the rounding, by the
// largest remainders (Hamilton's method); equal remainders favour the first.
func apportion(shares []float64) []int {
	quotas := make([]int, len(shares))
	total := 0.0
	for _, s := range shares {
		total += s
	}
	if total <= 0 {
		return quotas
	}
	order := make([]int, len(shares))
	rest := make([]float64, len(shares))
	left := filter.Buckets
	for i, s := range shares {
		exact := s / total * filter.Buckets
		quotas[i] = int(exact)
		rest[i], order[i] = exact-float64(quotas[i]), i
		left -= quotas[i]
	}
	slices.SortStableFunc(order, func(a, b int) int { return cmp.Compare(rest[b], rest[a]) })
	for _, i := range order[:min(left, len(order))] {
		quotas[i]++
	}
	return quotas
}

// carryOver gives the shares after a change of members when the shares follow
// the load: those that were there keep theirs in proportion to each other, and a
// newcomer begins with its fair one.
func carryOver(have, fair []float64, known func(int) bool) []float64 {
	shares := make([]float64, len(have))
	knownHave, knownFair := 0.0, 0.0
	for i := range have {
		if known(i) {
			knownHave += have[i]
			knownFair += fair[i]
		}
	}
	for i := range have {
		if known(i) && knownHave > 0 {
			shares[i] = have[i] / knownHave * knownFair
		} else {
			shares[i] = fair[i]
		}
	}
	return shares
}

// What rebalance goes by. The gain is small, since a node that is given less is
// not less busy before the connections that it has are over: with a gain of 0.2
// the shares swing to and fro without end, with this one not even with
// connections of a minute.
const (
	loadGain = 0.08  // part of a relative difference in load that is mended each second
	loadLeak = 0.001 // part of the distance from the static share that is undone each second
	loadBand = 0.02  // relative differences below that are none
	loadIdle = 0.05  // with a mean load below that the shares go back to the static ones,
	loadBack = 0.2   // by that part of the distance each second
	loadEbb  = 0.7   // with less than that part of the last mean the load goes away
	loadMost = 8.0   // a node has at least this part of its static share
	loadFull = 0.95  // what is busier than that is saturated
	loadWait = 0.05  // the most that connections count then
	loadStep = 2.0   // buckets: moving less is not worth a map,
	loadPart = 24.0  // nor is less than this part of what a node has, unless there is nothing else to do
)

// rebalance moves shares from nodes that are busier than the mean to those that
// are less busy, as much as the loads ask for in so many seconds, and gives the mean load, of which
// it is told the last. Where all are idle they go back to the static ones. Where the load goes away they stay as
// they are: whoever had less left to do is idle before the others, and what is damped, too, tells of the past.
func rebalance(chosen []candidate, shares, fair []float64, last, elapsed float64) (_ []float64, mean float64, idle bool) {
	load := loads(chosen, shares)
	sumFair := 0.0
	for i := range chosen {
		mean += load[i] / float64(len(chosen))
		sumFair += fair[i]
	}
	next, total := make([]float64, len(shares)), 0.0
	for i, share := range shares {
		static := fair[i] / sumFair * filter.Buckets
		switch back := static - share; {
		case mean < loadIdle && math.Abs(back) < loadStep:
			next[i] = static
		case mean < loadIdle:
			next[i] = share + back*loadBack*elapsed
		case mean < loadEbb*last:
			next[i] = share
		default:
			off := 1 - load[i]/mean
			off = math.Copysign(max(0, math.Abs(off)-loadBand), off)
			next[i] = max(share+(off*loadGain*share+back*loadLeak)*elapsed, static/loadMost)
		}
		total += next[i]
	}
	for i := range next {
		next[i] *= filter.Buckets / total
	}
	return next, mean, mean < loadIdle
}

// loads gives the busy share of each node's processors. When those of all are
// saturated it says little, and how many connections a node has for its share
// counts as well: by Little's law that is its response time. It counts little,
// since connections may also do nothing, and since those of clients that wait
// for their answers before they ask again all gather at whoever is the slowest
// at the moment.
func loads(chosen []candidate, shares []float64) []float64 {
	flows, full := 0.0, 1.0
	for _, c := range chosen {
		flows += c.flows
		full = min(full, max(0, c.busy-loadFull)/(1-loadFull))
	}
	load := make([]float64, len(chosen))
	for i, c := range chosen {
		load[i] = c.busy
		if flows > 0 && shares[i] > 0 {
			each, mean := c.flows/shares[i], flows/filter.Buckets
			load[i] *= 1 + loadWait*full*(each-mean)/(each+mean)
		}
	}
	return load
}

// towards moves buckets one by one, at most so many, until the quotas are as close
// to the shares as they can be; nil if that is not worth a map. A map takes all nodes something:
// one in each second is more than a balance that is a little better is worth.
func towards(shares, have []float64, most int, idle bool) []int {
	quotas := toInts(have)
	moved := 0.0
	for range most {
		gains, loses := 0, 0
		for i := range quotas {
			if lack(shares, quotas, i) > lack(shares, quotas, gains) {
				gains = i
			}
			if lack(shares, quotas, i) < lack(shares, quotas, loses) {
				loses = i
			}
		}
		if lack(shares, quotas, gains)-lack(shares, quotas, loses) <= 1 {
			break
		}
		quotas[gains]++
		quotas[loses]--
		moved++
	}
	if moved < min(loadStep, float64(most)) {
		return nil
	}
	for i, q := range quotas {
		if idle || moved >= float64(most) || math.Abs(float64(q)-have[i]) >= have[i]/loadPart {
			return quotas
		}
	}
	return nil
}

func lack(shares []float64, quotas []int, i int) float64 { return shares[i] - float64(quotas[i]) }

func toInts(fs []float64) []int {
	is := make([]int, len(fs))
	for i, f := range fs {
		is[i] = int(f)
	}
	return is
}

// score is what a node bids for a bucket: the highest has it.
func score(id NodeID, b int) uint64 { return mix(idNumber(id), uint64(b)+1) }

// assign gives each member its number of buckets. What a member has it keeps,
// up to that number, beginning with those for which its score is the highest;
// the rest go to the highest scores among those that have room.
func assign(last *Map, members []NodeID, quotas []int) (owner [filter.Buckets]uint8) {
	room := slices.Clone(quotas)
	for b := range owner {
		owner[b] = Nobody
	}
	if last != nil {
		had := make([][]int, len(members))
		for b := range last.Owner {
			if i := slices.Index(members, last.owner(b)); i >= 0 {
				had[i] = append(had[i], b)
			}
		}
		for i, id := range members {
			if len(had[i]) > room[i] {
				had[i] = keep(id, had[i], room[i])
			}
			for _, b := range had[i] {
				owner[b] = uint8(i)
			}
			room[i] -= len(had[i])
		}
	}
	for b := range owner {
		if owner[b] != Nobody {
			continue
		}
		best := uint64(0)
		for i, id := range members {
			if room[i] <= 0 {
				continue
			}
			if s := score(id, b); owner[b] == Nobody || s > best {
				owner[b], best = uint8(i), s
			}
		}
		if owner[b] != Nobody {
			room[owner[b]]--
		}
	}
	return owner
}

// keep gives the n buckets for which a node bids the most.
func keep(id NodeID, buckets []int, n int) []int {
	type bid struct {
		score  uint64
		bucket int
	}
	bids := make([]bid, len(buckets))
	for i, b := range buckets {
		bids[i] = bid{score(id, b), b}
	}
	slices.SortFunc(bids, func(x, y bid) int { return cmp.Compare(y.score, x.score) })
	for i := range n {
		buckets[i] = bids[i].bucket
	}
	return buckets[:n]
}

// nextMap is when to send the present map to those that lack it: its leader does at
// once and again, and, for those that do not hear the leader, the lowest of those that
// they hear.
func (m *Machine) nextMap(now int64) int64 {
	next := int64(math.MaxInt64)
	if m.cur == nil || m.state >= Leaving || m.cfg.Weakness == SendOnce && (m.mapSent != 0 || m.cur.Leader != m.self.ID) {
		return next
	}
	interval := int64(m.cfg.Params.Interval)
	author := m.peers[m.cur.Leader]
	for _, p := range m.all {
		if !p.proven || p.gone || now-p.heard > int64(m.cfg.Params.Dead) || p.mapID.Compare(m.cur.MapID) >= 0 {
			continue
		}
		since := max(p.laggedSince, m.adopted) // before that nobody lacked it
		switch {
		case m.cur.Leader == m.self.ID:
			next = min(next, m.mapSent+interval)
		case m.relays(p) && !(author != nil && author.live && slices.Contains(p.tags, author.tag)):
			next = min(next, max(since+interval, m.mapSent+interval))
		default:
			// Somebody else will do it, unless that one takes another machine for p.
			next = min(next, max(since+interval*int64(3+m.tag%8), m.mapSent+4*interval))
		}
	}
	return next
}

// relays reports whether of those that p hears and that have the map this node
// is the lowest.
func (m *Machine) relays(p *peer) bool {
	for _, l := range m.live {
		if l.ID.Compare(m.self.ID) < 0 && l != p && l.mapID == m.cur.MapID && slices.Contains(p.tags, l.tag) {
			return false
		}
	}
	return true
}
