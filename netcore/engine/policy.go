package engine

import (
	"context"
	"fmt"
	"maps"
	"net"
	"slices"
	"strings"
	"unicode/utf8"

	"clonecluster/netcore/api"
	"clonecluster/netcore/membership"
)

var balanceNames = map[membership.Balance]string{membership.Even: "even", membership.Load: "load"}

var setBalances = map[string]membership.SetBalance{
	"configured": membership.AsConfigured, "even": membership.SetEven, "load": membership.SetLoad,
}

// Policy says who gets how many buckets.
func (b backend) Policy() api.Policy {
	v := b.node.View()
	p := api.Policy{
		Balance: balanceNames[v.Balance], Configured: string(b.opt.Config.Policy.Balance), Affinity: string(b.opt.Config.Policy.Affinity),
		Nodes: []api.PolicyNode{},
	}
	set := map[membership.NodeID]uint16{}
	if s := v.Settings; s != nil {
		p.Version, p.Author, p.By = s.Version, s.Author.String(), s.By
		if s.Balance != membership.AsConfigured {
			p.Set = p.Balance
		}
		maps.Copy(set, s.Weights)
	}
	for _, m := range v.Members {
		_, is := set[m.ID]
		delete(set, m.ID)
		name, _ := b.cardOf(m.ID)
		p.Nodes = append(p.Nodes, api.PolicyNode{Node: m.ID.String(), Name: name, Weight: m.Weight, Set: is})
	}
	for id, w := range set {
		name, _ := b.cardOf(id)
		p.Nodes = append(p.Nodes, api.PolicyNode{Node: id.String(), Name: name, Weight: int(w), Set: true})
	}
	slices.SortFunc(p.Nodes, func(x, y api.PolicyNode) int { return strings.Compare(x.Node, y.Node) })
	return p
}

// SetPolicy changes it on all nodes.
func (b backend) SetPolicy(ctx context.Context, o api.PolicyOrder, who string) (api.Policy, error) {
	order := membership.Order{By: clipText(who, o.Reason), Weights: map[membership.NodeID]uint16{}}
	if o.Balance != "" {
		set := setBalances[o.Balance]
		order.Balance = &set
	}
	nodes := append([]api.Peer{{Node: b.self(), Name: b.host}}, b.Peers()...)
	for name, w := range o.Weights {
		id, err := nodeID(name, nodes)
		if err != nil {
			return api.Policy{}, fmt.Errorf("%w: %w", api.ErrOrder, err)
		}
		order.Weights[id] = uint16(w)
	}
	if _, err := b.node.Order(ctx, order); err != nil {
		return api.Policy{}, fmt.Errorf("changing the policy: %w", err)
	}
	return b.Policy(), nil
}

// nodeID gives a node by its wire MAC, whether it is there or not, or as api.Find does.
func nodeID(name string, nodes []api.Peer) (membership.NodeID, error) {
	mac, err := net.ParseMAC(name)
	if err != nil || len(mac) != 6 {
		p, err := api.Find(name, nodes)
		if err != nil {
			return membership.NodeID{}, err
		}
		if mac, err = net.ParseMAC(p.Node); err != nil {
			return membership.NodeID{}, err
		}
	}
	return membership.NodeID(mac), nil
}

// clipText is who and why, as much of it as goes into a frame.
func clipText(who, why string) string {
	text := who
	if why != "" {
		text += ": " + why
	}
	text = strings.ToValidUTF8(text, "·")
	for len(text) > membership.MaxBy {
		_, n := utf8.DecodeLastRuneInString(text)
		text = text[:len(text)-n]
	}
	return text
}

// settingsText says what holds at run time, in a sentence.
func (e *engine) settingsText(s *membership.Settings) string {
	var say []string
	switch s.Balance {
	case membership.SetEven:
		say = append(say, "balance even")
	case membership.SetLoad:
		say = append(say, "balance load")
	}
	for _, id := range slices.SortedFunc(maps.Keys(s.Weights), membership.NodeID.Compare) {
		say = append(say, fmt.Sprintf("weight %d of %s", s.Weights[id], e.called(id)))
	}
	if say == nil {
		say = []string{"all as configured"}
	}
	return fmt.Sprintf("policy %d: %s", s.Version, strings.Join(say, ", "))
}
