// SPDX-License-Identifier: GPL-2.0
// Directed mode: what clients send to the NIC's own address goes on as if it had come to
// the clone MAC, to be judged by filter.c behind this, and what clone0 says of the VIP
// names the director. Both are attached as long as frames are directed, and no longer.

#include <linux/bpf.h>
#include <linux/if_packet.h>
#include <linux/pkt_cls.h>

#define SEC(name) __attribute__((section(name), used))
#define inline_always static inline __attribute__((always_inline))

static long (*const load)(const void *ctx, __u32 off, void *to, __u32 len) = (void *)BPF_FUNC_skb_load_bytes;
static long (*const store)(void *ctx, __u32 off, const void *from, __u32 len, __u64 flags) = (void *)BPF_FUNC_skb_store_bytes;
static __s64 (*const csum_diff)(const void *from, __u32 from_size, const void *to, __u32 to_size, __u32 seed) = (void *)BPF_FUNC_csum_diff;
static long (*const l4_csum_replace)(void *ctx, __u32 off, __u64 from, __u64 to, __u64 flags) = (void *)BPF_FUNC_l4_csum_replace;

// Set before loading; an address of zeros: none.
volatile const __u8 clone_mac[6], director[6], vip4[4], vip6[16];

// Of RFC 826, RFC 791, RFC 8200, RFC 4861.
enum {
	ETHER = 14, ETHER_IPV4 = 0x0800, ETHER_ARP = 0x0806, ETHER_IPV6 = 0x86dd,
	ARP_LENGTH = 28, ARP_REQUEST = 1, ARP_MAC = ETHER + 8, ARP_SENDER = ETHER + 14, ARP_TARGET = ETHER + 24,
	IPV4_LENGTH = 20, IPV4_TO = ETHER + 16,
	IPV6_LENGTH = 40, IPV6_NEXT = ETHER + 6, IPV6_FROM = ETHER + 8, IPV6_TO = ETHER + 24,
	ICMPV6 = 58, ICMP = ETHER + IPV6_LENGTH, ICMP_SUM = ICMP + 2, NDP_TARGET = ICMP + 8, NDP_LENGTH = 24,
	SOLICITATION = 135, ADVERTISEMENT = 136, OPTION_SOURCE = 1, OPTION_TARGET = 2, OPTION_LENGTH = 8, OPTIONS = 4,
};

inline_always _Bool same(const __u8 *b, const volatile __u8 *want, int n)
{
	__u8 differs = 0, any = 0;
	for (int i = 0; i < n; i++) {
		differs |= b[i] ^ want[i];
		any |= want[i];
	}
	return !differs && any;
}

inline_always __u16 be16(const __u8 *b) { return (__u16)b[0] << 8 | b[1]; }

inline_always void copy(__u8 *to, const volatile __u8 *from, int n)
{
	for (int i = 0; i < n; i++)
		to[i] = from[i];
}

inline_always int to_clone(struct __sk_buff *skb)
{
	__u8 m[6];
	copy(m, clone_mac, sizeof(m));
	return store(skb, 0, m, sizeof(m), 0) ? TC_ACT_SHOT : TC_ACT_UNSPEC;
}

// directed_in is on the NIC, before the filter. Who asks for the VIP is answered by the
// engine's raw.Relay, which sees the frames before this: the kernel would answer each for
// its bucket's owner.
SEC("tc") int directed_in(struct __sk_buff *skb)
{
	__u8 b[ICMP + NDP_LENGTH];
	_Bool host = skb->pkt_type == PACKET_HOST;
	if (skb->pkt_type == PACKET_OTHERHOST || (skb->vlan_present && (skb->vlan_tci & 0x0fff)) || load(skb, 0, b, ETHER))
		return TC_ACT_UNSPEC;
	switch (be16(b + 12)) {
	case ETHER_ARP:
		if (load(skb, ETHER, b + ETHER, ARP_LENGTH) || !same(b + ARP_TARGET, vip4, 4) || same(b + ARP_SENDER, vip4, 4))
			return TC_ACT_UNSPEC;
		if (be16(b + ETHER + 6) == ARP_REQUEST)
			return TC_ACT_SHOT;
		break;
	case ETHER_IPV4:
		if (load(skb, ETHER, b + ETHER, IPV4_LENGTH) || !same(b + IPV4_TO, vip4, 4))
			return TC_ACT_UNSPEC;
		break;
	case ETHER_IPV6:
		if (load(skb, ETHER, b + ETHER, IPV6_LENGTH))
			return TC_ACT_UNSPEC;
		if (b[IPV6_NEXT] == ICMPV6 && !load(skb, ICMP, b + ICMP, NDP_LENGTH) && b[ICMP] == SOLICITATION &&
		    same(b + NDP_TARGET, vip6, 16) && !same(b + IPV6_FROM, vip6, 16))
			return TC_ACT_SHOT;
		if (!same(b + IPV6_TO, vip6, 16))
			return TC_ACT_UNSPEC;
		break;
	default:
		return TC_ACT_UNSPEC;
	}
	return host ? to_clone(skb) : TC_ACT_UNSPEC;
}

// directed_out is on clone0, behind the filter; neigh.Redirect does the same.
SEC("tc") int directed_out(struct __sk_buff *skb)
{
	__u8 b[ETHER], next, type, m[6], was[OPTION_LENGTH] __attribute__((aligned(4))), is[OPTION_LENGTH] __attribute__((aligned(4)));
	if (load(skb, 0, b, ETHER))
		return TC_ACT_UNSPEC;
	if (be16(b + 12) == ETHER_ARP) {
		if (skb->len < ETHER + ARP_LENGTH || load(skb, ARP_MAC, m, sizeof(m)) || !same(m, clone_mac, sizeof(m)))
			return TC_ACT_UNSPEC;
		copy(m, director, sizeof(m));
		return store(skb, ARP_MAC, m, sizeof(m), 0) ? TC_ACT_SHOT : TC_ACT_UNSPEC;
	}
	if (be16(b + 12) != ETHER_IPV6 || load(skb, IPV6_NEXT, &next, 1) || next != ICMPV6 || load(skb, ICMP, &type, 1) ||
	    (type != SOLICITATION && type != ADVERTISEMENT))
		return TC_ACT_UNSPEC;
	__u32 off = ICMP + NDP_LENGTH;
	for (int i = 0; i < OPTIONS; i++) {
		if (load(skb, off, was, sizeof(was)) || was[1] == 0)
			return TC_ACT_UNSPEC;
		if ((was[0] == OPTION_SOURCE || was[0] == OPTION_TARGET) && same(was + 2, clone_mac, 6)) {
			copy(is, was, 2);
			copy(is + 2, director, 6);
			__s64 diff = csum_diff(was, sizeof(was), is, sizeof(is), 0);
			if (diff < 0 || store(skb, off, is, sizeof(is), 0) || l4_csum_replace(skb, ICMP_SUM, 0, diff, 0))
				return TC_ACT_SHOT;
		}
		off += (__u32)was[1] * OPTION_LENGTH;
	}
	return TC_ACT_UNSPEC;
}

char _license[] SEC("license") = "GPL";
