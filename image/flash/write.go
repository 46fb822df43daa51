package flash

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"

	"clonecluster/uinit/stick"
)

const (
	mebibyte = 1 << 20
	chunk    = 4 * mebibyte
	// head is what is written last: as long as it is missing, nothing takes the
	// device for one that is whole.
	head = mebibyte
)

// Image is a disk image that has been looked at.
type Image struct {
	Path string
	Size int64
	// SHA256 in hex is what it has to have; empty if nobody knows. CheckImage leaves
	// it to who does.
	SHA256 string
}

// CheckImage makes sure that the file is a disk image and all there.
func CheckImage(path string) (Image, error) {
	f, err := os.Open(path)
	if err != nil {
		return Image{}, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return Image{}, err
	}
	size := fi.Size()
	if !fi.Mode().IsRegular() {
		return Image{}, fmt.Errorf("%s is not a file", path)
	}
	if _, err := stick.Partitions(f, size); err != nil {
		return Image{}, fmt.Errorf("%s is no disk image: %w", path, err)
	}
	// The table's backup is the last sector: where else is a file cut short?
	last := make([]byte, 8)
	if _, err := f.ReadAt(last, size-512); err != nil || string(last) != "EFI PART" || size%512 != 0 {
		if end := tableEnd(f); end > 0 && end < size {
			return Image{}, fmt.Errorf("%s is longer than its partition table says: %d bytes, not %d; cut it with truncate -s %d %s, or build or fetch it again", path, size, end, end, path)
		}
		return Image{}, fmt.Errorf("%s is not all there: its end is missing; build or fetch it again", path)
	}
	return Image{Path: path, Size: size}, nil
}

// tableEnd is where a disk ends by its partition table, behind the sector of the table's
// backup (UEFI 2.10, 5.3.2); 0: it does not say.
func tableEnd(f *os.File) int64 {
	header := make([]byte, 40)
	if _, err := f.ReadAt(header, 512); err != nil || string(header[:8]) != "EFI PART" {
		return 0
	}
	backup := binary.LittleEndian.Uint64(header[32:])
	if backup > math.MaxInt64/512-1 {
		return 0
	}
	return int64(backup+1) * 512
}

// State is what a device is like after Write.
type State int

// States.
const (
	Untouched State = iota
	Erased          // neither the old contents nor the new ones can be used
	Written         // all is written, but not seen to be there
	Verified
)

func (s State) String() string {
	switch s {
	case Untouched:
		return "nothing was written to it"
	case Erased:
		return "what was on it is lost, and it cannot be booted from: write it again"
	case Written:
		return "everything was written, but not compared: write it again to be sure"
	}
	return "it is written and compared"
}

func sameFile(a, b *os.File) (bool, error) {
	is, err := a.Stat()
	if err != nil {
		return false, err
	}
	other, err := b.Stat()
	return err == nil && (os.SameFile(is, other) || loopsOf(is).on(b, 0)), err
}

// Write puts the image onto the device (or the file) at path, reads it back
// past the cache and compares. Progress, if not nil, is told what is going on
// ("writing", "comparing") and how many bytes of it are done.
func Write(ctx context.Context, img Image, path string, progress func(what string, done int64)) (State, error) {
	if progress == nil {
		progress = func(string, int64) {}
	}
	in, err := os.Open(img.Path)
	if err != nil {
		return Untouched, err
	}
	defer in.Close()
	// O_EXCL: the kernel refuses a device that anything has mounted or holds.
	out, err := os.OpenFile(path, os.O_RDWR|unix.O_EXCL, 0)
	if err != nil {
		return Untouched, explain(path, err)
	}
	defer out.Close()
	size, err := out.Seek(0, io.SeekEnd)
	if err != nil {
		return Untouched, explain(path, err)
	}
	if same, err := sameFile(in, out); err != nil || same {
		return Untouched, cmp.Or(err, fmt.Errorf("%s is the image itself; name the device, or the file, to write it to", path))
	}
	if size < img.Size {
		return Untouched, fmt.Errorf("%s is too small: it has %.1f MB, the image %.1f MB", path, float64(size)/1e6, float64(img.Size)/1e6)
	}
	if err := ctx.Err(); err != nil {
		return Untouched, err
	}
	if ro, err := unix.IoctlGetInt(int(out.Fd()), unix.BLKROGET); err == nil && ro != 0 {
		return Untouched, explain(path, unix.EROFS) // the loop driver opens it all the same
	}
	if n, err := out.WriteAt(make([]byte, head), 0); err != nil {
		if n == 0 {
			return Untouched, explain(path, err)
		}
		return Erased, explain(path, err)
	}
	if err := put(ctx, in, out, img.Size, size, progress); err != nil {
		return Erased, explain(path, err)
	}
	if err := compare(ctx, in, out, img, progress); err != nil {
		return Written, explain(path, err)
	}
	// The kernel's idea of the partitions; a file has none, and udev may be
	// faster.
	_ = unix.IoctlSetInt(int(out.Fd()), unix.BLKRRPART, 0)
	return Verified, nil
}

// put writes the image onto a device whose head has been erased.
func put(ctx context.Context, in, out *os.File, length, size int64, progress func(string, int64)) error {
	zeros := make([]byte, head)
	// At the end of a larger device the backup of the old partition table would
	// contradict the new one.
	if end := max(length, size-head); size > length {
		if _, err := out.WriteAt(zeros[:size-end], end); err != nil {
			return err
		}
	}
	buf, done := make([]byte, chunk), int64(0)
	copyPart := func(from, to int64) error {
		for at := from; at < to; {
			if err := ctx.Err(); err != nil {
				return err
			}
			b := buf[:min(chunk, to-at)]
			if _, err := in.ReadAt(b, at); err != nil {
				return fmt.Errorf("reading the image: %w", err)
			}
			if _, err := out.WriteAt(b, at); err != nil {
				return fmt.Errorf("at %d MiB: %w", at/mebibyte, err)
			}
			at += int64(len(b))
			// Now and then, so that the progress is the device's and not the
			// cache's, and an interrupt does not wait for minutes.
			if err := unix.SyncFileRange(int(out.Fd()), at-int64(len(b)), int64(len(b)), unix.SYNC_FILE_RANGE_WRITE|unix.SYNC_FILE_RANGE_WAIT_AFTER); err != nil && !errors.Is(err, unix.ESPIPE) {
				return fmt.Errorf("at %d MiB: %w", at/mebibyte, err)
			}
			done += int64(len(b))
			progress("writing", done)
		}
		return nil
	}
	if err := copyPart(min(head, length), length); err != nil {
		return err
	}
	if err := out.Sync(); err != nil {
		return err
	}
	if err := copyPart(0, min(head, length)); err != nil {
		return err
	}
	return out.Sync()
}

// compare reads the device, and not the kernel's memory of it.
func compare(ctx context.Context, in, out *os.File, img Image, progress func(string, int64)) error {
	back := out
	direct, err := os.OpenFile(out.Name(), os.O_RDONLY|unix.O_DIRECT, 0)
	switch {
	case err == nil:
		defer direct.Close()
		back = direct
	case errors.Is(err, unix.EINVAL): // tmpfs, which has nothing behind its cache
	default:
		return err
	}
	_ = unix.IoctlSetInt(int(out.Fd()), unix.BLKFLSBUF, 0)
	_ = unix.Fadvise(int(out.Fd()), 0, 0, unix.FADV_DONTNEED)
	want, got := make([]byte, chunk), aligned(chunk)
	h := sha256.New()
	for at := int64(0); at < img.Size; {
		if err := ctx.Err(); err != nil {
			return err
		}
		n := min(chunk, img.Size-at)
		if _, err := in.ReadAt(want[:n], at); err != nil {
			return fmt.Errorf("reading the image: %w", err)
		}
		// Whole pages: direct reads have to be.
		if m, err := back.ReadAt(got[:(n+4095)&^4095], at); int64(m) < n {
			return fmt.Errorf("reading back at %d MiB: %w", at/mebibyte, err)
		}
		if !bytes.Equal(want[:n], got[:n]) {
			i := int64(0)
			for want[i] == got[i] {
				i++
			}
			return fmt.Errorf("byte %d is not what was written: the device is broken, or smaller than it says; take another", at+i)
		}
		h.Write(want[:n])
		at += n
		progress("comparing", at)
	}
	if img.SHA256 != "" && hex.EncodeToString(h.Sum(nil)) != img.SHA256 {
		return fmt.Errorf("the image %s was changed meanwhile: what is written is not what it was; begin again", img.Path)
	}
	return nil
}

// aligned gives memory that a direct read can go to.
func aligned(size int) []byte {
	b := make([]byte, size+4096)
	skip := -int(uintptr(unsafe.Pointer(&b[0]))) & 4095
	return b[skip : skip+size]
}

func explain(path string, err error) error {
	fix := ""
	switch {
	case errors.Is(err, unix.EBUSY):
		fix = "it is in use: unmount it first"
	case errors.Is(err, os.ErrPermission):
		fix = "it cannot be written to by this user: run this as root"
	case errors.Is(err, unix.EROFS) && isFile(path):
		fix = "the file system that it is on is mounted read-only: remount that (mount -o remount,rw), or give a file elsewhere"
	case errors.Is(err, unix.EROFS):
		fix = "it is write-protected: look for a switch on it"
	case errors.Is(err, unix.ENOSPC):
		fix = "it is full, or smaller than it says"
	case errors.Is(err, unix.EIO), errors.Is(err, unix.ENXIO), errors.Is(err, unix.ENODEV):
		fix = "it does not answer any more: was it pulled out, or is it broken?"
	default:
		return fmt.Errorf("%s: %w", path, err)
	}
	return fmt.Errorf("%s: %s (%w)", path, fix, err)
}

func isFile(path string) bool {
	fi, err := os.Stat(path)
	return err == nil && fi.Mode().IsRegular()
}
