package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"clonecluster/config"
	"clonecluster/netcore/api"
)

// access is how a running cluster is found: its cluster.yaml, which has the key, or
// a folder that "key issue" has filled.
type access struct {
	cluster   string
	addresses []string
	role      api.Role // of the certificate that is made with the key; "": control
}

func (a *access) add(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&a.cluster, "cluster", "", "the cluster's configuration, or a folder from \"clonectl key issue\": `PATH` (default cluster.yaml here, else the demo that runs, else "+hostConfig+")")
	f.StringArrayVar(&a.addresses, "address", nil, "ask at `ADDRESS[:PORT]`, a node's own or another, instead of the VIP; may be repeated")
	cmd.RegisterFlagCompletionFunc("cluster", completeYAML)
}

// The files of a folder from "key issue".
const (
	authorityFile = "ca.pem"
	certFile      = "client.pem"
	certKeyFile   = "client.key"
	targetFile    = "cluster.json"
)

// hostConfig is the configuration of a host that cloned makes a node.
const hostConfig = "/etc/clonecluster/cluster.yaml"

// targetOf is where a cluster is: the content of cluster.json.
type targetOf struct {
	Cluster   string   `json:"cluster"`
	Addresses []string `json:"addresses"` // with ports
}

// ownCertDays is more than a command takes.
const ownCertDays = 1

// client gives the client for the cluster that is meant, and its name.
func (a *access) client(ctx context.Context) (*api.Client, string, error) {
	path, err := a.path()
	if err != nil {
		return nil, "", err
	}
	var conf *tls.Config
	var at targetOf
	if info, serr := os.Stat(path); serr == nil && info.IsDir() {
		conf, at, err = issuedAccess(path)
	} else {
		conf, at, err = keyAccess(path, cmp.Or(a.role, api.RoleControl))
	}
	if err != nil {
		return nil, "", err
	}
	wanted := at.Addresses
	if len(a.addresses) > 0 {
		_, port, _ := net.SplitHostPort(at.Addresses[0])
		wanted = nil
		for _, text := range a.addresses {
			if _, _, err := net.SplitHostPort(text); err != nil {
				text = net.JoinHostPort(strings.Trim(text, "[]"), port)
			}
			wanted = append(wanted, text)
		}
	}
	addresses, err := resolve(ctx, wanted)
	if err != nil {
		return nil, "", err
	}
	return api.NewClient(conf, addresses...), at.Cluster, nil
}

// path finds the configuration, or the folder of the lab that runs.
func (a *access) path() (string, error) {
	if a.cluster != "" {
		return a.cluster, nil
	}
	if _, err := os.Stat("cluster.yaml"); err == nil {
		return "cluster.yaml", nil
	}
	if l := readLab(); l.Address != "" {
		return l.config(), nil
	}
	if _, err := os.Stat(hostConfig); err == nil {
		return hostConfig, nil
	}
	return "", usageError{errors.New("there is no cluster.yaml here nor in " + filepath.Dir(hostConfig) + ", and no demo runs; say which cluster with --cluster PATH")}
}

// keyAccess makes a certificate with the cluster's key.
func keyAccess(path string, role api.Role) (*tls.Config, targetOf, error) {
	data, name, err := readConfigFile(os.Stdin, path)
	if err != nil {
		return nil, targetOf{}, err
	}
	cfg, err := config.Load(data, name)
	if err != nil {
		return nil, targetOf{}, err
	}
	at, err := targetIn(cfg)
	if err != nil {
		return nil, at, err
	}
	at.addLab(func(c *config.Cluster) bool { return c.Name == cfg.Cluster.Name && c.Key == cfg.Cluster.Key })
	authority, err := api.NewAuthority(cfg.Cluster.Name, cfg.Cluster.Key, cfg.Cluster.AcceptKeys...)
	if err != nil {
		return nil, at, err
	}
	cert, err := authority.Issue(role, whoAmI(), time.Now().AddDate(0, 0, ownCertDays))
	if err != nil {
		return nil, at, err
	}
	return authority.Client(cert), at, nil
}

// addLab adds this computer's own port, by which the cluster of the demo is reached, if
// it is the one that is meant.
func (t *targetOf) addLab(meant func(*config.Cluster) bool) {
	l := readLab()
	if l.Address == "" {
		return
	}
	if theirs, err := config.LoadFile(l.config()); err == nil && meant(&theirs.Cluster) {
		t.Addresses = append(t.Addresses, l.Address)
	}
}

// targetIn is where a cluster's API is.
func targetIn(cfg *config.Config) (targetOf, error) {
	at := targetOf{Cluster: cfg.Cluster.Name}
	if cfg.Management.Port == 0 {
		return at, errors.New("this cluster has no management API: management.port is 0")
	}
	for _, vip := range vips(cfg) {
		at.Addresses = append(at.Addresses, net.JoinHostPort(vip, strconv.Itoa(cfg.Management.Port)))
	}
	return at, nil
}

// issuedAccess takes what "key issue" has written.
func issuedAccess(dir string) (*tls.Config, targetOf, error) {
	var at targetOf
	text, err := os.ReadFile(filepath.Join(dir, targetFile))
	if err != nil {
		return nil, at, fmt.Errorf("%w; such a folder is made with %q", err, "clonectl key issue --out FOLDER")
	}
	if err := json.Unmarshal(text, &at); err != nil || at.Cluster == "" || len(at.Addresses) == 0 {
		return nil, at, fmt.Errorf("%s: want the cluster's name and addresses, as %q writes them", filepath.Join(dir, targetFile), "clonectl key issue")
	}
	ca, err := os.ReadFile(filepath.Join(dir, authorityFile))
	if err != nil {
		return nil, at, err
	}
	cert, err := tls.LoadX509KeyPair(filepath.Join(dir, certFile), filepath.Join(dir, certKeyFile))
	if err != nil {
		return nil, at, fmt.Errorf("reading the certificate: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(ca) {
		return nil, at, fmt.Errorf("%s holds no certificate", filepath.Join(dir, authorityFile))
	}
	at.addLab(func(c *config.Cluster) bool { return c.Name == at.Cluster })
	return api.ClientTLS(at.Cluster, pool, cert), at, nil
}

// whoAmI is who gives an order, for the events.
func whoAmI() string {
	name := "somebody"
	if u, err := user.Current(); err == nil {
		name = u.Username
	}
	if host, err := os.Hostname(); err == nil {
		name += "@" + host
	}
	return clip(name, 64)
}

// resolve gives the addresses of host:port texts. What has no address counts only
// if nothing has.
func resolve(ctx context.Context, texts []string) (all []netip.AddrPort, err error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	var errs []error
	for _, text := range texts {
		if a, err := netip.ParseAddrPort(text); err == nil {
			all = append(all, a)
			continue
		}
		host, portText, err := net.SplitHostPort(text)
		if err != nil {
			return nil, usageError{fmt.Errorf("--address %q: want an address or a name, and perhaps a port", text)}
		}
		port, err := strconv.ParseUint(portText, 10, 16)
		if err != nil || port == 0 {
			return nil, usageError{fmt.Errorf("--address %q: the port must be 1 to 65535", text)}
		}
		found, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
		if err != nil {
			errs = append(errs, err)
		}
		for _, a := range found {
			all = append(all, netip.AddrPortFrom(a.Unmap(), uint16(port)))
		}
	}
	if len(all) == 0 {
		return nil, errors.Join(errs...)
	}
	return slices.Compact(all), nil
}

// runningLab is what "qemu up" leaves for those who ask its cluster, while it runs.
type runningLab struct {
	Address string `json:"address"` // of this computer, leads to the VIP's API
	dir     string
}

func labDir() (string, error) {
	cache, err := cacheDir()
	return filepath.Join(cache, "lab"), err
}

func (l runningLab) config() string { return filepath.Join(l.dir, "cluster.yaml") }

// readLab gives the lab that runs; without an address: none.
func readLab() (l runningLab) {
	dir, err := labDir()
	if err != nil {
		return l
	}
	text, err := os.ReadFile(filepath.Join(dir, "lab.json"))
	if err != nil || json.Unmarshal(text, &l) != nil {
		return runningLab{}
	}
	l.dir = dir
	return l
}

// writeLab says where the lab's cluster is reached, until the function it gives is
// called.
func writeLab(cfg *config.Config, address string) (forget func(), err error) {
	dir, err := labDir()
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	text, err := json.Marshal(runningLab{Address: address})
	if err != nil {
		return nil, err
	}
	l := runningLab{dir: dir}
	files := []string{l.config(), filepath.Join(dir, "lab.json")}
	for i, data := range [][]byte{cfg.Clear(), text} {
		if err := os.WriteFile(files[i], data, 0o600); err != nil {
			return nil, err
		}
	}
	return func() {
		if readLab().Address == address { // and not another's by now
			for _, f := range files {
				_ = os.Remove(f)
			}
		}
	}, nil
}

// completeNodes offers the names of the cluster's nodes.
func (a *access) completeNodes(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return a.nodeNames(cmd)
}

func (a *access) completeNodeFlag(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	return a.nodeNames(cmd)
}

func (a *access) nodeNames(cmd *cobra.Command) (names []string, _ cobra.ShellCompDirective) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(cmd.Context()), 2*time.Second)
	defer cancel()
	c, _, err := a.client(ctx)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	defer c.Close()
	var all api.Cluster
	if err := c.Get(ctx, "/v1/cluster", nil, &all); err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	called := callNodes(all.Nodes)
	for _, n := range all.Nodes {
		if !n.Gone {
			names = append(names, called[n.Node]+"\t"+n.Node)
		}
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

// callNodes gives what a person calls each node: its host's name, if no two have the
// same, or else its id.
func callNodes(nodes []api.NodeReport) map[string]string {
	count := map[string]int{}
	for _, n := range nodes {
		count[n.Name]++
	}
	called := map[string]string{}
	for _, n := range nodes {
		called[n.Node] = n.Node
		if n.Name != "" && count[n.Name] == 1 {
			called[n.Node] = n.Name
		}
	}
	return called
}
