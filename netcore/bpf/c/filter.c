// SPDX-License-Identifier: GPL-2.0
// The filter of netcore/filter for the kernel: the same verdict on every frame, as
// XDP or tcx on the NIC, and on what leaves by clone0. Where this file says less than
// filter's Go, that says why. It needs no BTF in the kernel, only UAPI headers here.

#include <linux/bpf.h>
#include <linux/pkt_cls.h>

#include "constants.h"

typedef __u8 u8;
typedef __u16 u16;
typedef __u32 u32;
typedef __u64 u64;
typedef __s64 s64;
typedef _Bool bool;
#define true 1
#define false 0

#define SEC(name) __attribute__((section(name), used))
#define inline_always static inline __attribute__((always_inline))
// A frame of the stack of its own: all that are in a chain of calls share 512 bytes.
#define subprogram static __attribute__((noinline))

static void *(*const map_lookup)(void *map, const void *key) = (void *)BPF_FUNC_map_lookup_elem;
static u64 (*const ktime_get_ns)(void) = (void *)BPF_FUNC_ktime_get_ns;
static u64 (*const ktime_get_coarse_ns)(void) = (void *)BPF_FUNC_ktime_get_coarse_ns;
static long (*const skb_load_bytes)(const void *ctx, u32 off, void *to, u32 len) = (void *)BPF_FUNC_skb_load_bytes;
static long (*const skb_store_bytes)(void *ctx, u32 off, const void *from, u32 len, u64 flags) = (void *)BPF_FUNC_skb_store_bytes;
static long (*const xdp_load_bytes)(void *ctx, u32 off, void *to, u32 len) = (void *)BPF_FUNC_xdp_load_bytes;
static u64 (*const xdp_get_buff_len)(void *ctx) = (void *)BPF_FUNC_xdp_get_buff_len;
static struct bpf_sock *(*const skc_lookup_tcp)(void *ctx, struct bpf_sock_tuple *t, u32 size, u64 netns, u64 flags) =
	(void *)BPF_FUNC_skc_lookup_tcp;
static long (*const sk_release)(void *sk) = (void *)BPF_FUNC_sk_release;
static long (*const tcp_check_syncookie)(void *sk, void *ip, u32 ip_len, void *tcp, u32 tcp_len) =
	(void *)BPF_FUNC_tcp_check_syncookie;

static void *(*const ringbuf_reserve)(void *map, u64 size, u64 flags) = (void *)BPF_FUNC_ringbuf_reserve;
static void (*const ringbuf_submit)(void *record, u64 flags) = (void *)BPF_FUNC_ringbuf_submit;
static void (*const ringbuf_discard)(void *record, u64 flags) = (void *)BPF_FUNC_ringbuf_discard;

static long (*const loop)(u32 n, void *step, void *with, u64 flags) = (void *)BPF_FUNC_loop;

// Maps in the form that needs no BTF.
struct map {
	u32 type, key_size, value_size, max_entries, flags;
};

struct shared {
	u8 tables[2][BUCKETS];
	u64 current;
	s64 lease;
	u64 wire_mac;
	s64 quarantine[BUCKETS], held_tcp[BUCKETS], held_datagram[BUCKETS];
	u64 resets[RESETS];
};

struct map shared SEC("maps") = {BPF_MAP_TYPE_ARRAY, sizeof(u32), sizeof(struct shared), 1, BPF_F_MMAPABLE};
struct map ports SEC("maps") = {BPF_MAP_TYPE_ARRAY, sizeof(u32), 2 * 65536, 1, BPF_F_MMAPABLE};
struct map guarded SEC("maps") = {BPF_MAP_TYPE_PERCPU_ARRAY, sizeof(u32), sizeof(u64), 1, 0};

// SYNs that came lately; see filter's offered.go.
struct syns {
	u64 seen[1 << SYN_BITS];
	u64 askers[1 << ASKER_BITS];
};

struct map syns SEC("maps") = {BPF_MAP_TYPE_ARRAY, sizeof(u32), sizeof(struct syns), 1, BPF_F_MMAPABLE};

// A RST that waits: the engine sends it if it still may leave after a while.
struct late {
	u32 len;
	u8 frame[LATE_FRAME];
};

struct map late SEC("maps") = {BPF_MAP_TYPE_RINGBUF, 0, 0, LATE_BYTES, 0};

// Set before loading.
volatile const u64 clone_mac;
volatile const u64 vip4, vip6_hi, vip6_lo; // 0: none; vip4 as ::ffff:a.b.c.d's low half
volatile const u64 key0, key1;
volatile const u32 max_frame;
volatile const u32 patience; // of resets, ms; 0: they leave at once
volatile const bool rewrite; // the Ethernet source of what leaves
// For tests: the time, and what the socket table says (enum asked); 0: the kernel's.
volatile const s64 test_now;
volatile const u32 test_sockets;

enum asked { ASK_KERNEL, ASK_NOBODY, NO_SOCKET, LISTENER, ESTABLISHED };

// Of IEEE 802, RFC 826, RFC 791, RFC 8200, RFC 792, RFC 4443, RFC 4861, RFC 3810.
enum {
	ETHER_HEADER = 14,
	ETHER_IPV4 = 0x0800, ETHER_ARP = 0x0806, ETHER_RARP = 0x8035, ETHER_VLAN = 0x8100, ETHER_SERVICE = 0x88a8, ETHER_IPV6 = 0x86dd, ETHER_PROBE = 0x88b5,
	PROTO_ICMP = 1, PROTO_TCP = 6, PROTO_UDP = 17, PROTO_ICMPV6 = 58,
	EXT_HOP_BY_HOP = 0, EXT_ROUTING = 43, EXT_FRAGMENT = 44, EXT_DEST = 60,
	FIN = 1, SYN = 2, RST = 4, ACK = 16,
	OPTION_SOURCE = 1, OPTION_TARGET = 2, NDP_LENGTH = 24,
	ICMP6_QUERY = 130, ICMP6_ADVERT = 136,
};

enum kind {
	KIND_SYN, KIND_TCP, KIND_UDP, KIND_ECHO, KIND_ERROR, KIND_ECHO_REPLY, KIND_FRAGMENT,
	KIND_NEIGHBOR, KIND_QUERY, KIND_REPORT, KIND_ROUTER, KIND_OTHER,
};

// An address as two numbers, most significant first; IPv4 is ::ffff:a.b.c.d.
struct addr {
	u64 hi, lo;
};

// The verifier lets no pointer into a packet beyond 65535.
#define LINEAR 0xff00

#define MAPPED 0x0000ffff00000000ULL
#define GROUP 0xff02000000000000ULL

struct frame {
	void *ctx, *data, *end;
	u64 xdp; // not bool: the verifier follows whole words only
	u64 len;
	s64 now; // 0: not asked yet
	struct shared *shared;
	u8 *ports;
	struct counted *counted;
	struct scratch *scratch; // of what does not take the short way
};

struct packet {
	struct addr src, dst;
	u32 header, payload, end; // offsets in the frame
	u16 src_port, dst_port;
	u32 found; // at the end of the extension headers
	u8 kind, proto, flags, hop_limit, icmp_type;
	bool v6, quoted, extended;
	// Of neighbour messages.
	u32 option; // offset
	u8 want;
	bool solicited, has_link, bad;
	struct addr target;
	u64 link;
};

// A flow as a frame from the client shows it, the bytes in the order of the wire.
struct flow {
	u64 words[4]; // client and VIP; IPv4 has both in the first
	u32 ports; // client's, VIP's
	bool v6;
	u8 proto;
	u8 flags;
	u32 header, payload; // offsets in the frame
};

// What every frame counts in is one value, which takes one look-up.
struct counted {
	u64 verdicts[VERDICTS];
	u64 frames[BUCKETS], syns[BUCKETS], again[BUCKETS];
};

struct map counted SEC("maps") = {BPF_MAP_TYPE_PERCPU_ARRAY, sizeof(u32), sizeof(struct counted), 1, 0};

// What is parsed lies in a map, as the verifier knows nothing of what is in there and
// so does not follow each combination of lengths on its own.
struct scratch {
	struct packet packet, quoted;
	struct flow flow;
};

struct map scratch SEC("maps") = {BPF_MAP_TYPE_PERCPU_ARRAY, sizeof(u32), sizeof(struct scratch), 1, 0};

// begin_long gives room for what is parsed; there always is.
inline_always bool begin_long(struct frame *f)
{
	u32 zero = 0;
	f->scratch = map_lookup(&scratch, &zero);
	return f->scratch;
}

inline_always bool is(struct addr a, struct addr b) { return a.hi == b.hi && a.lo == b.lo; }
inline_always bool is_mapped(struct addr a) { return a.hi == 0 && a.lo >> 32 == MAPPED >> 32; }
inline_always bool is_multicast(struct addr a) { return a.hi >> 56 == 0xff; }
inline_always bool is_group(u64 mac) { return mac >> 40 & 1; }
inline_always bool is_station(u64 mac) { return mac != 0 && !is_group(mac); }
inline_always bool unspecified(struct addr a) { return a.hi == 0 && a.lo == 0; }
inline_always bool owned(u8 state) { return state == SETTLED || state == SHARED; }

inline_always bool is_unicast(struct addr a)
{
	if (is_mapped(a)) {
		u8 first = a.lo >> 24;
		return first != 0 && first != 127 && first < 224;
	}
	return !is_multicast(a) && (a.hi != 0 || a.lo > 1);
}

inline_always struct addr solicited_node(struct addr a)
{
	struct addr s = {GROUP, 0x1ff000000ULL | (a.lo & 0xffffff)};
	return s;
}

inline_always u16 be16(const u8 *b) { return (u16)b[0] << 8 | b[1]; }
inline_always u32 be32(const u8 *b) { return (u32)be16(b) << 16 | be16(b + 2); }
inline_always u64 be64(const u8 *b) { return (u64)be32(b) << 32 | be32(b + 4); }
inline_always u64 mac(const u8 *b) { return (u64)be32(b) << 16 | be16(b + 4); }

inline_always struct addr addr4(const u8 *b)
{
	struct addr a = {0, MAPPED | be32(b)};
	return a;
}

inline_always struct addr addr6(const u8 *b)
{
	struct addr a = {be64(b), be64(b + 8)};
	return a;
}

inline_always struct addr the_vip6(void)
{
	struct addr a = {vip6_hi, vip6_lo};
	return a;
}

inline_always bool have_vip6(void) { return vip6_hi != 0 || vip6_lo != 0; }

// load copies n bytes of the frame; what is not in the linear part costs a helper.
inline_always bool load(struct frame *f, u32 off, u8 *to, u32 n)
{
	if (off <= LINEAR) {
		u8 *p = f->data + off;
		if ((void *)p + n <= f->end) {
			__builtin_memcpy(to, p, n);
			return true;
		}
	}
	if (f->xdp)
		return xdp_load_bytes(f->ctx, off, to, n) == 0;
	return skb_load_bytes(f->ctx, off, to, n) == 0;
}

// SipHash-1-3, as hash.go describes the key.

#define ROTATE(x, n) ((x) << (n) | (x) >> (64 - (n)))
#define ROUND                                                                                                          \
	do {                                                                                                           \
		v0 += v1; v1 = ROTATE(v1, 13) ^ v0; v0 = ROTATE(v0, 32);                                               \
		v2 += v3; v3 = ROTATE(v3, 16) ^ v2;                                                                    \
		v0 += v3; v3 = ROTATE(v3, 21) ^ v0;                                                                    \
		v2 += v1; v1 = ROTATE(v1, 17) ^ v2; v2 = ROTATE(v2, 32);                                               \
	} while (0)
#define TAKE(word)                                                                                                     \
	do {                                                                                                           \
		v3 ^= (word);                                                                                          \
		ROUND;                                                                                                 \
		v0 ^= (word);                                                                                          \
	} while (0)

#define BEGIN                                                                                                          \
	u64 v0 = key0 ^ 0x736f6d6570736575, v1 = key1 ^ 0x646f72616e646f6d;                                            \
	u64 v2 = key0 ^ 0x6c7967656e657261, v3 = key1 ^ 0x7465646279746573
#define END                                                                                                            \
	do {                                                                                                           \
		v2 ^= 0xff;                                                                                            \
		ROUND;                                                                                                 \
		ROUND;                                                                                                 \
		ROUND;                                                                                                 \
		return v0 ^ v1 ^ v2 ^ v3;                                                                              \
	} while (0)

// hash_plain is hash for AFFINITY_NONE and IPv4 in place, for what has to be discarded at
// line rate.
inline_always u64 hash_plain(const struct flow *w)
{
	BEGIN;
	TAKE(w->words[0]);
	TAKE(KEY_LENGTH4 << 56 | (u64)w->proto << 32 | w->ports);
	END;
}

subprogram u64 hash(u32 affinity, const struct flow *w)
{
	u64 a = w->words[0], b = w->words[1], last = (u64)affinity << 40;
	bool v6 = w->v6;
	switch (affinity) {
	case AFFINITY_SINGLE:
		a = 0;
		v6 = false;
		break;
	case AFFINITY_NONE:
		last |= (u64)w->proto << 32 | w->ports;
		break;
	case AFFINITY_NETWORK:
		if (v6)
			b = 0;
		else
			a &= ~0xff000000ULL;
	}
	BEGIN;
	TAKE(a);
	if (v6) {
		TAKE(b);
		TAKE(w->words[2]);
		TAKE(w->words[3]);
		last |= KEY_LENGTH6 << 56;
	} else {
		last |= KEY_LENGTH4 << 56;
	}
	TAKE(last);
	END;
}

inline_always u8 port(struct frame *f, u8 proto, u16 n)
{
	u64 i = n;
	asm volatile("%0 &= 0xffff" : "+r"(i)); // older verifiers know nothing of a swapped number
	return f->ports[(proto == PROTO_TCP ? 0 : 65536) + i];
}

// between gives what a client and a VIP of that IP version have without ports.
inline_always struct flow *between(struct frame *f, bool v6, struct addr client, struct addr vip)
{
	struct flow *w = &f->scratch->flow;
	w->v6 = v6;
	w->ports = w->proto = w->flags = w->header = w->payload = 0;
	if (v6) {
		w->words[0] = __builtin_bswap64(client.hi);
		w->words[1] = __builtin_bswap64(client.lo);
		w->words[2] = __builtin_bswap64(vip.hi);
		w->words[3] = __builtin_bswap64(vip.lo);
	} else {
		w->words[0] = __builtin_bswap64(client.lo << 32 | (u32)vip.lo);
	}
	return w;
}

// flow_of gives the flow of a packet to the VIP, or from it.
inline_always struct flow *flow_of(struct frame *f, const struct packet *p, bool from_vip)
{
	struct flow *w = from_vip ? between(f, p->v6, p->dst, p->src) : between(f, p->v6, p->src, p->dst);
	u16 client = from_vip ? p->dst_port : p->src_port, vip = from_vip ? p->src_port : p->dst_port;
	w->ports = (u32)__builtin_bswap16(client) | (u32)__builtin_bswap16(vip) << 16;
	w->proto = p->proto;
	w->flags = p->flags;
	w->header = p->header;
	w->payload = p->payload;
	return w;
}

inline_always u32 flow_bucket(u8 port, const struct flow *w) { return hash(port & PORT_AFFINITY, w) % BUCKETS; }

inline_always u32 client_bucket(const struct flow *w) { return hash(AFFINITY_CLIENT, w) % BUCKETS; }

inline_always u8 state_of(struct frame *f, u32 bucket) { return f->shared->tables[f->shared->current & 1][bucket % BUCKETS]; }

// now reads the clock when it is first asked: most frames never need it.
inline_always s64 now(struct frame *f)
{
	if (!f->now)
		f->now = test_now ? test_now : (s64)ktime_get_ns();
	return f->now;
}

inline_always bool leased(struct frame *f) { return now(f) < f->shared->lease; }

inline_always bool is_held(struct frame *f, u8 proto, u32 bucket)
{
	bucket %= BUCKETS;
	s64 until = proto == PROTO_TCP ? f->shared->held_tcp[bucket] : f->shared->held_datagram[bucket];
	return until != 0 && now(f) < until;
}

// hold needs no atomic step: two at a time write nearly the same.
inline_always bool hold(struct frame *f, bool tcp, u32 bucket)
{
	bucket %= BUCKETS;
	s64 *d = tcp ? &f->shared->held_tcp[bucket] : &f->shared->held_datagram[bucket];
	s64 length = tcp ? HOLD_TCP : HOLD_DATAGRAM, until = *d;
	if (until < now(f) + length - (s64)HOLD_SLACK)
		*d = now(f) + length;
	return until <= now(f);
}

// Parsing.

inline_always u8 icmp_kind(u8 t)
{
	switch (t) {
	case 8: return KIND_ECHO;
	case 0: return KIND_ECHO_REPLY;
	case 3: case 11: case 12: return KIND_ERROR;
	case 5: case 9: case 10: return KIND_ROUTER;
	}
	return KIND_OTHER;
}

inline_always u8 icmp6_kind(u8 t)
{
	switch (t) {
	case 128: return KIND_ECHO;
	case 129: return KIND_ECHO_REPLY;
	case 135: case ICMP6_ADVERT: return KIND_NEIGHBOR;
	case ICMP6_QUERY: return KIND_QUERY;
	case 131: case 132: case 143: return KIND_REPORT;
	case 133: case 134: case 137: return KIND_ROUTER;
	case 1: case 2: case 3: case 4: return KIND_ERROR;
	}
	return KIND_OTHER;
}

inline_always bool parse_transport(struct frame *f, struct packet *p, bool later)
{
	u8 b[20];
	u32 len = p->end - p->payload;
	p->kind = KIND_OTHER;
	if (p->proto != PROTO_TCP && p->proto != PROTO_UDP && p->proto != PROTO_ICMP && p->proto != PROTO_ICMPV6)
		return true;
	if (later) {
		p->kind = KIND_FRAGMENT;
		return true;
	}
	if (len < 8 || !load(f, p->payload, b, 8))
		return false;
	switch (p->proto) {
	case PROTO_TCP:
		p->src_port = be16(b);
		p->dst_port = be16(b + 2);
		p->kind = KIND_TCP;
		if (p->quoted)
			return true;
		if (len < 20 || !load(f, p->payload, b, 20) || b[12] >> 4 < 5 || (u32)(b[12] >> 4) * 4 > len)
			return false;
		p->flags = b[13];
		if ((p->flags & (SYN | ACK | RST | FIN)) == SYN)
			p->kind = KIND_SYN;
		break;
	case PROTO_UDP:
		p->src_port = be16(b);
		p->dst_port = be16(b + 2);
		p->kind = KIND_UDP;
		break;
	case PROTO_ICMP:
		p->icmp_type = b[0];
		if (!p->v6)
			p->kind = icmp_kind(b[0]);
		break;
	case PROTO_ICMPV6:
		p->icmp_type = b[0];
		if (p->v6)
			p->kind = icmp6_kind(b[0]);
	}
	return true;
}

enum found { GO_ON, TRANSPORT, LATER, CUT };

struct walk {
	struct frame *f;
	struct packet *p;
};

// next_header takes an IPv6 extension header; payload is its offset.
static long next_header(u32 i, struct walk *w)
{
	struct packet *p = w->p;
	u32 size = 8, have = p->end - p->payload;
	u8 b[4] = {}, proto = p->proto;
	bool sized = proto == EXT_HOP_BY_HOP || proto == EXT_ROUTING || proto == EXT_DEST;
	if (!sized && proto != EXT_FRAGMENT) {
		p->found = TRANSPORT;
		return 1;
	}
	p->found = CUT;
	if (have < 8 || !load(w->f, p->payload, b, 4))
		return 1;
	if (sized)
		size = ((u32)b[1] + 1) * 8;
	if (have < size)
		return 1;
	p->proto = b[0];
	p->extended = true;
	p->payload += size;
	p->found = GO_ON;
	if (!sized && (be16(b + 2) & ~7)) {
		p->found = LATER;
		return 1;
	}
	return 0;
}

// parse_ip reads the packet in [header, end) of the frame, of which the caller says
// v6 and quoted, too. A quoted one may be shorter than it says.
subprogram bool parse_ip(struct frame *f, struct packet *p)
{
	u8 b[40];
	u32 off = p->header, end = p->end, have = end - off;
	bool later = false;
	if (end < off)
		return false;
	p->extended = false;
	p->src_port = p->dst_port = 0;
	p->flags = p->icmp_type = 0;
	if (!p->v6) {
		if (have < 20 || !load(f, off, b, 20) || b[0] >> 4 != 4)
			return false;
		u32 header = (u32)(b[0] & 15) * 4, total = be16(b + 2);
		if (header < 20 || total < header || header > have)
			return false;
		if (total < have)
			end = off + total;
		else if (total > have && !p->quoted)
			return false;
		p->src = addr4(b + 12);
		p->dst = addr4(b + 16);
		p->hop_limit = b[8];
		p->proto = b[9];
		p->payload = off + header;
		later = (be16(b + 6) & 0x1fff) != 0;
		p->end = end;
		return parse_transport(f, p, later);
	}
	if (have < 40 || !load(f, off, b, 40) || b[0] >> 4 != 6)
		return false;
	p->src = addr6(b + 8);
	p->dst = addr6(b + 24);
	p->proto = b[6];
	p->hop_limit = b[7];
	u32 length = be16(b + 4);
	off += 40;
	have -= 40;
	if (length < have)
		end = off + length;
	else if (length > have && !p->quoted)
		return false;
	p->end = end;
	struct walk w = {f, p};
	p->payload = off;
	p->found = GO_ON;
	loop(MAX_EXTENSIONS + 1, next_header, &w, 0);
	return (p->found == TRANSPORT || p->found == LATER) && parse_transport(f, p, p->found == LATER);
}

static long next_option(u32 i, struct walk *w)
{
	u8 b[8];
	struct packet *p = w->p;
	u32 have = p->end - p->option;
	if (have == 0)
		return 1;
	p->bad = true;
	if (have < 8 || !load(w->f, p->option, b, 8) || b[1] == 0 || (u32)b[1] * 8 > have)
		return 1;
	if (b[0] == p->want) {
		if (b[1] != 1)
			return 1;
		p->link = mac(b + 2);
		p->has_link = true;
	}
	p->bad = false;
	p->option += (u32)b[1] * 8;
	return 0;
}

// parse_neighbor checks what RFC 4861 demands, but for the checksum.
subprogram bool parse_neighbor(struct frame *f, struct packet *p)
{
	u8 b[24];
	struct walk w = {f, p};
	p->solicited = p->has_link = p->bad = false;
	p->link = 0;
	if (p->extended || p->hop_limit != 255 || p->end - p->payload < NDP_LENGTH || !load(f, p->payload, b, NDP_LENGTH) || b[1] != 0)
		return false;
	bool advert = p->icmp_type == ICMP6_ADVERT;
	p->want = advert ? OPTION_TARGET : OPTION_SOURCE;
	p->solicited = advert && (b[4] & 0x40);
	p->target = addr6(b + 8);
	p->option = p->payload + NDP_LENGTH;
	loop(MAX_OPTIONS, next_option, &w, 0);
	if (p->bad || p->option != p->end || !is_unicast(p->target) || (p->has_link && !is_station(p->link)))
		return false;
	if (advert)
		return is_unicast(p->src) && !(is_multicast(p->dst) && p->solicited);
	if (unspecified(p->src)) // a duplicate-address probe
		return is(p->dst, solicited_node(p->dst)) && !p->has_link;
	return is_unicast(p->src);
}

struct arp {
	u64 sender_mac;
	struct addr sender, target;
	bool request;
};

inline_always bool parse_arp(struct frame *f, u32 off, struct arp *a)
{
	u8 b[28];
	if (f->len < off + 28 || !load(f, off, b, 28) || be64(b) >> 16 != 0x000108000604ULL)
		return false;
	u16 op = be16(b + 6);
	if (op != 1 && op != 2)
		return false;
	a->request = op == 1;
	a->sender_mac = mac(b + 8);
	a->sender = addr4(b + 14);
	a->target = addr4(b + 24);
	return is_station(a->sender_mac) && (is_unicast(a->sender) || a->sender.lo == MAPPED);
}

// Deciding.

// look_up asks the kernel's socket table, or in tests what they want it to say.
subprogram u32 look_up(struct frame *f, const struct flow *w)
{
	if (test_sockets != ASK_KERNEL)
		return test_sockets;
	struct bpf_sock_tuple t = {};
	struct bpf_sock *sk;
	if (w->v6) {
		__builtin_memcpy(t.ipv6.saddr, w->words, 32);
		t.ipv6.sport = w->ports;
		t.ipv6.dport = w->ports >> 16;
		sk = skc_lookup_tcp(f->ctx, &t, sizeof(t.ipv6), BPF_F_CURRENT_NETNS, 0);
	} else {
		t.ipv4.saddr = w->words[0];
		t.ipv4.daddr = w->words[0] >> 32;
		t.ipv4.sport = w->ports;
		t.ipv4.dport = w->ports >> 16;
		sk = skc_lookup_tcp(f->ctx, &t, sizeof(t.ipv4), BPF_F_CURRENT_NETNS, 0);
	}
	if (!sk)
		return NO_SOCKET;
	u32 found = ESTABLISHED;
	if (sk->state == BPF_TCP_LISTEN) {
		u8 ip[40], tcp[20];
		found = NO_SOCKET;
		// Options and extensions do not matter to a cookie.
		if (load(f, w->header, ip, 20) && (!w->v6 || load(f, w->header, ip, 40)) && load(f, w->payload, tcp, 20) &&
		    tcp_check_syncookie(sk, ip, w->v6 ? 40 : 20, tcp, 20) == 0)
			found = LISTENER;
	}
	sk_release(sk);
	return found;
}

// decide applies the table. w is the flow of the packet, of the quoted one in the case
// of an error.
inline_always u32 decide(struct frame *f, u8 kind, u32 bucket, bool sockets, const struct flow *w)
{
	u8 state = state_of(f, bucket);
	if (state == FOREIGN && w->proto == PROTO_TCP && is_held(f, PROTO_TCP, bucket))
		state = DRAINING;
	if (state == FOREIGN)
		return DROP_FOREIGN;
	if (kind != KIND_TCP && kind != KIND_ERROR) {
		if (state == DRAINING)
			return DROP_DRAINING;
		return leased(f) ? ACCEPT_NEW : DROP_LEASE;
	}
	if (state == SETTLED)
		return kind == KIND_TCP ? ACCEPT_FLOW : ACCEPT_ERROR;
	u32 found = sockets ? look_up(f, w) : ASK_NOBODY;
	if (kind == KIND_ERROR)
		return found == ASK_NOBODY || found == ESTABLISHED ? ACCEPT_ERROR : DROP_NO_SOCKET;
	switch (found) {
	case ASK_NOBODY:
		return ACCEPT_TRANSIT;
	case ESTABLISHED:
		return ACCEPT_FLOW;
	case LISTENER:
		if ((w->flags & (ACK | SYN | RST)) == ACK)
			return ACCEPT_TRANSIT;
	}
	return DROP_NO_SOCKET;
}

inline_always bool is_vip(bool v6, struct addr a)
{
	if (v6)
		return have_vip6() && is(a, the_vip6());
	return vip4 != 0 && a.hi == 0 && a.lo == vip4;
}

inline_always u32 icmp_error(struct frame *f, struct packet *p)
{
	struct packet *q = &f->scratch->quoted;
	q->header = p->payload + 8;
	q->end = p->end;
	q->v6 = p->v6;
	q->quoted = true;
	if (!parse_ip(f, q))
		return DROP_MALFORMED;
	if (!is_vip(q->v6, q->src) || !is_unicast(q->dst) || (q->v6 && is_mapped(q->dst)))
		return DROP_QUOTE;
	u32 bucket;
	bool own;
	struct flow *w = flow_of(f, q, true);
	switch (q->kind) {
	case KIND_TCP: case KIND_UDP: {
		u8 is = port(f, q->proto, q->src_port);
		if (is & PORT_DISABLED)
			return DROP_DISABLED;
		bucket = flow_bucket(is, w);
		own = is & PORT_LOCAL;
		break;
	}
	case KIND_ECHO: case KIND_ECHO_REPLY:
		bucket = client_bucket(w);
		own = q->kind == KIND_ECHO;
		break;
	default:
		return DROP_QUOTE;
	}
	if (own) {
		if (is_held(f, q->proto, bucket))
			return ACCEPT_ERROR;
		if (q->kind == KIND_TCP)
			return DROP_NO_SOCKET;
	}
	return decide(f, KIND_ERROR, bucket, q->proto == PROTO_TCP, w);
}

// syn_number is that of offered.go.
inline_always u64 syn_number(const struct flow *w, u32 sequence)
{
	u64 odd1 = 0x9e3779b97f4a7c15ULL, odd2 = 0xff51afd7ed558ccdULL, x = w->words[0];
	if (w->v6)
		x ^= w->words[1] * odd2;
	x = x * odd1 ^ ((u64)sequence << 32 | w->ports);
	x = (x ^ x >> 29) * odd2;
	return x ^ x >> 32;
}

// offer_syn tells whether a SYN came before. Most are another node's, so this has the
// clock that costs least; some milliseconds do not matter.
subprogram void offer_syn(struct frame *f, const struct flow *w, u32 bucket)
{
	u32 zero = 0, sequence;
	struct syns *s = map_lookup(&syns, &zero);
	bucket %= BUCKETS;
	f->counted->syns[bucket]++;
	if (!s || !load(f, w->payload + 4, (u8 *)&sequence, sizeof(sequence)))
		return;
	u64 x = syn_number(w, sequence), *e = &s->seen[x >> (64 - SYN_BITS)], was = *e;
	u32 tag = x, ms = (test_now ? (u64)test_now : ktime_get_coarse_ns()) / 1000000, since = ms - (u32)was;
	if (was >> 32 == tag && since < AGAIN_MOST) {
		if (since < AGAIN_LEAST)
			return;
		f->counted->again[bucket]++;
		u64 client = hash(AFFINITY_CLIENT, w);
		s->askers[client >> (64 - ASKER_BITS)] = ((client & 0x3fffff) << 10 | bucket) << 32 | ms;
	}
	*e = (u64)tag << 32 | ms;
}

// to_port decides on a segment or datagram to the VIP.
inline_always u32 to_port(struct frame *f, u8 kind, const struct flow *w, bool short_way)
{
	u8 is = port(f, w->proto, __builtin_bswap16(w->ports >> 16));
	if (is & PORT_DISABLED)
		return DROP_DISABLED;
	bool in_place = short_way && !w->v6 && (is & PORT_AFFINITY) == AFFINITY_NONE;
	u32 bucket = in_place ? hash_plain(w) % BUCKETS : flow_bucket(is, w);
	f->counted->frames[bucket]++;
	if (kind == KIND_SYN && (is & PORT_RULED))
		offer_syn(f, w, bucket);
	if (kind != KIND_SYN && (is & PORT_LOCAL)) {
		if (is_held(f, w->proto, bucket))
			return ACCEPT_OWN;
		if (kind == KIND_TCP)
			return DROP_NO_SOCKET;
	}
	return decide(f, kind, bucket, true, w);
}

// flow decides on a packet to the VIP.
inline_always u32 flow(struct frame *f, struct packet *p)
{
	struct flow *w = flow_of(f, p, false);
	switch (p->kind) {
	case KIND_FRAGMENT:
		return ACCEPT_FRAGMENT;
	case KIND_ROUTER:
		return DROP_ROUTER;
	case KIND_ERROR:
		return icmp_error(f, p);
	case KIND_ECHO_REPLY:
		return is_held(f, PROTO_UDP, client_bucket(w)) ? ACCEPT_OWN : DROP_NO_SOCKET;
	case KIND_ECHO:
		return decide(f, KIND_ECHO, client_bucket(w), false, w);
	case KIND_SYN: case KIND_TCP: case KIND_UDP:
		return to_port(f, p->kind, w, false);
	}
	return DROP_PROTOCOL;
}

inline_always u32 answer(struct frame *f, bool v6, struct addr asker, struct addr vip)
{
	return owned(state_of(f, client_bucket(between(f, v6, asker, vip)))) ? ANSWER_NEIGHBOR : DROP_FOREIGN;
}

subprogram u32 arp_in(struct frame *f, u32 off)
{
	struct arp a;
	if (!parse_arp(f, off, &a))
		return DROP_MALFORMED;
	bool from_vip = a.sender.lo == vip4, from_clone = a.sender_mac == clone_mac, nobody = a.sender.lo == MAPPED;
	struct addr vip = {0, vip4};
	if (vip4 == 0)
		return DROP_NOT_OURS;
	if (from_clone && (from_vip || nobody))
		return DROP_OWN_ANNOUNCEMENT;
	if (from_clone || from_vip)
		return DROP_CONFLICT;
	if (a.request && a.target.lo == vip4)
		return answer(f, false, a.sender, vip);
	if (nobody)
		return DROP_NOT_OURS;
	if (a.sender.lo == a.target.lo || (!a.request && a.target.lo == vip4))
		return ACCEPT_NEIGHBOR;
	return DROP_NOT_OURS;
}

// control decides on what ICMPv6 says about the link.
inline_always u32 control(struct frame *f, struct packet *p, u64 dst)
{
	struct addr vip = the_vip6(), all = {GROUP, 1};
	if (!have_vip6())
		return DROP_NOT_OURS;
	bool to_vip = dst == clone_mac && is(p->dst, vip);
	bool to_group = is_group(dst) && (is(p->dst, all) || is(p->dst, solicited_node(vip)));
	if (!to_vip && !to_group)
		return DROP_NOT_OURS;
	if (p->kind == KIND_QUERY) {
		if (p->end - p->payload < NDP_LENGTH || p->hop_limit != 1 || p->src.hi >> 54 != 0xfe80 >> 6)
			return DROP_MALFORMED;
		return to_vip ? DROP_NOT_OURS : ACCEPT_CONTROL;
	}
	if (!parse_neighbor(f, p))
		return DROP_MALFORMED;
	bool from_clone = p->has_link && p->link == clone_mac, target = is(p->target, vip), from_vip = is(p->src, vip);
	if (p->icmp_type == ICMP6_ADVERT) {
		if (target && from_clone)
			return DROP_OWN_ANNOUNCEMENT;
		return target || from_clone || from_vip ? DROP_CONFLICT : ACCEPT_NEIGHBOR;
	}
	if (from_vip && (from_clone || !p->has_link))
		return DROP_OWN_ANNOUNCEMENT;
	if (from_vip || from_clone)
		return DROP_CONFLICT;
	if (!target || is(p->dst, all))
		return DROP_NOT_OURS;
	return answer(f, true, p->src, vip);
}

// untag steps over priority tags. It gives 0, or a verdict.
inline_always u32 untag(struct frame *f, u16 *type, u32 *off)
{
	for (int i = 0; i < (int)MAX_TAGS; i++) {
		u8 b[4];
		if (*type != ETHER_VLAN && *type != ETHER_SERVICE)
			return 0;
		if (f->len < *off + 4 || !load(f, *off, b, 4))
			return DROP_MALFORMED;
		if (be16(b) & 0x0fff)
			return DROP_VLAN;
		*type = be16(b + 2);
		*off += 4;
	}
	return *type == ETHER_VLAN || *type == ETHER_SERVICE ? DROP_VLAN : 0;
}

inline_always u32 from_wire(struct frame *f, u64 *dst)
{
	u8 b[ETHER_HEADER];
	*dst = 0;
	if (f->len < ETHER_HEADER || !load(f, 0, b, ETHER_HEADER))
		return DROP_RUNT;
	*dst = mac(b);
	if (f->len > max_frame)
		return DROP_OVERSIZED;
	u64 src = mac(b + 6);
	if (src == clone_mac)
		return be16(b + 12) == ETHER_RARP ? DROP_CLONE_RARP : DROP_CLONE_SOURCE;
	if (*dst != clone_mac && !is_group(*dst))
		return DROP_NOT_OURS;
	if (!is_station(src) || !begin_long(f))
		return DROP_MALFORMED;
	u16 type = be16(b + 12);
	u32 off = ETHER_HEADER, v = untag(f, &type, &off);
	if (v)
		return v;
	if (type == ETHER_ARP)
		return arp_in(f, off);
	if (type != ETHER_IPV4 && type != ETHER_IPV6) {
		// Probes go on to netcore/doctor, which is to find out whether they come.
		if (type == ETHER_PROBE)
			*dst = 0;
		return DROP_NOT_OURS;
	}
	struct packet *p = &f->scratch->packet;
	p->header = off;
	p->end = f->len;
	p->v6 = type == ETHER_IPV6;
	p->quoted = false;
	if (!parse_ip(f, p))
		return DROP_MALFORMED;
	if (p->v6 && (p->kind == KIND_NEIGHBOR || p->kind == KIND_QUERY))
		return control(f, p, *dst);
	if (*dst != clone_mac || !is_vip(p->v6, p->dst))
		return DROP_NOT_OURS;
	if (is(p->src, p->dst) || !is_unicast(p->src) || (p->v6 && is_mapped(p->src)))
		return DROP_SPOOFED;
	return flow(f, p);
}

// AT reads a word where it lies, aligned or not: so the kernel's verifier allows it on
// x86-64, arm64 and others that do not mind.
#define AT(type, off) (*(const type *)(b + (off)))

// plain decides on what nearly all traffic is: a whole TCP segment or UDP datagram to
// the VIP in an untagged frame, by IPv4 without options or IPv6 without extension
// headers. Most of it is another node's, and every node has to discard that at line rate:
// so the headers are read where they lie, a word at a time, where from_wire copies and
// parses them step by step, which takes twice as long. Both decide by to_port. Where a
// check fails, this gives 0, and from_wire says why. What else there is on the NIC of a host
// that does other things, too, are frames to itself or to others: to whom says *to.
inline_always u32 plain(struct frame *f, u64 *to)
{
	const u8 *b = f->data, *end = f->end, *t;
	struct flow w = {.header = ETHER_HEADER};
	u32 rest; // of the packet, behind the IP header
	if (b + ETHER_HEADER + 40 > end || f->len > max_frame)
		return 0;
	u64 dst = __builtin_bswap64(AT(u64, 0)) >> 16, src = __builtin_bswap64(AT(u64, 6)) >> 16;
	if (dst != clone_mac) {
		if (is_group(dst) || src == clone_mac)
			return 0;
		*to = dst;
		return DROP_NOT_OURS;
	}
	if (src == clone_mac || !is_station(src))
		return 0;
	if (AT(u16, 12) == __builtin_bswap16(ETHER_IPV4)) {
		u32 vip = __builtin_bswap32((u32)vip4), len = __builtin_bswap16(AT(u16, 16));
		if (b[14] != 0x45 || (AT(u16, 20) & __builtin_bswap16(0x3fff)) || len < 20 || len + ETHER_HEADER > f->len)
			return 0;
		if (vip4 == 0 || AT(u32, 30) != vip || AT(u32, 26) == vip || b[26] == 0 || b[26] == 127 || b[26] >= 224)
			return 0;
		w.words[0] = AT(u64, 26);
		w.proto = b[23];
		w.payload = ETHER_HEADER + 20;
		t = b + ETHER_HEADER + 20;
		rest = len - 20;
	} else if (AT(u16, 12) == __builtin_bswap16(ETHER_IPV6)) {
		u64 hi = __builtin_bswap64(vip6_hi), lo = __builtin_bswap64(vip6_lo);
		if (b + ETHER_HEADER + 60 > end)
			return 0;
		rest = __builtin_bswap16(AT(u16, 18));
		if (b[14] >> 4 != 6 || rest + ETHER_HEADER + 40 > f->len)
			return 0;
		w.words[0] = AT(u64, 22);
		w.words[1] = AT(u64, 30);
		w.words[2] = AT(u64, 38);
		w.words[3] = AT(u64, 46);
		// What begins with 64 zero bits is mapped, loopback or nothing: rare enough.
		if (!have_vip6() || w.words[2] != hi || w.words[3] != lo || w.words[0] == 0 || (u8)w.words[0] == 0xff ||
		    (w.words[0] == hi && w.words[1] == lo))
			return 0;
		w.v6 = true;
		w.proto = b[20];
		w.payload = ETHER_HEADER + 40;
		t = b + ETHER_HEADER + 40;
	} else {
		return 0;
	}
	w.ports = *(const u32 *)t;
	u8 kind = KIND_UDP;
	if (w.proto == PROTO_TCP) {
		u32 header = (t[12] >> 4) * 4;
		if (header < 20 || header > rest)
			return 0;
		w.flags = t[13];
		kind = (w.flags & (SYN | ACK | RST | FIN)) == SYN ? KIND_SYN : KIND_TCP;
	} else if (w.proto != PROTO_UDP || rest < 8) {
		return 0;
	}
	return to_port(f, kind, &w, true);
}

// judge_reset delays the first RST of a flow; see resets.go.
inline_always u32 judge_reset(struct frame *f, u64 flow)
{
	u64 *e = &f->shared->resets[flow >> 52], was = *e;
	u32 tag = flow, ms = (u64)now(f) / 1000000;
	if (was >> 32 == tag) {
		u32 since = ms - (u32)was;
		if (since < patience)
			return DROP_RST;
		if (since < RESETS_FORGET)
			return SEND;
	}
	*e = (u64)tag << 32 | ms;
	return DELAY_RST;
}

// speak decides on a packet from the VIP.
inline_always u32 speak(struct frame *f, struct packet *p)
{
	switch (p->kind) {
	case KIND_NEIGHBOR:
		if (!parse_neighbor(f, p))
			return DROP_EGRESS_MALFORMED;
		return p->has_link && p->link != clone_mac ? DROP_EGRESS_SOURCE : SEND;
	case KIND_ECHO:
		return hold(f, false, client_bucket(between(f, p->v6, p->dst, p->src))) ? SEND_OPEN : SEND;
	case KIND_SYN: case KIND_TCP: case KIND_UDP:
		break;
	default:
		return SEND;
	}
	u8 is = port(f, p->proto, p->src_port);
	bool local = is & PORT_LOCAL;
	bool reset = (p->flags & (RST | ACK)) == RST;
	if (!local && !reset && p->kind != KIND_SYN)
		return SEND;
	struct flow *w = flow_of(f, p, true);
	u32 bucket = flow_bucket(is, w);
	u8 state = state_of(f, bucket);
	if (p->kind == KIND_SYN)
		return hold(f, true, bucket) ? SEND_OPEN : SEND;
	if (p->kind == KIND_UDP) {
		if (owned(state) && leased(f))
			return SEND;
		return hold(f, false, bucket) ? SEND_OPEN : SEND;
	}
	if (reset) {
		if (local || state != SETTLED || now(f) < f->shared->quarantine[bucket % BUCKETS] || !leased(f))
			return DROP_RST;
		if (patience)
			return judge_reset(f, hash(AFFINITY_NONE, w));
	} else if (!(p->flags & RST) && is_held(f, PROTO_TCP, bucket)) {
		hold(f, true, bucket);
	}
	return SEND;
}

subprogram u32 arp_out(struct frame *f)
{
	struct arp a;
	if (!parse_arp(f, ETHER_HEADER, &a))
		return DROP_EGRESS_MALFORMED;
	return a.sender_mac != clone_mac || a.sender.lo != vip4 ? DROP_EGRESS_SOURCE : SEND; // never 0
}

inline_always u32 from_clone(struct frame *f)
{
	u8 b[ETHER_HEADER];
	if (f->len < ETHER_HEADER || f->len > max_frame || !load(f, 0, b, ETHER_HEADER) || !begin_long(f))
		return DROP_EGRESS_MALFORMED;
	u16 type = be16(b + 12);
	if (type == ETHER_ARP)
		return arp_out(f);
	if (type != ETHER_IPV4 && type != ETHER_IPV6)
		return DROP_EGRESS_SOURCE;
	struct packet *p = &f->scratch->packet;
	p->header = ETHER_HEADER;
	p->end = f->len;
	p->v6 = type == ETHER_IPV6;
	p->quoted = false;
	if (!parse_ip(f, p))
		return DROP_EGRESS_MALFORMED;
	if (!is_vip(p->v6, p->src)) {
		bool report = p->v6 && p->kind == KIND_REPORT && unspecified(p->src) && have_vip6();
		return report ? SEND : DROP_EGRESS_SOURCE;
	}
	return speak(f, p);
}

// plain_out is the short way for what leaves: nearly all of it are segments of TCP from
// a service of the VIP with an ACK, and datagrams. True: send it. Otherwise from_clone
// decides, on the SYNs and RSTs of flows that the VIP opens or does not know.
inline_always bool plain_out(struct frame *f)
{
	const u8 *b = f->data, *end = f->end, *t;
	u32 rest; // of the packet, behind the IP header
	u8 proto;
	if (b + ETHER_HEADER + 40 > end || f->len > max_frame)
		return false;
	if (AT(u16, 12) == __builtin_bswap16(ETHER_IPV4)) {
		u32 len = __builtin_bswap16(AT(u16, 16));
		if (b[14] != 0x45 || (AT(u16, 20) & __builtin_bswap16(0x3fff)) || len < 20 || len + ETHER_HEADER > f->len)
			return false;
		if (vip4 == 0 || AT(u32, 26) != __builtin_bswap32((u32)vip4))
			return false;
		proto = b[23];
		t = b + ETHER_HEADER + 20;
		rest = len - 20;
	} else if (AT(u16, 12) == __builtin_bswap16(ETHER_IPV6)) {
		if (b + ETHER_HEADER + 60 > end)
			return false;
		rest = __builtin_bswap16(AT(u16, 18));
		if (b[14] >> 4 != 6 || rest + ETHER_HEADER + 40 > f->len)
			return false;
		if (!have_vip6() || AT(u64, 22) != __builtin_bswap64(vip6_hi) || AT(u64, 30) != __builtin_bswap64(vip6_lo))
			return false;
		proto = b[20];
		t = b + ETHER_HEADER + 40;
	} else {
		return false;
	}
	if (proto == PROTO_TCP) {
		u32 header = (t[12] >> 4) * 4;
		if (header < 20 || header > rest || (t[13] & (SYN | RST | ACK)) == SYN || (t[13] & (RST | ACK)) == RST)
			return false;
	} else if (proto != PROTO_UDP || rest < 8) {
		return false;
	}
	return !(port(f, proto, be16(t)) & PORT_LOCAL);
}

inline_always bool begin(struct frame *f)
{
	u32 zero = 0;
	f->shared = map_lookup(&shared, &zero);
	f->ports = map_lookup(&ports, &zero);
	f->counted = map_lookup(&counted, &zero);
	return f->shared && f->ports && f->counted;
}

inline_always void count(struct frame *f, u32 verdict)
{
	if (verdict < VERDICTS)
		f->counted->verdicts[verdict]++;
}

// passes tells whether a frame goes on to the kernel. What is not the cluster's is
// the host's own: it has the NIC, too.
inline_always bool passes(u32 verdict, u64 dst)
{
	if ((verdict >= ACCEPT_NEW && verdict <= ACCEPT_CONTROL) || verdict == ANSWER_NEIGHBOR)
		return true;
	if (dst == clone_mac)
		return false;
	return verdict == DROP_NOT_OURS || verdict == DROP_VLAN || verdict == DROP_MALFORMED || verdict == DROP_OVERSIZED;
}

SEC("xdp.frags") int ingress_xdp(struct xdp_md *ctx)
{
	u64 dst = clone_mac;
	struct frame f = {ctx, (void *)(long)ctx->data, (void *)(long)ctx->data_end, true, xdp_get_buff_len(ctx)};
	if (!begin(&f))
		return XDP_DROP;
	u32 v = plain(&f, &dst);
	if (!v)
		v = from_wire(&f, &dst);
	count(&f, v);
	return passes(v, dst) ? XDP_PASS : XDP_DROP;
}

SEC("tc") int ingress_tc(struct __sk_buff *skb)
{
	u64 dst = clone_mac;
	struct frame f = {skb, (void *)(long)skb->data, (void *)(long)skb->data_end, false, skb->len};
	if (!begin(&f))
		return TC_ACT_SHOT;
	u32 w = skb->vlan_present ? 0 : plain(&f, &dst);
	if (!w) {
		w = from_wire(&f, &dst);
		// The kernel takes the outer tag off before tc sees the frame.
		if (skb->vlan_present && w == DROP_CLONE_RARP)
			w = DROP_CLONE_SOURCE;
		bool tagged = skb->vlan_present && (skb->vlan_tci & 0x0fff);
		if (tagged && (w != DROP_RUNT && w != DROP_OVERSIZED && w != DROP_CLONE_SOURCE && w != DROP_NOT_OURS))
			w = DROP_VLAN;
	}
	count(&f, w);
	return passes(w, dst) ? TC_ACT_UNSPEC : TC_ACT_SHOT;
}

// set_source leaves no frame with a source of zero.
inline_always int set_source(struct __sk_buff *skb, u64 to)
{
	u8 m[6] = {to >> 40, to >> 32, to >> 24, to >> 16, to >> 8, to};
	return to && !skb_store_bytes(skb, 6, m, sizeof(m), 0) ? TC_ACT_UNSPEC : TC_ACT_SHOT;
}

inline_always void delay(struct __sk_buff *skb)
{
	u32 len = skb->len;
	if (len < ETHER_HEADER || len > LATE_FRAME)
		return;
	struct late *l = ringbuf_reserve(&late, sizeof(*l), 0);
	if (!l)
		return; // its client sends again
	l->len = len;
	// Read anew, so that no verifier combines what it knows of both: 6.12 forgot that it is
	// not 0, and 6.18 ran into a bug of its own.
	u32 last = (*(volatile u32 *)&skb->len - 1) & (LATE_FRAME - 1);
	asm volatile("" : "+r"(last));
	if (skb_load_bytes(skb, 0, l->frame, last + 1))
		ringbuf_discard(l, 0);
	else
		ringbuf_submit(l, 0);
}

SEC("tc") int egress_tc(struct __sk_buff *skb)
{
	struct frame f = {skb, (void *)(long)skb->data, (void *)(long)skb->data_end, false, skb->len};
	if (!begin(&f))
		return TC_ACT_SHOT;
	u32 v = plain_out(&f) ? SEND : from_clone(&f);
	count(&f, v);
	if (v == DELAY_RST)
		delay(skb);
	if (v != SEND && v != SEND_OPEN)
		return TC_ACT_SHOT;
	return rewrite ? set_source(skb, f.shared->wire_mac) : TC_ACT_UNSPEC;
}

// guard_tc is on the NIC: what leaves with the clone MAC as its source in spite of all
// is mended and counted.
SEC("tc") int guard_tc(struct __sk_buff *skb)
{
	u32 zero = 0;
	const u8 *b = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	u64 src;
	if (b + ETHER_HEADER <= end) {
		src = __builtin_bswap64(AT(u64, 6)) >> 16;
	} else {
		u8 m[6]; // a header of which not all lies in one piece
		if (skb_load_bytes(skb, 6, m, sizeof(m)))
			return TC_ACT_UNSPEC;
		src = mac(m);
	}
	if (src != clone_mac)
		return TC_ACT_UNSPEC;
	u64 *n = map_lookup(&guarded, &zero);
	struct shared *s = map_lookup(&shared, &zero);
	if (n)
		++*n;
	return s ? set_source(skb, s->wire_mac) : TC_ACT_SHOT;
}

char _license[] SEC("license") = "GPL";
