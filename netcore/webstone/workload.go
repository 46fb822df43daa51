package webstone

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
)

// A File is one that is asked for. Its name is its size in decimal digits, so that webd's
// /bench/ has it, and any server to which WriteContent gave it.
type File struct {
	Size   int64 `json:"size"`   // of the body, in octets
	Weight int   `json:"weight"` // how often it is asked for, in relation to the others
}

// Name is the last part of its path.
func (f File) Name() string { return strconv.FormatInt(f.Size, 10) }

// Workload is what files are asked for, and how often.
type Workload struct {
	Name  string `json:"name"`
	Title string `json:"title"`
	Files []File `json:"files"`
}

// Standard is the file mix of WebStone 2 (its filelist.standard): 19.8 kB on average, of
// which a fourth is in one request of a thousand.
var Standard = Workload{"standard", "WebStone 2 standard mix", []File{{500, 350}, {5125, 500}, {51250, 140}, {512500, 9}, {5248000, 1}}}

// Small is what a request of the published runs had on average.
var Small = Workload{"2k", "2 kB file", []File{{2000, 1}}}

// Workloads are all there are.
func Workloads() []Workload { return []Workload{Standard, Small} }

// WorkloadNamed gives one of them.
func WorkloadNamed(name string) (Workload, error) {
	for _, w := range Workloads() {
		if w.Name == name {
			return w, nil
		}
	}
	return Workload{}, fmt.Errorf("workload %q: want %s or %s", name, Standard.Name, Small.Name)
}

// Mean is the mean size of what is asked for, in octets.
func (w Workload) Mean() float64 {
	var sum, weights float64
	for _, f := range w.Files {
		sum += float64(f.Size) * float64(f.Weight)
		weights += float64(f.Weight)
	}
	return sum / weights
}

func (w Workload) validate() error {
	if len(w.Files) == 0 {
		return fmt.Errorf("workload %q: no files", w.Name)
	}
	for _, f := range w.Files {
		if f.Size < 0 || f.Weight < 1 || f.Weight > 1e6 {
			return fmt.Errorf("workload %q: size %d, weight %d: want 0 or more, and 1 to 1000000", w.Name, f.Size, f.Weight)
		}
	}
	return nil
}

// chooser chooses the files of one client: always the same of a seed.
type chooser struct {
	files   []File
	weights int
	random  *rand.Rand
}

func (w Workload) chooser(seed uint64, client int) *chooser {
	c := &chooser{files: w.Files, random: rand.New(rand.NewPCG(seed, uint64(client)))}
	for _, f := range w.Files {
		c.weights += f.Weight
	}
	return c
}

// next is the index of a file.
func (c *chooser) next() int {
	if len(c.files) == 1 {
		return 0
	}
	n := c.random.IntN(c.weights)
	for i, f := range c.files {
		if n -= f.Weight; n < 0 {
			return i
		}
	}
	return len(c.files) - 1
}

// WriteContent writes the files of all workloads into a folder, which it makes if need be.
// They are lines of text, the same each time.
func WriteContent(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for _, w := range Workloads() {
		for _, f := range w.Files {
			if err := writeFile(filepath.Join(dir, f.Name()), f.Size); err != nil {
				return err
			}
		}
	}
	return nil
}

func writeFile(path string, size int64) error {
	text := make([]byte, size)
	for i := range text {
		if text[i] = "0123456789abcdefghijklmnopqrstuvwxyz"[i/64%36]; i%64 == 63 {
			text[i] = '\n'
		}
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	return errors.Join(err, f.Close())
}
