package bundle

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"clonecluster/boards"
	"clonecluster/config"
	"clonecluster/image"
	"clonecluster/image/disk"
)

// maxStick bounds a file of a stick.
const maxStick = 1 << 30

func (b *builder) stickSteps() []step { return []step{{"usb", b.usb}} }

// checkStick finds what the stick needs from Debian: GRUB, where there are
// machines with a BIOS.
func (b *builder) checkStick(ctx context.Context) (err error) {
	if !b.Board.Boot.Has(boards.BIOS) {
		return nil
	}
	if b.boot, b.core, err = disk.GRUB(ctx); err != nil {
		return fmt.Errorf("the USB image needs it: %w (clonectl image does without)", err)
	}
	b.extra = append(b.extra, image.NewFile("grub-pc-bin/boot.img", b.boot), image.NewFile("grub-pc-bin/core.img", b.core))
	b.packages = append(b.packages, debianPackage("grub-pc-bin"))
	return nil
}

// usb makes the stick. Its unified image is not the folder's: the command line
// says that there is a stick.
func (b *builder) usb(context.Context) (string, error) {
	cmdline := Cmdline(b.Board) + " " + disk.StickParameter
	efi, err := b.unified(cmdline, func(dir string) ([]byte, error) {
		f, err := os.Open(filepath.Join(dir, StickName))
		if err != nil {
			return nil, err
		}
		defer f.Close()
		files, err := openDisk(f)
		if err != nil {
			return nil, err
		}
		return files.ReadFile(disk.BootFile(b.Board.Arch), maxStick)
	})
	if err != nil {
		return "", err
	}
	o := disk.Options{UKI: efi, Arch: b.Board.Arch, Config: b.Config}
	ways := "UEFI"
	if b.boot != nil {
		o.BIOS = &disk.BIOS{Kernel: b.kernelFile, Initrd: b.initrdFile, Cmdline: cmdline, BootImg: b.boot, CoreImg: b.core}
		ways = "UEFI and BIOS"
	}
	staged := filepath.Join(b.stage, StickName)
	if err := disk.Write(staged, o); err != nil {
		return "", err
	}
	f, err := os.Open(staged)
	if err != nil {
		return "", err
	}
	defer f.Close()
	files, err := openDisk(f)
	if err != nil {
		return "", fmt.Errorf("reading what was written: %w", err)
	}
	if b.stick, err = list(files, ""); err != nil {
		return "", fmt.Errorf("reading what was written: %w", err)
	}
	sum, n, err := hash(f)
	if err != nil {
		return "", err
	}
	out := image.File{Name: StickName, Bytes: n, SHA256: sum}
	b.outputs = append(b.outputs, out)
	if !b.same(out) {
		b.staged = append(b.staged, StickName)
	}
	return fmt.Sprintf("%.1f MB, %s", megabytes(n), ways), nil
}

// same tells whether the folder's file has these bytes, and mode 0600.
func (b *builder) same(want image.File) bool {
	f, err := os.Open(filepath.Join(b.OutDir, want.Name))
	if err != nil {
		return false
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil || fi.Size() != want.Bytes || fi.Mode() != 0o600 {
		return false
	}
	sum, _, err := hash(f)
	return err == nil && sum == want.SHA256
}

func openDisk(f *os.File) (*disk.FS, error) {
	size, err := f.Seek(0, io.SeekEnd) // a device has no size otherwise
	if err != nil {
		return nil, err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	return disk.Open(f, size)
}

// list gives the files of a disk below a folder, sorted by name.
func list(files *disk.FS, dir string) (all []image.File, err error) {
	entries, err := files.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		name := path.Join(dir, e.Name)
		if e.IsDir() {
			if strings.Count(name, "/") > 8 {
				return nil, fmt.Errorf("%s: too many folders inside each other", name)
			}
			below, err := list(files, name)
			if err != nil {
				return nil, err
			}
			all = append(all, below...)
			continue
		}
		data, err := files.ReadFile(name, maxStick)
		if err != nil {
			return nil, err
		}
		all = append(all, image.NewFile(name, data))
	}
	slices.SortFunc(all, func(a, b image.File) int { return strings.Compare(a.Name, b.Name) })
	return all, nil
}

// VerifyDisk compares a device or a disk image with the USB image of the build
// that the manifest, a file, is of: all bytes, and, if some differ, file by file.
// A cluster.yaml that was edited on the stick is no difference if it is valid.
func VerifyDisk(ctx context.Context, device, manifest string, o VerifyOptions) (*Report, *image.Manifest, error) {
	root, err := os.OpenRoot(filepath.Dir(manifest))
	if err != nil {
		return nil, nil, err
	}
	defer root.Close()
	text, err := readMeta(ctx, folder{root}, filepath.Base(manifest))
	if err != nil {
		return nil, nil, err
	}
	r := &Report{Source: device, Problems: []Problem{}}
	if err := r.signature(ctx, folder{root}, text, o); err != nil {
		return nil, nil, err
	}
	m, err := image.ParseManifest(text)
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", manifest, err)
	}
	r.about(m, o)
	want, ok := m.Find(StickName)
	if !ok {
		return nil, nil, fmt.Errorf("the build of %s has no %s; make one with: clonectl build", manifest, StickName)
	}
	f, err := os.Open(device)
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	var n int64
	r.SHA256, n, err = hash(io.LimitReader(o.reader(ctx, f, device, want.Bytes), want.Bytes))
	if ctx.Err() != nil {
		return nil, nil, ctx.Err()
	}
	if err != nil {
		return nil, nil, fmt.Errorf("reading %s: %w", device, err)
	}
	r.Of = len(m.Stick)
	if r.SHA256 == want.SHA256 {
		r.Files, r.Bytes = len(m.Stick), want.Bytes
		return r, m, nil
	}
	if n < want.Bytes {
		r.problem(device, "is truncated: %d of %d bytes; write it anew", n, want.Bytes)
	}
	files, err := openDisk(f)
	if err != nil {
		r.problem(device, "holds no disk of clonectl build: %v", err)
		return r, m, nil
	}
	r.stick(device, files, m)
	return r, m, nil
}

// stick says which files of a disk are not the manifest's.
func (r *Report) stick(device string, files *disk.FS, m *image.Manifest) {
	edited := false
	for _, f := range m.Stick {
		data, err := files.ReadFile(f.Name, maxStick)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			r.problem(f.Name, "is missing on %s; write it anew", device)
		case err != nil:
			r.problem(f.Name, "cannot be read from %s: %v", device, err)
		case image.NewFile(f.Name, data) == f:
			r.Files++
			r.Bytes += f.Bytes
		case f.Name == "cluster.yaml":
			edited = true
			if _, err := config.Load(bytes.TrimRight(data, "\x00"), f.Name); err != nil {
				r.problem(f.Name, "was edited on %s, and is not right; nodes take the built-in one:\n%v", device, err)
			} else {
				r.Notes = append(r.Notes, "cluster.yaml was edited on "+device+", and is valid; nodes booted from it use it")
			}
		default:
			r.problem(f.Name, "has been changed on %s; write it anew", device)
		}
	}
	have, err := list(files, "")
	if err != nil {
		r.problem(device, "cannot be read: %v", err)
		return
	}
	for _, f := range have {
		switch top, _, _ := strings.Cut(strings.ToLower(f.Name), "/"); {
		case slices.ContainsFunc(m.Stick, func(s image.File) bool { return strings.EqualFold(s.Name, f.Name) }):
		case top == "efi" || top == "grub":
			r.problem(f.Name, "is on %s and not in the manifest: a machine might boot it", device)
		default:
			r.Notes = append(r.Notes, f.Name+" is on "+device+" and not in the manifest; nodes do not read it")
		}
	}
	if len(r.Problems) == 0 && !edited {
		r.problem(device, "has the right files, but its partition table, its boot loader or the space between differs from %s; write it anew", StickName)
	}
}
