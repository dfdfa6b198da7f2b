"""The three file formats: npz, safetensors, and arrays of one zarr store. Whole files or none."""

from __future__ import annotations

import functools
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from equifeat.errors import FeaturesError, RecipeError, import_extra, suggest
from equifeat.features.record import About, parse_about
from equifeat.files import atomic_file, atomic_folder

Format = Literal["npz", "safetensors", "zarr"]
FORMATS: tuple[str, ...] = get_args(Format)
KEY = "equifeat"
"""Under this name every format holds the JSON of `About`."""

Array = np.ndarray[Any, np.dtype[Any]]
_DTYPES = ("float32", "float16")
CHUNK = "c.0.0.0"
"""File of the only chunk of an array in a zarr store."""
_MAX_JSON = 2**20


@dataclass(frozen=True)
class Store:
    """Where the features of a run are written.

    Args:
        kind: The format.
        out: Folder of files, or the zarr store.
    """

    kind: Format
    out: Path

    @property
    def side(self) -> Path:
        """Folder of index.json, lists and pictures: of a zarr store, one beside it."""
        return self.out.with_name(self.out.stem + "_report") if self.kind == "zarr" else self.out

    def file(self, name: str) -> str:
        """Return the path of an image's features relative to `out`."""
        return name if self.kind == "zarr" else f"{name}.{self.kind}"

    def path(self, name: str) -> Path:
        """Return the file of an image's features, or its folder in the zarr store."""
        return self.out / self.file(name)

    def header(self, name: str) -> About | None:
        """Return what is known of an image's features; None where they are missing or damaged."""
        try:
            return read_header(self.path(name))
        except FeaturesError:
            return None

    def write(self, about: About, features: Array) -> None:
        """Write the features of an image, whole or not at all.

        Args:
            about: What is known of them.
            features: (D, h, w).
        """
        path = self.path(about.name)
        if self.kind == "zarr":
            _write_zarr(self.out, path, about, features)
            return
        with atomic_file(path) as temporary:
            if self.kind == "npz":
                _write_npz(temporary, about, features)
            else:
                save_file({"features": np.ascontiguousarray(features)}, temporary, _texts(about))


def parse_out(out: Path, kind: str | None) -> Store:
    """Decide the format and the place.

    Args:
        out: What --out was: a folder, a path that ends in .zarr, or one of the three formats,
            which then goes to ./features (zarr to ./features.zarr).
        kind: What --format was.

    Returns:
        The store.

    Raises:
        RecipeError: There is no such format, or --out says another one.
    """
    if kind is not None and kind not in FORMATS:
        near = suggest(kind, FORMATS)
        raise RecipeError(f"--format {kind!r} is not one of {', '.join(FORMATS)}.{near}")
    said = str(out) if str(out) in FORMATS else "zarr" if out.suffix == ".zarr" else None
    if said is not None and kind not in (None, said):
        raise RecipeError(f"--out {out} means {said}, but --format is {kind}: give one of them")
    found = said or kind or "npz"
    if str(out) in FORMATS:
        out = Path("features.zarr" if found == "zarr" else "features")
    elif found == "zarr" and out.suffix != ".zarr":
        raise RecipeError(f"--out {out} must end in .zarr for --format zarr: a store is a folder")
    if found == "zarr":
        import_extra("zarr", "zarr", "--format zarr")
    return Store(found, out)  # type: ignore[arg-type]  # checked above


def read_header(path: Path) -> About:
    """Read what is known of the features of an image, not the features.

    Args:
        path: An .npz or .safetensors file, or the folder of an array in a zarr store.

    Returns:
        The record.

    Raises:
        FeaturesError: There are none, or they are damaged or not ours.
    """
    if path.suffix not in (".npz", ".safetensors") or path.is_dir():
        return _zarr_header(path)[0]
    try:
        if path.suffix == ".npz":
            with zipfile.ZipFile(path) as archive, archive.open(f"{KEY}.npy") as member:
                content = np.lib.format.read_array(
                    member, allow_pickle=False, max_header_size=_MAX_JSON
                )
                found = str(content)
        else:
            with safe_open(path, "np") as file:
                found = (file.metadata() or {}).get(KEY, "")
    except FileNotFoundError:
        raise FeaturesError(f"{path}: no such file") from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, SafetensorError) as error:
        raise _damaged(path, error) from error
    return parse_about(found, str(path))


def read_stored(path: Path) -> tuple[About, Array]:
    """Read the features of an image, strictly and without running anything.

    Args:
        path: As for `read_header`.

    Returns:
        The record, and (D, h, w) features.

    Raises:
        FeaturesError: There are none, or they are damaged or not ours.
    """
    if path.suffix not in (".npz", ".safetensors") or path.is_dir():
        about, shape, dtype = _zarr_header(path)
        features = _zarr_array(path, shape, dtype)
    else:
        about = read_header(path)
        try:
            if path.suffix == ".npz":
                with np.load(path, allow_pickle=False) as archive:
                    features = archive["features"]
            else:
                with safe_open(path, "np") as file:
                    features = file.get_tensor("features")
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise _damaged(path, error) from error
        except SafetensorError as error:
            raise _damaged(path, error) from error
    fits = features.ndim == 3 and features.shape[1:] == about.grid_hw
    if not fits or str(features.dtype) not in _DTYPES:
        raise FeaturesError(
            f"{path} holds features of shape {features.shape} and type {features.dtype} instead "
            f"of (D, {about.grid_hw[0]}, {about.grid_hw[1]}): compute it again"
        )
    return about, features


def open_store(store: Store, index: dict[str, Any]) -> None:
    """Make a zarr store's root, whose attributes are the index; nothing for the other formats.

    Args:
        store: The store.
        index: Content of index.json.
    """
    if store.kind == "zarr":
        zarr = import_extra("zarr", "zarr", "--format zarr")
        store.out.mkdir(parents=True, exist_ok=True)
        document = json.loads(_group_document())
        document["attributes"] = {KEY: index}
        with atomic_file(store.out / "zarr.json") as temporary:
            temporary.write_text(json.dumps(document), encoding="utf-8")
        zarr.open_group(store.out, mode="r")  # what we wrote is what zarr reads


def _write_npz(path: Path, about: About, features: Array) -> None:
    facts: dict[str, Any] = {
        "features": features,
        "size_hw": np.array(about.size_hw),
        "stride_yx": np.array(about.stride_yx),
        "margin_yx": np.array(about.margin_yx),
        KEY: np.array(about.as_json()),
    }
    with path.open("wb") as file:
        np.savez(file, **facts)


def _texts(about: About) -> dict[str, str]:
    """Return what a safetensors header can hold: text."""
    pairs = {key: getattr(about, key) for key in ("size_hw", "stride_yx", "margin_yx")}
    return {**{key: json.dumps(value) for key, value in pairs.items()}, KEY: about.as_json()}


def _write_zarr(root: Path, path: Path, about: About, features: Array) -> None:
    """Write one array with one chunk.

    The metadata is zarr's own; the files are written here because zarr passes every array through
    one thread, 7 ms each, and leaves an array of zeros when it is killed in between.
    """
    for folder in reversed(path.relative_to(root).parents[:-1]):
        _make_group(root / folder)
    document = json.loads(_array_document(features.shape, str(features.dtype)))
    pairs = {key: getattr(about, key) for key in ("size_hw", "stride_yx", "margin_yx")}
    document["attributes"] = {**pairs, KEY: about.as_dict()}
    with atomic_folder(path) as new:
        little = features.astype(features.dtype.newbyteorder("<"), order="C", copy=False)
        (new / CHUNK).write_bytes(little.data)
        (new / "zarr.json").write_text(json.dumps(document), encoding="utf-8")


def _make_group(folder: Path) -> None:
    if not (folder / "zarr.json").is_file():
        with atomic_file(folder / "zarr.json") as temporary:
            temporary.write_text(_group_document(), encoding="utf-8")


@functools.lru_cache(maxsize=256)
def _array_document(shape: tuple[int, ...], dtype: str) -> str:
    """Return zarr's own metadata of an array with one uncompressed chunk."""
    zarr = import_extra("zarr", "zarr", "--format zarr")
    kept: dict[str, Any] = {}
    zarr.create_array(
        zarr.storage.MemoryStore(kept),
        shape=shape,
        chunks=shape,
        dtype=dtype,
        compressors=None,
        filters=None,
        chunk_key_encoding={"name": "default", "separator": "."},
        dimension_names=("channel", "y", "x"),
        zarr_format=3,
    )
    return bytes(kept["zarr.json"].to_bytes()).decode()


@functools.cache
def _group_document() -> str:
    zarr = import_extra("zarr", "zarr", "--format zarr")
    kept: dict[str, Any] = {}
    zarr.create_group(zarr.storage.MemoryStore(kept), zarr_format=3)
    return bytes(kept["zarr.json"].to_bytes()).decode()


def _zarr_header(path: Path) -> tuple[About, tuple[int, ...], str]:
    """Read the metadata of an array that we wrote, without zarr, which is slow at it."""
    file = path / "zarr.json"
    try:
        if file.stat().st_size > _MAX_JSON:
            raise FeaturesError(f"{file} is larger than metadata can be")
        document = json.loads(file.read_text(encoding="utf-8"))
        about = document["attributes"][KEY]
        shape = tuple(int(n) for n in document["shape"])
        dtype = str(document["data_type"])
        size = (path / CHUNK).stat().st_size
    except FileNotFoundError:
        raise FeaturesError(f"{path}: no features there") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path, error) from error
    if dtype not in _DTYPES or size != np.dtype(dtype).itemsize * np.prod(shape):
        raise FeaturesError(f"{path} has {size} bytes, which is not {shape} {dtype}: damaged")
    return parse_about(about, str(path)), shape, dtype


def _zarr_array(path: Path, shape: tuple[int, ...], dtype: str) -> Array:
    zarr = import_extra("zarr", "zarr", "reading a zarr store")
    try:
        array = zarr.open_array(path, mode="r")
        if array.shape != shape or str(array.dtype) != dtype:
            raise FeaturesError(f"{path} is not an array of {shape} {dtype}: damaged")
        found: Array = array[:]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from error
    return found


def _damaged(path: Path, error: BaseException) -> FeaturesError:
    words = " ".join(str(error).split()) or type(error).__name__
    return FeaturesError(f"{path} is damaged or holds no features ({words}): compute it again")
