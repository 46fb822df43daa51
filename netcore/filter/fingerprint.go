package filter

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"slices"
)

// Fingerprint is a hash of all that decides which bucket a flow has, and
// whether its port is served: the hash key, the VIPs, Default and Rules,
// whatever their order, and rules in a row that say the same count as one. Nodes
// that tell each other different ones would take the same flows twice, or none
// of them would. What may differ between nodes is not in it (LocalPorts,
// MaxFrame, ResetPatience), nor is CloneMAC, which no bucket depends on. Nothing is learnt of
// the key from it: it is the first eight bytes of a SHA-256 over all 128 bits
// of the key, behind a text that no other use of the key begins with. The
// number in that text is the flow hash's, too: it goes up when flow keys change.
func (c Config) Fingerprint() uint64 {
	b := []byte("clonecluster flow fingerprint 2\n")
	b = append(b, c.HashKey[:]...)
	vip4, vip6 := c.VIP4.As16(), c.VIP6.As16() // zeros if there is none
	b = append(b, vip4[:]...)
	b = append(b, vip6[:]...)
	b = append(b, uint8(c.Default))
	for _, r := range merged(c.Rules) {
		b = append(b, r.Proto)
		b = binary.BigEndian.AppendUint16(b, r.PortLo)
		b = binary.BigEndian.AppendUint16(b, r.PortHi)
		disabled := uint8(0)
		if r.Disabled {
			disabled = 1
		}
		b = append(b, uint8(r.Affinity), disabled)
	}
	sum := sha256.Sum256(b)
	return binary.BigEndian.Uint64(sum[:])
}

// merged gives the rules in the order of protocols and ports, with those that
// say the same of ports in a row as one.
func merged(rules []Rule) []Rule {
	rules = slices.Clone(rules)
	slices.SortFunc(rules, func(a, b Rule) int {
		return cmp.Or(cmp.Compare(a.Proto, b.Proto), cmp.Compare(a.PortLo, b.PortLo))
	})
	out := rules[:0]
	for _, r := range rules {
		if n := len(out); n > 0 {
			last := &out[n-1]
			if last.Proto == r.Proto && last.Affinity == r.Affinity && last.Disabled == r.Disabled && int(last.PortHi)+1 == int(r.PortLo) {
				last.PortHi = r.PortHi
				continue
			}
		}
		out = append(out, r)
	}
	return out
}
