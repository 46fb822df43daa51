package disk

import (
	"encoding/binary"
	"hash/crc32"
	"unicode/utf16"

	"clonecluster/uinit/stick"
)

// partition is one to be written; start and size are in bytes, and multiples of
// a sector.
type partition struct {
	kind, id    stick.GUID
	name        string // up to 36 characters
	start, size int64
}

const (
	entries   = 128
	entrySize = 128
)

// addGPT adds the partition table and its backup at the end of the disk.
func addGPT(l *layout, disk stick.GUID, parts []partition) {
	le := binary.LittleEndian
	table := make([]byte, entries*entrySize)
	for i, p := range parts {
		e := table[i*entrySize:]
		copy(e, p.kind[:])
		copy(e[16:], p.id[:])
		le.PutUint64(e[32:], uint64(p.start/sectorSize))
		le.PutUint64(e[40:], uint64((p.start+p.size)/sectorSize-1))
		for j, u := range utf16.Encode([]rune(p.name)) {
			le.PutUint16(e[56+2*j:], u)
		}
	}
	last := l.size/sectorSize - 1
	tableSectors := int64(len(table) / sectorSize)
	header := func(at, other, tableAt int64) []byte {
		h := make([]byte, sectorSize)
		copy(h, "EFI PART")
		le.PutUint32(h[8:], 0x00010000)
		le.PutUint32(h[12:], 92)
		le.PutUint64(h[24:], uint64(at))
		le.PutUint64(h[32:], uint64(other))
		le.PutUint64(h[40:], uint64(2+tableSectors))      // first usable
		le.PutUint64(h[48:], uint64(last-tableSectors-1)) // last usable
		copy(h[56:], disk[:])
		le.PutUint64(h[72:], uint64(tableAt))
		le.PutUint32(h[80:], entries)
		le.PutUint32(h[84:], entrySize)
		le.PutUint32(h[88:], crc32.ChecksumIEEE(table))
		le.PutUint32(h[16:], crc32.ChecksumIEEE(h[:92]))
		return h
	}
	l.add(sectorSize, header(1, last, 2))
	l.add(2*sectorSize, table)
	l.add((last-tableSectors)*sectorSize, table)
	l.add(last*sectorSize, header(last, 1, last-tableSectors))
}

// protect enters the one partition into the first sector that keeps tools
// without GPT away from the disk. For BIOS there is a second entry, of no type
// and without a sector of its own: some do not boot a disk without an active
// partition, and UEFI does not take a protective partition that is active (EDK
// II, MdeModulePkg/Universal/Disk/PartitionDxe/Gpt.c). Xorriso makes it so too.
func protect(mbr []byte, size int64, bios bool) {
	le := binary.LittleEndian
	e := mbr[446:]
	copy(e, []byte{0x00, 0x00, 0x02, 0x00, 0xee, 0xff, 0xff, 0xff})
	le.PutUint32(e[8:], 1)
	le.PutUint32(e[12:], uint32(size/sectorSize-1))
	if bios {
		e = mbr[462:]
		copy(e, []byte{0x80, 0x00, 0x01, 0x00, 0x00, 0x00, 0x01, 0x00})
		le.PutUint32(e[12:], 1)
	}
	le.PutUint16(mbr[510:], 0xaa55)
}
