package clone

import (
	"errors"
	"fmt"
	"log/slog"
	"strings"

	"github.com/vishvananda/netlink"
)

// Remove takes back what an engine has left that is no more and that no other is to
// go on from; it needs no configuration. removed tells that there was a clone0, and
// nicName which NIC it belonged to. The error matches ErrBusy if an engine runs. An
// interface of that name that is not ours stays.
func Remove(log *slog.Logger) (nicName string, removed bool, err error) {
	h := &Host{log: log, lock: -1}
	if err := h.acquire(); err != nil {
		return "", false, fmt.Errorf("%s: %w: stop it instead", Device, err)
	}
	defer h.Abandon()
	link, err := netlink.LinkByName(Device)
	switch {
	case errors.As(err, &netlink.LinkNotFoundError{}):
		return "", false, h.release("") // of the rules that outlive it
	case err != nil:
		return "", false, fmt.Errorf("looking for %s: %w", Device, err)
	case !strings.HasPrefix(link.Attrs().Alias, hostNote):
		return "", false, h.release("")
	}
	if err := netlink.LinkDel(link); err != nil {
		return "", false, fmt.Errorf("removing %s: %w", Device, err)
	}
	alias := link.Attrs().Alias
	for field := range strings.FieldsSeq(alias) {
		if name, ok := strings.CutPrefix(field, "nic="); ok {
			nicName = name
		}
	}
	return nicName, true, h.release(alias)
}
