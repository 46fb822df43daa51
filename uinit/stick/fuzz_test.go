package stick

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"io"
	"testing"
)

// small is a FAT32 file system of a few sectors: a folder, and in it a file with
// a long name.
func small() []byte {
	le := binary.LittleEndian
	b := make([]byte, 16*512)
	le.PutUint16(b[11:], 512)
	b[13], b[16] = 1, 1
	le.PutUint16(b[14:], 1)
	le.PutUint32(b[32:], 16)
	le.PutUint32(b[36:], 1)
	le.PutUint32(b[44:], 2)
	b[510], b[511] = 0x55, 0xaa
	for i, c := range []uint32{0x0ffffff8, 0x0fffffff, 0x0fffffff, 0x0fffffff, 5, 0x0fffffff} {
		le.PutUint32(b[512+4*i:], c)
	}
	root, sub := b[1024:], b[1536:]
	copy(root, "SUB        \x10")
	le.PutUint16(root[26:], 3)
	sub[0], sub[11], sub[13] = 0x41, attrLong, ShortSum([11]byte([]byte("CLUSTE~1YAM")))
	for i, at := range LongAt {
		u := uint16(0)
		if i < len(ConfigFile) {
			u = uint16(ConfigFile[i])
		}
		le.PutUint16(sub[at:], u)
	}
	copy(sub[32:], "CLUSTE~1YAM\x20")
	le.PutUint16(sub[32+26:], 4)
	le.PutUint32(sub[32+28:], 600)
	copy(b[2048:], bytes.Repeat([]byte("x"), 600))
	return b
}

func volumeOf(b []byte) (*volume, error) {
	return openVolume(io.NewSectionReader(bytes.NewReader(b), 0, int64(len(b))))
}

func TestSmallVolume(t *testing.T) {
	v, err := volumeOf(small())
	if err != nil {
		t.Fatal(err)
	}
	f := &FS{volumes: []*volume{v}}
	if data, err := f.ReadFile("sub/Cluster.YAML", 600); err != nil || len(data) != 600 {
		t.Errorf("ReadFile = %d bytes, %v; want 600", len(data), err)
	}
}

func TestDamagedVolume(t *testing.T) {
	le := binary.LittleEndian
	for name, damage := range map[string]func(b []byte){
		"a folder that is its own next": func(b []byte) { le.PutUint32(b[512+8:], 2); fill(b[1024:1536], 0xe5) },
		"a chain to nowhere":            func(b []byte) { le.PutUint32(b[512+16:], 0x00ffffff) },
		"a chain to the first cluster":  func(b []byte) { le.PutUint32(b[512+16:], 1) },
		"a chain that ends early":       func(b []byte) { le.PutUint32(b[512+16:], 0x0fffffff) },
		"a huge file":                   func(b []byte) { le.PutUint32(b[1536+32+28:], 0xffffffff) },
		"no root":                       func(b []byte) { le.PutUint32(b[44:], 0) },
	} {
		t.Run(name, func(t *testing.T) {
			b := small()
			damage(b)
			v, err := volumeOf(b)
			if err != nil {
				t.Fatal(err)
			}
			f := &FS{volumes: []*volume{v}}
			if data, err := f.ReadFile("sub/cluster.yaml", 1<<40); err == nil {
				t.Errorf("ReadFile = %d bytes; want an error", len(data))
			}
		})
	}
	for name, damage := range map[string]func(b []byte){
		"no boot sector":       func(b []byte) { b[510] = 0 },
		"no clusters":          func(b []byte) { b[13] = 0 },
		"odd sectors":          func(b []byte) { b[11] = 1 },
		"FAT16":                func(b []byte) { b[17] = 2 },
		"larger than the disk": func(b []byte) { le.PutUint32(b[32:], 17) },
		"a FAT that is short":  func(b []byte) { le.PutUint32(b[36:], 0) },
	} {
		b := small()
		damage(b)
		if _, err := volumeOf(b); err == nil {
			t.Errorf("%s: opened", name)
		}
	}
}

func fill(b []byte, c byte) {
	for i := range b {
		b[i] = c
	}
}

func FuzzVolume(f *testing.F) {
	f.Add(small())
	loop := small()
	binary.LittleEndian.PutUint32(loop[512+8:], 2)
	fill(loop[1024:1536], 0xe5)
	f.Add(loop)
	f.Fuzz(func(t *testing.T, b []byte) {
		v, err := volumeOf(b)
		if err != nil {
			return
		}
		fs := &FS{volumes: []*volume{v}}
		entries, err := fs.ReadDir("")
		if err != nil {
			return
		}
		for _, e := range entries[:min(len(entries), 20)] {
			data, err := fs.ReadFile(e.Name, 1<<20)
			if err == nil && len(data) > 1<<20 {
				t.Errorf("%d bytes", len(data))
			}
			fs.ReadFile(e.Name+"/"+ConfigFile, 1<<20)
		}
	})
}

// table is a disk with nothing but a partition table.
func table(number, entry uint32) []byte {
	le := binary.LittleEndian
	b := make([]byte, 64*512)
	h := b[512:]
	copy(h, "EFI PART")
	le.PutUint32(h[12:], 92)
	le.PutUint64(h[24:], 1)
	le.PutUint64(h[72:], 2)
	le.PutUint32(h[80:], number)
	le.PutUint32(h[84:], entry)
	e := b[1024:]
	copy(e, TypeData[:])
	le.PutUint64(e[32:], 40)
	le.PutUint64(e[40:], 55)
	for i, c := range PartitionName {
		le.PutUint16(e[56+2*i:], uint16(c))
	}
	copy(b[40*512:], small())
	seal(b)
	return b
}

// seal makes a table's checksums right, if its header leaves it possible.
func seal(b []byte) {
	le := binary.LittleEndian
	h := b[512:1024]
	at, size := le.Uint64(h[72:]), uint64(le.Uint32(h[80:]))*uint64(le.Uint32(h[84:]))
	if at < 1<<20 && size < 1<<20 && at*512+size <= uint64(len(b)) {
		le.PutUint32(h[88:], crc32.ChecksumIEEE(b[at*512:at*512+size]))
	}
	if n := le.Uint32(h[12:]); n <= 512 {
		clear(h[16:20])
		le.PutUint32(h[16:], crc32.ChecksumIEEE(h[:n]))
	}
}

func TestTables(t *testing.T) {
	for _, tt := range []struct {
		number, entry uint32
		ok            bool
	}{{4, 128, true}, {1, 256, true}, {0, 128, false}, {128, 64, false}, {1 << 30, 128, false}, {4, 1 << 30, false}, {0xffffffff, 0xffffffff, false}} {
		b := table(tt.number, tt.entry)
		f, err := Open(bytes.NewReader(b), int64(len(b)))
		if (err == nil) != tt.ok {
			t.Errorf("%d entries of %d bytes: %v", tt.number, tt.entry, err)
		}
		if err == nil {
			if data, err := f.ReadFile("sub/cluster.yaml", 1000); err != nil || len(data) != 600 {
				t.Errorf("ReadFile = %d bytes, %v", len(data), err)
			}
		}
	}
	b := table(4, 128)
	b[1024+56]++
	if _, err := Partitions(bytes.NewReader(b), int64(len(b))); err == nil {
		t.Error("a table with a wrong checksum is read")
	}
}

func FuzzOpen(f *testing.F) {
	f.Add(table(4, 128))
	f.Add(table(1, 256))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) >= 1024 {
			seal(b)
		}
		fs, err := Open(bytes.NewReader(b), int64(len(b)))
		if err != nil {
			return
		}
		for _, p := range fs.Partitions {
			if p.Start < 0 || p.Size <= 0 || p.Start+p.Size > int64(len(b)) {
				t.Errorf("partition %+v in %d bytes", p, len(b))
			}
		}
		fs.ReadFile("sub/cluster.yaml", 1<<20)
	})
}
