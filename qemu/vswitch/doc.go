// Package vswitch is a learning Ethernet switch in user space for QEMU guests
// and in-process hosts. A cluster lives or dies by what its switch does with a
// MAC address that must never be learnt, so tests need a switch whose table can
// be read, whose cables can be cut and whose every frame is on record; and they
// need it without root.
//
// It follows the MAC bridge of IEEE 802.1D-2004, clauses 7.7 to 7.9: the source
// address of every received frame is learnt with its port, entries age (300 s),
// frames for a known address leave by that port only, all others are flooded,
// and frames for the reserved addresses 01:80:c2:00:00:00 to 0f are not
// forwarded. As Linux's bridge does, it drops frames with a group or zero source
// address and forgets what it learnt on a port whose link goes down. There is no
// spanning tree, no VLAN filtering (a tagged frame is switched by its addresses)
// and no multicast snooping.
//
// A QEMU guest connects with
//
//	-netdev stream,id=n0,server=off,addr.type=unix,addr.path=SOCKET
//
// which carries each frame behind a 4-byte big-endian length (net/stream.c and
// net/net.c, net_fill_rstate, of QEMU). A port belongs to one guest, so the end
// of its connection is the end of its link. QEMU before 8.0 does not reconnect.
// QEMU offers no checksum or segmentation offload to a guest on such a netdev:
// frames on this switch are complete and at most one MTU long, and one that is
// longer than [Config.MaxFrame] is dropped and counted as a real switch would.
//
// Everything the cluster promises about its shared MAC address (invariant I1) is
// checked here on every frame of every test: list it in [Config.Guard], and each
// frame that has it as Ethernet source becomes a [Violation]. Such a frame is
// still learnt and switched, so that its consequences show too.
package vswitch
