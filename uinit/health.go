package uinit

import (
	"context"

	"clonecluster/config"
	"clonecluster/netcore/health/probe"
)

// question is how init itself asks a service whether it works; nil where a
// living process has to do. Init runs no programs for it: the engine, which
// decides whether the node serves, does.
func question(h config.Health) func(context.Context) error {
	switch {
	case h.HTTP != "":
		return func(ctx context.Context) error { return probe.HTTP(ctx, h.HTTP) }
	case h.TCP != "":
		return func(ctx context.Context) error { return probe.TCP(ctx, h.TCP) }
	}
	return nil
}
