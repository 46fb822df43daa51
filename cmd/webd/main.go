// Webd is the reference web service as a program of its own, for machines that
// are not the appliance. See clonecluster/cmd/internal/webd.
package main

import (
	"os"

	"clonecluster/cmd/internal/webd"
)

func main() { os.Exit(webd.Main(os.Args[1:])) }
