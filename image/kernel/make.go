package kernel

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// tools are the programs a build calls, and their versions: another compiler
// makes another kernel.
type tools struct {
	prefix   string // of cross tools
	versions []string
	ccache   bool
	path     string
}

// needed programs, with the Debian package of each. The first three make bytes
// of the image, so their versions count.
var needed = []struct{ program, pkg string }{
	{"gcc", "gcc"}, {"ld", "binutils"}, {"zstd", "zstd"},
	{"make", "make"}, {"flex", "flex"}, {"bison", "bison"}, {"bc", "bc"}, {"tar", "tar"}, {"xz", "xz-utils"},
}

func findTools(ctx context.Context, o Options) (tools, error) {
	t := tools{path: os.Getenv("PATH")}
	if o.path != nil {
		t.path = strings.Join(o.path, string(os.PathListSeparator))
	}
	if runtime.GOARCH != o.Board.Arch {
		t.prefix = o.Board.Kernel.CrossCompile
	}
	var missing, packages []string
	look := func(program, pkg string) {
		if t.look(program) == "" {
			missing, packages = append(missing, program), append(packages, pkg)
		}
	}
	for i, n := range needed {
		if t.prefix != "" && i < 2 { // besides the host's, which the kernel's own tools are built with
			look(t.prefix+n.program, n.pkg+"-"+strings.ReplaceAll(strings.TrimSuffix(t.prefix, "-"), "_", "-"))
		}
		look(n.program, n.pkg)
	}
	if missing != nil {
		return tools{}, fmt.Errorf("missing %s: apt-get install %s", strings.Join(missing, ", "), strings.Join(packages, " "))
	}
	for _, program := range []string{t.prefix + "gcc", t.prefix + "ld", "zstd"} {
		out, err := t.command(ctx, program, "--version").Output()
		if err != nil {
			return tools{}, fmt.Errorf("%s --version: %w", program, err)
		}
		first, _, _ := strings.Cut(string(out), "\n")
		t.versions = append(t.versions, strings.TrimSpace(first))
	}
	t.ccache = t.look("ccache") != ""
	return t, nil
}

// look is exec.LookPath in the tools' own path.
func (t tools) look(program string) string {
	for _, dir := range filepath.SplitList(t.path) {
		file := filepath.Join(dir, program)
		if fi, err := os.Stat(file); err == nil && fi.Mode().IsRegular() && fi.Mode()&0o111 != 0 {
			return file
		}
	}
	return ""
}

// complete checks for headers, which only a real build needs.
func (t tools) complete() error {
	for _, h := range []struct{ header, pkg string }{{"stdlib.h", "libc6-dev"}, {"gelf.h", "libelf-dev"}} {
		cmd := t.command(context.Background(), "gcc", "-E", "-include", h.header, "-x", "c", "-o", os.DevNull, os.DevNull)
		if err := cmd.Run(); err != nil {
			return fmt.Errorf("missing the C header %s: apt-get install %s", h.header, h.pkg)
		}
	}
	return nil
}

// command is a process of the build: in a group of its own, which is ended as a
// whole with ctx, and with an environment in which no variable of the user's
// changes the result.
func (t tools) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	if file := t.look(args[0]); file != "" {
		cmd.Path, cmd.Err = file, nil
	}
	cmd.Env = append(slices.Clone(buildEnv), "PATH="+t.path)
	for _, v := range os.Environ() {
		name, _, _ := strings.Cut(v, "=")
		if name == "HOME" || name == "TMPDIR" || strings.HasPrefix(name, "CCACHE_") {
			cmd.Env = append(cmd.Env, v)
		}
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// run runs a command so that it ends with this process, however that ends.
func run(cmd *exec.Cmd) error {
	// The signal comes at the death of the thread that starts the command.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr.Pdeathsig = syscall.SIGTERM
	return cmd.Run()
}

// maker runs make in one build folder.
type maker struct {
	tools
	base  []string // make and what every call has
	log   io.Writer
	files int           // compiled so far
	cpu   time.Duration // used so far
}

func (t tools) maker(o Options, src, out string, log io.Writer) *maker {
	m := &maker{tools: t, log: log}
	m.base = append([]string{"make", "-C", src, "O=" + out, "ARCH=" + o.Board.Kernel.Arch, "-j" + strconv.Itoa(o.Jobs)}, makeVars...)
	if t.prefix != "" {
		m.base = append(m.base, "CROSS_COMPILE="+t.prefix)
	}
	if m.ccache = t.ccache && !o.noCcache; m.ccache {
		m.base = append(m.base, "CC=ccache "+t.prefix+"gcc", "HOSTCC=ccache gcc")
	}
	return m
}

// run calls make for a target. counted is told the number of files compiled, at
// most twice a second. The error ends with what the compiler said last.
func (m *maker) run(ctx context.Context, env []string, counted func(int), target string) error {
	cmd := m.command(ctx, append(slices.Clone(m.base), target)...)
	cmd.Env = append(cmd.Env, env...)
	var mu sync.Mutex
	var said tail
	var last time.Time
	cmd.Stdout = &lineWriter{mu: &mu, line: func(l []byte) {
		fmt.Fprintf(m.log, "%s\n", l)
		if !compiles(l) {
			return
		}
		m.files++
		if now := time.Now(); counted != nil && now.Sub(last) >= 500*time.Millisecond {
			last = now
			counted(m.files)
		}
	}}
	cmd.Stderr = &lineWriter{mu: &mu, line: func(l []byte) {
		fmt.Fprintf(m.log, "%s\n", l)
		said.add(string(l))
	}}
	err := run(cmd)
	if s := cmd.ProcessState; s != nil {
		m.cpu += s.UserTime() + s.SystemTime()
	}
	if ctx.Err() != nil {
		// What ignored SIGTERM, or was started meanwhile, goes now.
		if cmd.Process != nil {
			_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		}
		return ctx.Err()
	}
	if err != nil {
		return fmt.Errorf("make %s: %w\n%s", target, err, said.String())
	}
	return nil
}

// compiles tells whether a line of kbuild's output stands for a file.
func compiles(line []byte) bool {
	kind, _, ok := bytes.Cut(bytes.TrimPrefix(line, []byte("  ")), []byte(" "))
	return ok && bytes.HasPrefix(line, []byte("  ")) && slices.Contains([]string{"CC", "AS", "HOSTCC"}, string(kind))
}

// tail keeps the last lines of the compiler, and apart from them those of make,
// which come after and say nothing but that it failed.
type tail struct{ compiler, make []string }

const tailLines = 30

func (t *tail) add(line string) {
	to := &t.compiler
	if strings.HasPrefix(line, "make:") || strings.HasPrefix(line, "make[") {
		to = &t.make
	}
	if *to = append(*to, line); len(*to) > tailLines {
		*to = (*to)[1:]
	}
}

func (t *tail) String() string {
	lines := t.compiler
	if len(t.make) > 0 { // the first names the target
		lines = append(slices.Clone(lines), t.make[0])
	}
	return "\t" + strings.Join(lines, "\n\t")
}

func lastLines(text string, n int) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

// lineWriter calls line for every line written to it; one of more than maxLine
// bytes comes in pieces.
type lineWriter struct {
	mu   *sync.Mutex
	line func([]byte)
	rest []byte
}

const maxLine = 64 << 10

func (w *lineWriter) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.rest = append(w.rest, p...)
	for {
		i := bytes.IndexByte(w.rest, '\n')
		switch {
		case i >= 0:
			w.line(w.rest[:i])
			w.rest = w.rest[i+1:]
		case len(w.rest) > maxLine:
			w.line(w.rest)
			w.rest = nil
		default:
			return len(p), nil
		}
	}
}
