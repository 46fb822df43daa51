package api

import (
	"fmt"
	"strings"
)

// byWhat says in words what an affinity looks at.
var byWhat = map[string]string{
	"none": "the client's address and port", "client": "the client's address alone", "network": "the client's network alone",
	"single": "nothing: one node has all of them",
}

// explain says why a flow is where it is.
func (w Which) explain(names map[string]string) string {
	called := func(id string) string {
		if names[id] != "" {
			return names[id]
		}
		return id
	}
	var say []string
	add := func(format string, args ...any) { say = append(say, fmt.Sprintf(format, args...)) }
	switch {
	case w.Affinity == "disabled":
		return fmt.Sprintf("No node takes what comes to port %d/%s: a rule disables it.", w.Port, w.Protocol)
	case w.Bucket == nil:
		return fmt.Sprintf("Each connection to port %d/%s goes by the client's port, too, so those of one client are on all nodes: give the port of the one that is meant.", w.Port, w.Protocol)
	}
	add("Port %d/%s goes by %s, which gives bucket %d of 1024", w.Port, w.Protocol, byWhat[w.Affinity], *w.Bucket)
	if w.Owner == "" {
		add("the map gives that bucket to nobody")
	} else {
		add("the map gives that bucket to %s", called(w.Owner))
	}
	for _, n := range w.Nodes {
		switch {
		case n.Error != "":
			add("%s did not say what it makes of it (%s)", called(n.Node), n.Error)
		case n.Socket && n.Node != w.Owner:
			add("this very connection is with %s, where it stays until it ends", called(n.Node))
		case n.Socket:
			add("it has this very connection")
		case n.Node == w.Owner && n.State == "shared":
			add("another node still has connections in it, and keeps them")
		case n.Node == w.Owner && n.State == "foreign":
			add("it has not taken it over yet")
		case n.Node != w.Owner && n.State == "draining":
			add("%s still has connections in it, and keeps them", called(n.Node))
		case n.Node != w.Owner && (n.State == "settled" || n.State == "shared"):
			add("%s takes it as well, by a map that is not this node's", called(n.Node))
		}
		if n.Fenced && n.Node == w.Owner {
			add("but it takes no new connections now: somebody may not know of it")
		}
	}
	return strings.Join(say, "; ") + "."
}
