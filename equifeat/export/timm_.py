"""A model folder as a timm model: merged weights, the head beside them, and how to use both."""

from __future__ import annotations

from pathlib import Path

from equifeat.checkpoint import load_model
from equifeat.export.foreign import (
    FORMULAS,
    add_facts,
    check_out,
    check_size,
    contents,
    difference,
    facts,
    size_to_compare,
    snippet,
    write_head,
)
from equifeat.files import atomic_folder
from equifeat.geometry.pixels import SizeHW
from equifeat.model.backbone import save_timm
from equifeat.model.extractor import FeatureExtractor
from equifeat.model.weights import State

_README = """# {name} for timm

`model.safetensors` has all weights of timm's `{name}`{lora}.
`head.safetensors` is what comes after it{no_head}: {formula} on the map of its patch tokens.
`config.json` is timm's own, with everything else under `equifeat`.
{sizes}
With timm and torch only, in this folder:

{code}

timm also opens the folder by itself, without the head:
`timm.create_model("local-dir:THIS_FOLDER", pretrained=True, num_classes=0)`, and after an upload
`"hf-hub:USER/NAME"`.

Points are {points}.
"""

_FIXED = """
**For images of {h} x {w} pixels only.** The position embedding is written for that size{why}.
The code below resizes every image to it.
"""


def timm_state(extractor: FeatureExtractor, size_hw: SizeHW | None = None) -> State:
    """Return a model's weights as timm's own model of that name takes them, strictly.

    Args:
        extractor: The model.
        size_hw: Height and width of the only images it is to take (timm's `img_size`); None keeps
            the position embedding as it is.

    Returns:
        All tensors by timm's names, LoRA folded in; without the head.

    Raises:
        ExportError: The size is not in whole patches.
    """
    check_size(extractor, size_hw)
    merged = extractor.merged()
    state: State = dict(merged.backbone.model.state_dict())
    if size_hw is not None and "pos_embed" in state:
        p = extractor.patch_size
        position = merged.backbone.position_embedding((size_hw[0] // p, size_hw[1] // p))
        assert position is not None
        state["pos_embed"] = position
    return {name: value.detach().cpu().contiguous() for name, value in state.items()}


def export_timm(
    folder: str | Path,
    out: str | Path,
    weights: str | None = None,
    *,
    size_hw: SizeHW | None = None,
) -> str:
    """Write a folder for timm: model.safetensors, head.safetensors, config.json, README.md.

    Args:
        folder: The model folder.
        out: Where to write; a new folder.
        weights: Another place to take the backbone's weights from.
        size_hw: Height and width of the only images it is to take; None for images of any size.

    Returns:
        What was written, in two sentences.

    Raises:
        ExportError: The folder is there already, the size does not fit, or the model needs one.
        CheckpointError: The model folder is wrong.
        WeightsError: The backbone's weights cannot be had.
    """
    out = Path(out)
    check_out(out)
    extractor = load_model(folder, weights=weights)
    name = extractor.backbone.name
    state = timm_state(extractor, size_hw)
    with atomic_folder(out) as new:
        vit = save_timm(name, state, new, size_hw)
        off = difference(extractor, vit.forward_features, size_to_compare(extractor, size_hw))
        add_facts(new / "config.json", facts(extractor, size_hw))
        write_head(extractor, new)
        (new / "README.md").write_text(_readme(extractor, size_hw), encoding="utf-8")
    of_size = "" if size_hw is None else f" for images of {size_hw[0]} × {size_hw[1]} pixels"
    return (
        f"Wrote {out}: timm's {name} ({contents(extractor)}){of_size}. timm's "
        f"features differ from equifeat's by {off:.1e} of the largest feature."
    )


def _readme(extractor: FeatureExtractor, size_hw: SizeHW | None) -> str:
    backbone, kind = extractor.backbone, extractor.head.kind
    size = "dynamic_img_size=True" if size_hw is None else f"img_size={size_hw}"
    setup = [
        f'vit = timm.create_model("{backbone.name}", num_classes=0, {size}).eval()',
        'vit.load_state_dict(load_file(folder / "model.safetensors"), strict=True)',
    ]
    code = snippet(
        extractor,
        size_hw,
        ["import timm", "from safetensors.torch import load_file"],
        setup,
        "vit.forward_features((images - mean) / std)",
    )
    reference = backbone.position == "reference"
    why = ", resampled as the reference does, which timm cannot" if reference else ""
    return _README.format(
        name=backbone.name,
        lora="" if extractor.adapter is None else ", with the LoRA updates added to q and v",
        no_head=" (there is none here)" if kind == "none" else "",
        formula=f"`{FORMULAS[kind]}`",
        sizes="" if size_hw is None else _FIXED.format(h=size_hw[0], w=size_hw[1], why=why),
        code=code,
        points=facts(extractor)["pixel_convention"],
    )
