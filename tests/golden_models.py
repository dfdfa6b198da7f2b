"""Frozen model folders, one set a format version: how they are made and how they are read.

A new format version gets its set from the first code that writes it, once and for all:

    python -m tests.golden_models

writes tests/golden/model_v<VERSION>/ and refuses when it is there. A set is never written again.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from equifeat.checkpoint import VERSION, load_model, read_config, save_model
from equifeat.files import atomic_folder, sha256_of
from equifeat.model.backbone import Backbone, load_backbone
from equifeat.model.extractor import FeatureExtractor, build_extractor
from equifeat.model.head import HeadKind
from equifeat.model.weights import PACKAGED_BACKBONE, WeightsSource
from tests.helpers import GOLDEN
from tests.model.tiny import randomize

# Shared by the sets of all versions. Random weights are stored too: torch's generator and timm's
# starting values may change.
BACKBONES = GOLDEN / "model_backbones"
SUMS = "SHA256SUMS"
EXPECTED = "expected.safetensors"
_TINY = {"depth": 2, "embed_dim": 32, "num_heads": 2}


class Kind(NamedTuple):
    """One frozen model.

    Args:
        backbone: timm's name.
        options: What timm's own function is given to make it tiny; None for a model as it is.
        file: Its weights in BACKBONES; None for the packaged DINOv2.
        source: Where config.json says the weights are from.
        head: Kind of the head.
        lora_blocks: How many of the last blocks are adapted.
        position: How the position embedding is resampled.
    """

    backbone: str
    options: dict[str, Any] | None
    file: str | None
    source: WeightsSource
    head: HeadKind
    lora_blocks: int
    position: str = "timm"


_VIT = ("test_vit.r160_in1k", None, "test_vit.safetensors")
_EVA = "eva02_tiny_patch14_224.mim_in22k"
_DINOV2 = "vit_small_patch14_reg4_dinov2.lvd142m"
_GIVEN = WeightsSource("given")
KINDS: dict[str, Kind] = {
    # What is usual: a plain ViT, LoRA and a head, weights of a file.
    "residual": Kind(*_VIT, WeightsSource("file", "test_vit.safetensors"), "residual", 2),
    "conv": Kind(*_VIT, WeightsSource("random", seed=0), "conv", 2),
    "none": Kind(*_VIT, WeightsSource("hub"), "none", 2),
    "no_lora": Kind(*_VIT, WeightsSource("hub"), "residual", 0),
    # The other ways LoRA is stored and read.
    "eva_split": Kind(
        _EVA,
        {**_TINY, "img_size": 56, "qkv_fused": False},
        "eva_split.safetensors",
        _GIVEN,
        "residual",
        1,
    ),
    "eva_bias_beside_weight": Kind(
        _EVA, {**_TINY, "img_size": 56}, "eva_fused.safetensors", _GIVEN, "none", 2
    ),
    "registers_reference_position": Kind(
        _DINOV2,
        {**_TINY, "img_size": 70},
        "dinov2_reg4.safetensors",
        _GIVEN,
        "conv",
        1,
        "reference",
    ),
    # The real thing.
    "packaged": Kind(PACKAGED_BACKBONE, None, None, WeightsSource("packaged"), "none", 1),
}


def backbone(kind: Kind) -> Backbone:
    """Return the frozen backbone of a kind."""
    if kind.file is None:
        return load_backbone(kind.backbone, "packaged", position=kind.position)
    path = BACKBONES / kind.file
    if kind.options is None:
        return load_backbone(kind.backbone, str(path), position=kind.position)
    model = _create(kind)
    model.load_state_dict(load_file(path), strict=True)
    return Backbone(model, kind.backbone, kind.source, kind.position)


def load(folder: Path) -> FeatureExtractor:
    """Load a frozen folder as a user would: weights given by a file, or a backbone in memory."""
    kind = KINDS.get(folder.name)
    if kind is None:  # one made elsewhere, of which config.json names the file
        source = read_config(folder)["backbone"]["weights"]
        return load_model(folder, weights=str(BACKBONES / source["path"]))
    if kind.options is not None:
        return load_model(folder, backbone=backbone(kind))
    return load_model(folder, weights=str(BACKBONES / kind.file) if kind.file else None)


def features(extractor: FeatureExtractor, image: Tensor, keypoints: Tensor) -> dict[str, Tensor]:
    """Return what is frozen beside the inputs."""
    with torch.no_grad():
        found = {
            "dense": extractor.dense(image).features,
            "descriptors": extractor.at(image, keypoints),
        }
    return {name: value.contiguous() for name, value in found.items()}


def folders() -> list[Path]:
    """Return every frozen model folder of every version."""
    return sorted(path.parent for path in GOLDEN.glob("model_v*/**/config.json"))


def sums(root: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below a folder, by relative path."""
    files = sorted(path for path in root.rglob("*") if path.is_file() and path.name != SUMS)
    return {path.relative_to(root).as_posix(): sha256_of(path) for path in files}


def read_sums(root: Path) -> dict[str, str]:
    """Return what SHA256SUMS says, in the format of sha256sum."""
    lines = (root / SUMS).read_text(encoding="utf-8").splitlines()
    return {name: digest for digest, name in (line.split("  ", 1) for line in lines)}


def write_sums(root: Path) -> None:
    """Write SHA256SUMS."""
    lines = [f"{digest}  {name}\n" for name, digest in sums(root).items()]
    (root / SUMS).write_text("".join(lines), encoding="utf-8")


def _create(kind: Kind) -> Any:
    options = kind.options or {}
    return timm.create_model(kind.backbone, num_classes=0, dynamic_img_size=True, **options)


def make_backbones() -> None:
    """Write the backbones' weights where they are missing."""
    BACKBONES.mkdir(exist_ok=True)
    for kind in KINDS.values():
        if kind.file is None or (BACKBONES / kind.file).exists():
            continue
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            state = _create(kind).state_dict()
            for name, value in state.items():
                if "gamma" in name:  # layer scales start near zero and would hide the blocks
                    value.fill_(0.5)
                value.add_(torch.randn_like(value), alpha=0.05)
                # Few digits: the file packs to half its size.
                value.copy_(value.bfloat16().float())
        save_file(state, BACKBONES / kind.file)
    write_sums(BACKBONES)


def make_set(root: Path) -> None:
    """Write the set of the present format version."""
    if root.exists():
        raise SystemExit(f"{root} is there already: frozen models are never written again")
    with atomic_folder(root) as new:
        for seed, (name, kind) in enumerate(KINDS.items()):
            own = backbone(kind)
            own.source = kind.source
            extractor = build_extractor(
                own, head=kind.head, lora_rank=2, lora_alpha=3.0, lora_blocks=kind.lora_blocks
            ).eval()
            if extractor.adapter is not None:
                randomize(extractor.adapter, seed)
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for parameter in extractor.head.parameters():
                    parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
            folder = save_model(extractor, new / name, recipe={"steps": 3})
            # No whole patches, and another grid than any position embedding: both are resized.
            image = torch.rand(1, 3, 75, 103, generator=generator)
            keypoints = torch.tensor([[[0.5, 0.5], [51.25, 30.0], [102.5, 74.5]]])
            inputs = {"image": image, "keypoints": keypoints}
            save_file({**inputs, **features(extractor, image, keypoints)}, folder / EXPECTED)
        write_sums(new)


if __name__ == "__main__":
    # The path of a weights file is written into config.json: let it be a bare name.
    make_backbones()
    os.chdir(BACKBONES)
    make_set(GOLDEN / f"model_v{VERSION}")
