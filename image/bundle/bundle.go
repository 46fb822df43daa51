// Package bundle makes the folder with everything that the machines of a cluster
// can boot, whichever way, from one configuration: see decision 20.
//
// A folder holds one build. What is new lies in a hidden folder until all of it
// is there, and then takes the old one's place file by file, so that a build
// that fails, is interrupted or killed leaves the old files whole.
package bundle

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"aead.dev/minisign"
	"golang.org/x/sys/unix"

	"clonecluster/boards"
	"clonecluster/config"
	"clonecluster/image"
	"clonecluster/image/kernel"
	"clonecluster/image/kernel/kconfig"
	"clonecluster/image/uki"
)

// The files of a folder, beside the base image and the services' member.
const (
	KernelName    = "bzImage"     // on x86-64: see KernelFile
	ConfigName    = "config.cpio" // with the cluster's key, as are the next four: mode 0600
	InitrdName    = "initrd.img"
	EFIName       = "clonecluster.efi"
	StickName     = "usb.img"
	PXEDir        = "pxe" // the kernel, the initramfs and the unified image once more, as hard links, and
	ScriptName    = "boot.ipxe"
	SBOMName      = "sbom.cdx.json"
	ManifestName  = "manifest.json"
	SignatureName = "manifest.json.minisig"
	SumsName      = "SHA256SUMS"
)

// stageName is the folder for what is not complete.
const stageName = ".new"

// Options says what to build.
type Options struct {
	Board      boards.Board
	Config     []byte // the text of cluster.yaml
	ConfigName string // what messages call it; default cluster.yaml
	ConfigDir  string // what its relative paths are relative to
	// Content are the folders with the services' content, by their places in
	// the image: see Content.
	Content map[string]string
	Debug   bool   // with a shell and tools
	Minimal bool   // only what QEMU's -kernel and -initrd take
	Source  string // the checkout; default: found upwards from the working directory
	OutDir  string
	Kernel  kernel.Options // its board is filled in
	// Built is a kernel that is there already, in place of one from Kernel.
	Built      *kernel.Result
	Key        *minisign.PrivateKey // signs the manifest; nil: it is not signed
	SecureBoot *SecureBoot          // signs the unified image; nil: it is not signed
	Progress   Progress
}

// SecureBoot is what the unified image is signed with.
type SecureBoot struct {
	Key  crypto.Signer // nil: only a signature that is there is taken
	Cert *x509.Certificate
	// Fingerprint is the SHA-256 of a certificate that is not at hand.
	Fingerprint string
	// Dir is the folder of a build whose signatures are taken again where what
	// was signed is the same: a signature holds a time. Default: the folder that
	// is built.
	Dir string
}

func (s *SecureBoot) fingerprint() string {
	if s.Cert == nil {
		return s.Fingerprint
	}
	h := sha256.Sum256(s.Cert.Raw)
	return hex.EncodeToString(h[:])
}

// Progress is told what goes on. Its functions may be nil.
type Progress struct {
	Step   func(Step)   // at the end of each step
	Status func(string) // now and then
}

// Step is a part of the build that is done.
type Step struct {
	N, Of int // from 1
	Name  string
	Text  string // what came out
	Took  time.Duration
}

// Content gives the folders with the content of a configuration's services, whose
// relative paths begin at dir; www is that of the reference service, or empty.
func Content(c *config.Config, dir, www string) (map[string]string, error) {
	all := map[string]string{}
	if www != "" {
		if err := CheckFolder(www); err != nil {
			return nil, fmt.Errorf("the web service's content: %w", err)
		}
		if !slices.ContainsFunc(c.Services, servesWWW) {
			return nil, fmt.Errorf("the web service's content: no service would serve %s: it is for one that runs %s and has no content of its own; give the folder to another service with content: in its part of cluster.yaml, or leave it out", www, config.Webd)
		}
		all[image.ContentDir] = www
	}
	for _, s := range c.Services {
		if s.Content == "" {
			continue
		}
		place := strings.TrimPrefix(s.ContentDir(), "/")
		if all[place] != "" {
			return nil, fmt.Errorf("services.%s.content: %s is given another folder already (%s); leave one of them out", s.Name, s.ContentDir(), all[place])
		}
		if all[place] = s.Content; !filepath.IsAbs(s.Content) {
			all[place] = filepath.Join(dir, s.Content)
		}
		if err := CheckFolder(all[place]); err != nil {
			return nil, fmt.Errorf("services.%s.content: %w; relative paths begin at the folder of cluster.yaml", s.Name, err)
		}
	}
	return all, nil
}

// servesWWW tells whether a service has to do with the folder image.ContentDir.
func servesWWW(s config.Service) bool {
	const www = "/" + image.ContentDir
	return s.ContentDir() == www || s.Content == "" && s.Run[0] == config.Webd ||
		slices.ContainsFunc(s.Run, func(arg string) bool { return strings.Contains(arg, www) })
}

// CheckFolder tells whether a path of content is a folder that can be read.
func CheckFolder(dir string) error {
	if fi, err := os.Stat(dir); errors.Is(err, fs.ErrPermission) {
		return err
	} else if err != nil {
		return fmt.Errorf("there is no folder %s: %w", dir, err)
	} else if !fi.IsDir() {
		return fmt.Errorf("%s is a file; content is a folder of files", dir)
	}
	_, err := os.ReadDir(dir)
	return err
}

// Cmdline is the kernel's command line where nothing else gives one. The last
// console becomes /dev/console.
func Cmdline(b boards.Board) string {
	var words []string
	for _, c := range b.Consoles {
		words = append(words, "console="+c)
	}
	return strings.Join(append(words, "quiet", "panic=10"), " ")
}

// Build builds the folder and gives its manifest. If nothing has changed, it
// compiles nothing and writes nothing.
func Build(ctx context.Context, o Options) (*image.Manifest, error) {
	b := &builder{Options: o}
	abandon, err := image.Folder(o.OutDir)
	if err != nil {
		return nil, err
	}
	defer abandon()
	unlock, err := b.open()
	if err != nil {
		return nil, b.explain(err)
	}
	defer unlock()
	defer os.RemoveAll(b.stage)
	steps := b.steps()
	for i, s := range steps {
		begin := time.Now()
		text, err := s.run(ctx)
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return nil, b.explain(err)
		}
		if o.Progress.Step != nil {
			o.Progress.Step(Step{i + 1, len(steps), s.name, text, time.Since(begin)})
		}
	}
	return b.manifest, nil
}

type step struct {
	name string
	run  func(context.Context) (text string, err error)
}

// steps in their order: first what can be wrong in a second, then what takes
// minutes. The last one makes the folder's files what the others have prepared.
func (b *builder) steps() []step {
	all := []step{{"cluster", b.check}, {"base", b.base}, {"services", b.services}, {"kernel", b.kernel}, {"initrd", b.initrd}}
	if !b.Minimal {
		all = append(all, step{"efi", b.efi})
		all = append(all, b.stickSteps()...)
		all = append(all, step{"pxe", b.pxe})
	}
	return append(all, step{"manifest", b.finish})
}

// builder is one build. Later steps use what earlier ones have left.
type builder struct {
	Options
	stage  string
	before *image.Manifest // of what is in the folder; nil: unknown

	cfg         *config.Config
	stub        []byte
	boot, core  []byte // GRUB's
	configCPIO  []byte
	content     []image.File
	baseImage   *image.Base
	sources     []image.File
	service     *image.Services
	kernelFile  []byte
	kernelBuilt *kernel.Result
	initrdFile  []byte
	packages    []image.Package
	extra       []image.File // inputs besides sources and content
	stick       []image.File
	staged      []string // names, in the order of their making
	outputs     []image.File
	links       []string // in PXEDir
	manifest    *image.Manifest
}

func (b *builder) status(text string) {
	if b.Progress.Status != nil {
		b.Progress.Status(text)
	}
}

// open makes the folder ready: nobody else builds into it, and what a killed
// build has left is gone.
func (b *builder) open() (unlock func(), err error) {
	if b.ConfigName == "" {
		b.ConfigName = "cluster.yaml"
	}
	dir, err := os.Open(b.OutDir)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		dir.Close()
		return nil, fmt.Errorf("another build writes to %s; wait for it, or give another folder with --out", b.OutDir)
	}
	if b.stage, err = filepath.Abs(filepath.Join(b.OutDir, stageName)); err == nil {
		if err = os.RemoveAll(b.stage); err == nil {
			err = os.MkdirAll(filepath.Join(b.stage, "tmp"), 0o700)
		}
	}
	if err != nil {
		dir.Close()
		return nil, err
	}
	left, _ := filepath.Glob(filepath.Join(b.OutDir, ".*-*")) // of WriteFile
	for _, file := range left {
		os.Remove(file)
	}
	if m, err := image.ReadManifest(filepath.Join(b.OutDir, ManifestName)); err == nil {
		b.before = m
	}
	if err := b.keepSigned(); err != nil {
		os.RemoveAll(b.stage)
		dir.Close()
		return nil, err
	}
	return func() { dir.Close() }, nil
}

// keepSigned refuses to make the minimal build of a folder that holds a signed one: what it
// would remove, nobody may be able to make again here. What is not signed, a build makes again.
func (b *builder) keepSigned() error {
	if !b.Minimal {
		return nil
	}
	if _, err := os.Lstat(filepath.Join(b.OutDir, SignatureName)); errors.Is(err, os.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	return fmt.Errorf("%s holds a signed build, of which this would remove %s and what it is of: give another folder with --out (make: OUT=FOLDER), or make all of it anew with clonectl build",
		b.OutDir, SignatureName)
}

// explain adds what helps to the errors of the folder.
func (b *builder) explain(err error) error {
	switch {
	case errors.Is(err, kernel.ErrNoSpace): // says so itself, of the cache
	case errors.Is(err, unix.ENOSPC), strings.Contains(err.Error(), unix.ENOSPC.Error()): // the second from the Go command
		return fmt.Errorf("no space left for the build: free some 300 MB in %s, or give another folder with --out: %w", b.OutDir, err)
	case errors.Is(err, fs.ErrPermission), errors.Is(err, unix.EROFS):
		var at *fs.PathError
		if errors.As(err, &at) && strings.HasPrefix(at.Path, b.OutDir) {
			return fmt.Errorf("%s cannot be written to; give another folder with --out: %w", b.OutDir, err)
		}
	}
	return err
}

// put prepares a file of the folder. One that is there with these bytes stays.
func (b *builder) put(name string, data []byte, perm fs.FileMode) error {
	b.outputs = append(b.outputs, image.NewFile(name, data))
	return b.prepare(name, data, perm)
}

func (b *builder) prepare(name string, data []byte, perm fs.FileMode) error {
	path := filepath.Join(b.OutDir, name)
	if fi, err := os.Lstat(path); err == nil && fi.Mode() == perm && fi.Size() == int64(len(data)) {
		if have, err := os.ReadFile(path); err == nil && bytes.Equal(have, data) {
			return nil
		}
	}
	b.staged = append(b.staged, name)
	return image.WriteFile(filepath.Join(b.stage, name), data, perm)
}

func (b *builder) check(ctx context.Context) (string, error) {
	var err error
	if b.cfg, err = config.Load(b.Config, b.ConfigName); err != nil {
		return "", fmt.Errorf("the configuration is not right:\n%w", err)
	}
	if !b.Minimal {
		if err := b.checkPackages(ctx); err != nil {
			return "", err
		}
		if s := b.SecureBoot; s != nil && s.Key != nil {
			if err := uki.CheckKey(s.Key, s.Cert); err != nil {
				return "", fmt.Errorf("signing for Secure Boot: %w; clonectl key secure-boot makes both files", err)
			}
		}
	}
	if b.Source == "" {
		if b.Source, err = image.FindSource("."); err != nil {
			return "", err
		}
	}
	if err := b.serviceOptions().Check(); err != nil {
		return "", err
	}
	if b.Built == nil {
		b.Kernel.Board = b.Board
		if err := kernel.Check(ctx, b.Kernel); err != nil {
			return "", err
		}
	}
	if b.configCPIO, b.content, err = image.ConfigMember(b.Config, b.Content, time.Time{}); err != nil {
		return "", err
	}
	var vips []string
	for _, p := range []string{b.cfg.VIP.IPv4.Addr().String(), b.cfg.VIP.IPv6.Addr().String()} {
		if p != "invalid IP" {
			vips = append(vips, p)
		}
	}
	return fmt.Sprintf("%q at %s, for %s", b.cfg.Cluster.Name, strings.Join(vips, " and "), b.Board.Name), nil
}

// checkPackages finds what comes from Debian for the ways to boot.
func (b *builder) checkPackages(ctx context.Context) error {
	var more []string // where make stub-arm puts that of another architecture
	if b.Kernel.CacheDir != "" {
		more = append(more, filepath.Join(b.Kernel.CacheDir, "stub"))
	}
	stub, path, err := uki.Stub(b.Board.Arch, more...)
	if err != nil {
		return fmt.Errorf("the unified kernel image needs it: %w (clonectl image does without)", err)
	}
	b.stub = stub
	b.extra = append(b.extra, image.NewFile("systemd-boot-efi/"+filepath.Base(path), stub))
	b.packages = append(b.packages, debianPackage("systemd-boot-efi:"+b.Board.Arch, "systemd-boot-efi"))
	return b.checkStick(ctx)
}

func (b *builder) base(ctx context.Context) (text string, err error) {
	opt := image.BaseOptions{Source: b.Source, Arch: b.Board.Arch, Debug: b.Debug, OutDir: b.stage, TempDir: filepath.Join(b.stage, "tmp"), Progress: statusLines(b.status)}
	how := "as before"
	if b.baseImage, b.sources, err = image.ReuseBase(ctx, opt, b.before, b.OutDir); err != nil {
		return "", err
	}
	if b.baseImage == nil {
		how = "compiled"
		if b.baseImage, err = image.BuildBase(ctx, opt); err != nil {
			return "", err
		}
		b.staged = append(b.staged, image.BaseName(b.Debug))
	}
	return fmt.Sprintf("%.1f MB, %.1f MB unpacked (%s)", megabytes(b.baseImage.Bytes), megabytes(b.baseImage.Unpacked), how), nil
}

// statusLines gives a Progress.Status what is written line by line.
type statusLines func(string)

func (s statusLines) Write(text []byte) (int, error) {
	for line := range strings.Lines(string(text)) {
		s(strings.TrimRight(line, "\n"))
	}
	return len(text), nil
}

func megabytes(n int64) float64 { return float64(n) / 1e6 }

func (b *builder) serviceOptions() image.ServiceOptions {
	return image.ServiceOptions{
		Config: b.cfg, Dir: cmp.Or(b.ConfigDir, "."), Arch: b.Board.Arch, Debug: b.Debug,
		OutDir: b.stage, TempDir: filepath.Join(b.stage, "tmp"), Before: b.before, BeforeDir: b.OutDir, Status: b.status,
	}
}

func (b *builder) services(ctx context.Context) (text string, err error) {
	b.service, err = image.BuildServices(ctx, b.serviceOptions())
	switch {
	case err != nil:
		return "", err
	case b.service.Path == "":
		return "none but the image's own", nil
	case !b.service.Reused:
		b.staged = append(b.staged, image.ServicesName)
	}
	var names []string
	for _, p := range b.service.Programs {
		names = append(names, p.Name)
	}
	how := "built"
	if b.service.Reused {
		how = "as before"
	}
	b.outputs = append(append(b.outputs, b.service.Programs...), b.service.File)
	return fmt.Sprintf("%s, %.1f MB (%s)", strings.Join(names, ", "), megabytes(b.service.File.Bytes), how), nil
}

func (b *builder) kernel(ctx context.Context) (string, error) {
	k := b.Built
	if k == nil {
		if b.Kernel.Status == nil {
			b.Kernel.Status = b.status
		}
		var err error
		if k, err = kernel.Build(ctx, b.Kernel); err != nil {
			return "", err
		}
	}
	data, err := os.ReadFile(k.Image)
	if err != nil {
		return "", fmt.Errorf("reading the built kernel: %w", err)
	}
	if err := b.checkKernel(k); err != nil {
		return "", err
	}
	b.kernelFile, b.kernelBuilt = data, k
	how := "from the cache"
	if b.Built == nil && !k.Cached {
		how = fmt.Sprintf("built, %s of CPU time", k.CPU.Round(time.Second))
	}
	return fmt.Sprintf("%s, %.1f MB (%s)", k.Release, megabytes(int64(len(data))), how), b.put(KernelFile(b.Board), data, 0o644)
}

// needs are the options without which a kernel cannot boot this way, whatever
// the board's fragments say.
var needs = []struct {
	symbol string
	uefi   bool
	why    string
}{
	{"CONFIG_BLK_DEV_INITRD", false, "it would have no initramfs"},
	{"CONFIG_RD_ZSTD", false, "it could not unpack the base image"},
	{"CONFIG_EFI_STUB", true, "UEFI could not start it"},
}

// checkKernel compares the complete configuration of a kernel with what the
// board and the ways to boot need. A kernel without one is not checked: it is
// that of a test.
func (b *builder) checkKernel(k *kernel.Result) error {
	if k.Config == "" {
		return nil
	}
	data, err := os.ReadFile(k.Config)
	if err != nil {
		return fmt.Errorf("reading the kernel's configuration: %w", err)
	}
	have, err := kconfig.Parse("config of the kernel", data)
	if err != nil {
		return err
	}
	for _, n := range needs {
		if n.uefi && b.Minimal {
			continue
		}
		if !slices.ContainsFunc(have, func(s kconfig.Symbol) bool { return s.Name == n.symbol && s.Value == "y" }) {
			return fmt.Errorf("the kernel of %s lacks %s, so %s: put %s=y into boards/%s/kernel.config", b.Board.Name, n.symbol, n.why, n.symbol, b.Board.Name)
		}
	}
	want, err := b.Board.KernelConfig()
	if err != nil {
		return err
	}
	if err := want.Check(data); err != nil {
		return fmt.Errorf("the kernel is not what the board %s needs: %w", b.Board.Name, err)
	}
	return nil
}

func (b *builder) initrd(context.Context) (string, error) {
	packed, err := os.ReadFile(b.baseImage.Path)
	if err != nil {
		return "", fmt.Errorf("reading the base image: %w", err)
	}
	members := [][]byte{packed}
	if b.service.Path != "" {
		member, err := os.ReadFile(b.service.Path)
		if err != nil {
			return "", fmt.Errorf("reading the services' member: %w", err)
		}
		members = append(members, member)
	}
	b.initrdFile = image.Initrd(append(members, b.configCPIO)...)
	if err := b.put(ConfigName, b.configCPIO, 0o600); err != nil {
		return "", err
	}
	return fmt.Sprintf("%.1f MB in %d members", megabytes(int64(len(b.initrdFile))), len(members)+1), b.put(InitrdName, b.initrdFile, 0o600)
}

func (b *builder) efi(context.Context) (string, error) {
	data, err := b.unified(Cmdline(b.Board), func(dir string) ([]byte, error) { return os.ReadFile(filepath.Join(dir, EFIName)) })
	if err != nil {
		return "", err
	}
	how := "not signed"
	if b.SecureBoot != nil {
		how = "signed"
	}
	return fmt.Sprintf("%.1f MB (%s)", megabytes(int64(len(data))), how), b.put(EFIName, data, 0o600)
}

// unified is the unified kernel image with that command line, signed if it is to
// be; before gives the one of an earlier build's folder.
func (b *builder) unified(cmdline string, before func(dir string) ([]byte, error)) ([]byte, error) {
	plain, err := uki.Build(uki.Options{
		Stub: b.stub, Linux: b.kernelFile, Initrd: b.initrdFile, Cmdline: cmdline, Uname: b.kernelBuilt.Release,
		OSRelease: fmt.Sprintf("ID=clonecluster\nNAME=clonecluster\nPRETTY_NAME=\"clonecluster %s\"\n", b.cfg.Cluster.Name),
	})
	s := b.SecureBoot
	if err != nil || s == nil {
		return plain, err
	}
	signed, err := before(cmp.Or(s.Dir, b.OutDir))
	if err == nil && (s.Cert == nil || uki.Verify(signed, s.Cert) == nil) {
		if was, err := uki.Unsigned(signed); err == nil && bytes.Equal(was, plain) {
			return signed, nil
		}
	}
	if s.Key == nil {
		return plain, nil
	}
	return uki.Sign(plain, s.Key, s.Cert)
}

// KernelFile is the kernel's name in a board's folder, the one that its own build
// gives it: bzImage, on arm64 Image.
func KernelFile(b boards.Board) string { return path.Base(b.Kernel.Image) }

// KernelFiles are the kernel's names in the folders of all boards.
func KernelFiles() []string {
	all, err := boards.All()
	if err != nil {
		panic(err) // they are compiled in
	}
	var names []string
	for _, b := range all {
		if name := KernelFile(b); !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	return names
}

// Script is what iPXE is told; the other files lie beside it.
func Script(kernel, cmdline string) string {
	return "#!ipxe\nkernel " + kernel + " initrd=" + InitrdName + " " + cmdline + "\ninitrd " + InitrdName + "\nboot\n"
}

func (b *builder) pxe(context.Context) (string, error) {
	for _, name := range []string{KernelFile(b.Board), InitrdName, EFIName} {
		i := slices.IndexFunc(b.outputs, func(f image.File) bool { return f.Name == name })
		f := b.outputs[i]
		f.Name = PXEDir + "/" + name
		b.outputs = append(b.outputs, f)
		b.links = append(b.links, name)
	}
	return PXEDir + "/: links to the kernel, initrd and .efi, and " + ScriptName, b.put(PXEDir+"/"+ScriptName, []byte(Script(KernelFile(b.Board), Cmdline(b.Board))), 0o644)
}

func (b *builder) finish(ctx context.Context) (string, error) {
	m, err := image.NewManifest(b.Board.Name, b.baseImage, image.KernelOf(b.kernelBuilt))
	if err != nil {
		return "", err
	}
	m.Recipe, m.Cluster, m.Cmdline = image.Recipe, b.cfg.Cluster.Name, Cmdline(b.Board)
	m.Services, m.Packages, m.Stick, m.Inputs = b.service.Services, b.packages, b.stick, nil
	if b.SecureBoot != nil && !b.Minimal {
		m.SecureBoot = b.SecureBoot.fingerprint()
	}
	m.AddInputs(slices.Concat(b.sources, b.content, b.service.Inputs, b.extra, []image.File{image.NewFile("cluster.yaml", b.Config)})...)
	m.AddOutputs(b.outputs...)
	bom, err := sbom(m)
	if err != nil {
		return "", err
	}
	if err := b.prepare(SBOMName, bom, 0o644); err != nil {
		return "", err
	}
	m.AddOutputs(image.NewFile(SBOMName, bom))
	text, err := m.Bytes()
	if err != nil {
		return "", err
	}
	if err := b.prepare(ManifestName, text, 0o644); err != nil {
		return "", err
	}
	signed := "not signed"
	if b.Key != nil {
		signed = "signed"
		comment := fmt.Sprintf("clonecluster %s for %s", m.Cluster, m.Board)
		sig := minisign.SignWithComments(*b.Key, text, comment, "signature of "+ManifestName+", for minisign and clonectl verify")
		if err := b.prepare(SignatureName, sig, 0o644); err != nil {
			return "", err
		}
	}
	if err := b.prepare(SumsName, sums(m, text), 0o644); err != nil {
		return "", err
	}
	if err := ctx.Err(); err != nil {
		return "", err
	}
	b.manifest = m
	gone, err := b.replace()
	text2 := fmt.Sprintf("%s: %.1f MB to boot, %s", b.OutDir, megabytes(int64(len(b.kernelFile)+len(b.initrdFile))), signed)
	if len(gone) > 0 {
		text2 += "; removed " + strings.Join(gone, ", ") + " of an earlier build"
	}
	return text2, err
}

// replace gives the folder its new files, and takes from it those of the build
// before that are no more.
func (b *builder) replace() (gone []string, err error) {
	// Nobody is to take an old signature for that of what comes now.
	if b.Key == nil || slices.Contains(b.staged, SignatureName) {
		err = os.Remove(filepath.Join(b.OutDir, SignatureName))
		if err == nil && b.Key == nil {
			gone = append(gone, SignatureName)
		}
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for _, name := range b.staged {
		to := filepath.Join(b.OutDir, name)
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			return nil, err
		}
		if err := os.Rename(filepath.Join(b.stage, name), to); err != nil {
			return nil, err
		}
	}
	for _, name := range b.links {
		if err := link(filepath.Join(b.OutDir, name), filepath.Join(b.OutDir, PXEDir, name)); err != nil {
			return nil, err
		}
	}
	if b.before == nil {
		return gone, nil
	}
	for _, f := range b.before.Files() {
		if _, ok := b.manifest.Find(f.Name); ok {
			continue
		}
		if err := os.Remove(filepath.Join(b.OutDir, f.Name)); err == nil {
			gone = append(gone, f.Name)
		} else if !errors.Is(err, fs.ErrNotExist) {
			return gone, err
		}
	}
	os.Remove(filepath.Join(b.OutDir, PXEDir)) // if nothing is in it
	return gone, nil
}

// link makes to another name of the file from, or a copy where the file system
// has no links.
func link(from, to string) error {
	a, err := os.Stat(from)
	if err != nil {
		return err
	}
	if c, err := os.Lstat(to); err == nil && os.SameFile(a, c) {
		return nil
	}
	tmp := filepath.Join(filepath.Dir(to), ".link-"+filepath.Base(to))
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if os.Link(from, tmp) == nil {
		return os.Rename(tmp, to)
	}
	data, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return image.WriteFile(to, data, a.Mode().Perm())
}

// sums is for sha256sum -c.
func sums(m *image.Manifest, manifest []byte) []byte {
	files := append(m.Files(), image.NewFile(ManifestName, manifest))
	slices.SortFunc(files, func(a, b image.File) int { return strings.Compare(a.Name, b.Name) })
	var buf bytes.Buffer
	for _, f := range files {
		fmt.Fprintf(&buf, "%s  %s\n", f.SHA256, f.Name)
	}
	return buf.Bytes()
}
