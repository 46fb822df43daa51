package nic

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// Sysctl is one per-interface setting below /proc/sys/net: Family is "ipv4" or
// "ipv6", Interface its name, and Key the last part, as in
// net.ipv4.conf.eth0.arp_ignore. See the kernel's ip-sysctl.rst.
type Sysctl struct{ Family, Interface, Key string }

func (s Sysctl) String() string {
	return "net." + s.Family + ".conf." + s.Interface + "." + s.Key
}

// path is built from parts and not by replacing dots: an interface's name may
// have dots in it (eth0.5).
func (s Sysctl) path() string {
	return filepath.Join("/proc/sys/net", s.Family, "conf", s.Interface, s.Key)
}

// Get reads the setting. The error matches os.ErrNotExist if the kernel has no
// such setting, for example because IPv6 is off.
func (s Sysctl) Get() (string, error) {
	b, err := os.ReadFile(s.path())
	if err != nil {
		return "", fmt.Errorf("reading %v: %w", s, err)
	}
	return strings.TrimSpace(string(b)), nil
}

// Set writes the setting.
func (s Sysctl) Set(value string) error {
	// No O_CREATE or O_TRUNC: a missing file is an answer, not to be made.
	f, err := os.OpenFile(s.path(), os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("setting %v=%s: %w", s, value, err)
	}
	defer f.Close()
	if _, err := f.WriteString(value); err != nil {
		return fmt.Errorf("setting %v=%s: %w", s, value, err)
	}
	return nil
}
