// Command generate writes docs/openapi.yaml. It runs in the folder of package api:
// go generate ./netcore/api.
package main

import (
	"fmt"
	"os"

	"clonecluster/cmd/internal/openapi"
)

func main() {
	text, err := openapi.Generate("../..")
	if err == nil {
		err = os.WriteFile("../../docs/openapi.yaml", text, 0o644)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "generate:", err)
		os.Exit(1)
	}
}
