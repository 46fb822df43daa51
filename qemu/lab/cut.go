package lab

import (
	"errors"
	"fmt"
	"slices"

	"clonecluster/qemu/vswitch"
)

// Mute makes the node's cable a one-way street: what it sends is lost, and neither
// end of the cable knows. Call undo to end it.
func (m *Machine) Mute() (undo func(), err error) {
	return m.lab.drop(vswitch.Rule{Name: "mute " + m.node.Name, At: vswitch.Ingress, From: m.node.Name})
}

// Deafen is Mute for what is sent to the node.
func (m *Machine) Deafen() (undo func(), err error) {
	return m.lab.drop(vswitch.Rule{Name: "deafen " + m.node.Name, At: vswitch.Egress, To: m.node.Name})
}

// Partition splits the segment into groups of ports: no frame gets from one to
// another. A port that is in no group stays connected to all; the client host's
// is "client". Call heal to join the groups again.
func (l *Lab) Partition(groups ...[]string) (heal func(), err error) {
	if len(groups) < 2 {
		return nil, errors.New("splitting the segment: one group is no partition")
	}
	var undo []func()
	heal = func() {
		for _, f := range undo {
			f()
		}
	}
	known := func(port string) bool {
		return slices.ContainsFunc(l.sw.Ports(), func(p *vswitch.Port) bool { return p.Name() == port })
	}
	for i, here := range groups {
		for _, from := range here {
			if !known(from) {
				heal()
				return nil, fmt.Errorf("splitting the segment: no port %q", from)
			}
			for _, to := range slices.Concat(slices.Delete(slices.Clone(groups), i, i+1)...) {
				u, err := l.drop(vswitch.Rule{Name: "partition", At: vswitch.Egress, From: from, To: to})
				if err != nil {
					heal()
					return nil, err
				}
				undo = append(undo, u)
			}
		}
	}
	return heal, nil
}

func (l *Lab) drop(r vswitch.Rule) (undo func(), err error) {
	r.Drop = true
	if undo, err = l.sw.AddRule(r); err != nil {
		return nil, fmt.Errorf("cutting off (%s): %w", r.Name, err)
	}
	return undo, nil
}
