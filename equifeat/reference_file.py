"""Files of the reference implementation (3DCorrEnhance): read without trust, checked, named.

Such a Lightning file holds the convolution in `state_dict['refine_conv']` and, at the top level,
`w_a_000`, … and `w_b_000`, … : LoRA's two matrices for q and v of the first adapted block, q and v
of the next, and so on. The backbone is not in it, nor its name.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from equifeat.errors import CheckpointError
from equifeat.model.weights import describe_mismatch

# The largest backbone's file, with the optimiser's state, has a quarter of a gigabyte.
_MAX_BYTES = 2**31
# Wider than any ViT: a file may claim any shape without holding the numbers.
_MAX_DIM = 16384


class ReferenceTensors(NamedTuple):
    """What a reference checkpoint holds.

    Attributes:
        down: (r, D) each: the first of LoRA's two matrices, for q, v, q, v, … of the blocks.
        up: (D, r) each: the second.
        conv: `weight` (D, D, 3, 3) and `bias` (D).
        epoch: Lightning's count, or None.
        step: Lightning's count of optimiser steps, or None.
    """

    down: list[Tensor]
    up: list[Tensor]
    conv: dict[str, Tensor]
    epoch: int | None
    step: int | None

    @property
    def rank(self) -> int:
        """Rank r of the updates."""
        return int(self.down[0].shape[0])

    @property
    def dim(self) -> int:
        """Width D of the backbone it was trained on."""
        return int(self.down[0].shape[1])

    def named(self) -> dict[str, Tensor]:
        """Return all tensors by their names in the file; those of the convolution are joined."""
        found = {f"w_a_{index:03d}": value for index, value in enumerate(self.down)}
        found |= {f"w_b_{index:03d}": value for index, value in enumerate(self.up)}
        return found | {f"refine_conv.{key}": value for key, value in self.conv.items()}


def read_reference(path: str | Path) -> ReferenceTensors:
    """Read the tensors of a reference checkpoint without running code from it.

    Args:
        path: The .ckpt file.

    Returns:
        The tensors: names in the reference's order, shapes that fit each other, finite numbers.

    Raises:
        CheckpointError: It is missing, damaged, unsafe, another kind of file, or does not hold
            exactly what the reference writes; the message says what.
    """
    path = Path(path)
    content = _load(path)
    conv = _conv(content, path)
    parts = [_numbered(content, prefix, path) for prefix in ("w_a_", "w_b_")]
    (down_keys, up_keys) = parts
    if len(down_keys) != len(up_keys):
        short = "w_a" if len(down_keys) < len(up_keys) else "w_b"
        raise CheckpointError(
            f"{path} lacks '{short}_{min(len(down_keys), len(up_keys)):03d}' "
            f"(it has {len(down_keys)} w_a but {len(up_keys)} w_b)"
        )
    if len(down_keys) % 2:
        raise CheckpointError(
            f"{path} lacks 'w_a_{len(down_keys):03d}': q and v of a block make pairs, "
            f"and it has {len(down_keys)}"
        )
    named = {key: content[key] for keys in parts for key in keys}
    named |= {f"refine_conv.{key}": value for key, value in conv.items()}
    for key, value in named.items():
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise CheckpointError(f"{path} holds a {kind} as {key!r} instead of a tensor")
        if not value.is_floating_point():
            raise CheckpointError(f"{path} holds {key!r} as {value.dtype}, not as floats")
    counts = [content.get(key) for key in ("epoch", "global_step")]
    epoch, step = (count if isinstance(count, int) else None for count in counts)
    down = [content[key].detach() for key in down_keys]
    up = [content[key].detach() for key in up_keys]
    tensors = ReferenceTensors(down, up, {k: v.detach() for k, v in conv.items()}, epoch, step)
    _check_shapes(tensors, path)
    for key, value in tensors.named().items():
        if not bool(torch.isfinite(value).all()):
            raise CheckpointError(
                f"{path} holds NaN or infinite numbers in {key!r}: its training diverged or the "
                "file is damaged, take another checkpoint"
            )
    return tensors


def _load(path: Path) -> Mapping[str, Any]:
    """Unpickle plain data and tensors only."""
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder: give the .ckpt file in it")
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: give a .ckpt file of the reference")
    try:
        _check_size(path)
        with warnings.catch_warnings():
            # torch remarks on pickles that it will then refuse or read all the same
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # zipfile and torch raise a dozen types on damaged bytes
        raise CheckpointError(_why_unreadable(path, error)) from None
    if not isinstance(content, Mapping):
        kind = type(content).__name__
        raise CheckpointError(f"{path} holds a {kind}: not a reference checkpoint, nor any other")
    return content


def _check_size(path: Path) -> None:
    """Refuse a file that would fill the memory, also one that is packed."""
    size = path.stat().st_size
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            size = max(size, sum(item.file_size for item in archive.infolist()))
    if size > _MAX_BYTES:
        raise CheckpointError(
            f"{path} holds {size / 2**30:.1f} GiB, more than any reference checkpoint "
            f"({_MAX_BYTES / 2**30:.0f} GiB): give another file"
        )


def _is_whole_zip(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # it raises this for some damage
        return False


def _why_unreadable(path: Path, error: Exception) -> str:
    """Tell code, damage and other kinds of files apart."""
    forbidden = re.search(r"GLOBAL ([\w.]+)", str(error))
    if forbidden:
        return (
            f"{path} cannot be read without running its code: it asks for {forbidden[1]!r}, "
            "which is not plain data; get a checkpoint from who you trust, saved without it"
        )
    with path.open("rb") as file:
        start = file.read(4)
    # torch's older format begins with a pickle (protocol 2) of a long number
    if (start == b"PK\x03\x04" and not _is_whole_zip(path)) or start[:2] == b"\x80\x02":
        return f"{path} cannot be read: the file is cut short or damaged, copy it again"
    if not start:
        return f"{path} cannot be read: the file is empty"
    return f"{path} cannot be read: it is not a checkpoint that torch.save wrote"


def _conv(content: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """Return `state_dict['refine_conv']`, or say what the file is instead."""
    state = content.get("state_dict")
    conv = state.get("refine_conv") if isinstance(state, Mapping) else None
    if isinstance(state, Mapping) and isinstance(conv, Mapping):
        others = sorted(str(key) for key in state if key != "refine_conv")
        if others:
            raise CheckpointError(f"{path} holds {others[0]!r} in its state_dict, which is unknown")
        return conv
    keys = [str(key) for key in (*content, *(state if isinstance(state, Mapping) else ()))]
    if any(key.startswith("module.") for key in keys):
        why = (
            "its names begin with the 'module.' of DataParallel: save the checkpoint from the "
            "wrapped model, `model.module`"
        )
    elif any(key.startswith("refine_conv.") for key in keys):
        why = (
            "its state_dict has flat names like 'refine_conv.weight', but the reference nests them "
            "in state_dict['refine_conv']: it was saved anew by other code"
        )
    elif isinstance(state, Mapping):
        why = (
            f"not a reference checkpoint: its state_dict has no 'refine_conv' but {_listed(state)}"
        )
    elif any(key in content for key in ("optimizer_states", "param_groups")):
        why = "not a reference checkpoint: it holds the state of an optimizer and no weights"
    else:
        why = f"not a reference checkpoint: it has no state_dict but {_listed(content)}"
    raise CheckpointError(f"{path}: {why}")


def _listed(names: Iterable[Any], limit: int = 3) -> str:
    """Return the first names of a possibly long list."""
    shown = [repr(str(name))[:60] for name in names]
    return ", ".join(shown[:limit]) + (", …" if len(shown) > limit else "") or "nothing"


def _numbered(content: Mapping[str, Any], prefix: str, path: Path) -> list[str]:
    """Return the keys `prefix000`, `prefix001`, …: all there, none more, stored in this order."""
    keys = [str(key) for key in content if str(key).startswith(prefix)]
    wanted = [f"{prefix}{index:03d}" for index in range(len(keys))]
    strange = sorted(key for key in keys if not re.fullmatch(rf"{prefix}\d{{3}}", key))
    if strange:
        raise CheckpointError(f"{path} holds {strange[0]!r}, which the reference does not write")
    missing = sorted(set(wanted) - set(keys)) or ([] if keys else [f"{prefix}000"])
    if missing:
        has = f"it has {_listed(sorted(keys), 8)}"
        raise CheckpointError(f"{path} lacks {missing[0]!r} ({has})")
    if keys != wanted:
        raise CheckpointError(
            f"{path} holds {_listed(keys, 8)} in this order: the number says which of q and v of "
            "which block, and the reference writes them in order, so which is right is not known"
        )
    return keys


def _check_shapes(tensors: ReferenceTensors, path: Path) -> None:
    """Raise unless all shapes fit each other."""
    first = tuple(tensors.down[0].shape)
    if len(first) != 2 or 0 in first:
        raise CheckpointError(f"{path} holds 'w_a_000' of shape {first} instead of (rank, width)")
    if max(first) > _MAX_DIM:
        raise CheckpointError(f"{path} holds 'w_a_000' of shape {first}: no ViT is so wide")
    if first[0] > first[1]:
        raise CheckpointError(
            f"{path} holds 'w_a_000' of shape {first}, more ranks than channels: w_a and w_b are "
            "swapped"
        )
    rank, dim = first
    wanted: dict[str, tuple[int, ...]] = {}
    wanted |= {f"w_a_{index:03d}": (rank, dim) for index in range(len(tensors.down))}
    wanted |= {f"w_b_{index:03d}": (dim, rank) for index in range(len(tensors.up))}
    wanted |= {"refine_conv.weight": (dim, dim, 3, 3), "refine_conv.bias": (dim,)}
    found = tensors.named()
    # tensors without storage: only names and shapes are compared
    expected = {key: torch.empty(shape, device="meta") for key, shape in wanted.items()}
    problem = describe_mismatch(expected, found)
    if problem:
        raise CheckpointError(
            f"{path} does not fit itself (rank {rank} and width {dim} by 'w_a_000'): {problem}"
        )
