package disk

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"maps"
	"slices"
	"strings"
	"unicode/utf16"
	"unicode/utf8"

	"clonecluster/uinit/stick"
)

// Parameters of our FAT32 file systems. Fewer clusters than minClusters would
// make it FAT16 to whoever goes by the specification, and some firmware counts
// a few wrong.
const (
	reservedSectors = 32
	copies          = 2
	minClusters     = 65525 + 64
	endOfChain      = 0x0fffffff
)

// fatFS is a file system before it is written. Clusters are given out in order:
// every file and folder lies in one piece.
type fatFS struct {
	label  string
	hidden uint32 // sectors before the partition
	id     uint32
	size   int64 // in bytes

	perCluster int64 // sectors
	perFAT     int64 // sectors
	fat        []uint32
	pieces     []clusters
}

type clusters struct {
	first uint32
	data  []byte
}

// node is a file or a folder of the tree to be written.
type node struct {
	name    string
	data    []byte
	dir     bool
	nodes   []*node // a folder's
	cluster uint32
}

// newFAT lays out a file system with the files, as small as it can be: with
// clusters of a sector it is at least 33 MiB.
func newFAT(files map[string][]byte, label string, hidden, id uint32) (*fatFS, error) {
	root := &node{dir: true}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if err := root.add(name, files[name]); err != nil {
			return nil, err
		}
	}
	f := &fatFS{label: label, hidden: hidden, id: id, perCluster: 1}
	// Larger clusters as soon as the file system is large enough to have them:
	// shorter chains, fewer reads.
	for need := f.count(root); need > 2*minClusters && f.perCluster < 8; need = f.count(root) {
		f.perCluster *= 2
	}
	need := max(f.count(root)+16, minClusters)
	f.perFAT = (need+2+127)/128 + 1
	f.size = align((reservedSectors+copies*f.perFAT+need*f.perCluster)*sectorSize, mebibyte)
	// The sectors that rounding up added are clusters too, and FAT has to cover
	// them.
	for (f.clusterCount()+2)*4 > f.perFAT*sectorSize {
		f.perFAT++
	}
	if f.size > MaxSize {
		return nil, fmt.Errorf("%d MiB of files; at most %d MiB can be", f.size>>20, int64(MaxSize)>>20)
	}
	f.fat = []uint32{0x0ffffff8, endOfChain}
	f.place(root)
	f.fill(root, nil)
	return f, nil
}

func (f *fatFS) dataStart() int64 { return (reservedSectors + copies*f.perFAT) * sectorSize }

func (f *fatFS) clusterCount() int64 {
	return (f.size - f.dataStart()) / (f.perCluster * sectorSize)
}

// add puts a file into the tree, and the folders above it.
func (n *node) add(name string, data []byte) error {
	at := n
	steps := strings.Split(name, "/")
	for i, step := range steps {
		if err := checkName(step); err != nil {
			return fmt.Errorf("%q: %w", name, err)
		}
		last := i == len(steps)-1
		j := slices.IndexFunc(at.nodes, func(m *node) bool { return strings.EqualFold(m.name, step) })
		if j >= 0 && (last || !at.nodes[j].dir) {
			return fmt.Errorf("%q: there is a file %q already; upper and lower case are the same to FAT", name, at.nodes[j].name)
		}
		if j < 0 {
			j = len(at.nodes)
			at.nodes = append(at.nodes, &node{name: step, dir: !last})
			if last {
				at.nodes[j].data = data
			}
		}
		at = at.nodes[j]
	}
	return nil
}

func checkName(name string) error {
	switch {
	case name == "" || name == "." || name == "..":
		return fmt.Errorf("%q is no name of a file", name)
	case !utf8.ValidString(name) || strings.ContainsFunc(name, func(r rune) bool { return r < ' ' || strings.ContainsRune(`"*/:<>?\|`, r) }):
		return fmt.Errorf("%q has a character that no name on FAT can have", name)
	case strings.HasSuffix(name, ".") || strings.HasSuffix(name, " "):
		return fmt.Errorf("%q ends in what FAT drops", name)
	case len(utf16.Encode([]rune(name))) > 255:
		return fmt.Errorf("%q is longer than 255 characters", name)
	}
	return nil
}

// count is how many clusters the tree takes.
func (f *fatFS) count(n *node) int64 {
	size := int64(len(n.data))
	if n.dir {
		size = n.dirSize()
	}
	total := (size + f.perCluster*sectorSize - 1) / (f.perCluster * sectorSize)
	for _, m := range n.nodes {
		total += f.count(m)
	}
	return total
}

// dirSize is what a folder's entries take at most: those of a folder itself,
// its label or . and .., and its files' with long names.
func (n *node) dirSize() int64 {
	total := 2
	for _, m := range n.nodes {
		total += 1 + longEntries(m.name)
	}
	return int64(total) * 32
}

func longEntries(name string) int { return (len(utf16.Encode([]rune(name))) + 12) / 13 }

// place gives every node its clusters, a folder before what is in it; the
// root's are the first.
func (f *fatFS) place(n *node) {
	size := int64(len(n.data))
	if n.dir {
		size = n.dirSize()
	}
	if number := (size + f.perCluster*sectorSize - 1) / (f.perCluster * sectorSize); number > 0 {
		n.cluster = uint32(len(f.fat))
		for i := range number {
			next := n.cluster + uint32(i) + 1
			if i == number-1 {
				next = endOfChain
			}
			f.fat = append(f.fat, next)
		}
	}
	for _, m := range n.nodes {
		f.place(m)
	}
}

// fill makes the contents of files and folders, once everything has its place.
func (f *fatFS) fill(n, parent *node) {
	if !n.dir {
		f.pieces = append(f.pieces, clusters{n.cluster, n.data})
		return
	}
	var b []byte
	if parent == nil {
		b = append(b, shortEntry(padded(f.label, 11), 0x08, 0, 0)...)
	} else {
		up := parent.cluster
		if parent.name == "" { // the root is written as 0 here, whatever its cluster
			up = 0
		}
		b = append(b, shortEntry(padded(".", 11), 0x10, n.cluster, 0)...)
		b = append(b, shortEntry(padded("..", 11), 0x10, up, 0)...)
	}
	taken := map[string]bool{}
	for _, m := range n.nodes {
		short, exact := shortName(m.name, taken)
		taken[short] = true
		if !exact {
			b = append(b, longEntry(m.name, short)...)
		}
		attr := byte(0x20)
		if m.dir {
			attr = 0x10
		}
		b = append(b, shortEntry(short, attr, m.cluster, uint32(len(m.data)))...)
	}
	f.pieces = append(f.pieces, clusters{n.cluster, b})
	for _, m := range n.nodes {
		f.fill(m, n)
	}
}

func padded(s string, n int) string { return s + strings.Repeat(" ", n-len(s)) }

// epoch is 1 January 1980, the earliest day of FAT: the date of everything.
const epoch = 1<<5 | 1

func shortEntry(name string, attr byte, cluster, size uint32) []byte {
	le := binary.LittleEndian
	e := make([]byte, 32)
	copy(e, name)
	e[11] = attr
	le.PutUint16(e[16:], epoch) // made
	le.PutUint16(e[18:], epoch) // read
	le.PutUint16(e[20:], uint16(cluster>>16))
	le.PutUint16(e[24:], epoch) // written
	le.PutUint16(e[26:], uint16(cluster))
	le.PutUint32(e[28:], size)
	return e
}

// shortName is the name in 8.3 characters, padded with spaces and without the
// dot. It is exact if it says all that the name says.
func shortName(name string, taken map[string]bool) (short string, exact bool) {
	base, ext := name, ""
	if i := strings.LastIndexByte(name, '.'); i > 0 {
		base, ext = name[:i], name[i+1:]
	}
	plain := func(s string) string {
		return strings.Map(func(r rune) rune {
			switch {
			case r >= 'a' && r <= 'z':
				return r - 'a' + 'A'
			case r >= 'A' && r <= 'Z', r >= '0' && r <= '9', strings.ContainsRune("!#$%&'()-@^_`{}~", r):
				return r
			case r == '.' || r == ' ':
				return -1
			}
			return '_'
		}, s)
	}
	b, e := plain(base), plain(ext)
	if b == base && e == ext && len(b) >= 1 && len(b) <= 8 && len(e) <= 3 {
		if short = padded(b, 8) + padded(e, 3); !taken[short] {
			return short, true
		}
	}
	for i := 1; ; i++ {
		tail := fmt.Sprintf("~%d", i)
		short = padded(b[:min(len(b), 8-len(tail))]+tail, 8) + padded(e[:min(len(e), 3)], 3)
		if !taken[short] {
			return short, false
		}
	}
}

// longEntry is the entries of a long name, last part first, that go before its
// short one.
func longEntry(name, short string) []byte {
	units := utf16.Encode([]rune(name))
	number := (len(units) + 12) / 13
	sum := stick.ShortSum([11]byte([]byte(short)))
	var b []byte
	for i := number; i >= 1; i-- {
		e := make([]byte, 32)
		e[0] = byte(i)
		if i == number {
			e[0] |= 0x40
		}
		e[11], e[13] = 0x0f, sum
		for j, at := range stick.LongAt {
			u := uint16(0xffff)
			switch k := (i-1)*13 + j; cmp.Compare(k, len(units)) {
			case -1:
				u = units[k]
			case 0:
				u = 0
			}
			binary.LittleEndian.PutUint16(e[at:], u)
		}
		b = append(b, e...)
	}
	return b
}

// addTo adds the file system to a disk.
func (f *fatFS) addTo(l *layout, at int64) {
	le := binary.LittleEndian
	boot := make([]byte, sectorSize)
	copy(boot, []byte{0xeb, 0x58, 0x90})
	copy(boot[3:], "MSWIN4.1") // what the specification advises: some systems look at it
	le.PutUint16(boot[11:], sectorSize)
	boot[13] = byte(f.perCluster)
	le.PutUint16(boot[14:], reservedSectors)
	boot[16] = copies
	boot[21] = 0xf8 // a fixed disk
	le.PutUint16(boot[24:], 63)
	le.PutUint16(boot[26:], 255)
	le.PutUint32(boot[28:], f.hidden)
	le.PutUint32(boot[32:], uint32(f.size/sectorSize))
	le.PutUint32(boot[36:], uint32(f.perFAT))
	le.PutUint32(boot[44:], 2) // the root's cluster
	le.PutUint16(boot[48:], 1) // FSInfo's sector
	le.PutUint16(boot[50:], 6) // the backup's
	boot[64], boot[66] = 0x80, 0x29
	le.PutUint32(boot[67:], f.id)
	copy(boot[71:], padded(f.label, 11))
	copy(boot[82:], "FAT32   ")
	copy(boot[90:], []byte{0xf4, 0xeb, 0xfd}) // nobody runs this: stop
	le.PutUint16(boot[510:], 0xaa55)

	info := make([]byte, sectorSize)
	copy(info, "RRaA")
	copy(info[484:], "rrAa")
	le.PutUint32(info[488:], uint32(f.clusterCount()+2-int64(len(f.fat)))) // free
	le.PutUint32(info[492:], uint32(len(f.fat)))                           // the next that is
	le.PutUint16(info[510:], 0xaa55)

	for _, sector := range []int64{0, 6} {
		l.add(at+sector*sectorSize, boot)
		l.add(at+(sector+1)*sectorSize, info)
	}
	fat := make([]byte, 4*len(f.fat))
	for i, c := range f.fat {
		le.PutUint32(fat[4*i:], c)
	}
	for i := range int64(copies) {
		l.add(at+(reservedSectors+i*f.perFAT)*sectorSize, fat)
	}
	for _, p := range f.pieces {
		if len(p.data) > 0 {
			l.add(at+f.dataStart()+int64(p.first-2)*f.perCluster*sectorSize, p.data)
		}
	}
}
