// Package stick reads what a node was booted from: the GUID partition table of
// a disk and the FAT32 file systems in it, as little as it takes to find one
// file. The kernel's own drivers for both would take a disk's word for much
// more, and the smallest kernel has none.
//
// Whatever lies on the disk, reading it is bounded in time and memory, and
// nothing is ever written.
//
// Sources: UEFI Specification 2.10, chapter 5 (GUID Partition Table); Microsoft
// FAT32 File System Specification 1.03.
package stick

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"unicode/utf16"
)

// PartitionName is the name of the partition that holds the cluster's
// configuration, and ConfigFile the file in its root.
const (
	PartitionName = "clonecluster"
	ConfigFile    = "cluster.yaml"
)

// Types of partitions, as their bytes lie on the disk.
var (
	// TypeESP is an EFI system partition, C12A7328-F81F-11D2-BA4B-00A0C93EC93B.
	// Most systems hide it from their users.
	TypeESP = GUID{0x28, 0x73, 0x2a, 0xc1, 0x1f, 0xf8, 0xd2, 0x11, 0xba, 0x4b, 0x00, 0xa0, 0xc9, 0x3e, 0xc9, 0x3b}
	// TypeData is a partition that every system shows,
	// EBD0A0A2-B9E5-4433-87C0-68B6B72699C7.
	TypeData = GUID{0xa2, 0xa0, 0xd0, 0xeb, 0xe5, 0xb9, 0x33, 0x44, 0x87, 0xc0, 0x68, 0xb6, 0xb7, 0x26, 0x99, 0xc7}
	// TypeBIOS holds a boot loader for BIOS, 21686148-6449-6E6F-744E-656564454649.
	TypeBIOS = GUID{0x48, 0x61, 0x68, 0x21, 0x49, 0x64, 0x6f, 0x6e, 0x74, 0x4e, 0x65, 0x65, 0x64, 0x45, 0x46, 0x49}
)

// GUID is as it lies on the disk, its first three parts little-endian.
type GUID [16]byte

func (g GUID) String() string {
	le := binary.LittleEndian
	return fmt.Sprintf("%08X-%04X-%04X-%X-%X", le.Uint32(g[:]), le.Uint16(g[4:]), le.Uint16(g[6:]), g[8:10], g[10:])
}

// Partition is one entry of the table. Start and Size are in bytes and inside
// the disk.
type Partition struct {
	Type, ID    GUID
	Name        string
	Start, Size int64
}

// ErrNoGPT is what the errors for a disk without a GUID partition table wrap.
var ErrNoGPT = errors.New("no GUID partition table")

// Bounds of a table. The specification knows no upper ones; every tool writes
// 128 entries of 128 bytes.
const (
	maxEntries   = 1024
	maxEntrySize = 1024
)

// Partitions reads the partition table of a disk of size bytes: the primary
// one, or the backup if that is damaged. Sectors may have 512 or 4096 bytes.
func Partitions(r io.ReaderAt, size int64) ([]Partition, error) {
	err := ErrNoGPT
	for _, sector := range []int64{512, 4096} {
		last := size/sector - 1
		if last < 2 {
			break
		}
		for _, lba := range []int64{1, last} {
			parts, e := readTable(r, lba, sector, last)
			if e == nil {
				return parts, nil
			}
			if !errors.Is(e, ErrNoGPT) {
				err = e
			}
		}
	}
	return nil, err
}

func readTable(r io.ReaderAt, lba, sector, last int64) ([]Partition, error) {
	le := binary.LittleEndian
	h := make([]byte, sector)
	if err := readAt(r, h, lba*sector); err != nil {
		return nil, err
	}
	if string(h[:8]) != "EFI PART" {
		return nil, ErrNoGPT
	}
	length, sum := le.Uint32(h[12:]), le.Uint32(h[16:])
	if length < 92 || int64(length) > sector {
		return nil, fmt.Errorf("partition table: a header of %d bytes", length)
	}
	clear(h[16:20])
	if crc32.ChecksumIEEE(h[:length]) != sum || int64(le.Uint64(h[24:])) != lba {
		return nil, errors.New("partition table: its header is damaged")
	}
	at, number, entry := le.Uint64(h[72:]), le.Uint32(h[80:]), le.Uint32(h[84:])
	if number > maxEntries || entry < 128 || entry > maxEntrySize || at > uint64(last) {
		return nil, fmt.Errorf("partition table: %d entries of %d bytes at sector %d", number, entry, at)
	}
	table := make([]byte, number*entry)
	if err := readAt(r, table, int64(at)*sector); err != nil {
		return nil, err
	}
	if crc32.ChecksumIEEE(table) != le.Uint32(h[88:]) {
		return nil, errors.New("partition table: its entries are damaged")
	}
	var parts []Partition
	for ; len(table) > 0; table = table[entry:] {
		p := Partition{Type: GUID(table[:16]), ID: GUID(table[16:32])}
		if p.Type == (GUID{}) {
			continue
		}
		from, to := le.Uint64(table[32:]), le.Uint64(table[40:])
		if from < 2 || from > to || to > uint64(last) {
			continue // perhaps of a larger disk that this is a copy of
		}
		p.Start, p.Size = int64(from)*sector, int64(to-from+1)*sector
		var name [36]uint16
		n := 0
		for ; n < len(name); n++ {
			if name[n] = le.Uint16(table[56+2*n:]); name[n] == 0 {
				break
			}
		}
		p.Name = string(utf16.Decode(name[:n]))
		parts = append(parts, p)
	}
	return parts, nil
}

// readAt fills b or says why not.
func readAt(r io.ReaderAt, b []byte, off int64) error {
	n, err := r.ReadAt(b, off)
	if n == len(b) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("reading the disk at byte %d: %w", off, err)
}
