// Package uki makes and reads unified kernel images: one PE file for UEFI that
// carries kernel, initramfs and command line, so that firmware can load it
// without a boot loader, by one name, and check it by one signature.
//
// The file is systemd's stub with sections added behind its own, which the stub
// finds by their names (systemd-stub(7), the UAPI Group's Unified Kernel Image
// specification, Microsoft's PE Format). Objcopy can add them too, but needs
// their addresses computed outside, keeps a symbol table, and leaves the
// checksum of the stub.
package uki

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Names of the sections that the stub looks for, in the order of the file.
const (
	OSRelease = ".osrel"
	Cmdline   = ".cmdline"
	Uname     = ".uname"
	Initrd    = ".initrd"
	Linux     = ".linux"
)

// Options are the parts of an image. Stub and Linux are needed; an empty part
// gets no section.
type Options struct {
	Stub      []byte // systemd's, of the kernel's architecture
	Linux     []byte // a kernel with CONFIG_EFI_STUB
	Initrd    []byte
	Cmdline   string // printable ASCII
	OSRelease string // os-release(5)
	Uname     string // the kernel's release
}

// pageSize is what the stub's own sections are apart at most, and what the
// firmware protects memory by.
const pageSize = 4096

// Build puts an image together. The same parts give the same bytes.
func Build(o Options) ([]byte, error) {
	if len(o.Linux) == 0 {
		return nil, errors.New("making a unified kernel image: no kernel")
	}
	if i := strings.IndexFunc(o.Cmdline, func(r rune) bool { return r < ' ' || r > '~' }); i >= 0 {
		return nil, fmt.Errorf("making a unified kernel image: command line: character %d is not printable ASCII", i+1)
	}
	img, err := Read(o.Stub)
	if err != nil {
		return nil, fmt.Errorf("making a unified kernel image: the stub: %w", err)
	}
	if img.Signed {
		return nil, errors.New("making a unified kernel image: the stub is signed, and the signature would break; use the one that is not")
	}
	out, err := img.append([]Section{
		{Name: OSRelease, Data: []byte(o.OSRelease)},
		{Name: Cmdline, Data: []byte(o.Cmdline)},
		{Name: Uname, Data: []byte(o.Uname)},
		{Name: Initrd, Data: o.Initrd},
		{Name: Linux, Data: o.Linux},
	})
	if err != nil {
		return nil, fmt.Errorf("making a unified kernel image: %w", err)
	}
	return out, nil
}

// append gives the image without a symbol table and with the sections that are
// not empty behind its own.
func (m *Image) append(sections []Section) ([]byte, error) {
	end, va := m.sizeOfHeaders, uint64(0)
	for _, s := range m.Sections {
		if slices.ContainsFunc(sections, func(n Section) bool { return n.Name == s.Name }) {
			return nil, fmt.Errorf("the stub has a section %s already", s.Name)
		}
		end = max(end, s.rawOffset+s.rawSize)
		va = max(va, uint64(s.Address)+uint64(s.Size))
	}
	// Behind the last section lie the symbols, which nobody needs.
	out := slices.Clone(m.raw[:end])
	out = append(out, make([]byte, padding(len(out), m.fileAlignment))...)
	le := binary.LittleEndian
	le.PutUint64(out[m.coff+8:], 0) // PointerToSymbolTable, NumberOfSymbols
	number, data := len(m.Sections), uint64(0)
	for _, s := range sections {
		if len(s.Data) == 0 {
			continue
		}
		va = (va + pageSize - 1) &^ (pageSize - 1)
		header := m.sectionTable + number*sectionHeaderSize
		if header+sectionHeaderSize > m.sizeOfHeaders || !zero(out[header:header+sectionHeaderSize]) {
			return nil, fmt.Errorf("the stub's header has no room for a section %s", s.Name)
		}
		size := len(s.Data) + padding(len(s.Data), m.fileAlignment)
		if uint64(len(out))+uint64(size) > maxImage || va+uint64(size) > maxImage {
			return nil, fmt.Errorf("section %s makes it larger than %d MiB", s.Name, maxImage>>20)
		}
		h := out[header:]
		copy(h, s.Name)
		le.PutUint32(h[8:], uint32(len(s.Data)))
		le.PutUint32(h[12:], uint32(va))
		le.PutUint32(h[16:], uint32(size))
		le.PutUint32(h[20:], uint32(len(out)))
		le.PutUint32(h[36:], 0x40000040) // readable, initialised data
		out = append(out, s.Data...)
		out = append(out, make([]byte, size-len(s.Data))...)
		va += uint64(len(s.Data))
		data += uint64(size)
		number++
	}
	align := uint64(m.sectionAlignment)
	le.PutUint16(out[m.coff+2:], uint16(number))
	le.PutUint32(out[m.optional+8:], le.Uint32(out[m.optional+8:])+uint32(data)) // SizeOfInitializedData
	le.PutUint32(out[m.optional+56:], uint32((va+align-1)&^(align-1)))           // SizeOfImage
	le.PutUint32(out[m.optional+checksumOffset:], checksum(out, m.optional+checksumOffset))
	return out, nil
}

// maxImage bounds an image: firmware holds it twice in memory below 4 GiB.
const maxImage = 1 << 30

// Section is a named part of an image.
type Section struct {
	Name    string
	Address uint32 // from the start of the image in memory
	Size    uint32 // in memory
	Data    []byte // what the file has of it, without padding

	rawOffset, rawSize int
}

// Image is a PE file that has been taken apart.
type Image struct {
	Machine  uint16 // 0x8664 amd64, 0xaa64 arm64
	Entry    uint32
	Sections []Section // in the order of the section table
	Signed   bool      // it has a certificate table; what that says is for others to check
	Checksum uint32    // as the header says
	Right    bool      // the checksum is right

	raw                             []byte
	coff, optional, sectionTable    int
	sizeOfHeaders                   int
	fileAlignment, sectionAlignment int
	certificates                    [2]int // from, to; 0, 0 if there are none
}

const (
	sectionHeaderSize = 40
	checksumOffset    = 64  // in the optional header
	securityDirectory = 144 // entry 4 of the data directories, in a PE32+ optional header
)

// Section gives the first section of that name, nil if there is none.
func (m *Image) Section(name string) *Section {
	for i := range m.Sections {
		if m.Sections[i].Name == name {
			return &m.Sections[i]
		}
	}
	return nil
}

// Arch is the image's architecture as Go calls it, "" for one that we do not
// build for.
func (m *Image) Arch() string {
	for arch, s := range stubs {
		if s.machine == m.Machine {
			return arch
		}
	}
	return ""
}

// Read takes a PE32+ image apart. Its sections lie in data. Whatever the
// headers say, nothing outside data is touched; sections that are not wholly
// in data are errors.
func Read(data []byte) (*Image, error) {
	le := binary.LittleEndian
	if len(data) < 64 || data[0] != 'M' || data[1] != 'Z' {
		return nil, errors.New("not a PE image: no MZ at its start")
	}
	pe := int64(le.Uint32(data[60:]))
	if pe+24 > int64(len(data)) || string(data[pe:pe+4]) != "PE\x00\x00" {
		return nil, errors.New("not a PE image: no PE header")
	}
	m := &Image{raw: data, coff: int(pe) + 4}
	m.Machine = le.Uint16(data[m.coff:])
	number, optionalSize := int(le.Uint16(data[m.coff+2:])), int(le.Uint16(data[m.coff+16:]))
	m.optional = m.coff + 20
	m.sectionTable = m.optional + optionalSize
	if optionalSize < 112 || m.sectionTable+number*sectionHeaderSize > len(data) {
		return nil, errors.New("damaged PE image: its headers do not fit")
	}
	o := data[m.optional:m.sectionTable]
	if magic := le.Uint16(o); magic != 0x20b {
		return nil, fmt.Errorf("PE image of the kind %#x: only PE32+ (0x20b) is known", magic)
	}
	m.Entry = le.Uint32(o[16:])
	m.Checksum = le.Uint32(o[checksumOffset:])
	m.Right = m.Checksum == checksum(data, m.optional+checksumOffset)
	var err error
	if m.sectionAlignment, err = alignment(le.Uint32(o[32:])); err != nil {
		return nil, err
	}
	if m.fileAlignment, err = alignment(le.Uint32(o[36:])); err != nil {
		return nil, err
	}
	headers := le.Uint32(o[60:])
	if int64(headers) > int64(len(data)) || int64(headers) < int64(m.sectionTable+number*sectionHeaderSize) {
		return nil, fmt.Errorf("damaged PE image: headers of %d bytes", headers)
	}
	m.sizeOfHeaders = int(headers)
	if le.Uint32(o[108:]) > 4 && len(o) >= securityDirectory+8 {
		from, size := int64(le.Uint32(o[securityDirectory:])), int64(le.Uint32(o[securityDirectory+4:]))
		if size > 0 {
			if from+size > int64(len(data)) || from < int64(headers) {
				return nil, errors.New("damaged PE image: its certificates do not fit")
			}
			m.Signed, m.certificates = true, [2]int{int(from), int(from + size)}
		}
	}
	for i := range number {
		s, err := readSection(data, m.sectionTable+i*sectionHeaderSize)
		if err != nil {
			return nil, err
		}
		m.Sections = append(m.Sections, s)
	}
	return m, nil
}

func readSection(data []byte, at int) (Section, error) {
	le := binary.LittleEndian
	h := data[at : at+sectionHeaderSize]
	name, _, _ := strings.Cut(string(h[:8]), "\x00")
	s := Section{Name: name, Size: le.Uint32(h[8:]), Address: le.Uint32(h[12:])}
	size, offset := int64(le.Uint32(h[16:])), int64(le.Uint32(h[20:]))
	if size == 0 { // all of it is zeros in memory
		return s, nil
	}
	if offset+size > int64(len(data)) {
		return s, fmt.Errorf("damaged PE image: section %q is not all there; the file was cut short", name)
	}
	if uint64(s.Address)+uint64(s.Size) > math.MaxUint32 {
		return s, fmt.Errorf("damaged PE image: section %q does not fit into memory", name)
	}
	s.rawOffset, s.rawSize = int(offset), int(size)
	s.Data = data[offset : offset+min(size, int64(s.Size))]
	return s, nil
}

func alignment(a uint32) (int, error) {
	if a == 0 || a > 1<<16 || a&(a-1) != 0 {
		return 0, fmt.Errorf("damaged PE image: an alignment of %d", a)
	}
	return int(a), nil
}

// checksum is that of imagehlp's CheckSumMappedFile: the 16-bit words of the
// file but for the checksum itself, added with the carry going round, and the
// length.
func checksum(data []byte, at int) uint32 {
	sum := uint64(0)
	add := func(b []byte) {
		for ; len(b) >= 2; b = b[2:] {
			sum += uint64(b[0]) | uint64(b[1])<<8
		}
		if len(b) == 1 {
			sum += uint64(b[0])
		}
	}
	// The checksum is at an even offset in every file of ours, but a stranger's
	// may have it anywhere: its bytes count as zero.
	var field [6]byte
	from, to := at&^1, (at+5)&^1
	copy(field[:], data[from:min(to, len(data))])
	clear(field[at-from : at-from+4])
	add(data[:from])
	add(field[:to-from])
	add(data[min(to, len(data)):])
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return uint32(sum) + uint32(len(data))
}

func padding(size, alignment int) int { return -size & (alignment - 1) }

func zero(b []byte) bool {
	return !slices.ContainsFunc(b, func(c byte) bool { return c != 0 })
}

// stubs are the architectures that can be built for.
var stubs = map[string]struct {
	machine   uint16
	file, how string
}{
	"amd64": {0x8664, "linuxx64.efi.stub", "apt-get install systemd-boot-efi"},
	"arm64": {0xaa64, "linuxaa64.efi.stub", "make stub-arm, or: dpkg --add-architecture arm64 && apt-get update && apt-get install systemd-boot-efi:arm64"},
}

// stubDirs are where the stubs are.
var stubDirs = []string{"/usr/lib/systemd/boot/efi"}

// Stub reads systemd's stub for an architecture as Go calls it, and says where
// it was. It is looked for where Debian's package puts it and then in more, since
// the package of another architecture need not be installed.
func Stub(arch string, more ...string) (stub []byte, path string, err error) {
	s, ok := stubs[arch]
	if !ok {
		return nil, "", fmt.Errorf("no UEFI stub for the architecture %q: amd64 and arm64 are known", arch)
	}
	for _, dir := range slices.Concat(stubDirs, more) {
		path := filepath.Join(dir, s.file)
		data, err := os.ReadFile(path)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, "", fmt.Errorf("reading systemd's UEFI stub: %w", err)
		}
		m, err := Read(data)
		if err != nil {
			return nil, "", fmt.Errorf("%s: %w", path, err)
		}
		if m.Machine != s.machine {
			return nil, "", fmt.Errorf("%s: is for another machine (%#x)", path, m.Machine)
		}
		return data, path, nil
	}
	return nil, "", fmt.Errorf("systemd's UEFI stub %s is not installed (%s): %w", s.file, s.how, os.ErrNotExist)
}
