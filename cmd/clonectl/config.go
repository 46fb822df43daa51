package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"clonecluster/config"
	"clonecluster/config/schema"
	"clonecluster/image"
	"clonecluster/image/bundle"
)

func newConfigCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "config",
		Short: "Check and explain cluster.yaml",
		Args:  usageArgs(cobra.NoArgs),
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newConfigCheckCmd(), newConfigShowCmd(), newConfigSchemaCmd(), newConfigExampleCmd())
	return cmd
}

// readConfig reads FILE (default cluster.yaml, "-" for standard input) with
// the overrides that --set gives, which are those of the kernel command line.
func readConfig(cmd *cobra.Command, args, set []string) (*config.Config, error) {
	path := configPath(args)
	data, name, err := readConfigFile(cmd.InOrStdin(), path)
	if err != nil {
		return nil, err
	}
	cmdline := ""
	for _, s := range set {
		if path, _, ok := strings.Cut(s, "="); !ok || strings.ContainsAny(path, " \t\n") {
			return nil, usageError{fmt.Errorf("--set %q: want PATH=VALUE, as vip.ipv4=10.0.0.9/24", s)}
		}
		cmdline += config.Prefix + s + " "
	}
	c, ignored, err := config.LoadWithCmdline(data, name, cmdline)
	if err != nil {
		return nil, err
	}
	// A node goes on without an override that it cannot use; here it is a mistake.
	if len(ignored) > 0 {
		for _, p := range ignored {
			p.Where = "--set " + strings.TrimPrefix(p.Where, config.Prefix)
		}
		return nil, ignored
	}
	return c, nil
}

func configPath(args []string) string {
	if len(args) > 0 {
		return args[0]
	}
	return "cluster.yaml"
}

// configDir is where the relative paths in a configuration begin.
func configDir(path string) string {
	if path == "-" {
		return "."
	}
	return filepath.Dir(path)
}

// checkSources finds what services are built from, and is not there.
func checkSources(c *config.Config, dir string) error {
	var problems config.Problems
	check := func(path, source string, f func(source string) error) {
		if !filepath.IsAbs(source) {
			source = filepath.Join(dir, source)
		}
		if err := f(source); err != nil {
			problems = append(problems, &config.Problem{Where: c.Where(path), Path: path, Message: explainRights(err).Error()})
		}
	}
	for _, s := range c.Services {
		if config.IsPath(s.Build) {
			check("services."+s.Name+".build", s.Build, func(p string) error { return image.CheckBuild(p, "") })
		}
		if s.Content != "" {
			check("services."+s.Name+".content", s.Content, bundle.CheckFolder)
		}
	}
	if len(problems) == 0 {
		return nil
	}
	return problems
}

func readConfigFile(stdin io.Reader, path string) (data []byte, name string, err error) {
	if path == "-" {
		data, err = io.ReadAll(io.LimitReader(stdin, config.MaxBytes+1))
		return data, "standard input", err
	}
	data, err = config.ReadFile(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		err = fmt.Errorf("%w; %q writes one to start from", err, "clonectl config example > cluster.yaml")
	case errors.Is(err, syscall.EISDIR):
		err = fmt.Errorf("%w; give the file: %s", err, filepath.Join(path, "cluster.yaml"))
	}
	if err == nil && len(bytes.TrimSpace(data)) == 0 {
		err = fmt.Errorf("%s is empty; %q writes one to start from", path, "clonectl config example > cluster.yaml")
	}
	return data, path, explainRights(err)
}

func loadConfigFile(stdin io.Reader, path string) (*config.Config, error) {
	data, name, err := readConfigFile(stdin, path)
	if err != nil {
		return nil, err
	}
	cfg, err := config.Load(data, name)
	if err != nil {
		return nil, fmt.Errorf("the configuration is not right:\n%w", err)
	}
	return cfg, nil
}

func completeYAML(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	return []string{"yaml", "yml"}, cobra.ShellCompDirectiveFilterFileExt
}

func setFlag(cmd *cobra.Command, set *[]string) {
	cmd.Flags().StringArrayVar(set, "set", nil, "override a value as the kernel command line would: `PATH=VALUE`; may be repeated")
}

func newConfigCheckCmd() *cobra.Command {
	var set []string
	cmd := &cobra.Command{
		Use:   "check [FILE]",
		Short: "Say whether a configuration is right, and if not, where",
		Long: `Check reads a configuration (cluster.yaml, or FILE; - for standard input) as a
node will, and looks for the programs and the content that services are built
from. Every problem is printed with line, column and what is allowed. What is
allowed and likely a mistake is a warning, as is a program that no image has.`,
		Example: `  clonectl config check cluster.yaml
  clonectl config check --set system.log-level=debug`,
		Args:              usageArgs(cobra.MaximumNArgs(1)),
		ValidArgsFunction: completeYAML,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := readConfig(cmd, args, set)
			if err == nil {
				err = checkSources(c, configDir(configPath(args)))
			}
			if errors.As(err, new(config.Problems)) {
				return fmt.Errorf("the configuration is not right:\n%w", err)
			} else if err != nil {
				return err
			}
			for _, w := range c.Warnings() {
				fmt.Fprintln(cmd.ErrOrStderr(), "warning:", w)
			}
			for _, err := range image.MissingPrograms(c, false) {
				fmt.Fprintf(cmd.ErrOrStderr(), "warning: %v (of no matter on hosts, which start their programs themselves; build --debug adds tools)\n", err)
			}
			fmt.Fprintf(cmd.OutOrStdout(), "ok: cluster %q, VIP %s, clone MAC %s, %d service(s)\n",
				c.Cluster.Name, strings.Join(vips(c), " and "), c.VIP.CloneMAC, len(c.Services))
			return nil
		},
	}
	setFlag(cmd, &set)
	return cmd
}

func vips(c *config.Config) []string {
	var list []string
	if c.VIP.IPv4.IsValid() {
		list = append(list, c.VIP.IPv4.Addr().String())
	}
	if c.VIP.IPv6.IsValid() {
		list = append(list, c.VIP.IPv6.Addr().String())
	}
	return list
}

func newConfigShowCmd() *cobra.Command {
	var set []string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "show [FILE]",
		Short: "Print every effective value and where it came from",
		Long: `Show prints every value that a node will use, and whether it is a default, was
derived from another one, or stands in the file (with its line). Keys are
masked.`,
		Example: `  clonectl config show cluster.yaml
  clonectl config show --json | jq '.[] | select(.source != "default")'`,
		Args:              usageArgs(cobra.MaximumNArgs(1)),
		ValidArgsFunction: completeYAML,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := readConfig(cmd, args, set)
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), c.Effective())
			}
			w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
			fmt.Fprintln(w, "VALUE\t\tFROM")
			for _, e := range c.Effective() {
				value := e.Value
				if value == "" {
					value = "-"
				}
				fmt.Fprintf(w, "%s\t%s\t%s\n", e.Path, value, e.Source)
			}
			return w.Flush()
		},
	}
	setFlag(cmd, &set)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func newConfigSchemaCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "schema",
		Short: "Print the JSON Schema of cluster.yaml, for an editor",
		Example: `  clonectl config schema > cluster.schema.json
  # then, as the first line of cluster.yaml, for editors with a YAML language server:
  # yaml-language-server: $schema=cluster.schema.json`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := cmd.OutOrStdout().Write(schema.JSON)
			return err
		},
	}
}

func newConfigExampleCmd() *cobra.Command {
	return &cobra.Command{
		Use:     "example",
		Short:   "Print a commented cluster.yaml to start from",
		Example: `  clonectl config example > cluster.yaml`,
		Args:    usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := cmd.OutOrStdout().Write(config.DemoYAML)
			return err
		},
	}
}

func printJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}
