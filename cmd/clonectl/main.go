// Clonectl builds, runs and inspects clone clusters.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// Exit codes, documented in the root command's help.
const (
	exitFailure     = 1
	exitUsage       = 2
	exitDiffers     = 3
	exitDoubtful    = 4 // of doctor: works now
	exitRefuses     = 5 // of doctor: the network does not do what the cluster needs
	exitInterrupted = 130
)

// usageError marks a mistake in how clonectl was called.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

func main() { os.Exit(run(os.Args[1:])) }

// run is clonectl with those arguments; the result is its exit code.
func run(args []string) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	// A second Ctrl-C does not wait for a tidy end.
	context.AfterFunc(ctx, stop)

	root := newRoot()
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	switch {
	case err == nil:
		return 0
	case ctx.Err() != nil && errors.Is(err, context.Canceled):
		fmt.Fprintln(os.Stderr, "clonectl: interrupted")
		return exitInterrupted
	}
	fmt.Fprintln(os.Stderr, "clonectl:", err)
	switch {
	case errors.As(err, new(usageError)):
		return exitUsage
	case errors.Is(err, errDiffers):
		return exitDiffers
	}
	if coded := (codedError{}); errors.As(err, &coded) {
		return coded.code
	}
	return exitFailure
}

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:   "clonectl",
		Short: "Build, run and inspect clone clusters",
		Long: `Clonectl builds the appliance image of a clone cluster (N machines that answer
for one IP address with one MAC address, with nothing in front of them), runs
it in QEMU, checks its configuration, and shows and steers a running cluster.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 "verify" found a difference or the
time of --wait of "drain", "reboot" or "rollout" ran out, 4 "doctor" found something
that should be looked at, 5 it found that the network does not cooperate, 130
interrupted (but Ctrl-C is the normal end of "serve", of a live "qemu up", of
"capture", and of what watches or follows: 0).`,
		Example: `  clonectl build --config cluster.yaml   # everything that boots, for every way to boot
  clonectl image                         # kernel and initramfs for QEMU
  clonectl qemu up --nodes 3             # boot a cluster, answer on http://127.0.0.1:8080/
  clonectl status --watch                # what its nodes do
  clonectl config check cluster.yaml     # is this file right?`,
		SilenceUsage:      true,
		SilenceErrors:     true,
		Args:              usageArgs(cobra.NoArgs),
		RunE:              func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error { return noEmptyFlags(cmd) },
	}
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usageError{fmt.Errorf("%w; see %q", err, cmd.CommandPath()+" --help")}
	})
	root.AddGroup(
		&cobra.Group{ID: "build", Title: "Build:"},
		&cobra.Group{ID: "run", Title: "Run:"},
		&cobra.Group{ID: "operate", Title: "See and steer a running cluster:"},
		&cobra.Group{ID: "configure", Title: "Configure:"},
	)
	root.AddCommand(
		grouped("build", newKernelCmd()),
		grouped("build", newImageCmd()),
		grouped("build", newBuildCmd()),
		grouped("build", newVerifyCmd()),
		grouped("build", newKeyCmd()),
		grouped("build", newFlashCmd()),
		grouped("build", newSizesCmd()),
		grouped("run", newQEMUCmd()),
		grouped("run", newServeCmd()),
		grouped("run", newSimCmd()),
		grouped("run", newBenchCmd()),
		grouped("configure", newConfigCmd()),
		grouped("operate", newStatusCmd()),
		grouped("operate", newDashboardCmd()),
		grouped("operate", newDrainCmd()),
		grouped("operate", newResumeCmd()),
		grouped("operate", newPolicyCmd()),
		grouped("operate", newWeightCmd()),
		grouped("operate", newDoctorCmd()),
		grouped("operate", newEventsCmd()),
		grouped("operate", newWhichCmd()),
		grouped("operate", newLogsCmd()),
		grouped("operate", newBootCmd()),
		grouped("operate", newCaptureCmd()),
		grouped("operate", newRebootCmd()),
		grouped("operate", newRolloutCmd()),
		newManCmd(),
		newReferenceCmd(),
	)
	root.InitDefaultCompletionCmd()
	strictCompletion(root)
	return root
}

// strictCompletion makes cobra's own command say what is wrong with its arguments,
// as all others do.
func strictCompletion(root *cobra.Command) {
	completion, _, err := root.Find([]string{"completion"})
	if err != nil {
		panic(err) // it has just been added
	}
	for _, cmd := range append(completion.Commands(), completion) {
		cmd.Args = usageArgs(cobra.NoArgs)
	}
	completion.RunE = func(cmd *cobra.Command, _ []string) error { return cmd.Help() }
}

func grouped(id string, cmd *cobra.Command) *cobra.Command {
	cmd.GroupID = id
	return cmd
}

// usageArgs makes a wrong number of arguments exit with the usage code, and
// say where help is.
func usageArgs(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		err := check(cmd, args)
		if err == nil && slices.Contains(args, "") {
			err = errString("an argument is empty")
		}
		if err != nil {
			return usageError{fmt.Errorf("%w; see %q", err, cmd.CommandPath()+" --help")}
		}
		return nil
	}
}

// mayBeEmpty are the flags to which an empty value says something.
var mayBeEmpty = []string{"api", "append", "ipxe", "reason", "since"}

// noEmptyFlags refuses a flag that is given without a value, as by a shell's variable that is
// not set: --public-key "" would check nothing.
func noEmptyFlags(cmd *cobra.Command) (err error) {
	cmd.Flags().Visit(func(f *pflag.Flag) {
		if err == nil && f.Value.Type() == "string" && f.Value.String() == "" && !slices.Contains(mayBeEmpty, f.Name) {
			err = usageError{fmt.Errorf("--%s is empty: give a value, or leave it out", f.Name)}
		}
	})
	return err
}
