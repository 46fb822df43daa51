package pxe

import (
	"bytes"
	"cmp"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path"
	"strings"

	"clonecluster/image/pxe/tftp"
)

// The files that machines load, by their names in URLs and TFTP paths.
const (
	scriptFile = "boot.ipxe"
	kernelFile = "bzImage"
	initrdFile = "initrd.img"
	efiFile    = "clonecluster.efi"
	undionly   = "undionly.kpxe"
)

// Image is what the machines of one architecture boot: a folder with a kernel and
// an initramfs (for BIOS), a unified kernel image (for UEFI), or both.
type Image struct {
	Arch    string // as Go says it: amd64, arm64
	Folder  string
	Cmdline string // of the kernel, for BIOS; the unified image has its own
	// EFI is a unified image for a folder that has none.
	EFI []byte
	// Known are the folder's files as they were when they were looked at: others are
	// not handed out. Nil means whatever is there.
	Known map[string]fs.FileInfo
	// Build is the command that makes the folder, for messages.
	Build string
}

// openImage is an image whose folder is open.
type openImage struct {
	Image
	root *os.Root
}

func (i Image) open() (*openImage, error) {
	if strings.ContainsAny(i.Cmdline, "\n\r\x00") {
		return nil, errors.New("the kernel command line has a line break")
	}
	root, err := os.OpenRoot(i.Folder)
	if err != nil {
		return nil, fmt.Errorf("opening the image: %w", err)
	}
	return &openImage{i, root}, nil
}

// has says whether a file is there, and can be read by us.
func (i *openImage) has(name string) error {
	f, err := i.openFile(name)
	if err != nil {
		return err
	}
	defer f.Close()
	if f.size == 0 {
		return fmt.Errorf("%s is no file with something in it", name)
	}
	return nil
}

// Unchanged tells whether a file is the one that it was when it was looked at; nil: it was not.
func Unchanged(was, now fs.FileInfo) bool {
	return was != nil && os.SameFile(was, now) && was.Size() == now.Size() && was.ModTime().Equal(now.ModTime())
}

func (i *openImage) openFile(name string) (diskFile, error) {
	f, err := regular(i.root.Open(name))
	if err != nil || i.Known == nil {
		return f, err
	}
	now, err := f.Stat()
	if err == nil && !Unchanged(i.Known[name], now) {
		err = fmt.Errorf("%s has changed since this server began: end it, and start it again", name)
	}
	if err != nil {
		f.Close()
	}
	return f, err
}

// diskFile is a file of a folder: read as it is now, whatever comes after.
type diskFile struct {
	*os.File
	size int64
}

func (f diskFile) Size() int64 { return f.size }

// memFile is a file that is made here.
type memFile struct{ *bytes.Reader }

func (memFile) Close() error { return nil }

// tokens are the folders in which machines see their files: the MAC address, and
// a word that only this server can make. So each request says whose it is, and
// only who was offered a file can have it: without that, the port would give the
// cluster's key to whoever asks.
type tokens struct{ secret []byte }

func (t tokens) folder(mac [6]byte) string {
	h := hmac.New(sha256.New, t.secret)
	h.Write(mac[:])
	return hex.EncodeToString(mac[:]) + "-" + hex.EncodeToString(h.Sum(nil)[:8])
}

// machine says whose file a path names, and which. Clients write paths with one
// slash before them or none, and old ROMs with backslashes.
func (t tokens) machine(name string) (mac [6]byte, file string, ok bool) {
	name = strings.TrimLeft(strings.ReplaceAll(name, `\`, "/"), "/")
	folder, file, ok := strings.Cut(name, "/")
	if !ok || len(folder) != 12+1+16 {
		return mac, "", false
	}
	if _, err := hex.Decode(mac[:], []byte(folder[:12])); err != nil {
		return mac, "", false
	}
	if !hmac.Equal([]byte(t.folder(mac)), []byte(folder)) {
		return mac, "", false
	}
	return mac, file, true
}

// boot is the file a client has to load, or why there is none.
func (s *Server) boot(mac [6]byte, c Client) (bootFile, error) {
	if c.Arch == "" {
		return bootFile{}, fmt.Errorf("the machine calls itself %s; there are images for x86_64 and arm64 only", c.Unknown)
	}
	img, err := s.image(c.Arch)
	if err != nil {
		return bootFile{}, err
	}
	name := efiFile
	switch {
	case c.Kind == IPXE:
		name = scriptFile
	case c.Kind == BIOS:
		name = undionly
	}
	if err := s.available(img, c, name); err != nil {
		return bootFile{}, err
	}
	folder := s.tokens.folder(mac)
	b := bootFile{name: name, path: path.Join(folder, name)}
	if c.Kind == IPXE || c.Kind == UEFIHTTP {
		b.url = fmt.Sprintf("http://%v/%s", netip.AddrPortFrom(s.opts.Addr.Addr(), s.httpPort), b.path)
	}
	return b, nil
}

func (s *Server) image(arch string) (*openImage, error) {
	if img := s.images[arch]; img != nil {
		return img, nil
	}
	var have []string
	for a := range s.images {
		have = append(have, a)
	}
	return nil, fmt.Errorf("the machine is %s, and the image for %s; build one for a board of that architecture and serve its folder, too",
		arch, strings.Join(have, ", "))
}

// available says why a client could not load what it is to be told of.
func (s *Server) available(img *openImage, c Client, name string) error {
	switch {
	case name == undionly && s.opts.Undionly == "":
		return errors.New("its BIOS needs iPXE to load by HTTP, and there is no undionly.kpxe here: apt-get install ipxe")
	case c.Kind == BIOS || c.Kind == IPXE && !c.EFI:
		for _, f := range []string{kernelFile, initrdFile} {
			if err := img.has(f); err != nil {
				return missing(img, f, err)
			}
		}
	case img.EFI == nil:
		if err := img.has(efiFile); err != nil {
			return missing(img, efiFile, err)
		}
	}
	return nil
}

func missing(img *openImage, name string, err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s has no %s; build it with %q", img.Folder, name, cmp.Or(img.Build, "clonectl build"))
	}
	return fmt.Errorf("%s: %w", img.Folder, err)
}

// open gives a machine's file.
func (s *Server) open(mac [6]byte, arch, name string) (tftp.File, error) {
	img, err := s.image(arch)
	if err != nil {
		return nil, err
	}
	switch name {
	case scriptFile:
		return memFile{bytes.NewReader(s.script(mac, img))}, nil
	case undionly:
		if s.opts.Undionly == "" {
			return nil, tftp.ErrNotFound
		}
		return regular(os.Open(s.opts.Undionly))
	case efiFile:
		if img.EFI != nil {
			return memFile{bytes.NewReader(img.EFI)}, nil
		}
		fallthrough
	case kernelFile, initrdFile:
		return img.openFile(name)
	}
	return nil, tftp.ErrNotFound
}

func regular(f *os.File, err error) (diskFile, error) {
	if errors.Is(err, fs.ErrNotExist) {
		return diskFile{}, fmt.Errorf("%w: %w", tftp.ErrNotFound, err)
	} else if err != nil {
		return diskFile{}, err
	}
	info, err := f.Stat()
	if err != nil || !info.Mode().IsRegular() {
		f.Close()
		return diskFile{}, errors.Join(errors.New("not a regular file"), err)
	}
	return diskFile{f, info.Size()}, nil
}

// script is what iPXE runs. It has what the machine is: under UEFI one unified
// image, else kernel and initramfs. When something fails it waits and begins anew,
// so that a server which comes back is found.
func (s *Server) script(mac [6]byte, img *openImage) []byte {
	base := fmt.Sprintf("http://%v/%s/", netip.AddrPortFrom(s.opts.Addr.Addr(), s.httpPort), s.tokens.folder(mac))
	var b bytes.Buffer
	say := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	say("#!ipxe")
	say("iseq ${platform} efi && goto efi ||")
	say(":bios")
	say("kernel %s%s %s || goto failed", base, kernelFile, img.Cmdline)
	say("initrd %s%s || goto failed", base, initrdFile)
	say("boot || goto failed")
	say(":efi")
	say("kernel %s%s || goto failed", base, efiFile)
	say("boot || goto failed")
	say(":failed")
	say("echo clonecluster: loading from %s failed; again in 10 seconds", base)
	say("imgfree")
	say("sleep 10")
	say("chain %s%s || goto failed", base, scriptFile)
	return b.Bytes()
}

// section makes an io.ReadSeeker of a file, for net/http.
func section(f tftp.File) io.ReadSeeker { return io.NewSectionReader(f, 0, f.Size()) }

// key is a MAC address as a map's key.
func key(mac net.HardwareAddr) [6]byte { return [6]byte(mac) }
