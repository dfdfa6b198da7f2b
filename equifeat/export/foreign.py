"""What the exports to timm, PEFT and transformers share: facts, head, snippet and the check."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from equifeat._version import __version__
from equifeat.checkpoint import HEAD_WEIGHTS, PIXEL_CONVENTION
from equifeat.errors import ExportError
from equifeat.geometry.pixels import SizeHW
from equifeat.model.extractor import FeatureExtractor

KEY = "equifeat"
"""Where the facts are in the export's config.json, beside the keys of the other tool."""
FORMULAS = {"none": "x", "conv": "conv(x)", "residual": "x + conv(x)"}
_HEAD_CODE = {
    "none": "x",
    "conv": 'F.conv2d(x, head["conv.weight"], head["conv.bias"], padding=1)',
    "residual": 'x + F.conv2d(x, head["conv.weight"], head["conv.bias"], padding=1)',
}
# Above this the written model is another one: float32 noise is a hundredth of it.
_TOLERANCE = 1e-4

_IMPORTS = ("import torch", "from torch.nn import functional as F")
_CODE = '''```python
import json
from pathlib import Path

{imports}

folder = Path(".")  # this folder
facts = json.loads((folder / "config.json").read_text())["equifeat"]
mean, std = (torch.tensor(facts[key]).view(3, 1, 1) for key in ("mean", "std"))
{setup}


@torch.no_grad()
def features(images):
    """RGB images in [0, 1], (B, 3, H, W), to their feature maps (B, {dim}, h, w)."""
    {size}
    images = F.interpolate(images, (h * {patch}, w * {patch}), mode="bilinear", antialias=True)
    tokens = {tokens}
    x = tokens[:, {prefix}:].transpose(1, 2).unflatten(2, (h, w))
    return {head}


def descriptors(images, keypoints):
    """Points xy in pixels, (B, N, 2), to their unit descriptors (B, N, {dim})."""
    grid = 2 * keypoints[:, None]{scale} / torch.tensor(images.shape[:1:-1]) - 1
    found = F.grid_sample(features(images), grid, padding_mode="border", align_corners=False)
    return F.normalize(found[:, :, 0].mT, dim=-1)


images = torch.rand(1, 3, {height}, {width})
print(features(images).shape, descriptors(images, torch.tensor([[[10.0, 20.0]]])).shape)
```'''


def contents(extractor: FeatureExtractor) -> str:
    """Say in a few words what a model adds to its backbone.

    Args:
        extractor: The model.

    Returns:
        For example "LoRA of 4 blocks, head x + conv(x)".
    """
    kind, blocks = extractor.head.kind, extractor.tail_blocks
    lora = f"LoRA of {blocks} block{'s' if blocks > 1 else ''}" if blocks else "no LoRA"
    return f"{lora}, {'no head' if kind == 'none' else 'head ' + FORMULAS[kind]}"


def check_out(out: Path) -> None:
    """Refuse to write over anything.

    Args:
        out: Folder that is to be written.

    Raises:
        ExportError: It is a file, or holds something.
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ExportError(f"{out} is there already and will not be overwritten: give a new folder")


def check_size(extractor: FeatureExtractor, size_hw: SizeHW | None) -> None:
    """Refuse an image size that is no whole number of patches, and a model that must have a size.

    Args:
        extractor: The model.
        size_hw: Height and width of the only images that the export takes, or None.

    Raises:
        ExportError: There is no size, but only this project resamples positions as the model does;
            or the size is not in whole patches.
    """
    p, native = extractor.patch_size, extractor.backbone.native_hw
    if size_hw is None:
        if extractor.backbone.position == "reference":
            raise ExportError(
                f"{extractor.backbone.name!r} resamples its positions as the reference does, which "
                f"only equifeat can for every image size: give --height and --width, multiples of "
                f"{p} (such as {native[0]} {native[1]}), to write the positions of that size"
            )
        return
    if min(size_hw) < p or size_hw[0] % p or size_hw[1] % p:
        raise ExportError(
            f"--height and --width must be multiples of {p}, the patches of "
            f"{extractor.backbone.name!r}, not {size_hw[0]} and {size_hw[1]}"
        )


def facts(extractor: FeatureExtractor, size_hw: SizeHW | None = None) -> dict[str, Any]:
    """Return all that is needed to get the features from the tokens.

    Args:
        extractor: The model, before it was merged.
        size_hw: Height and width of the only images that the export takes; None for any.

    Returns:
        What JSON can hold.
    """
    backbone, adapter = extractor.backbone, extractor.adapter
    return {
        "version": __version__,
        "backbone": {
            "name": backbone.name,
            "sha256": backbone.weights_hash(),
            "weights": backbone.source.kind,
            "position": backbone.position,
        },
        "lora": None
        if adapter is None
        else {"rank": adapter.rank, "alpha": adapter.alpha, "blocks": extractor.tail_blocks},
        "image_size": None if size_hw is None else list(size_hw),
        "patch_size": backbone.patch_size,
        "dim": backbone.dim,
        "mean": [round(float(value), 6) for value in backbone.mean.flatten()],
        "std": [round(float(value), 6) for value in backbone.std.flatten()],
        "prefix_tokens": backbone.num_prefix_tokens,
        "tokens": "after the last block and the final norm; the patches' alone, row by row",
        "head": {
            "kind": extractor.head.kind,
            "formula": FORMULAS[extractor.head.kind],
            "conv": "3 x 3, padding 1 with zeros",
        },
        "sampling": extractor.sampling,
        "pixel_convention": PIXEL_CONVENTION,
    }


def add_facts(config: Path, content: dict[str, Any]) -> None:
    """Add the facts to a config.json, which may belong to another tool.

    Args:
        config: The file; made when it is not there.
        content: What `facts` returned.
    """
    there = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
    text = json.dumps({**there, KEY: content}, indent=2)
    config.write_text(text + "\n", encoding="utf-8")


def write_head(extractor: FeatureExtractor, folder: Path) -> None:
    """Write head.safetensors, where there is a head.

    Args:
        extractor: The model.
        folder: Where to write.
    """
    state = {key: value.cpu().contiguous() for key, value in extractor.head.state_dict().items()}
    if state:
        save_file(state, folder / HEAD_WEIGHTS, metadata={"format": "pt"})


def snippet(
    extractor: FeatureExtractor,
    size_hw: SizeHW | None,
    imports: list[str],
    setup: list[str],
    tokens: str,
) -> str:
    """Return Python, fenced for Markdown, that gets the features without this package.

    Args:
        extractor: The model.
        size_hw: Height and width of the only images that the export takes; None for any.
        imports: Lines that import the other tool, after torch.
        setup: Lines that make `vit`.
        tokens: Expression of all tokens of `images`, with `mean` and `std`.

    Returns:
        The text.
    """
    backbone, kind = extractor.backbone, extractor.head.kind
    if kind != "none":
        setup = [*setup, f'head = load_file(folder / "{HEAD_WEIGHTS}")']
        imports = [*imports, "from safetensors.torch import load_file"]
    p = backbone.patch_size
    if size_hw is None:
        size = f"h, w = (max(1, int(side / {p} + 0.5)) for side in images.shape[-2:])"
    else:
        size = f"h, w = {size_hw[0] // p}, {size_hw[1] // p}"
    # The fault of the reference that such a model was trained with, see docs/convert.md.
    scale = f" * {p} / 14" if extractor.sampling == "reference" else ""
    height, width = size_hw or (10 * p, 12 * p)
    return _CODE.format(
        imports="\n".join(sorted({*imports, *_IMPORTS}, key=_import_order)),
        setup="\n".join(setup),
        size=size,
        patch=p,
        tokens=tokens,
        prefix=backbone.num_prefix_tokens,
        head=_HEAD_CODE[kind],
        dim=backbone.dim,
        scale=scale,
        height=height,
        width=width,
    )


def _import_order(line: str) -> tuple[bool, str]:
    return line.startswith("from"), line


@torch.no_grad()
def difference(
    extractor: FeatureExtractor,
    tokens: Callable[[Tensor], Tensor],
    size_hw: SizeHW,
) -> float:
    """Compare another tool's features of one image with the model's own.

    Args:
        extractor: The model.
        tokens: The other tool: normalised images to all their tokens after the final norm.
        size_hw: Height and width of the image, in whole patches.

    Returns:
        The largest difference, divided by the largest feature.

    Raises:
        ExportError: It is larger than rounding can make it.
    """
    backbone, p = extractor.backbone, extractor.patch_size
    image = torch.rand(1, 3, *size_hw, generator=torch.Generator().manual_seed(0))
    expected = extractor.dense(image).features
    patches = tokens((image - backbone.mean) / backbone.std)[:, backbone.num_prefix_tokens :]
    as_map = patches.transpose(1, 2).reshape(1, -1, size_hw[0] // p, size_hw[1] // p)
    found: Tensor = extractor.head(as_map)
    largest = float((found - expected).abs().max() / expected.abs().max())
    if not largest <= _TOLERANCE:
        raise ExportError(
            f"the written model gives other features than {backbone.name!r} with its adapter "
            f"(relative difference {largest:.1e}): nothing was written; please report this"
        )
    return largest


def size_to_compare(extractor: FeatureExtractor, size_hw: SizeHW | None) -> SizeHW:
    """Return an image size to compare at: the fixed one, or a small one that is not the model's.

    Args:
        extractor: The model.
        size_hw: Height and width of the only images that the export takes, or None.

    Returns:
        Height and width in whole patches.
    """
    return size_hw or (5 * extractor.patch_size, 7 * extractor.patch_size)
