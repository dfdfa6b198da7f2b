"""The container of a glTF or GLB file, read with suspicion: sizes, URIs, extensions.

Nothing here trusts a number of the file. What is damaged, leaves the folder or needs an extension
that is not implemented is refused with its name, before any other library sees the bytes.
"""

from __future__ import annotations

import base64
import binascii
import json
import struct
from pathlib import Path
from typing import Any
from urllib.parse import unquote

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
}
_HARMLESS = ("KHR_materials_", "KHR_lights_punctual", "KHR_xmp", "EXT_lights_", "KHR_animation_")


def read_container(path: Path, data: bytes) -> tuple[Json, list[bytes]]:
    """Split a file into its JSON header and its buffers.

    Args:
        path: The file: its suffix says GLB or glTF, its folder bounds external URIs.
        data: Its content.

    Returns:
        The header and one bytes object a buffer. A buffer that an extension declares as a
        fallback without data is empty.

    Raises:
        MeshError: Truncated, damaged, of another version, or a URI outside the folder.
    """
    if path.suffix.lower() == ".glb":
        header, chunk = _split_glb(path, data)
    else:
        header, chunk = _parse_json(path, data), b""
    version = str(header.get("asset", {}).get("version", "2.0"))
    if not version.startswith("2."):
        raise MeshError(f"{path}: glTF version {version} is not supported; convert it to 2.0")
    buffers = []
    for i, buffer in enumerate(header.get("buffers", [])):
        found = _buffer(path, i, buffer, chunk)
        need = int(buffer["byteLength"])
        fallback = "EXT_meshopt_compression" in buffer.get("extensions", {})
        if len(found) < need and not (fallback and not found):
            raise MeshError(
                f"{path}: buffer {i} has {len(found)} of its {need} bytes; the file is truncated"
            )
        buffers.append(found)
    return header, buffers


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
        if name == "KHR_texture_basisu":
            raise MeshError(
                f"{path}: its textures are KTX2 (KHR_texture_basisu), which cannot be read; "
                "convert them to PNG or JPEG, for example with gltf-transform"
            )
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
    folder = path.parent.resolve()
    target = (folder / name).resolve()
    outside = target != folder and folder not in target.parents
    if "://" in name or "\\" in name or "\0" in name or Path(name).is_absolute() or outside:
        raise MeshError(
            f"{path}: refers to {uri!r}, which is outside its folder; copy that file beside it "
            "and correct the reference"
        )
    if not target.is_file():
        raise MeshError(f"{path}: refers to {uri!r}, which is not there; put it beside the mesh")
    return target


def resolve_uri(path: Path, uri: str) -> bytes:
    """Return the bytes behind a data URI or a local file.

    Args:
        path: The mesh file.
        uri: As written in the file.

    Returns:
        The bytes.

    Raises:
        MeshError: See :func:`local_file`; or the data URI is damaged.
    """
    if not uri.startswith("data:"):
        return local_file(path, uri).read_bytes()
    head, _, body = uri.partition(",")
    try:
        return (
            base64.b64decode(body, validate=True) if ";base64" in head else unquote(body).encode()
        )
    except binascii.Error as error:
        raise MeshError(f"{path}: a data URI is not valid base64; the file is damaged") from error


def _split_glb(path: Path, data: bytes) -> tuple[Json, bytes]:
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
    return _parse_json(path, chunks[_JSON_CHUNK]), chunks.get(_BIN_CHUNK, b"")


def _parse_json(path: Path, text: bytes) -> Json:
    try:
        header = json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise MeshError(f"{path}: its JSON cannot be read ({error}); it is damaged") from error
    if not isinstance(header, dict):
        raise MeshError(f"{path}: its JSON is not a glTF object")
    return header


def _buffer(path: Path, index: int, buffer: Json, chunk: bytes) -> bytes:
    if "uri" in buffer:
        return resolve_uri(path, str(buffer["uri"]))
    return chunk if index == 0 else b""
