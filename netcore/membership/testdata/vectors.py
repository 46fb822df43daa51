"""Writes the test vectors of the membership protocol, version 2, beside itself.

It shares no code with the codec: it follows the layout in frame.go, and the
hashes are Python's (hashlib, hmac). Run it only when the layout changes:

    python3 vectors.py
"""

import hashlib
import hmac
import pathlib
import struct

KEY = b"\x5a" * 32
CLUSTER = "demo"
INCARNATION = 0x1122334455667788
BUCKETS = 1024
PIECE = 1400  # bytes of a map in all its frames but the last


def node(n):
    return bytes.fromhex("52540077") + struct.pack(">H", n)


def tag(n, incarnation):
    return hashlib.sha256(node(n) + struct.pack(">Q", incarnation)).digest()[:4]


def map_id(version, leader):
    return struct.pack(">Q", version) + node(leader)


def frame(kind, sequence, body):
    f = bytes.fromhex("03cc000088b5") + node(1) + bytes.fromhex("88b5")
    f += b"CC" + bytes([2, kind])
    f += hashlib.sha256(CLUSTER.encode()).digest()[:8]
    f += struct.pack(">QQ", INCARNATION, sequence) + body
    return f + hmac.new(KEY, f[6:], hashlib.sha256).digest()[:16]


def beacon():
    """Serving, sick, with flows in buckets 0, 9 and 1023; hears nodes 2 and 3."""
    held = bytearray(BUCKETS // 8)
    for bucket in 0, 9, 1023:
        held[bucket // 8] |= 1 << bucket % 8
    body = bytes([2, 1 | 2]) + struct.pack(">HHI", 150, 333, 70000)
    body += struct.pack(">Q", 0xFEDCBA9876543210)
    body += map_id(7, 1) + map_id(6, 2) + node(1)
    body += bytes([2]) + held + tag(2, 22) + tag(3, 33)
    return [frame(1, 42, body)]


def whole_map(members):
    """Map 7 of node 1, made from map 6 of node 2. Its members are nodes 1, 2, 3
    and so on; the buckets go around, and the last one is nobody's."""
    whole = map_id(6, 2) + struct.pack(">Q", 0xFEDCBA9876543210)
    whole += bytes([members]) + b"".join(node(1 + i) for i in range(members))
    whole += bytes(b % members for b in range(BUCKETS - 1)) + b"\xff"
    pieces = [whole[i : i + PIECE] for i in range(0, len(whole), PIECE)]
    return [
        frame(2, 43 + i, map_id(7, 1) + bytes([i, len(pieces)]) + piece)
        for i, piece in enumerate(pieces)
    ]


def write(name, frames):
    """Hex, 32 bytes a line, and an empty line between two frames."""
    lines = [[f[i : i + 32].hex() for i in range(0, len(f), 32)] for f in frames]
    text = "\n\n".join("\n".join(f) for f in lines) + "\n"
    (pathlib.Path(__file__).parent / name).write_text(text)


write("beacon.hex", beacon())
write("map-3.hex", whole_map(3))
write("map-200.hex", whole_map(200))
