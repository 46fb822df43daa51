package image

import (
	"context"
	"debug/buildinfo"
	"debug/elf"
	"errors"
	"fmt"
	gobuild "go/build"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/u-root/u-root/pkg/cpio"

	"clonecluster/config"
)

// ServicesName is the member with the programs that cluster.yaml has built. It
// is one of its own, so that the base image stays the same for every cluster.
const ServicesName = "services.cpio.zst"

// ServiceOptions says where the programs of services are built from, and to.
type ServiceOptions struct {
	Config  *config.Config
	Dir     string // of cluster.yaml: paths that begin with a dot are relative to it
	Arch    string
	Debug   bool // of the base image, whose programs are taken
	OutDir  string
	TempDir string
	// Before is a manifest whose member is in BeforeDir and is taken again if
	// nothing that it was made from has changed. May be nil.
	Before    *Manifest
	BeforeDir string
	Status    func(string) // what is being built; may be nil
}

// Services is the member with the programs of services.
type Services struct {
	Path     string // empty: no service needs one
	Reused   bool
	Services []Service // in the order of their paths
	Programs []File
	Inputs   []File
	File     File // of the member
}

// BuildServices compiles the Go programs that services name, takes the static
// binaries, and packs both. It is an error if a service would run a program that
// the image has not, or a binary that could not run there.
func BuildServices(ctx context.Context, o ServiceOptions) (*Services, error) {
	todo, err := o.programs()
	if err != nil {
		return nil, err
	}
	s := &Services{}
	if len(todo) == 0 {
		return s, nil
	}
	for _, p := range todo {
		if err := p.inspect(ctx, o); err != nil {
			return nil, fmt.Errorf("services.%s.build: %w", p.service, err)
		}
		s.Services = append(s.Services, Service{Path: "/" + p.name, Build: p.build, Go: p.goVersion})
		s.Inputs = append(s.Inputs, p.inputs...)
	}
	sortFiles(s.Inputs)
	if s.reuse(o) {
		return s, nil
	}
	return s, s.build(ctx, o, todo)
}

// Check finds what is wrong with the programs of services as far as that needs no
// compiler: those that are not there, and what is no program.
func (o ServiceOptions) Check() error {
	todo, err := o.programs()
	if err != nil {
		return err
	}
	for _, p := range todo {
		if p.path == "" {
			continue
		}
		if err := CheckBuild(p.path, o.Arch); err != nil {
			return fmt.Errorf("services.%s.build: %w", p.service, err)
		}
	}
	return nil
}

// CheckBuild tells whether a path of a service's build is a folder with a Go main
// package, or a static program for that architecture (empty: any that nodes have).
func CheckBuild(path, arch string) error {
	fi, err := os.Stat(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("%s does not exist; paths that begin with a dot are relative to the folder of cluster.yaml", path)
	case err != nil:
		return err
	case fi.Mode().IsRegular():
		return CheckStatic(path, arch)
	case !fi.IsDir():
		return fmt.Errorf("%s is neither a folder with a Go program nor a file", path)
	}
	archs := []string{arch}
	if arch == "" {
		archs = []string{"amd64", "arm64"}
	}
	var p *gobuild.Package
	for _, one := range archs {
		target := gobuild.Default
		target.GOOS, target.GOARCH, target.CgoEnabled = "linux", one, false
		if p, err = target.ImportDir(path, 0); err == nil {
			break
		}
	}
	switch ignored := (*gobuild.NoGoError)(nil); {
	case errors.As(err, &ignored) && len(p.IgnoredGoFiles) > 0:
		return fmt.Errorf("%s has no Go file for linux/%s without cgo: a node has no C library", path, strings.Join(archs, " or "))
	case errors.As(err, &ignored):
		return fmt.Errorf("%s has no Go files; build names the folder of a Go main package, or a file that is a static binary", path)
	case err != nil:
		return err
	case p.Name != "main":
		return fmt.Errorf("%s is package %s; a program is package main", path, p.Name)
	}
	return nil
}

// reuse takes the member of an earlier build if nothing has changed since.
func (s *Services) reuse(o ServiceOptions) bool {
	if o.Before == nil || o.Before.Arch != o.Arch || o.Before.Recipe != Recipe || !slices.EqualFunc(o.Before.Services, s.Services, sameService) ||
		!slices.Equal(below(o.Before.Inputs, "service/"), s.Inputs) {
		return false
	}
	f, ok := o.Before.Find(ServicesName)
	path := filepath.Join(o.BeforeDir, ServicesName)
	if hash, _, err := sumFile(path); !ok || err != nil || hash != f.SHA256 {
		return false
	}
	for _, v := range s.Services {
		p, ok := o.Before.Find(v.Path)
		if !ok {
			return false
		}
		s.Programs = append(s.Programs, p)
	}
	s.Path, s.File, s.Reused, s.Services = path, f, true, o.Before.Services
	return true
}

// sameService tells whether two services are built in the same way.
func sameService(a, b Service) bool { return a.Path == b.Path && a.Build == b.Build && a.Go == b.Go }

// below gives the files whose names begin so.
func below(files []File, prefix string) []File {
	var found []File
	for _, f := range files {
		if strings.HasPrefix(f.Name, prefix) {
			found = append(found, f)
		}
	}
	return found
}

func (s *Services) build(ctx context.Context, o ServiceOptions, todo []*serviceProgram) error {
	tmp, err := os.MkdirTemp(o.TempDir, "clonecluster-services-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	records := directories("bin")
	for i, p := range todo {
		if o.Status != nil {
			o.Status("building " + p.build)
		}
		data, err := p.make(ctx, o, tmp)
		if err != nil {
			return fmt.Errorf("services.%s.build: %w", p.service, err)
		}
		if p.goVersion != "" {
			info, err := buildinfo.ReadFile(filepath.Join(tmp, filepath.Base(p.name)))
			if err != nil {
				return fmt.Errorf("services.%s.build: reading what it was built from: %w", p.service, err)
			}
			s.Services[i].Modules = mergeModules(nil, info)
		}
		records = append(records, cpio.StaticRecord(data, cpio.Info{Name: p.name, Mode: cpio.S_IFREG | 0o755}))
		s.Programs = append(s.Programs, NewFile("/"+p.name, data))
	}
	plain, err := archive(records, time.Time{})
	if err != nil {
		return err
	}
	packed, err := Compress(plain)
	if err != nil {
		return err
	}
	s.Path, s.File = filepath.Join(o.OutDir, ServicesName), NewFile(ServicesName, packed)
	return WriteFile(s.Path, packed, 0o644)
}

// serviceProgram is a program to be built.
type serviceProgram struct {
	service   string // the first that wants it
	name      string // in the image, without the first slash
	build     string
	path      string // of the folder or file; empty for an import path
	goVersion string // empty: a binary
	inputs    []File
}

// programs lists what is to be built, sorted by name, and checks that every
// program that runs will be there.
func (o ServiceOptions) programs() ([]*serviceProgram, error) {
	own := Programs(o.Debug)
	have := slices.Clone(own)
	var todo []*serviceProgram
	for _, s := range o.Config.Services {
		if s.Build == "" {
			continue
		}
		run := s.Run[0]
		if slices.Contains(own, run) {
			return nil, fmt.Errorf("services.%s.run: %s is a program of the image itself; have build make one of another name", s.Name, run)
		}
		if slices.Contains(have, run) {
			continue // two services, one program
		}
		have = append(have, run)
		p := &serviceProgram{service: s.Name, name: strings.TrimPrefix(run, "/"), build: s.Build}
		if config.IsPath(s.Build) {
			if p.path = s.Build; !filepath.IsAbs(p.path) {
				p.path = filepath.Join(o.Dir, p.path)
			}
		}
		todo = append(todo, p)
	}
	if missing := MissingPrograms(o.Config, o.Debug); len(missing) > 0 {
		return nil, missing[0]
	}
	slices.SortFunc(todo, func(a, b *serviceProgram) int { return strings.Compare(a.name, b.name) })
	return todo, nil
}

// MissingPrograms gives an error for each program that a service would run, or be checked
// with, and that an image of the configuration would not have.
func MissingPrograms(c *config.Config, debug bool) (missing []error) {
	have := Programs(debug)
	for _, s := range c.Services {
		if s.Build != "" && !slices.Contains(have, s.Run[0]) {
			have = append(have, s.Run[0])
		}
	}
	for _, s := range c.Services {
		for _, p := range []struct {
			key     string
			command []string
		}{{"run", s.Run}, {"health.exec", s.Health.Exec}} {
			if len(p.command) > 0 && !slices.Contains(have, p.command[0]) {
				missing = append(missing, fmt.Errorf("services.%s.%s: the image has no program %s; it has %s; say with build where it comes from",
					s.Name, p.key, p.command[0], strings.Join(have, ", ")))
			}
		}
	}
	return missing
}

// inspect finds out what the program is made from.
func (p *serviceProgram) inspect(ctx context.Context, o ServiceOptions) error {
	prefix := "service/" + strings.TrimPrefix(p.name, "bin/")
	if p.path == "" {
		v, err := toolchain(ctx, o.TempDir, o.Arch, o.TempDir)
		p.goVersion = v
		return err // the version in the import path pins the rest
	}
	if err := CheckBuild(p.path, o.Arch); err != nil {
		return err
	}
	if fi, err := os.Stat(p.path); err == nil && fi.Mode().IsRegular() {
		f, err := fileAt(filepath.Dir(p.path), filepath.Base(p.path), prefix)
		p.inputs = []File{f}
		return err
	}
	var err error
	if p.inputs, err = sources(ctx, p.path, o.Arch, o.TempDir, "", prefix, "."); err != nil {
		return hint(err, p.path)
	}
	out, err := runGo(ctx, p.path, o.Arch, o.TempDir, "list", "-f", "{{with .Module}}{{.Dir}}{{end}}", ".")
	if err != nil {
		return err
	}
	root := strings.TrimSpace(string(out))
	for _, file := range []string{"go.mod", "go.sum"} {
		f, err := fileAt(root, file, prefix)
		if errors.Is(err, os.ErrNotExist) && file == "go.sum" {
			continue // nothing but the standard library
		}
		if err != nil {
			return err
		}
		p.inputs = append(p.inputs, f)
	}
	p.goVersion, err = toolchain(ctx, p.path, o.Arch, o.TempDir)
	return err
}

// hint adds what helps to the errors that a newcomer meets.
func hint(err error, dir string) error {
	switch text := err.Error(); {
	case strings.Contains(text, "go.mod file not found"):
		return fmt.Errorf("%w\nmake it a module: cd %s && go mod init example.com/hello && go mod tidy", err, dir)
	case strings.Contains(text, "missing go.sum entry"), strings.Contains(text, "updates to go.mod needed"):
		return fmt.Errorf("%w\nfirst: cd %s && go mod tidy", err, dir)
	}
	return err
}

// make gives the program's bytes. A compiled one is in the folder tmp, too.
func (p *serviceProgram) make(ctx context.Context, o ServiceOptions, tmp string) ([]byte, error) {
	file := filepath.Join(tmp, filepath.Base(p.name))
	switch {
	case p.goVersion == "":
		file = p.path
	case p.path != "":
		if err := compile(ctx, p.path, o.Arch, tmp, p.build, "-o", file, "."); err != nil {
			return nil, hint(err, p.path)
		}
	default:
		if err := p.fetch(ctx, o, tmp, file); err != nil {
			return nil, err
		}
	}
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	return data, CheckStatic(file, o.Arch)
}

// fetch compiles a package at a version, as "go install" would, in a module
// made for it: go install puts what it builds for another architecture
// somewhere else.
func (p *serviceProgram) fetch(ctx context.Context, o ServiceOptions, tmp, file string) error {
	dir, err := os.MkdirTemp(tmp, "module-")
	if err != nil {
		return err
	}
	pkg, _, _ := strings.Cut(p.build, "@")
	for _, args := range [][]string{{"mod", "init", "clonecluster.invalid/service"}, {"get", p.build}} {
		if _, err := runGo(ctx, dir, o.Arch, tmp, args...); err != nil {
			return fmt.Errorf("fetching %s: %w", p.build, err)
		}
	}
	return compile(ctx, dir, o.Arch, tmp, p.build, "-mod=mod", "-o", file, pkg)
}

// CheckStatic checks that a file is a program that runs on a node of that
// architecture (empty: of any), where there is no C library and no interpreter.
func CheckStatic(file, arch string) error {
	f, err := elf.Open(file)
	if err != nil {
		if head := make([]byte, 2); readHead(file, head) == nil && string(head) == "#!" {
			return fmt.Errorf("%s is a script, and the image has no interpreter for it; build a static binary", file)
		}
		return fmt.Errorf("%s is no Linux program (ELF): %w", file, err)
	}
	defer f.Close()
	want := map[string]elf.Machine{"": f.Machine, "amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64}[arch]
	if f.Machine != want {
		return fmt.Errorf("%s is for %v; the board needs %v (%s)", file, f.Machine, want, arch)
	}
	if f.Type != elf.ET_EXEC && f.Type != elf.ET_DYN {
		return fmt.Errorf("%s is an ELF file of type %v, which is no program", file, f.Type)
	}
	libs, err := f.ImportedLibraries()
	if err != nil {
		return fmt.Errorf("reading %s: %w", file, err)
	}
	interpreter := slices.ContainsFunc(f.Progs, func(p *elf.Prog) bool { return p.Type == elf.PT_INTERP })
	if len(libs) > 0 || interpreter {
		needs := "a dynamic loader"
		if len(libs) > 0 {
			needs = strings.Join(libs, ", ")
		}
		return fmt.Errorf("%s is linked dynamically and needs %s, which the image has not; link it statically (Go: CGO_ENABLED=0; C: -static)", file, needs)
	}
	return nil
}

func readHead(file string, head []byte) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.Read(head)
	return err
}
