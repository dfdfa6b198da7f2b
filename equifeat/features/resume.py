"""The output folder: one run at a time, the same options, and nothing left over of killed runs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from equifeat._version import __version__
from equifeat.errors import FeaturesError, RecipeError
from equifeat.features.formats import CHUNK, Store, open_store
from equifeat.features.record import FORMAT, VERSION
from equifeat.files import InUseError, atomic_file, lock

INDEX = "index.json"
ITEMS = "items.jsonl"
FAILED = "failed.txt"
BASIS = "pca.safetensors"
_LOCK = ".lock"

CONVENTION = {
    "features": "array (D, h, w): channels, rows, columns",
    "pixels": "xy; the image's top-left corner is (0, 0), its first pixel's centre (0.5, 0.5)",
    "x": "feature [:, i, j] lies at x = margin_yx[1] + (j + 0.5) * stride_yx[1]",
    "y": "feature [:, i, j] lies at y = margin_yx[0] + (i + 0.5) * stride_yx[0]",
    "stride_yx": "(size_hw - 2 * margin_yx) / (h, w), in pixels of the image",
    "size_hw": "height and width of the image, upright by its EXIF orientation",
}


@contextmanager
def locked(store: Store) -> Iterator[None]:
    """Keep other processes out of an output folder while one writes to it.

    Args:
        store: The output.

    Raises:
        RecipeError: Another process writes there, or the place cannot be written to.
    """
    with ExitStack() as stack:
        try:
            store.side.mkdir(parents=True, exist_ok=True)
            # A file system without locks is written to without.
            stack.enter_context(lock(store.side / _LOCK))
        except InUseError as error:
            raise RecipeError(
                f"{store.out} is being written by another run ({error.holder}): wait for it, or "
                "choose another --out"
            ) from error
        except OSError as error:
            raise RecipeError(f"--out {store.out} cannot be written to ({error})") from error
        yield


def start(store: Store, identity: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """Take up an output folder, or begin one.

    Args:
        store: The output.
        identity: All that the files of one folder must have in common, by name.
        model: What index.json says about the model besides.

    Raises:
        RecipeError: The folder holds features of other options, or something else.
    """
    index = read_index(store)
    if index is None:
        there = [path for path in _entries(store) if path.name != _LOCK]
        if there:
            raise RecipeError(
                f"{store.out} is not a folder of features (it holds {min(there).name!r}): give a "
                "new --out"
            )
    else:
        # A run that was stopped before its first image binds nobody.
        if index["identity"] != dict(identity) and _any_features(store):
            _refuse_others(store, index, identity)
        if not index.get("complete"):
            _clean(store)
    write_index(store, identity, model, complete=False)


def read_index(store: Store) -> dict[str, Any] | None:
    """Read index.json.

    Args:
        store: The output.

    Returns:
        Its content, None when there is none.

    Raises:
        FeaturesError: It is damaged or from a newer version.
    """
    path = store.side / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if index["format"] != FORMAT or index["version"] != VERSION:
            raise FeaturesError(
                f"{path} has format {index['format']!r}, version {index['version']!r}; this "
                f"equifeat reads {FORMAT!r}, version {VERSION}: give another --out"
            )
        if not isinstance(index["identity"], dict):
            raise TypeError("identity")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise FeaturesError(f"{path} is damaged ({error}): give another --out") from error
    return dict(index)


def write_index(
    store: Store, identity: Mapping[str, Any], model: Mapping[str, Any], **facts: Any
) -> None:
    """Write index.json, and with it the root of a zarr store.

    Args:
        store: The output.
        identity: See `start`.
        model: See `start`.
        facts: What else is known: whether it is complete, how many images.
    """
    index = {
        "format": FORMAT,
        "version": VERSION,
        "equifeat": __version__,
        "model": dict(model),
        "identity": dict(identity),
        "convention": CONVENTION,
        "items": ITEMS,
        **facts,
    }
    open_store(store, index)
    with atomic_file(store.side / INDEX) as temporary:
        temporary.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_lists(store: Store, lines: Mapping[str, str], failed: Mapping[str, str]) -> int:
    """Write the list of images with features, and of those without.

    Args:
        store: The output.
        lines: JSON of the records by name; images of earlier runs stay on the list.
        failed: Reasons by name.

    Returns:
        How many images are on the list.
    """
    path = store.side / ITEMS
    known: dict[str, str] = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError, KeyError, TypeError):  # a list only: features tell themselves
                name = str(json.loads(line)["name"])
                if name not in failed and store.path(name).exists():
                    known[name] = line
    for name, line in lines.items():
        record = json.loads(line)
        kept = ("name", "size_hw", "grid_hw", "stride_yx", "margin_yx", "time")
        facts = {key: record[key] for key in kept if key in record}
        known[name] = json.dumps({**facts, "file": store.file(name)})
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(f"{known[name]}\n" for name in sorted(known))
    if failed:
        with atomic_file(store.side / FAILED) as temporary:
            text = "".join(f"{name}\t{reason}\n" for name, reason in sorted(failed.items()))
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    else:
        (store.side / FAILED).unlink(missing_ok=True)
    return len(known)


def _refuse_others(store: Store, index: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Raise when the folder's files were made in another way."""
    there = index["identity"]
    for key in sorted({*there, *identity}):
        if there.get(key) != identity.get(key):
            if key == "root":
                raise RecipeError(
                    f"{store.out} names images relative to {there.get(key)}, but these would be "
                    f"named relative to {identity.get(key)}: give --root, or another --out"
                )
            raise RecipeError(
                f"{store.out} holds features with {key} {_short(there.get(key))}, but now it is "
                f"{_short(identity.get(key))}: give another --out"
            )


def _any_features(store: Store) -> bool:
    ends = (".npz", ".safetensors", CHUNK)
    for folder in {store.out, store.side}:
        for _, _, files in os.walk(folder):
            if any(name.endswith(ends) and name != BASIS for name in files):
                return True
    return False


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 50 else f"{text[:16]}…"


def _entries(store: Store) -> list[Path]:
    folders = {store.out, store.side}
    return [path for folder in folders if folder.exists() for path in folder.iterdir()]


def _clean(store: Store) -> None:
    """Remove the temporary files of a run that was killed."""
    for folder in {store.out, store.side}:
        for here, folders, files in os.walk(folder):
            for name in [name for name in folders if name.startswith(".tmp_")]:
                shutil.rmtree(Path(here, name), ignore_errors=True)
                folders.remove(name)
            for name in files:
                if name.startswith(".tmp_"):
                    Path(here, name).unlink(missing_ok=True)
