"""OBJ and PLY files: the files they refer to, checked and handed over in memory.

Trimesh follows any path, reads the first material library only, drops textures whose statement has
options, paints what has no colour grey, and takes relative OBJ indices from the end of the file.
"""

from __future__ import annotations

import re
from io import BytesIO
from pathlib import Path
from typing import Any

import trimesh
from PIL import Image

from data_prep.gltf_guard import local_file
from equifeat.errors import MeshError

# Options of map_ statements and how many values they take (Wavefront MTL).
_MAP_OPTIONS = {
    **{"-o": 3, "-s": 3, "-t": 3, "-mm": 2},
    **dict.fromkeys(("-clamp", "-blendu", "-blendv", "-bm", "-boost", "-imfchan"), 1),
    **dict.fromkeys(("-texres", "-type", "-cc"), 1),
}
_NUMBER = re.compile(r"[-+]?[\d.]+(?:[eE][-+]?\d+)?")


def read_obj(path: Path, data: bytes) -> trimesh.Scene:
    """Read an OBJ file with all its material libraries.

    Args:
        path: The OBJ file.
        data: Its content.

    Returns:
        What trimesh makes of it.

    Raises:
        MeshError: A reference leaves the folder or is missing, or there are no triangles.
    """
    text = data.decode("utf-8", errors="replace").replace("\\\n", " ").replace("\\\r\n", " ")
    if not re.search(r"^\s*v\s", text, re.MULTILINE):
        raise MeshError(f"{path}: has no vertices ('v' lines); it is empty or not an OBJ file")
    if not re.search(r"^\s*f\s", text, re.MULTILINE):
        raise MeshError(f"{path}: it holds points or lines only, and no triangles to render")
    files: dict[str, bytes] = {}
    libraries: list[str] = []
    for line in re.findall(r"^\s*mtllib[ \t]+(.+?)\s*$", text, re.MULTILINE):
        # several names on one line, or one name with spaces
        whole = (path.parent / line).is_file()
        for name in [line] if whole else line.split():
            library = local_file(path, name).read_text(encoding="utf-8", errors="replace")
            libraries.append(_plain_library(path, library, files))
    text = re.sub(r"^\s*mtllib[^\n]*$", "", text, flags=re.MULTILINE)
    if re.search(r"^\s*f\s[^\n]*-", text, re.MULTILINE):
        text = _absolute_indices(path, text)
    files["all.mtl"] = "\n".join(libraries).encode()
    plain = f"mtllib all.mtl\n{text}\n".encode()
    return trimesh.load_scene(
        BytesIO(plain),
        file_type="obj",
        resolver=_Files(files),
        process=False,
        maintain_order=True,
    )


def read_ply(path: Path, data: bytes) -> trimesh.Scene:
    """Read a PLY file.

    Args:
        path: The PLY file.
        data: Its content.

    Returns:
        What trimesh makes of it.

    Raises:
        MeshError: Not a PLY file, cut off, or a texture that leaves the folder or is missing.
    """
    head, end, _ = data.partition(b"end_header")
    if not data.startswith(b"ply") or not end:
        raise MeshError(f"{path}: has no complete PLY header; it is truncated or not a PLY file")
    text = head.decode("ascii", errors="replace")
    declared = dict(re.findall(r"^element\s+(\w+)\s+(\d+)", text, re.MULTILINE))
    if int(declared.get("face", 0)) == 0:
        raise MeshError(f"{path}: it holds points or lines only, and no triangles to render")
    files = {
        name: local_file(path, name).read_bytes()
        for name in re.findall(r"^comment\s+TextureFile\s+(.+?)\s*$", text, re.MULTILINE)
    }
    scene = trimesh.load_scene(
        BytesIO(data), file_type="ply", resolver=_Files(files), process=False
    )
    for element, attribute in (("vertex", "vertices"), ("face", "faces")):
        found = sum(len(getattr(g, attribute, ())) for g in scene.geometry.values())
        if found < int(declared.get(element, 0)):
            raise MeshError(
                f"{path}: declares {declared[element]} elements of kind {element} and holds "
                f"{found}; it is truncated or damaged"
            )
    return scene


class _Files(trimesh.resolvers.Resolver):
    """Gives trimesh the files that were checked, and no other."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self._files = files

    def get(self, name: str) -> bytes:
        return self._files[name]

    def keys(self) -> Any:
        return self._files.keys()

    def write(self, name: str, data: Any) -> None:
        raise PermissionError(f"reading a mesh writes nothing, not {name}")

    def namespaced(self, namespace: str) -> Any:
        raise PermissionError(f"a mesh reads nothing from {namespace}")


def _plain_library(path: Path, library: str, files: dict[str, bytes]) -> str:
    """Reduce a material library to newmtl, Kd, d and map_Kd; put its images into files."""
    out: list[str] = []
    for block in re.split(r"^\s*(?=newmtl\s)", library, flags=re.MULTILINE):
        found = re.match(r"newmtl[ \t]+(.+?)\s*$", block, re.MULTILINE)
        if found is None:
            continue
        statements = {
            key.lower(): value
            for key, value in re.findall(r"^\s*(\w+)[ \t]+(.+?)\s*$", block, re.MULTILINE)
        }
        out.append(f"newmtl {found.group(1)}")
        color = statements.get("kd", "1 1 1")
        image, opacity = (_map_file(statements.get(k, "")) for k in ("map_kd", "map_d"))
        if opacity and opacity != image:
            raise MeshError(
                f"{path}: material {found.group(1)!r} has an opacity map of its own ({opacity}), "
                "which is not supported; put it into the alpha channel of map_Kd"
            )
        if image:
            name = f"map_{len(files)}"
            files[name] = _image_bytes(path, image)
            # modellers leave any Kd beside a texture and ignore it
            color = "1 1 1"
            out.append(f"map_Kd {name}")
        out.append(f"Kd {color}")
        alpha = statements.get("d", "1").split()[-1]
        if "d" not in statements and "tr" in statements:
            alpha = str(1.0 - float(statements["tr"].split()[-1]))
        out.append(f"d {alpha}")
    return "\n".join(out)


def _image_bytes(path: Path, name: str) -> bytes:
    data = local_file(path, name.replace("\\", "/")).read_bytes()
    try:
        with Image.open(BytesIO(data)):
            return data
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise MeshError(f"{path}: texture {name!r} cannot be decoded ({error})") from error


def _map_file(statement: str) -> str:
    """Drop the options of a map statement; what is left is the file name, spaces included."""
    words = statement.split()
    while words and words[0] in _MAP_OPTIONS:
        count = _MAP_OPTIONS[words.pop(0)]
        words.pop(0)
        # -o, -s and -t may give fewer values than they can take
        for _ in range(count - 1):
            if words and _NUMBER.fullmatch(words[0]):
                words.pop(0)
    return " ".join(words)


def _absolute_indices(path: Path, text: str) -> str:
    """Turn indices that count backwards from their own line into absolute ones."""
    counts = {"v": 0, "vt": 0, "vn": 0}
    lines = text.splitlines()
    for i, line in enumerate(lines):
        words = line.split()
        if words and words[0] in counts:
            counts[words[0]] += 1
        elif words and words[0] == "f" and "-" in line:
            corners = []
            for corner in words[1:]:
                fields = zip(corner.split("/"), ("v", "vt", "vn"), strict=False)
                numbers = [
                    (str(counts[kind] + 1 + int(n)) if n.startswith("-") else n)
                    for n, kind in fields
                ]
                if any(n.startswith("-") or n == "0" for n in numbers):
                    raise MeshError(f"{path}: line {i + 1} ({line.strip()}) counts back too far")
                corners.append("/".join(numbers))
            lines[i] = " ".join(["f", *corners])
    return "\n".join(lines)
