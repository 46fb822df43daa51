package main

//go:generate sh -c "go run . reference >../../docs/commands.md"

import (
	"fmt"
	"io"
	"iter"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// newReferenceCmd is for the documentation, as "man" is for the package.
func newReferenceCmd() *cobra.Command {
	return &cobra.Command{
		Use: "reference", Short: "Print the reference of all commands, as Markdown", Hidden: true,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return writeReference(cmd.OutOrStdout(), cmd.Root())
		},
	}
}

// writeReference writes docs/commands.md: the help of all commands, by group.
func writeReference(w io.Writer, root *cobra.Command) error {
	var b strings.Builder
	fmt.Fprintf(&b, "<!-- Generated from cmd/clonectl by \"go generate ./cmd/clonectl\"; do not edit. -->\n\n# The commands of %s\n\n%s\n", root.Name(), prose(root.Long))
	for _, g := range root.Groups() {
		fmt.Fprintf(&b, "\n## %s\n\n| | |\n|---|---|\n", strings.TrimSuffix(g.Title, ":"))
		for c := range inGroup(root, g.ID) {
			name := strings.TrimPrefix(c.CommandPath(), root.Name()+" ")
			fmt.Fprintf(&b, "| [`%s`](#%s) | %s |\n", name, strings.ReplaceAll(c.CommandPath(), " ", "-"), c.Short)
		}
	}
	for _, g := range root.Groups() {
		for c := range inGroup(root, g.ID) {
			writeCommand(&b, c)
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// inGroup are the commands of a group, and those below them.
func inGroup(root *cobra.Command, id string) iter.Seq[*cobra.Command] {
	return func(yield func(*cobra.Command) bool) {
		for c := range commands(root) {
			top := c
			for top.Parent() != root {
				top = top.Parent()
			}
			if top.GroupID == id && !yield(c) {
				return
			}
		}
	}
}

func writeCommand(b *strings.Builder, c *cobra.Command) {
	fmt.Fprintf(b, "\n## %s\n\n%s\n\n```\n%s\n```\n", c.CommandPath(), prose(longOf(c)), c.UseLine())
	first := true
	c.LocalFlags().VisitAll(func(f *pflag.Flag) {
		if f.Hidden || f.Name == "help" {
			return
		}
		if first {
			fmt.Fprint(b, "\n| flag | |\n|---|---|\n")
			first = false
		}
		value, usage := pflag.UnquoteUsage(f)
		name := "--" + f.Name
		if f.Shorthand != "" {
			name = "-" + f.Shorthand + ", " + name
		}
		if value != "" {
			name += " " + value
		}
		if hasDefault(f) {
			usage += fmt.Sprintf(" (default %s)", f.DefValue)
		}
		fmt.Fprintf(b, "| `%s` | %s |\n", name, strings.ReplaceAll(usage, "|", "\\|"))
	})
	if c.Example != "" {
		fmt.Fprintf(b, "\n```\n%s\n```\n", outdent(c.Example))
	}
}

// prose is help text as Markdown: what is indented there is code.
func prose(text string) string {
	var out []string
	for p := range strings.SplitSeq(strings.Trim(text, "\n"), "\n\n") {
		if strings.HasPrefix(p, " ") {
			p = "```\n" + outdent(p) + "\n```"
		}
		out = append(out, p)
	}
	return strings.Join(out, "\n\n")
}

// outdent takes the two columns off by which help indents examples.
func outdent(text string) string {
	lines := strings.Split(text, "\n")
	for i, l := range lines {
		lines[i] = strings.TrimPrefix(l, "  ")
	}
	return strings.Join(lines, "\n")
}
