package clone

import (
	"errors"
	"fmt"
	"log/slog"

	"github.com/vishvananda/netlink"
)

// Remove takes back what an engine has left that is no more and that no other is to
// go on from; it needs no configuration. removed tells that there was a clone0. Rest is
// called when there is none any more, and before another engine can come. The error
// matches ErrBusy if an engine runs. An interface of that name that is not ours stays.
func Remove(log *slog.Logger, rest func() error) (removed bool, err error) {
	h := &Host{log: log, lock: -1}
	if err := h.acquire(); err != nil {
		return false, fmt.Errorf("%s: %w: stop it instead", Device, err)
	}
	defer h.Abandon()
	link, err := netlink.LinkByName(Device)
	alias := ""
	switch {
	case errors.As(err, &netlink.LinkNotFoundError{}):
	case err != nil:
		return false, fmt.Errorf("looking for %s: %w", Device, err)
	case Ours(link.Attrs().Alias, link.Attrs().Group):
		alias = link.Attrs().Alias
		if err := netlink.LinkDel(link); err != nil { // what keeps it harmless has to stay (I1)
			return false, fmt.Errorf("removing %s: %w", Device, err)
		}
		removed = true
	}
	return removed, errors.Join(h.release(alias), rest())
}
