"""Material libraries of OBJ files (MTL): base colour, its texture and where that lies, opacity."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.gltf_guard import local_bytes
from data_prep.limits import Budget
from data_prep.primitives import Wrap
from data_prep.textures import decode_texture
from equifeat.errors import MeshError

Array = NDArray[Any]

# Options of map_ statements and how many values they take at most (Wavefront MTL).
_MAP_OPTIONS = {
    **{"-o": 3, "-s": 3, "-t": 3, "-mm": 2},
    **dict.fromkeys(("-clamp", "-blendu", "-blendv", "-bm", "-boost", "-imfchan"), 1),
    **dict.fromkeys(("-texres", "-type", "-cc"), 1),
}
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


@dataclass(frozen=True)
class ObjMaterial:
    """What of a material is drawn.

    Attributes:
        color: Kd, sRGB.
        alpha: d, or 1 - Tr.
        texture: map_Kd, (H, W, 4) uint8 or None.
        scale: -s of map_Kd: texture coordinates are multiplied by it.
        offset: -o of map_Kd: then it is added.
        wrap: "clamp" after -clamp on.
    """

    color: tuple[float, float, float] = (1.0, 1.0, 1.0)
    alpha: float = 1.0
    texture: Array | None = None
    scale: tuple[float, float] = (1.0, 1.0)
    offset: tuple[float, float] = (0.0, 0.0)
    wrap: Wrap = "repeat"


@dataclass
class _Map:
    """A map statement taken apart."""

    file: str = ""
    options: dict[str, list[str]] = field(default_factory=dict)


def read_library(
    path: Path, name: str, budget: Budget, images: dict[str, Array]
) -> dict[str, ObjMaterial]:
    """Read one material library.

    Args:
        path: The OBJ file, for messages and its folder.
        name: Of the library, as the OBJ file writes it.
        budget: Accounts for files and pixels.
        images: Textures by file name, decoded once; added to.

    Returns:
        Materials by name.

    Raises:
        MeshError: A reference leaves the folder or is missing, or a statement cannot be read.
    """
    text = local_bytes(path, name, budget).decode("utf-8", errors="replace")
    found: dict[str, ObjMaterial] = {}
    current: dict[str, str] | None = None
    blocks: list[tuple[str, dict[str, str]]] = []
    for line in text.replace("\\\r\n", " ").replace("\\\n", " ").splitlines():
        key, _, value = line.strip().replace("\t", " ").partition(" ")
        key, value = key.lower(), value.strip()
        if key == "newmtl":
            current = {}
            blocks.append((value, current))
        elif current is not None and value and not key.startswith("#"):
            current[key] = value
    for material, statements in blocks:
        found[material] = _material(path, material, statements, budget, images)
    return found


def _material(
    path: Path, name: str, statements: dict[str, str], budget: Budget, images: dict[str, Array]
) -> ObjMaterial:
    where = f"{path}: material {name!r:.80}"
    color, opacity = _map(where, statements.get("map_kd", "")), statements.get("map_d", "")
    if opacity and _map(where, opacity).file != color.file:
        raise MeshError(
            f"{where} has an opacity map of its own ({opacity!r:.80}), which is not supported; "
            "put it into the alpha channel of map_Kd"
        )
    alpha = 1.0
    if "d" in statements:
        alpha = _floats(where, statements["d"].split()[-1:])[0]
    elif "tr" in statements:
        alpha = 1.0 - _floats(where, statements["tr"].split()[-1:])[0]
    if not color.file:
        kd = _floats(where, statements.get("kd", "1 1 1").split())
        red, green, blue = (kd * 3)[:3] if len(kd) == 1 else (*kd, *[0.0] * 3)[:3]
        return ObjMaterial((red, green, blue), alpha)
    if color.file not in images:
        data = local_bytes(path, color.file.replace("\\", "/"), budget)
        images[color.file] = decode_texture(f"{path}: texture {color.file!r:.80}", data, budget)
    scale = [*_floats(where, color.options.get("-s", [])), 1.0, 1.0]
    offset = [*_floats(where, color.options.get("-o", [])), 0.0, 0.0]
    clamp = color.options.get("-clamp", ["off"])[0].lower() == "on"
    # modellers leave any Kd beside a texture and ignore it
    return ObjMaterial(
        alpha=alpha,
        texture=images[color.file],
        scale=(scale[0], scale[1]),
        offset=(offset[0], offset[1]),
        wrap="clamp" if clamp else "repeat",
    )


def _floats(where: str, words: list[str]) -> list[float]:
    try:
        values = [float(word) for word in words]
    except ValueError:
        values = [np.nan]
    if not np.isfinite(values).all():
        raise MeshError(f"{where} has {' '.join(words)!r:.80} where numbers belong; correct it")
    return values


def _map(where: str, statement: str) -> _Map:
    """Take a map statement apart; what follows the options is the file name, spaces included."""
    words, out = statement.split(), _Map()
    while words and words[0] in _MAP_OPTIONS:
        option = words.pop(0)
        values = out.options[option] = words[:1]
        del words[:1]
        # -o, -s and -t may give fewer values than they can take
        while len(values) < _MAP_OPTIONS[option] and words and _NUMBER.fullmatch(words[0]):
            values.append(words.pop(0))
    out.file = " ".join(words)
    return out
