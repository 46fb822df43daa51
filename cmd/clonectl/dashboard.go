package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"time"

	"github.com/spf13/cobra"

	"clonecluster/netcore/api"
	"clonecluster/netcore/dashboard/local"
)

func newDashboardCmd() *cobra.Command {
	var a access
	var listen string
	var control, noBrowser bool
	cmd := &cobra.Command{
		Use:   "dashboard",
		Short: "Show a running cluster in the browser",
		Long: `Dashboard opens the page that every node serves: the ring of buckets and who takes
them, the nodes, connections, events and findings, as they change.

The nodes ask for a certificate, which a browser does not have. So this command
has one, asks at the VIP, and serves the page on a loopback address of this
computer, behind a link that works once, until Ctrl-C. When the node that tells
it all fails, the next one goes on.

It can only look, unless --control is given: then nodes can be drained and
resumed on the page, too.`,
		Example: `  clonectl dashboard
  clonectl dashboard --control
  clonectl dashboard --cluster read-only/ --no-browser`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			at, err := netip.ParseAddrPort(listen)
			if err != nil || !at.Addr().IsLoopback() {
				return usageError{fmt.Errorf("--listen %q: want a loopback address and a port, as 127.0.0.1:9265; for other computers use ssh -L", listen)}
			}
			a.role = api.RoleReadOnly
			if control {
				a.role = api.RoleControl
			}
			c, cluster, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			defer c.Close()
			// Better said here than on a page.
			first, cancel := context.WithTimeout(cmd.Context(), 15*time.Second)
			defer cancel()
			if err := c.Get(first, "/v1/status", nil, &api.Status{}); err != nil {
				return notReached(err)
			}
			l, err := (&net.ListenConfig{}).Listen(cmd.Context(), "tcp", at.String())
			if err != nil {
				return fmt.Errorf("serving the dashboard: %w", err)
			}
			p := local.New(c, l.Addr().String(), control)
			fmt.Fprintf(cmd.OutOrStdout(), "the dashboard of %s, for one browser, until Ctrl-C:\n\n  %s\n\n", cluster, p.Link())
			if !noBrowser {
				openBrowser(cmd.Context(), p.Link())
			}
			return serveUntil(cmd.Context(), l, p)
		},
	}
	a.add(cmd)
	f := cmd.Flags()
	f.StringVar(&listen, "listen", "127.0.0.1:0", "serve the page at this loopback `ADDRESS:PORT`; port 0: any")
	f.BoolVar(&control, "control", false, "nodes can be drained and resumed on the page")
	f.BoolVar(&noBrowser, "no-browser", false, "print the link, and start no browser")
	return cmd
}

// serveUntil serves until ctx ends, which is the normal end.
func serveUntil(ctx context.Context, l net.Listener, h http.Handler) error {
	srv := &http.Server{Handler: h, ReadHeaderTimeout: 10 * time.Second, MaxHeaderBytes: 16 << 10, BaseContext: func(net.Listener) context.Context { return ctx }}
	stop := context.AfterFunc(ctx, func() { _ = srv.Close() })
	defer stop()
	if err := srv.Serve(l); ctx.Err() == nil && !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serving the dashboard: %w", err)
	}
	return nil
}

// openBrowser opens a link where somebody sees it. It is no matter if nothing does:
// the link is printed.
func openBrowser(ctx context.Context, link string) {
	name := "xdg-open"
	switch {
	case runtime.GOOS == "darwin":
		name = "open"
	case os.Getenv("DISPLAY") == "" && os.Getenv("WAYLAND_DISPLAY") == "":
		return
	}
	cmd := exec.CommandContext(ctx, name, link)
	if cmd.Start() == nil {
		go func() { _ = cmd.Wait() }()
	}
}
