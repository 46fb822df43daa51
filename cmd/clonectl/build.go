package main

import (
	"os"

	"aead.dev/minisign"
	"github.com/spf13/cobra"

	"clonecluster/image/bundle"
	"clonecluster/image/keys"
)

func newBuildCmd() *cobra.Command {
	var flags imageFlags
	var keyFile, passwordFile, secureKey, secureCert string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "build",
		Short: "Build everything that boots, for every way to boot",
		Long: `Build makes, of one configuration and for one board, a folder with

  bzImage            the patched kernel (from the cache if nothing changed); for
                     arm64 it is called Image
  base.cpio.zst      init, engine and web service; the same for every cluster
  services.cpio.zst  programs that the configuration has built, if any
  config.cpio        the cluster's configuration and content  *
  initrd.img         all of these, as a boot loader wants them  *
  clonecluster.efi   kernel, initramfs and command line in one file, for UEFI  *
  usb.img            a disk for USB sticks: UEFI, and BIOS on a PC  *
  pxe/               what network boot takes: the same files as hard links, and
                     a script for iPXE  *
  manifest.json      every input and output with its SHA-256
  sbom.cdx.json      the same for other tools (CycloneDX)
  SHA256SUMS         for sha256sum -c

Those with a star hold the cluster's key: who can read them can join the
cluster. They have mode 0600.

The same inputs give the same bytes, wherever and whenever they are built. A
build that fails or is interrupted leaves the files of the one before. Nothing
is written outside the folder and the caches (clonectl's and Go's).
Run it inside a checkout: the programs are compiled from source.`,
		Example: `  clonectl build --config cluster.yaml --board pc-x86_64
  clonectl build --config cluster.yaml --content www/ --out /srv/boot
  clonectl build --key cluster.key                  # sign the manifest: clonectl key new
  clonectl build --secure-boot-key sb/secure-boot.key --secure-boot-cert sb/secure-boot.pem`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			p := newProgress(os.Stderr)
			if (secureKey == "") != (secureCert == "") {
				return usageError{errString("--secure-boot-key and --secure-boot-cert belong together: clonectl key secure-boot makes both")}
			}
			if passwordFile != "" && keyFile == "" {
				return usageError{errString("--password-file is for the key that signs: give that with --key, or leave both out")}
			}
			o, err := flags.bundleOptions(p)
			if err != nil {
				return err
			}
			if keyFile != "" {
				if o.Key, err = signingKey(keyFile, passwordFile); err != nil {
					return explainRights(err)
				}
			}
			if secureKey != "" {
				o.SecureBoot = &bundle.SecureBoot{}
				if o.SecureBoot.Key, o.SecureBoot.Cert, err = keys.LoadSecureBoot(secureKey, secureCert); err != nil {
					return explainRights(err)
				}
			}
			m, err := buildBundle(cmd.Context(), o, p)
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), m)
			}
			return nil
		},
	}
	flags.add(cmd)
	f := cmd.Flags()
	f.StringVar(&keyFile, "key", "", "sign the manifest with this minisign secret key, a `FILE`")
	f.StringVar(&passwordFile, "password-file", "", "`FILE` with the key's password in its first line (default: asked for)")
	f.StringVar(&secureKey, "secure-boot-key", "", "sign the .efi for Secure Boot with this RSA key, a PEM `FILE`")
	f.StringVar(&secureCert, "secure-boot-cert", "", "its certificate, a PEM `FILE`")
	f.BoolVar(&asJSON, "json", false, "print the manifest")
	return cmd
}

// signingKey reads a minisign key. A file for its password has to be there, even if the key
// is not encrypted: who names one means one that is.
func signingKey(file, passwordFile string) (*minisign.PrivateKey, error) {
	ask := func() (string, error) { return password("", false) }
	if passwordFile != "" {
		word, err := password(passwordFile, false)
		if err != nil {
			return nil, err
		}
		ask = func() (string, error) { return word, nil }
	}
	key, err := keys.Load(file, ask)
	if err != nil {
		return nil, err
	}
	return &key, nil
}

// errString is an error that is only a text.
type errString string

func (e errString) Error() string { return string(e) }
