"""stub"""
from __future__ import annotations
import json, struct
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
Wrap = Literal["repeat", "mirror", "clamp"]
@dataclass(frozen=True)
class MaterialNotes:
    wrap: tuple[Wrap, Wrap] = ("repeat", "repeat")
    base_color: tuple[float, float, float, float] | None = None
def read_plain_glb(path: Path, data: bytes) -> tuple[bytes, list[MaterialNotes]]:
    length = struct.unpack("<I", data[12:16])[0]
    header = json.loads(data[20 : 20 + length])
    for m in header.get("meshes", []):
        for p in m["primitives"]:
            if "material" not in p:
                header.setdefault("materials", []); p["material"] = len(header["materials"]); header["materials"].append({})
    for i, m in enumerate(header.get("materials", [])):
        m["name"] = str(i)
    j = json.dumps(header).encode(); j += b" " * (-len(j) % 4)
    rest = data[20 + length :]
    out = struct.pack("<4sIIII", b"glTF", 2, 20 + len(j) + len(rest), len(j), 0x4E4F534A) + j + rest
    return out, [MaterialNotes() for _ in header.get("materials", [])]
