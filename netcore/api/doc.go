// Package api is the management API of a node: HTTPS with certificates on both
// sides, under /v1/, at the node's own addresses and at the VIP. Any node answers
// for the whole cluster, since it can ask the others by the same API.
//
// Who has the cluster's key can make every certificate: the authority behind them
// is derived from it, so there is nothing to set up or to hand out, and a change
// of the key makes all of them void. docs/decisions/0022-node-api.md says why it is
// like that, docs/openapi.yaml what can be asked.
package api

//go:generate go run ../../cmd/internal/openapi/generate
