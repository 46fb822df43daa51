package main

import (
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"clonecluster/config"
	"clonecluster/netcore/api"
)

func newKeyIssueCmd() *cobra.Command {
	var cluster, out, name string
	var readOnly bool
	var days int
	cmd := &cobra.Command{
		Use:   "issue",
		Short: "Issue a certificate for a cluster's management API",
		Long: `Issue makes a certificate with the key of cluster.yaml, for somebody who shall not
have that key, and writes a folder that --cluster of the other commands takes:

  ca.pem         what nodes are checked with
  client.pem     the certificate
  client.key     its private key
  cluster.json   where the cluster is

With --read-only it can look at everything and change nothing. There is no list of
those that were issued: a certificate ends with its days, or when the cluster's
key is changed, which makes all of them void.`,
		Example: `  clonectl key issue --read-only --days 90 --name grafana --out grafana/
  clonectl status --cluster grafana/`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			switch {
			case out == "":
				return usageError{errors.New("--out is needed: the folder to write")}
			case days < 1 || days > 36500:
				return usageError{fmt.Errorf("--days %d: want 1 to 36500", days)}
			}
			if err := checkName(name); err != nil {
				return err
			}
			cfg, err := loadConfigFile(cmd.InOrStdin(), cluster)
			if err != nil {
				return err
			}
			role := api.RoleControl
			if readOnly {
				role = api.RoleReadOnly
			}
			until := time.Now().AddDate(0, 0, days)
			if err := issue(cfg, role, name, until, out); err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s: %s for %s, until %s\n", out, role, name, until.Format(time.DateOnly))
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&cluster, "cluster", "cluster.yaml", "the cluster's configuration: `FILE`")
	f.StringVar(&out, "out", "", "`FOLDER` to write")
	f.StringVar(&name, "name", "", "`NAME` of its holder, which events show (default from the folder)")
	f.BoolVar(&readOnly, "read-only", false, "it may look at everything and change nothing")
	f.IntVar(&days, "days", 365, "how long it is valid")
	cmd.PreRun = func(*cobra.Command, []string) {
		if name == "" && out != "" {
			name = filepath.Base(filepath.Clean(out))
		}
	}
	cmd.RegisterFlagCompletionFunc("cluster", completeYAML)
	cmd.MarkFlagDirname("out")
	return cmd
}

// issue writes the folder. What is there already is left alone: it may be the only
// copy of a key.
func issue(cfg *config.Config, role api.Role, name string, until time.Time, dir string) error {
	at, err := targetIn(cfg)
	if err != nil {
		return err
	}
	authority, err := api.NewAuthority(cfg.Cluster.Name, cfg.Cluster.Key)
	if err != nil {
		return err
	}
	cert, err := authority.Issue(role, name, until)
	if err != nil {
		return err
	}
	key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	if err != nil {
		return fmt.Errorf("writing the private key: %w", err)
	}
	where, err := json.MarshalIndent(at, "", "  ")
	if err != nil {
		return err
	}
	cannot := func(err error) error {
		return fmt.Errorf("%s cannot be written to; give another folder with --out: %w", dir, err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return cannot(err)
	}
	for _, f := range []struct {
		name string
		data []byte
	}{
		{certKeyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})}, // first: it says whether there was one
		{certFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Certificate[0]})},
		{authorityFile, authority.PEM()},
		{targetFile, append(where, '\n')},
	} {
		file, err := os.OpenFile(filepath.Join(dir, f.name), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if errors.Is(err, os.ErrExist) {
			return fmt.Errorf("%s holds a certificate already: remove it first, or give another folder", dir)
		} else if err != nil {
			return cannot(err)
		}
		_, err = file.Write(f.data)
		if err := errors.Join(err, file.Close()); err != nil {
			return cannot(err)
		}
	}
	return nil
}
