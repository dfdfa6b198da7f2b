"""The container of a glTF or GLB file, read with suspicion: sizes, URIs, extensions.

Nothing here trusts a number of the file. What is damaged, leaves the folder or needs an extension
that is not implemented is refused with its name, before any other library sees the bytes.
"""

from __future__ import annotations

import base64
import json
import struct
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from data_prep.limits import Budget
from equifeat.errors import MeshError

Json = dict[str, Any]

_JSON_CHUNK, _BIN_CHUNK = 0x4E4F534A, 0x004E4942
# What data_prep.gltf carries out. Materials' extensions change the look only and are ignored.
IMPLEMENTED = {
    "KHR_draco_mesh_compression",
    "EXT_meshopt_compression",
    "KHR_mesh_quantization",
    "KHR_texture_transform",
    "EXT_mesh_gpu_instancing",
    "EXT_texture_webp",
    "KHR_texture_basisu",
}
_HARMLESS = ("KHR_materials_", "KHR_lights_punctual", "KHR_xmp", "EXT_lights_", "KHR_animation_")


def read_container(path: Path, data: bytes, budget: Budget) -> tuple[Json, list[bytes]]:
    """Split a file into its JSON header and its buffers.

    Args:
        path: The file: its suffix says GLB or glTF, its folder bounds external URIs.
        data: Its content.
        budget: Accounts for the header's values and for external files.

    Returns:
        The header and one bytes object a buffer. A buffer that an extension declares as a
        fallback without data is empty.

    Raises:
        MeshError: Truncated, damaged, of another version, or a URI outside the folder.
    """
    if path.suffix.lower() == ".glb":
        header, chunk = _split_glb(path, data, budget)
    else:
        header, chunk = _parse_json(path, data, budget), b""
    version = str(header.get("asset", {}).get("version", "2.0"))
    if not version.startswith("2."):
        raise MeshError(f"{path}: glTF version {version} is not supported; convert it to 2.0")
    buffers = []
    for i, buffer in enumerate(header.get("buffers", [])):
        found = _buffer(path, i, buffer, chunk, budget)
        need = whole(path, buffer["byteLength"], "byteLength")
        fallback = "EXT_meshopt_compression" in buffer.get("extensions", {})
        if len(found) < need and not (fallback and not found):
            raise MeshError(
                f"{path}: buffer {i} has {len(found)} of its {need} bytes; the file is truncated"
            )
        buffers.append(found)
    return header, buffers


def whole(path: Path, value: Any, what: str) -> int:
    """Return a count, offset or index of the header, which must be a whole number from 0 up.

    Args:
        path: For the message.
        value: What the header holds, of any type.
        what: What the message calls it.

    Returns:
        The number.

    Raises:
        MeshError: It is anything else.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**53:
        raise MeshError(f"{path}: {what} is {value!r:.40}, which cannot be; the file is damaged")
    return value


def entry(path: Path, header: Json, kind: str, index: Any) -> Json:
    """Return an object of one of the header's lists.

    Args:
        path: For the message.
        header: The glTF header.
        kind: Name of the list, for example "meshes".
        index: What refers to it, of any type.

    Returns:
        The object.

    Raises:
        MeshError: There is no such entry, or it is no object.
    """
    number, entries = whole(path, index, f"a reference to {kind}"), header.get(kind, [])
    if not isinstance(entries, list) or number >= len(entries):
        count = len(entries) if isinstance(entries, list) else 0
        raise MeshError(f"{path}: refers to {kind}[{number}] of {count}; the file is damaged")
    if not isinstance(entries[number], dict):
        raise MeshError(f"{path}: {kind}[{number}] is not an object; the file is damaged")
    found: Json = entries[number]
    return found


def check_extensions(path: Path, header: Json) -> None:
    """Refuse what the file needs and this project does not do.

    Args:
        path: For the message.
        header: The glTF header.

    Raises:
        MeshError: A required extension is not implemented, or its decoder is not installed.
    """
    required = list(header.get("extensionsRequired", []))
    for name in required:
        if name not in IMPLEMENTED and not name.startswith(_HARMLESS):
            raise MeshError(
                f"{path}: needs the glTF extension {name}, which is not supported; "
                "export it without"
            )
    packages = {
        "KHR_draco_mesh_compression": "DracoPy",
        "EXT_meshopt_compression": "meshoptimizer",
    }
    for name, package in packages.items():
        if name in required or name in header.get("extensionsUsed", []):
            try:
                __import__(package)
            except ImportError as error:
                raise MeshError(
                    f"{path}: its geometry is compressed ({name}) and the decoder {package} is "
                    'not installed: pip install "equifeat[formats]"'
                ) from error


def local_file(path: Path, uri: str) -> Path:
    """Find a file that a mesh file refers to, in its own folder or below.

    Args:
        path: The mesh file.
        uri: A relative reference, percent-encoded or not.

    Returns:
        The file.

    Raises:
        MeshError: The reference leaves the folder, even through a link, or nothing is there.
    """
    name = unquote(uri)
    foreign = "://" in name or "\\" in name or "\0" in name or Path(name).is_absolute()
    try:
        folder = path.parent.resolve()
        target = folder if foreign else (folder / name).resolve()
        outside = foreign or (target != folder and folder not in target.parents)
        found = not outside and target.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # too long, not encodable, a loop of links
        raise MeshError(f"{path}: refers to {uri!r:.200}, which is no file name") from error
    if outside:
        raise MeshError(
            f"{path}: refers to {uri!r:.200}, which is outside its folder; copy that file beside "
            "it and correct the reference"
        )
    if not found:
        raise MeshError(
            f"{path}: refers to {uri!r:.200}, which is not there; put it beside the mesh"
        )
    return target


def local_bytes(path: Path, uri: str, budget: Budget) -> bytes:
    """Read a file that a mesh file refers to.

    Args:
        path: The mesh file.
        uri: A relative reference, percent-encoded or not.
        budget: Accounts for its bytes before they are read.

    Returns:
        Its content.

    Raises:
        MeshError: See `local_file`; or it cannot be read, or is too large.
    """
    target = local_file(path, uri)
    try:
        budget.file_bytes(target.stat().st_size)
        return target.read_bytes()
    except OSError as error:
        raise MeshError(f"{path}: {uri!r:.200} cannot be read ({error.strerror})") from error


def resolve_uri(path: Path, uri: Any, budget: Budget) -> bytes:
    """Return the bytes behind a data URI or a local file.

    Args:
        path: The mesh file.
        uri: As written in the file, of any type.
        budget: Accounts for its bytes.

    Returns:
        The bytes.

    Raises:
        MeshError: See `local_bytes`; or the data URI is damaged.
    """
    if not isinstance(uri, str):
        raise MeshError(f"{path}: a URI is {uri!r:.40}, which cannot be; the file is damaged")
    if not uri.startswith("data:"):
        return local_bytes(path, uri, budget)
    # a header that repeats one long URI is no larger than its bytes, but count them all the same
    budget.file_bytes(len(uri))
    head, _, body = uri.partition(",")
    try:
        return (
            base64.b64decode(body, validate=True) if ";base64" in head else unquote(body).encode()
        )
    except ValueError as error:  # binascii.Error is one
        raise MeshError(f"{path}: a data URI is not valid base64; the file is damaged") from error


def _split_glb(path: Path, data: bytes, budget: Budget) -> tuple[Json, bytes]:
    if data[:4] != b"glTF":
        raise MeshError(f"{path}: is not a GLB file, it starts with {data[:4]!r}")
    if len(data) < 20:
        raise MeshError(f"{path}: the file is truncated after {len(data)} bytes")
    version, length = struct.unpack_from("<II", data, 4)
    if version != 2:
        raise MeshError(f"{path}: GLB version {version} is not supported; convert it to 2")
    if length > len(data):
        raise MeshError(
            f"{path}: the file is truncated, it has {len(data)} of its {length} bytes; "
            "download or export it again"
        )
    chunks: dict[int, bytes] = {}
    at = 12
    while at + 8 <= length:
        size, kind = struct.unpack_from("<II", data, at)
        if at + 8 + size > length:
            raise MeshError(f"{path}: a chunk of {size} bytes leaves the file; it is damaged")
        chunks.setdefault(kind, data[at + 8 : at + 8 + size])
        at += 8 + size
    if _JSON_CHUNK not in chunks:
        raise MeshError(f"{path}: has no JSON chunk; the file is damaged")
    return _parse_json(path, chunks[_JSON_CHUNK], budget), chunks.get(_BIN_CHUNK, b"")


def _parse_json(path: Path, text: bytes, budget: Budget) -> Json:
    # data URIs hold none of the three but one comma each
    budget.header_items(sum(text.count(c) for c in (b"[", b"{", b",")))
    try:
        header = json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise MeshError(f"{path}: its JSON cannot be read ({error}); it is damaged") from error
    if not isinstance(header, dict):
        raise MeshError(f"{path}: its JSON is not a glTF object")
    return header


def _buffer(path: Path, index: int, buffer: Json, chunk: bytes, budget: Budget) -> bytes:
    if "uri" in buffer:
        return resolve_uri(path, buffer["uri"], budget)
    return chunk if index == 0 else b""
