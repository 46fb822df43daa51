package config

import (
	_ "embed"
	"fmt"
)

// DemoYAML is the commented cluster.yaml of the demo network, and the example
// for writing one's own.
//
//go:embed demo.yaml
var DemoYAML []byte

// Demo is DemoYAML, loaded.
func Demo() *Config {
	c, err := Load(DemoYAML, "demo.yaml")
	if err != nil {
		panic(fmt.Sprint("config: the embedded demo is not valid: ", err))
	}
	return c
}

var demoKey = Key([]byte("clonecluster demo, not a secret!"))
