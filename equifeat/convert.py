"""The convert command: a checkpoint of the reference implementation becomes a model folder."""

from __future__ import annotations

from pathlib import Path

from equifeat.checkpoint import save_model
from equifeat.errors import WeightsError
from equifeat.files import sha256_of
from equifeat.model.extractor import FeatureExtractor, Sampling
from equifeat.model.weights import PACKAGED_BACKBONE, packaged_available
from equifeat.reference_checkpoint import (
    RESOLUTION,
    TARGET_SIDE,
    backbone_name,
    import_reference,
)
from equifeat.reference_file import ReferenceTensors, read_reference

_NAME = "3DCorrEnhance"


def convert_command(
    checkpoint: str | Path,
    out: Path,
    backbone: str = "dinov2-small",
    weights: str = "auto",
    sampling: Sampling = "exact",
) -> str:
    """Write a model folder from a checkpoint of 3DCorrEnhance.

    Args:
        checkpoint: The Lightning .ckpt file; no code of it is run.
        out: The model folder to write.
        backbone: What it was trained on: dinov2-small, -base, -large or -giant, dinov2-reg-small, …
            (with registers), mae-base, clip-base, deit3-base, or the name of a timm ViT.
        weights: The backbone's weights: auto, hub, packaged or a file.
        sampling: exact, or reference to repeat its faulty sampling of patches of 16 pixels.

    Returns:
        What was found, what was written and how to use it.

    Raises:
        CheckpointError: The file is not a checkpoint of it, or does not fit the backbone.
        ModelNameError: There is no such backbone.
        WeightsError: The backbone's weights cannot be had.
    """
    path, out = Path(checkpoint), Path(out)
    tensors = read_reference(path)
    name = backbone_name(backbone)
    if weights == "auto":
        weights = "packaged" if name == PACKAGED_BACKBONE and packaged_available() else "hub"
    if weights == "random":
        raise WeightsError(
            "--weights random makes no sense for a trained checkpoint: give hub, packaged or a file"
        )
    extractor = import_reference(path, backbone, weights, sampling=sampling)
    source = {
        "file": path.name,
        "sha256": sha256_of(path),
        "epoch": tensors.epoch,
        "global_step": tensors.step,
    }
    card = {
        "summary": f"A checkpoint of {_NAME} (arXiv 2411.19458), converted to equifeat's format.",
        "converted from": f"`{path.name}`, SHA-256 `{source['sha256']}`",
        "resolution": f"{RESOLUTION} patches on the longer side, as in its training",
    }
    if extractor.sampling == "reference":
        card["sampling"] = (
            f"points are multiplied by {extractor.patch_size}/14, a fault of {_NAME} repeated to "
            "reproduce its published numbers; see docs/convert.md"
        )
    recipe = {"converted_from": {"code": _NAME, **source}, "resolution": RESOLUTION}
    save_model(extractor, out, recipe=recipe, card=card)
    return "\n".join([_found(path, tensors, extractor), *_use(out, extractor, sampling)])


def _found(path: Path, tensors: ReferenceTensors, extractor: FeatureExtractor) -> str:
    """Say what is in the checkpoint."""
    count = sum(value.numel() for value in tensors.named().values())
    when = "" if tensors.step is None else f" after {tensors.step:,} steps"
    backbone = extractor.backbone
    return (
        f"{path.name}: {_NAME}{when}, LoRA of rank {tensors.rank} on q and v of the last "
        f"{extractor.tail_blocks} of {backbone.depth} blocks of {backbone.name} "
        f"({backbone.source.kind} weights), head conv 3x3, {count:,} parameters"
    )


def _use(out: Path, extractor: FeatureExtractor, sampling: Sampling) -> list[str]:
    """Say how to use what was written."""
    lines = [
        f"wrote {out}",
        f'use it with resolution {RESOLUTION} ({TARGET_SIDE}/8): equifeat.load("{out}")'
        f".dense(images, resolution={RESOLUTION})",
    ]
    patch = extractor.patch_size
    if extractor.sampling == "reference":
        lines.append(
            f"points are sampled at {patch}/14 of the right place, as {_NAME} does: for its "
            "published numbers only"
        )
    elif sampling == "reference":
        lines.append(f"--sampling reference changes nothing for this backbone (patch {patch})")
    elif patch != 14:
        lines.append(
            f"points are sampled where they are; {_NAME} itself samples patches of {patch} px at "
            f"{patch}/14 of the right place: for its published numbers give --sampling reference"
        )
    return lines
