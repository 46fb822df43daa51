// Command generate writes cluster.schema.json and cluster.md of package schema.
// It runs in the folder of package config: go generate ./config.
package main

import (
	"fmt"
	"os"

	"clonecluster/config/schema"
)

func main() {
	for name, generate := range map[string]func(string) ([]byte, error){
		"schema/cluster.schema.json": schema.GenerateJSON,
		"schema/cluster.md":          schema.GenerateReference,
	} {
		text, err := generate("..")
		if err == nil {
			err = os.WriteFile(name, text, 0o644)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "generate:", err)
			os.Exit(1)
		}
	}
}
