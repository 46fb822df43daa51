package health

// state is what is known of a service.
type state uint8

const (
	_        state = iota
	starting       // has never worked: not healthy, and no failure either
	healthy
	failed
)

// machine turns the answers of one check into a state. It has no clock.
//
// The first success decides at once. From then on it takes fall failures in a
// row to be failed, and rise successes in a row to be healthy again.
type machine struct {
	rise, fall int // 1 at least
	state      state
	streak     int    // answers in a row against the state
	excused    int    // failures in a row that were not counted
	reason     string // of the last failure
}

func newMachine(rise, fall int) machine {
	return machine{rise: max(rise, 1), fall: max(fall, 1), state: starting}
}

// excuses is how many times fall failures in a row may be excused.
const excuses = 10

// step takes an answer, nil if all was well. One that is excused does not count against a
// healthy service, unless there were very many in a row.
func (m *machine) step(answer error, excused bool) {
	if answer != nil {
		m.reason = answer.Error()
	}
	if answer != nil && excused && m.state == healthy {
		if m.excused++; m.excused < excuses*m.fall {
			return
		}
		m.streak = m.fall - 1
	}
	m.excused = 0
	switch {
	case m.state == starting && answer != nil, m.state == healthy && answer == nil, m.state == failed && answer != nil:
		m.streak = 0
		return
	}
	m.streak++
	switch {
	case m.state == starting, m.state == failed && m.streak >= m.rise:
		m.state, m.streak = healthy, 0
	case m.state == healthy && m.streak >= m.fall:
		m.state, m.streak = failed, 0
	}
}

// why is the reason for not being healthy; empty if it is.
func (m *machine) why() string {
	switch {
	case m.state == healthy:
		return ""
	case m.state == starting && m.reason == "":
		return "starting"
	case m.state == starting:
		return "starting, " + m.reason
	}
	return m.reason
}
