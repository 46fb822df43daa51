package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"clonecluster/image/keys"
)

func newKeyCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "key",
		Short: "Make keys and certificates",
		Args:  usageArgs(cobra.NoArgs),
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newKeyNewCmd(), newKeySecureBootCmd(), newKeyIssueCmd())
	return cmd
}

func newKeyNewCmd() *cobra.Command {
	var passwordFile string
	var plain bool
	cmd := &cobra.Command{
		Use:   "new FILE",
		Short: "Make a minisign key pair, for the manifest",
		Long: `New writes a minisign secret key to FILE, with mode 0600, and the public key to
FILE.pub. It overwrites nothing. With a password the secret key is encrypted;
an empty one, or --no-password, leaves it readable for who can read the file.
The keys work with the minisign program, too.`,
		Example: `  clonectl key new cluster.key
  clonectl build --key cluster.key
  clonectl verify build/qemu-x86_64 --public-key cluster.key.pub
  minisign -V -p cluster.key.pub -m build/qemu-x86_64/manifest.json`,
		Args: usageArgs(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := keys.CheckNew(args[0]); err != nil {
				return err
			}
			word := ""
			if !plain {
				var err error
				if word, err = password(passwordFile, true); err != nil {
					return err
				}
			}
			p := newProgress(os.Stderr)
			if word != "" {
				p.Status("encrypting the key: seconds, so that guessing the password takes years")
			}
			public, err := keys.New(args[0], word)
			p.Clear()
			if err != nil {
				return err
			}
			how := "encrypted"
			if word == "" {
				how = "not encrypted"
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s      the secret key (%s): keep it\n%s.pub  the public key %v: give it to who verifies\n", args[0], how, args[0], public)
			return nil
		},
	}
	cmd.Flags().StringVar(&passwordFile, "password-file", "", "`FILE` with the password in its first line (default: asked for)")
	cmd.Flags().BoolVar(&plain, "no-password", false, "do not encrypt the secret key")
	return cmd
}

func newKeySecureBootCmd() *cobra.Command {
	var name string
	cmd := &cobra.Command{
		Use:   "secure-boot FOLDER",
		Short: "Make a key and what enrols it, for UEFI Secure Boot",
		Long: `Secure-boot writes into FOLDER

  secure-boot.key            the secret RSA key (mode 0600), for build --secure-boot-key
  secure-boot.pem            its certificate, for build --secure-boot-cert
  secure-boot.cer            the same for the menus of firmware (DER)
  db, KEK, PK with .auth     signed updates of the firmware's variables, in the
                             order in which they are enrolled
  db, KEK, PK with .esl      the lists in them

A machine whose firmware has this key as its only one starts nothing that you
have not signed: no other system, and no option ROM of a card.`,
		Example: `  clonectl key secure-boot sb/
  clonectl build --secure-boot-key sb/secure-boot.key --secure-boot-cert sb/secure-boot.pem`,
		Args: usageArgs(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkName(name); err != nil {
				return err
			}
			names, err := keys.NewSecureBoot(args[0], name)
			if err != nil {
				return err
			}
			for _, n := range names {
				fmt.Fprintln(cmd.OutOrStdout(), filepath.Join(args[0], n))
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&name, "name", "clonecluster", "`NAME` in the certificate, which firmware shows")
	return cmd
}

// checkName tells whether a certificate can have that name (RFC 5280, appendix A.1,
// ub-common-name), and somebody can read it.
func checkName(name string) error {
	if name == "" || len(name) > 64 || !utf8.ValidString(name) || strings.ContainsFunc(name, unicode.IsControl) {
		return usageError{fmt.Errorf("--name %.80q: want 1 to 64 printable characters", name)}
	}
	return nil
}

// maxPassword bounds the line with a password, in bytes.
const maxPassword = 4096

// password is the first line of the file, or what is typed; typed twice for a
// new one.
func password(file string, fresh bool) (string, error) {
	if file != "" {
		f, err := os.Open(file)
		if err != nil {
			return "", fmt.Errorf("reading the password: %w", err)
		}
		defer f.Close()
		line, err := bufio.NewReader(io.LimitReader(f, maxPassword+1)).ReadString('\n')
		word := strings.TrimRight(line, "\r\n")
		switch {
		case err != nil && !errors.Is(err, io.EOF):
			return "", fmt.Errorf("reading the password: %w", err)
		case len(line) > maxPassword:
			return "", fmt.Errorf("the first line of %s is longer than %d bytes, which is no password", file, maxPassword)
		case word == "" && fresh:
			return "", fmt.Errorf("the first line of %s is empty: write the password there, or say --no-password", file)
		}
		return word, nil
	}
	fd := int(os.Stdin.Fd())
	if !term.IsTerminal(fd) {
		return "", usageError{errString("there is no terminal to ask for the password; give it with --password-file FILE (for a new key also: --no-password)")}
	}
	ask := func(prompt string) (string, error) {
		fmt.Fprint(os.Stderr, prompt)
		word, err := term.ReadPassword(fd)
		fmt.Fprintln(os.Stderr)
		return string(word), err
	}
	word, err := ask("Password of the key: ")
	if err != nil || !fresh || word == "" {
		return word, err
	}
	again, err := ask("The same again: ")
	if err == nil && again != word {
		err = errors.New("the two passwords differ; nothing was written")
	}
	return word, err
}
