"""A model folder as a DINOv2 model of Hugging Face's transformers, and onto one that a user has.

transformers' Dinov2Model resamples its position embedding without antialiasing, timm (and so this
project) with it. Dinov2WithRegistersModel does what timm does, and is the same network otherwise,
so it is what is written, with as many registers as there are, perhaps none.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from equifeat.checkpoint import CONFIG, load_model, read_config
from equifeat.errors import ExportError, import_extra
from equifeat.export.foreign import (
    FORMULAS,
    add_facts,
    check_out,
    contents,
    difference,
    facts,
    size_to_compare,
    snippet,
    write_head,
)
from equifeat.export.timm_ import timm_state
from equifeat.export.transformers_names import (
    TAKES,
    check_dinov2,
    checkpoint_names,
    dinov2_options,
    memory_name,
    to_timm_names,
    to_transformers_names,
)
from equifeat.files import atomic_folder
from equifeat.geometry.pixels import SizeHW
from equifeat.model.backbone import Backbone, backbone_from_state
from equifeat.model.extractor import FeatureExtractor
from equifeat.model.head import Head

_WEIGHTS = "model.safetensors"
_PURPOSE = "a model of transformers"

_README = """# {name} for transformers

`transformers.AutoModel.from_pretrained(THIS_FOLDER)` opens it, as a `{cls}`{lora}.
`head.safetensors` is what comes after it{no_head}: {formula} on the map of the patch tokens.
{sizes}
With transformers and torch only, in this folder:

{code}

`AutoImageProcessor.from_pretrained(THIS_FOLDER)` scales and normalises as this does, but does not
resize: give it images whose sides are multiples of {patch}.

Points are {points}.
"""

_ANY = """
Features are those of equifeat at every image size. With `Dinov2Model` they would not be, because it
resamples the position embedding otherwise; the two are the same network with {registers} registers.
"""
_FIXED = """
**For images of {h} x {w} pixels only.** The position embedding is written for that size; the code
below resizes every image to it.
"""


def export_transformers(
    folder: str | Path,
    out: str | Path,
    weights: str | None = None,
    *,
    size_hw: SizeHW | None = None,
) -> str:
    """Write a folder that transformers' AutoModel opens, with head.safetensors and README.md.

    Args:
        folder: The model folder.
        out: Where to write; a new folder.
        weights: Another place to take the backbone's weights from.
        size_hw: Height and width of the only images it is to take, equal; None for any size.

    Returns:
        What was written, in two sentences.

    Raises:
        ExportError: The folder is there already, the size does not fit, or transformers' DINOv2
            cannot be this ViT.
        MissingExtraError: transformers is not installed.
        CheckpointError: The model folder is wrong.
        WeightsError: The backbone's weights cannot be had.
    """
    out = Path(out)
    check_out(out)
    transformers = _transformers()
    extractor = load_model(folder, weights=weights)
    with atomic_folder(out) as new:
        cls = _write(extractor, new, size_hw)
        model = _open(transformers.AutoModel, new)
        off = difference(extractor, _tokens_of(model), size_to_compare(extractor, size_hw))
        (new / "README.md").write_text(_readme(extractor, size_hw, cls), encoding="utf-8")
    return (
        f"Wrote {out}: transformers' {cls} with the weights of {extractor.backbone.name} "
        f"({contents(extractor)}). Its features differ from equifeat's by {off:.1e} of the largest "
        "feature."
    )


def to_transformers(extractor: FeatureExtractor, size_hw: SizeHW | None = None) -> Any:
    """Return a model as transformers' own, without the head.

    Args:
        extractor: The model.
        size_hw: Height and width of the only images it is to take, equal; None for any size.

    Returns:
        A Dinov2WithRegistersModel; with a size and without registers a Dinov2Model. Its
        `last_hidden_state`, without the class and register tokens, is what the head takes.

    Raises:
        ExportError: The size does not fit, or transformers' DINOv2 cannot be this ViT.
        MissingExtraError: transformers is not installed.
    """
    transformers = _transformers()
    with tempfile.TemporaryDirectory() as name:
        _write(extractor, Path(name), size_hw)
        model = _open(transformers.AutoModel, Path(name))
    difference(extractor, _tokens_of(model), size_to_compare(extractor, size_hw))
    return model


def load_onto(model: Any, folder: str | Path, size_hw: SizeHW | None = None) -> tuple[Any, Head]:
    """Put a model folder onto DINOv2 weights that transformers has loaded already.

    The weights must be those that the folder was trained on, to the bit. Features are equifeat's
    at 518 × 518, and at size_hw when it is given; elsewhere a Dinov2Model resamples positions in
    its own way, see docs/interop.md. A Dinov2WithRegistersModel resamples them as timm does.

    Args:
        model: A Dinov2Model or Dinov2WithRegistersModel in float32, such as
            facebook/dinov2-small; it is changed.
        folder: The model folder.
        size_hw: Height and width, equal, for which the model's position embedding is replaced by
            a resampled one; None keeps it.

    Returns:
        The model in eval mode, with the adapter added to its weights, and the head.

    Raises:
        ExportError: It is no such model, not in float32, or the size does not fit.
        CheckpointError: The folder is wrong, or was trained on other weights.
        WeightsError: The model has another size than the one that the folder names.
        MissingExtraError: transformers is not installed.
    """
    transformers = _transformers()
    kinds = (transformers.Dinov2Model, transformers.Dinov2WithRegistersModel)
    if not isinstance(model, kinds):
        raise ExportError(
            f"the adapter goes onto a Dinov2Model or Dinov2WithRegistersModel, not a "
            f"{type(model).__name__}: give its backbone (such as model.dinov2)"
        )
    if model.dtype != torch.float32:
        raise ExportError(
            f"the model is in {model.dtype}: load it with dtype=torch.float32, and convert it after"
        )
    depth, swiglu = model.config.num_hidden_layers, bool(model.config.use_swiglu_ffn)
    registers = getattr(model.config, "num_register_tokens", 0) > 0
    theirs = checkpoint_names({key: value.cpu() for key, value in model.state_dict().items()})
    state = to_timm_names(theirs, depth, swiglu, registers)
    spec = read_config(Path(folder))["backbone"]
    backbone = backbone_from_state(spec["name"], state, position=spec["position"])
    extractor = load_model(folder, backbone=backbone)
    _check_square(size_hw)
    merged = timm_state(extractor, size_hw or backbone.native_hw)
    patches = _patches(size_hw or backbone.native_hw, backbone)
    merged = to_transformers_names(merged, depth, patches, swiglu)
    own = model.state_dict()
    with torch.no_grad():
        for name, value in merged.items():
            if ".attention.attention." in name:
                own[name if name in own else memory_name(name)].copy_(value)
    if size_hw is not None:
        old = model.embeddings.position_embeddings
        position = merged["embeddings.position_embeddings"].to(old.device)
        model.embeddings.position_embeddings = nn.Parameter(position, old.requires_grad)
        model.config.image_size = size_hw[0]
    return model.eval(), extractor.head.to(model.device)


def _transformers() -> Any:
    return import_extra("transformers", "transformers", _PURPOSE)


def _open(cls: Any, folder: Path) -> Any:
    logging = _transformers().utils.logging
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return cls.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    finally:
        if bars:
            logging.enable_progress_bar()


def _tokens_of(model: Any) -> Any:
    def tokens(images: Tensor) -> Tensor:
        out: Tensor = model(pixel_values=images).last_hidden_state
        return out

    return tokens


def _patches(size_hw: SizeHW, backbone: Backbone) -> int:
    return (size_hw[0] // backbone.patch_size) * (size_hw[1] // backbone.patch_size)


def _check_square(size_hw: SizeHW | None) -> None:
    if size_hw is not None and size_hw[0] != size_hw[1]:
        raise ExportError(
            f"transformers' DINOv2 keeps the positions of square images only: give --height and "
            f"--width that are equal, not {size_hw[0]} and {size_hw[1]}"
        )


def _write(extractor: FeatureExtractor, folder: Path, size_hw: SizeHW | None) -> str:
    """Write config.json, model.safetensors, preprocessor_config.json and the head."""
    transformers = _transformers()
    backbone = extractor.backbone
    swiglu = check_dinov2(backbone)
    _check_square(size_hw)
    state = timm_state(extractor, size_hw)
    side = (size_hw or backbone.native_hw)[0]
    registers = backbone.num_prefix_tokens - 1
    patches = _patches((side, side), backbone)
    state = to_transformers_names(state, backbone.depth, patches, swiglu)
    with_registers = registers > 0 or size_hw is None
    options = dinov2_options(backbone, side)
    if with_registers:
        kind = "Dinov2WithRegisters"
        options["num_register_tokens"] = registers
    else:
        kind = "Dinov2"
        del state["embeddings.register_tokens"]
    config = getattr(transformers, f"{kind}Config")(**options)
    cls = getattr(transformers, f"{kind}Model")
    with torch.device("meta"):
        expected = checkpoint_names(cls(config).state_dict())
    wrong = sorted(
        name
        for name in expected.keys() | state.keys()
        if name not in expected or name not in state or expected[name].shape != state[name].shape
    )
    if wrong:
        raise ExportError(f"{backbone.name!r} differs from DINOv2 in {wrong[0]!r}: {TAKES}")
    config.architectures = [cls.__name__]
    config.save_pretrained(folder)
    add_facts(folder / CONFIG, facts(extractor, size_hw))
    save_file(
        {name: value.contiguous() for name, value in state.items()},
        folder / _WEIGHTS,
        metadata={"format": "pt"},
    )
    _write_processor(extractor, folder)
    write_head(extractor, folder)
    return str(cls.__name__)


def _write_processor(extractor: FeatureExtractor, folder: Path) -> None:
    """Write what AutoImageProcessor opens: scaling and statistics, no resizing, no cropping."""
    known = facts(extractor)
    content = {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": False,
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": known["mean"],
        "image_std": known["std"],
    }
    text = json.dumps(content, indent=2) + "\n"
    (folder / "preprocessor_config.json").write_text(text, encoding="utf-8")


def _readme(extractor: FeatureExtractor, size_hw: SizeHW | None, cls: str) -> str:
    backbone, kind = extractor.backbone, extractor.head.kind
    code = snippet(
        extractor,
        size_hw,
        ["from transformers import AutoModel"],
        ["vit = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()"],
        "vit(pixel_values=(images - mean) / std).last_hidden_state",
    )
    if size_hw is None:
        sizes = _ANY.format(registers=backbone.num_prefix_tokens - 1)
    else:
        sizes = _FIXED.format(h=size_hw[0], w=size_hw[1])
    return _README.format(
        name=backbone.name,
        cls=cls,
        lora="" if extractor.adapter is None else ", LoRA added to its weights",
        no_head=" (there is none here)" if kind == "none" else "",
        formula=f"`{FORMULAS[kind]}`",
        sizes=sizes,
        code=code,
        patch=backbone.patch_size,
        points=facts(extractor)["pixel_convention"],
    )
