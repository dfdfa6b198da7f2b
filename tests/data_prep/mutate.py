"""Hostile variants of mesh files for the fuzz tests: a file and a random source in, bytes out."""

from __future__ import annotations

import copy
import json
import random
import struct
from typing import Any

HOSTILE: list[Any] = [
    *(0, 1, -1, 2, 3, 255, 65535, 2**31, 2**32 - 1, 2**53, -(2**63), 10**30),
    *(0.5, -0.0, 1e-300, 1e38, 1e300, 1e400, float("nan"), float("-inf")),
    *(None, True, "", "a", "9" * 40, "\ud800", "x\ny\x1b[2J", "VEC3", "MAT4", "BLEND"),
    *("../secret.png", "/etc/hostname", "skin.png", "data.bin", "data:,", "data:x;base64,AAAA"),
    *("a" * 5000, "%00", "https://example.org/a", "loop", "..", "."),
    *([], {}, [[]], [0], [0, 0], [1, 2, 3], [1e308] * 4, [float("nan")] * 3, [0.0] * 16, {"a": 1}),
]
TOKENS = [
    *("0", "1", "-1", "2", "4", "9", "-9", "99999999999999999999", "nan", "inf", "-inf", "1e400"),
    *("1e-320", "1/1", "1//1", "1/1/1", "/", "//", "1/", "/1", "-1/-1", "a", "#", "\\", '"', "\0"),
    *("v", "vt", "vn", "f", "l", "p", "usemtl", "mtllib", "newmtl", "map_Kd", "map_d", "Kd", "d"),
    *("Tr", "-s", "-o", "-clamp on", "../secret.png", "/etc/hostname", "skin.png", "a.mtl", "é"),
    *("element", "property", "list", "uchar", "int", "float", "vertex", "face", "vertex_indices"),
    *("end_header", "ply", "format", "ascii", "binary_little_endian", "comment TextureFile", "x"),
]


def mutate(suffix: str, data: bytes, rng: random.Random) -> bytes:
    """Return a damaged or hostile variant of a file.

    Args:
        suffix: ".glb", ".gltf", ".obj" or ".ply".
        data: A file that loads, or nearly.
        rng: Decides everything.
    """
    if suffix == ".glb" and rng.random() < 0.85:
        return _glb(data, rng)
    if suffix == ".gltf" and rng.random() < 0.85:
        return _dump(_edited(json.loads(data), rng))
    if suffix in (".obj", ".ply") and rng.random() < 0.8:
        return _text(data, rng)
    return _raw(data, rng)


def _raw(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        if not out:
            break
        at, kind = rng.randrange(len(out)), rng.random()
        if kind < 0.4:
            out[at] ^= 1 << rng.randrange(8)
        elif kind < 0.6:
            out[at] = rng.choice([0, 1, 127, 128, 255])
        elif kind < 0.75:
            out[at : at + 4] = struct.pack("<I", rng.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1]))
        elif kind < 0.85:
            del out[at:]
        elif kind < 0.95:
            to = rng.randrange(len(out))
            out[at : at + 64] = out[to : to + 64]
        else:
            out[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(20)))
    return bytes(out)


def _glb(data: bytes, rng: random.Random) -> bytes:
    """Change the JSON, the buffer (where compressed data and pictures are), or the chunk sizes."""
    if len(data) < 28:
        return _raw(data, rng)
    size = struct.unpack_from("<I", data, 12)[0]
    try:
        header = json.loads(data[20 : 20 + size])
    except ValueError:
        return _raw(data, rng)
    blob = data[28 + size :]
    what = rng.random()
    if what < 0.65:
        header = _edited(header, rng)
    if what > 0.5 and blob:
        blob = _in_view(header, blob, rng)
    text = _dump(header)
    text += b" " * (-len(text) % 4)
    total, sizes = 28 + len(text) + len(blob), [len(text), len(blob)]
    if rng.random() < 0.05:
        sizes[rng.randrange(2)] += rng.choice([-4, 4, 1, 10**6, -1])
        total += rng.choice([0, 4, -4, 10**6])
    return (
        struct.pack("<4sIII4s", b"glTF", 2, total & 0xFFFFFFFF, sizes[0] & 0xFFFFFFFF, b"JSON")
        + text
        + struct.pack("<I4s", sizes[1] & 0xFFFFFFFF, b"BIN\0")
        + blob
    )


def _in_view(header: Any, blob: bytes, rng: random.Random) -> bytes:
    """Damage the bytes of one buffer view."""
    try:
        view = rng.choice(header["bufferViews"])
        view = view.get("extensions", {}).get("EXT_meshopt_compression", view)
        start, length = int(view.get("byteOffset", 0)), int(view["byteLength"])
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError):
        return _raw(blob, rng)
    if not 0 <= start < start + length <= len(blob):
        return _raw(blob, rng)
    part = _raw(blob[start : start + length], rng)[:length]
    return blob[:start] + part + b"\0" * (length - len(part)) + blob[start + length :]


def _dump(header: Any) -> bytes:
    return json.dumps(header).encode("utf-8", errors="surrogatepass")


def _edited(header: Any, rng: random.Random) -> Any:
    """Change values anywhere in a JSON tree."""
    header = copy.deepcopy(header)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 6])):
        places = list(_places(header))
        if not places:
            break
        holder, key = rng.choice(places)
        old, kind = holder[key], rng.random()
        if kind < 0.55:
            holder[key] = copy.deepcopy(rng.choice(HOSTILE))
        elif kind < 0.7 and isinstance(old, int | float) and not isinstance(old, bool):
            holder[key] = rng.choice([old + 1, old - 1, -old, old * 1000, old * 2**20, float(old)])
        elif kind < 0.8:
            other, name = rng.choice(places)
            holder[key] = copy.deepcopy(other[name])
        elif kind < 0.9 and isinstance(old, list) and len(old) < 50:
            holder[key] = old * rng.choice([0, 2, 100])
        elif isinstance(holder, dict):
            del holder[key]
        else:
            holder[key] = None
    return header


def _places(node: Any) -> Any:
    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield node, key
            yield from _places(value)


def _text(data: bytes, rng: random.Random) -> bytes:
    head, mark, tail = data.partition(b"end_header\n")
    binary = b"binary" in head[:100]
    if binary and rng.random() < 0.5:
        return head + mark + _raw(tail, rng)
    text = head + mark if binary else data
    lines = text.decode("utf-8", errors="replace").split("\n")
    for _ in range(rng.choice([1, 1, 2, 4, 10])):
        at, kind = rng.randrange(len(lines)), rng.random()
        words = lines[at].split(" ")
        if kind < 0.6:
            words[rng.randrange(len(words))] = rng.choice(TOKENS)
            lines[at] = " ".join(words)
        elif kind < 0.7:
            words.insert(rng.randrange(len(words) + 1), rng.choice(TOKENS))
            lines[at] = " ".join(words)
        elif kind < 0.8:
            lines[at] = " ".join(words[:-1])
        elif kind < 0.9:
            lines.insert(at, rng.choice(lines))
        else:
            lines[at] = " ".join(rng.choice(TOKENS) for _ in range(rng.randrange(1, 6)))
    return "\n".join(lines).encode() + (tail if binary else b"")
