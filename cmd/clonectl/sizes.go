package main

import "github.com/spf13/cobra"

func newSizesCmd() *cobra.Command {
	return &cobra.Command{Use: "sizes", Run: func(*cobra.Command, []string) {}}
}
