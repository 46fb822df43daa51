package main

import (
	"fmt"
	"io"
	"iter"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// newManCmd is for the package: the manual page is the help of all commands.
func newManCmd() *cobra.Command {
	return &cobra.Command{
		Use: "man", Short: "Print the manual page", Hidden: true,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return writeMan(cmd.OutOrStdout(), cmd.Root())
		},
	}
}

// writeMan writes man(7) source with one section for each command.
func writeMan(w io.Writer, root *cobra.Command) error {
	var b strings.Builder
	fmt.Fprintf(&b, ".TH CLONECTL 1 \"\" clonecluster\n.SH NAME\nclonectl \\- %s\n", roff(lowerFirst(root.Short)))
	fmt.Fprint(&b, ".SH SYNOPSIS\n.B clonectl\n.I COMMAND\n.RI [ FLAGS ]\n")
	fmt.Fprintf(&b, ".SH DESCRIPTION\n%s", paragraphs(root.Long))
	writeExample(&b, root)
	for sub := range commands(root) {
		fmt.Fprintf(&b, ".SH \"%s\"\n%s.PP\n.nf\n%s\n.fi\n", roff(strings.ToUpper(strings.TrimPrefix(sub.CommandPath(), root.Name()+" "))), paragraphs(longOf(sub)), roff(sub.UseLine()))
		sub.LocalFlags().VisitAll(func(f *pflag.Flag) { writeFlag(&b, f) })
		writeExample(&b, sub)
	}
	fmt.Fprint(&b, ".SH SEE ALSO\n.BR cloned (8)\n")
	_, err := io.WriteString(w, b.String())
	return err
}

// commands are all that do something and that help lists, in its order.
func commands(c *cobra.Command) iter.Seq[*cobra.Command] {
	return func(yield func(*cobra.Command) bool) {
		for _, sub := range c.Commands() {
			if sub.Hidden || sub.Name() == "help" || !sub.IsAvailableCommand() {
				continue
			}
			if sub.Runnable() && !sub.HasSubCommands() && !yield(sub) {
				return
			}
			for deeper := range commands(sub) {
				if !yield(deeper) {
					return
				}
			}
		}
	}
}

func longOf(c *cobra.Command) string {
	if c.Long != "" {
		return c.Long
	}
	return c.Short + "."
}

func writeFlag(b *strings.Builder, f *pflag.Flag) {
	if f.Hidden {
		return
	}
	value, usage := pflag.UnquoteUsage(f)
	name := "--" + f.Name
	if f.Shorthand != "" {
		name = "-" + f.Shorthand + ", " + name
	}
	fmt.Fprintf(b, ".TP\n\\fB%s\\fR \\fI%s\\fR\n%s\n", roff(name), roff(value), roff(usage))
	if hasDefault(f) {
		fmt.Fprintf(b, "(default %s)\n", roff(f.DefValue))
	}
}

// hasDefault reports whether a flag's default says more than that it is not given.
func hasDefault(f *pflag.Flag) bool {
	return f.DefValue != "" && f.DefValue != "false" && f.DefValue != "[]" && f.DefValue != "0"
}

func writeExample(b *strings.Builder, c *cobra.Command) {
	if c.Example != "" {
		fmt.Fprintf(b, ".PP\n.nf\n%s\n.fi\n", roff(c.Example))
	}
}

// paragraphs turns help text into paragraphs; indented lines stay as they are.
func paragraphs(text string) string {
	var b strings.Builder
	for p := range strings.SplitSeq(strings.Trim(text, "\n"), "\n\n") {
		if strings.HasPrefix(p, " ") {
			fmt.Fprintf(&b, ".PP\n.nf\n%s\n.fi\n", roff(p))
		} else {
			fmt.Fprintf(&b, ".PP\n%s\n", roff(p))
		}
	}
	return b.String()
}

// roff escapes what the formatter would take for its own.
func roff(s string) string {
	s = strings.NewReplacer(`\`, `\e`, "-", `\-`, `"`, `\(dq`).Replace(s)
	lines := strings.Split(s, "\n")
	for i, l := range lines {
		if strings.HasPrefix(l, ".") || strings.HasPrefix(l, "'") {
			lines[i] = `\&` + l
		}
	}
	return strings.Join(lines, "\n")
}

func lowerFirst(s string) string { return strings.ToLower(s[:1]) + s[1:] }
