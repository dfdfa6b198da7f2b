"""A model folder as a stock PEFT folder, with the head and how to use both without equifeat."""

from __future__ import annotations

import copy
from pathlib import Path

from equifeat.checkpoint import load_model
from equifeat.errors import ExportError
from equifeat.export.foreign import (
    FORMULAS,
    add_facts,
    check_out,
    contents,
    difference,
    facts,
    snippet,
    write_head,
)
from equifeat.files import atomic_folder
from equifeat.model.adapter import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    adapts_stored_weight,
    merge_with_peft,
)
from equifeat.model.extractor import FeatureExtractor

_FILES = {ADAPTER_CONFIG, ADAPTER_WEIGHTS}

_README = """# LoRA of {name} for PEFT

`adapter_model.safetensors` and `adapter_config.json` are an ordinary PEFT adapter of timm's
`{name}`. `head.safetensors` is what comes after it{no_head}: {formula} on the map of the patch
tokens. The facts are in `config.json`. The ViT's own weights are not here: {where}.
{caution}
With timm, PEFT and torch only, in this folder:

{code}

{unmerged}

Points are {points}.
"""

_MERGE_ONLY = """`merge_and_unload()` is needed: this model's attention reads `qkv.weight` and never
calls `qkv`, so an unmerged PEFT layer would do nothing, without any error."""
_EITHER = """`merge_and_unload()` may be left out: `vit.base_model.model.forward_features` then
gives the same tokens, somewhat slower, and LoRA can train on."""

_REFERENCE = """
**Only images of {h} x {w} pixels give this model's own features.** It was trained with positions
resampled as the reference does, which timm does not do; at that size nothing is resampled.
"""


def export_peft(folder: str | Path, out: str | Path, weights: str | None = None) -> str:
    """Write a PEFT folder, with head.safetensors, config.json and README.md.

    Args:
        folder: The model folder.
        out: Where to write; a new folder.
        weights: Another place to take the backbone's weights from; they are not written, but the
            export is checked with them.

    Returns:
        What was written, in a few sentences.

    Raises:
        ExportError: The folder is there already, or the model has no LoRA.
        CheckpointError: The model folder is wrong.
        WeightsError: The backbone's weights cannot be had.
    """
    out = Path(out)
    check_out(out)
    extractor = load_model(folder, weights=weights)
    backbone, adapter = extractor.backbone, extractor.adapter
    if adapter is None:
        raise ExportError(
            f"{folder} has no LoRA, only a head ({extractor.head.kind}): give --to timm, which "
            "writes the backbone's weights and the head"
        )
    p, reference = backbone.patch_size, backbone.position == "reference"
    size_hw = backbone.native_hw if reference else (5 * p, 7 * p)
    with atomic_folder(out) as new:
        adapter.save_peft(new, backbone.blocks, backbone.name)
        for extra in {path.name for path in new.iterdir()} - _FILES:
            (new / extra).unlink()  # peft's empty template of a card
        vit = merge_with_peft(copy.deepcopy(backbone.model), new)
        off = difference(extractor, vit.forward_features, size_hw)
        add_facts(new / "config.json", facts(extractor))
        write_head(extractor, new)
        (new / "README.md").write_text(_readme(extractor), encoding="utf-8")
    caution = ""
    if reference:
        h, w = size_hw
        caution = f" Only images of {h} × {w} pixels give these features: timm resamples otherwise."
    return (
        f"Wrote {out}: a PEFT adapter of timm's {backbone.name} ({contents(extractor)}). Merged by "
        f"PEFT, features differ from equifeat's by {off:.1e} of the largest feature.{caution}"
    )


def _readme(extractor: FeatureExtractor) -> str:
    backbone, kind = extractor.backbone, extractor.head.kind
    make = f'timm.create_model("{backbone.name}", num_classes=0, dynamic_img_size=True'
    if backbone.source.kind == "hub":
        where = "timm downloads them"
        setup = [f"vit = {make}, pretrained=True)"]
    else:
        digest = backbone.weights_hash()[:16]
        where = f"put them here as `backbone.safetensors` (SHA-256 of the tensors `{digest}…`)"
        setup = [
            f"vit = {make})",
            'vit.load_state_dict(load_file(folder / "backbone.safetensors"))',
        ]
    code = snippet(
        extractor,
        None,
        ["import peft", "import timm", "from safetensors.torch import load_file"],
        [*setup, "vit = peft.PeftModel.from_pretrained(vit, folder).merge_and_unload().eval()"],
        "vit.forward_features((images - mean) / std)",
    )
    h, w = backbone.native_hw
    return _README.format(
        name=backbone.name,
        where=where,
        no_head=" (there is none here)" if kind == "none" else "",
        formula=f"`{FORMULAS[kind]}`",
        caution=_REFERENCE.format(h=h, w=w) if backbone.position == "reference" else "",
        code=code,
        unmerged=_MERGE_ONLY if adapts_stored_weight(backbone.blocks) else _EITHER,
        points=facts(extractor)["pixel_convention"],
    )
