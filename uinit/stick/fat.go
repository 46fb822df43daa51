package stick

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"
	"unicode/utf16"
)

// FS is the files of all FAT32 file systems on a disk: a name is looked for in
// one after the other, in the order of the partition table.
type FS struct {
	Partitions []Partition // all of the disk's
	volumes    []*volume
	problems   []error // of partitions that should be readable and are not
}

// Open finds the file systems on a disk of size bytes: those in partitions of
// the types TypeESP and TypeData that are FAT32. Nothing of r beyond size is
// read. The error wraps ErrNoGPT for a disk that is not partitioned that way.
func Open(r io.ReaderAt, size int64) (*FS, error) {
	parts, err := Partitions(r, size)
	if err != nil {
		return nil, err
	}
	f := &FS{Partitions: parts}
	for i, p := range parts {
		if p.Type != TypeESP && p.Type != TypeData {
			continue
		}
		v, err := openVolume(io.NewSectionReader(r, p.Start, p.Size))
		if err != nil {
			f.problems = append(f.problems, fmt.Errorf("partition %d: %w", i+1, err))
			continue
		}
		v.partition = p
		f.volumes = append(f.volumes, v)
	}
	if len(f.volumes) == 0 {
		return nil, errors.Join(append([]error{errors.New("the disk has no FAT32 file system")}, f.problems...)...)
	}
	return f, nil
}

// In is the files of the partitions of that name only. It is an error if there
// is none that can be read.
func (f *FS) In(partition string) (*FS, error) {
	in := &FS{Partitions: f.Partitions}
	for _, v := range f.volumes {
		if v.partition.Name == partition {
			in.volumes = append(in.volumes, v)
		}
	}
	if len(in.volumes) == 0 {
		return nil, errors.Join(append([]error{fmt.Errorf("no partition %q that can be read", partition)}, f.problems...)...)
	}
	return in, nil
}

// ReadFile reads the file of that name, with slashes between its folders; case
// does not count. It is an error if the file is larger than most bytes. The
// error wraps fs.ErrNotExist if no partition has it.
func (f *FS) ReadFile(name string, most int64) ([]byte, error) {
	v, e, err := f.find(name)
	if err != nil {
		return nil, &fs.PathError{Op: "read", Path: name, Err: err}
	}
	switch {
	case e.dir:
		err = errors.New("is a folder")
	case int64(e.Size) > most:
		err = fmt.Errorf("%d bytes; at most %d are read", e.Size, most)
	default:
		var data []byte
		if data, err = v.read(e.cluster, int64(e.Size)); err == nil {
			return data, nil
		}
	}
	return nil, &fs.PathError{Op: "read", Path: name, Err: err}
}

// Entry is a file or a folder.
type Entry struct {
	Name    string
	Size    uint32 // 0 for a folder
	dir     bool
	short   string
	cluster uint32
}

// IsDir says that the entry is a folder.
func (e Entry) IsDir() bool { return e.dir }

// ReadDir lists the folder of that name, "" for the roots of all file systems
// together.
func (f *FS) ReadDir(name string) ([]Entry, error) {
	if strings.Trim(name, "/") == "" {
		var all []Entry
		for _, v := range f.volumes {
			entries, err := v.readDir(v.root)
			if err != nil {
				return nil, err
			}
			all = append(all, entries...)
		}
		return all, nil
	}
	v, e, err := f.find(name)
	if err == nil && !e.dir {
		err = errors.New("is no folder")
	}
	if err != nil {
		return nil, &fs.PathError{Op: "read", Path: name, Err: err}
	}
	return v.readDir(e.cluster)
}

func (f *FS) find(name string) (*volume, Entry, error) {
	failed := fs.ErrNotExist
	for _, v := range f.volumes {
		e, err := v.find(name)
		if err == nil {
			return v, e, nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			failed = err
		}
	}
	return nil, Entry{}, failed
}

// volume is one FAT32 file system. Offsets and sizes are in bytes.
type volume struct {
	r           io.ReaderAt
	partition   Partition
	fat, data   int64 // where they begin
	clusterSize int64
	clusters    uint32 // numbers from 2 to clusters+1 are valid
	root        uint32

	cached   [512]byte // a piece of the FAT
	cachedAt int64     // 0: none
}

// maxDir is the size of a folder, by the specification: 65536 entries.
const maxDir = 65536 * 32

func openVolume(r *io.SectionReader) (*volume, error) {
	le := binary.LittleEndian
	var b [512]byte
	if err := readAt(r, b[:], 0); err != nil {
		return nil, err
	}
	sector, perCluster := int64(le.Uint16(b[11:])), int64(b[13])
	reserved, fats := int64(le.Uint16(b[14:])), int64(b[16])
	total, perFAT := int64(le.Uint32(b[32:])), int64(le.Uint32(b[36:]))
	switch {
	case b[510] != 0x55 || b[511] != 0xaa:
		return nil, errors.New("no FAT file system: no boot sector")
	case sector < 512 || sector > 4096 || sector&(sector-1) != 0 || perCluster == 0 || perCluster&(perCluster-1) != 0:
		return nil, fmt.Errorf("no FAT file system: clusters of %d sectors of %d bytes", perCluster, sector)
	case le.Uint16(b[17:]) != 0 || le.Uint16(b[22:]) != 0:
		return nil, errors.New("a FAT12 or FAT16 file system: only FAT32 is read")
	case reserved == 0 || fats == 0 || perFAT == 0:
		return nil, errors.New("a damaged FAT32 file system: it has no FAT")
	case total*sector > r.Size():
		return nil, errors.New("a damaged FAT32 file system: larger than its partition")
	}
	v := &volume{r: r, fat: reserved * sector, data: (reserved + fats*perFAT) * sector, clusterSize: perCluster * sector, root: le.Uint32(b[44:])}
	clusters := (total*sector - v.data) / v.clusterSize
	if clusters < 1 || clusters > 0x0ffffff5 || (clusters+2)*4 > perFAT*sector {
		return nil, fmt.Errorf("a damaged FAT32 file system: %d clusters", clusters)
	}
	v.clusters = uint32(clusters)
	// Bits 0–3 of ExtFlags name the FAT in use where bit 7 says that there is
	// only one.
	if flags := le.Uint16(b[40:]); flags&0x80 != 0 {
		if active := int64(flags & 15); active < fats {
			v.fat += active * perFAT * sector
		}
	}
	return v, nil
}

var errChain = errors.New("damaged FAT32 file system: a chain of clusters is broken")

// read reads size bytes that begin in a cluster.
func (v *volume) read(cluster uint32, size int64) ([]byte, error) {
	if size > int64(v.clusters)*v.clusterSize {
		return nil, errChain
	}
	var data []byte
	for int64(len(data)) < size {
		// Clusters that lie behind one another are read at once.
		first, run := cluster, int64(0)
		for {
			if cluster < 2 || cluster-2 >= v.clusters {
				return nil, errChain
			}
			run += v.clusterSize
			next, err := v.next(cluster)
			if err != nil {
				return nil, err
			}
			if int64(len(data))+run >= size || next != cluster+1 || run >= 1<<20 {
				cluster = next
				break
			}
			cluster = next
		}
		part := make([]byte, min(run, size-int64(len(data))))
		if err := readAt(v.r, part, v.offset(first)); err != nil {
			return nil, err
		}
		data = append(data, part...)
	}
	return data, nil
}

func (v *volume) offset(cluster uint32) int64 { return v.data + int64(cluster-2)*v.clusterSize }

// next is what the FAT has for a valid cluster.
func (v *volume) next(cluster uint32) (uint32, error) {
	at := v.fat + int64(cluster)*4
	if from := at &^ 511; from != v.cachedAt {
		v.cachedAt = 0
		if err := readAt(v.r, v.cached[:], from); err != nil {
			return 0, err
		}
		v.cachedAt = from
	}
	return binary.LittleEndian.Uint32(v.cached[at&511:]) & 0x0fffffff, nil
}

func (v *volume) find(name string) (Entry, error) {
	at := Entry{dir: true, cluster: v.root}
	for step := range strings.SplitSeq(strings.Trim(name, "/"), "/") {
		if !at.dir {
			return at, fs.ErrNotExist
		}
		entries, err := v.readDir(at.cluster)
		if err != nil {
			return at, err
		}
		found := false
		for _, e := range entries {
			if found = strings.EqualFold(e.Name, step) || strings.EqualFold(e.short, step); found {
				at = e
				break
			}
		}
		if !found {
			return at, fs.ErrNotExist
		}
	}
	return at, nil
}

// readDir reads the folder that begins in a cluster, without . and .. and
// without the volume's label.
func (v *volume) readDir(cluster uint32) ([]Entry, error) {
	var entries []Entry
	var long longName
	for size := int64(0); size < maxDir; size += v.clusterSize {
		if cluster < 2 || cluster-2 >= v.clusters {
			return nil, errChain
		}
		b := make([]byte, v.clusterSize)
		if err := readAt(v.r, b, v.offset(cluster)); err != nil {
			return nil, err
		}
		for ; len(b) >= 32; b = b[32:] {
			switch {
			case b[0] == 0:
				return entries, nil
			case b[0] == 0xe5:
				long = longName{}
			case b[11]&0x3f == attrLong:
				long.add(b[:32])
			case b[11]&attrLabel != 0 || b[0] == '.':
				long = longName{}
			default:
				entries = append(entries, entry(b[:32], &long))
				long = longName{}
			}
		}
		next, err := v.next(cluster)
		if err != nil {
			return nil, err
		}
		if next >= 0x0ffffff8 {
			return entries, nil
		}
		cluster = next
	}
	return nil, errors.New("damaged FAT32 file system: a folder without an end")
}

const (
	attrLabel  = 0x08
	attrFolder = 0x10
	attrLong   = 0x0f
)

func entry(b []byte, long *longName) Entry {
	le := binary.LittleEndian
	short := strings.TrimRight(string(b[:8]), " ")
	if b[0] == 0x05 {
		short = "\xe5" + short[1:]
	}
	if ext := strings.TrimRight(string(b[8:11]), " "); ext != "" {
		short += "." + ext
	}
	e := Entry{
		Name: short, short: short, dir: b[11]&attrFolder != 0, Size: le.Uint32(b[28:]),
		cluster: uint32(le.Uint16(b[20:]))<<16 | uint32(le.Uint16(b[26:])),
	}
	if name := long.name(ShortSum([11]byte(b[:11]))); name != "" {
		e.Name = name
	}
	if e.dir {
		e.Size = 0
	}
	return e
}

// longName collects the entries of a long name, which come in reverse.
type longName struct {
	units [20 * 13]uint16
	next  byte // the number that has to come next; 0: complete, if parts > 0
	parts byte
	sum   byte
}

// LongAt is where the 13 UTF-16 units of a long name's entry are.
var LongAt = [13]int{1, 3, 5, 7, 9, 14, 16, 18, 20, 22, 24, 28, 30}

func (l *longName) add(b []byte) {
	number := b[0] & 0x3f
	if b[0]&0x40 != 0 && number >= 1 && number <= 20 {
		*l = longName{next: number, parts: number, sum: b[13]}
	}
	if l.next == 0 || number != l.next || b[13] != l.sum {
		*l = longName{}
		return
	}
	l.next--
	for i, at := range LongAt {
		l.units[int(l.next)*13+i] = binary.LittleEndian.Uint16(b[at:])
	}
}

// name is the long name if it is whole and of the short name with that sum.
func (l *longName) name(sum byte) string {
	if l.parts == 0 || l.next != 0 || l.sum != sum {
		return ""
	}
	units := l.units[:int(l.parts)*13]
	for i, u := range units {
		if u == 0 {
			units = units[:i]
			break
		}
	}
	return string(utf16.Decode(units))
}

// ShortSum is the checksum of a short name that its long name carries.
func ShortSum(short [11]byte) byte {
	sum := byte(0)
	for _, c := range short {
		sum = sum>>1 | sum<<7
		sum += c
	}
	return sum
}
