// Command cloned is one node's data plane on any Linux host.
package main

import (
	"os"

	"clonecluster/netcore/engine"
)

func main() { os.Exit(engine.Main(os.Args[1:])) }
