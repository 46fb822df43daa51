package simulator

type kind uint8

const (
	evDo kind = iota
	evTick
	evDeliver
	evFlows
	evArrive
	evEnd
)

type event struct {
	at      int64
	order   uint64
	kind    kind
	from    int
	boot    uint64
	node    *node
	payload any
	do      func()
}

// queue is a binary heap by time, then by order of arrival. container/heap would
// allocate for every event.
type queue struct {
	events []event
	order  uint64
}

func (q *queue) len() int { return len(q.events) }

func (q *queue) less(i, j int) bool {
	a, b := &q.events[i], &q.events[j]
	return a.at < b.at || a.at == b.at && a.order < b.order
}

func (q *queue) push(e event) {
	q.order++
	e.order = q.order
	q.events = append(q.events, e)
	for i := len(q.events) - 1; i > 0; {
		parent := (i - 1) / 2
		if !q.less(i, parent) {
			break
		}
		q.events[i], q.events[parent] = q.events[parent], q.events[i]
		i = parent
	}
}

func (q *queue) pop() event {
	top := q.events[0]
	last := len(q.events) - 1
	q.events[0] = q.events[last]
	q.events[last] = event{}
	q.events = q.events[:last]
	for i := 0; ; {
		least := i
		for _, child := range [2]int{2*i + 1, 2*i + 2} {
			if child < last && q.less(child, least) {
				least = child
			}
		}
		if least == i {
			return top
		}
		q.events[i], q.events[least] = q.events[least], q.events[i]
		i = least
	}
}
