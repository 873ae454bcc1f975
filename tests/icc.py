"""Colour profiles as small as the format allows, for tests."""

from __future__ import annotations

import struct

D50 = (0.9642, 1.0, 0.8249)
RED, GREEN, BLUE = (0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141)  # sRGB's, at D50


def rgb(red: tuple[float, ...], green: tuple[float, ...], blue: tuple[float, ...], gamma: float = 2.2) -> bytes:
    """A profile of three primaries (XYZ) with one power law."""
    curve = _curve(gamma)
    return _profile(
        b"RGB ",
        b"XYZ ",
        {
            **{b"rXYZ": _xyz(red), b"gXYZ": _xyz(green), b"bXYZ": _xyz(blue)},
            **{b"rTRC": curve, b"gTRC": curve, b"bTRC": curve},
        },
    )


def grey(gamma: float) -> bytes:
    return _profile(b"GRAY", b"XYZ ", {b"kTRC": _curve(gamma)})


def cmyk(magenta_on_yellow: tuple[int, int, int]) -> bytes:
    """A profile of white paper on which full magenta and yellow are this colour (8-bit CIELAB), other inks black."""
    ramp = bytes(range(256))
    nodes = [(0, 128, 128)] * 2**4
    nodes[0b0000], nodes[0b0110] = (255, 128, 128), magenta_on_yellow
    matrix = struct.pack(">9i", *(65536 * (i in (0, 4, 8)) for i in range(9)))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + ramp * 4 + b"".join(map(bytes, nodes)) + ramp * 3
    return _profile(b"CMYK", b"Lab ", {b"A2B0": table}, b"prtr")


def _profile(space: bytes, connection: bytes, tags: dict[bytes, bytes], kind: bytes = b"mntr") -> bytes:
    name = b"test\0"
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", len(name)) + name + bytes(78),
        b"cprt": b"text" + bytes(4) + name,
        b"wtpt": _xyz(D50),
        **tags,
    }
    table, data = struct.pack(">I", len(tags)), b""
    for tag, content in tags.items():
        table += tag + struct.pack(">II", 128 + 4 + 12 * len(tags) + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    rest = table + data
    head = struct.pack(">I4xI4s4s4s12x4s", 128 + len(rest), 0x02400000, kind, space, connection, b"acsp")
    head += bytes(68 - len(head)) + struct.pack(">3i", *(round(v * 65536) for v in D50))
    return head + bytes(128 - len(head)) + rest


def _xyz(value: tuple[float, ...]) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(v * 65536) for v in value))


def _curve(gamma: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))
