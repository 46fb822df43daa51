package image

import (
	"fmt"
	"os"
	"path/filepath"
)

// Folder makes sure that there is a folder dir and that it can be written to, so
// that a build ends before it has begun and not when it has something to write.
// abandon takes away what was made of it, as far as nothing is in it.
func Folder(dir string) (abandon func(), err error) {
	var made []string // the innermost first
	for at := filepath.Clean(dir); ; at = filepath.Dir(at) {
		if _, err := os.Lstat(at); err == nil || at == filepath.Dir(at) {
			break
		}
		made = append(made, at)
	}
	abandon = func() {
		for _, d := range made {
			os.Remove(d)
		}
	}
	err = os.MkdirAll(dir, 0o755)
	if err == nil {
		err = writable(dir)
	}
	if err != nil {
		abandon()
		return nil, fmt.Errorf("%s cannot be written to; give another folder with --out: %w", dir, err)
	}
	return abandon, nil
}

func writable(dir string) error {
	f, err := os.CreateTemp(dir, ".write-*")
	if err != nil {
		return err
	}
	f.Close()
	return os.Remove(f.Name())
}
