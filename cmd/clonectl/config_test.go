package main

import (
	"bytes"
	"strings"
	"testing"

	"clonecluster/config"
)

// TestSetThatIsWrong: what a node would ignore at its boot is an error here, and
// in the words of this command line.
func TestSetThatIsWrong(t *testing.T) {
	cmd := newConfigCheckCmd()
	cmd.SetIn(bytes.NewReader(config.DemoYAML))
	_, err := readConfig(cmd, []string{"-"}, []string{"system.log-level=debug", "vip.ipv5=10.0.0.9/24"})
	if err == nil || !strings.HasPrefix(err.Error(), `--set vip.ipv5: vip: unknown name "ipv5"`) || strings.Contains(err.Error(), "ignored") {
		t.Errorf("readConfig = %v", err)
	}
}
