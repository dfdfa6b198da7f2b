"""What the tests of exports to other tools share: models, and the README's code run as it is."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from equifeat.checkpoint import save_model
from equifeat.model.backbone import Backbone, load_backbone
from equifeat.model.extractor import FeatureExtractor, build_extractor
from equifeat.model.head import HeadKind
from tests.model.tiny import images, randomize

DINOV2 = "vit_small_patch14_dinov2.lvd142m"


def trained(
    backbone: str | Backbone,
    weights: str = "random",
    head: HeadKind = "residual",
    blocks: int = 2,
    position: str = "timm",
) -> FeatureExtractor:
    """A model whose adapter and head have random weights large enough to matter."""
    if isinstance(backbone, str):
        backbone = load_backbone(backbone, weights, position=position, seed=1)
    model = build_extractor(backbone, head=head, lora_rank=3, lora_alpha=5.0, lora_blocks=blocks)
    if model.adapter is not None:
        randomize(model.adapter)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.head.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise, alpha=model.dim**-0.5 / 3)
    return model.eval()


def saved(folder: Path, *options: Any, **named: Any) -> Path:
    return save_model(trained(*options, **named), folder)


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def readme_functions(out: Path) -> dict[str, Any]:
    """Run the README's Python in its folder, as a user who copies it; what it defines."""
    (code,) = re.findall(r"^```python\n(.*?)^```", (out / "README.md").read_text(), re.M | re.S)
    assert "equifeat" not in re.findall(r"^(?:import|from) (\w+)", code, re.M)
    namespace: dict[str, Any] = {}
    with inside(out):
        exec(compile(code, str(out / "README.md"), "exec"), namespace)
    return namespace


def check_readme(out: Path, model: FeatureExtractor, size_hw: tuple[int, int]) -> None:
    """The README's code gives the model's features and descriptors, at any size of the image."""
    found = readme_functions(out)
    image = images(1, *size_hw, seed=3)
    keypoints = torch.tensor([[[0.5, 0.5], [size_hw[1] / 3, size_hw[0] / 2]]])
    with torch.no_grad():
        same(found["features"](image), model.dense(image).features)
        torch.testing.assert_close(
            found["descriptors"](image, keypoints), model.at(image, keypoints), rtol=0, atol=1e-5
        )


def same(found: Tensor, expected: Tensor) -> None:
    """Equal to 1e-5 of the largest feature."""
    assert float(expected.std()) > 1e-2
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * max(1.0, scale))


def as_map(tokens: Tensor, model: FeatureExtractor, size_hw: tuple[int, int]) -> Tensor:
    """Another tool's tokens as a map, refined by the head."""
    p = model.patch_size
    patches = tokens[:, model.backbone.num_prefix_tokens :].transpose(1, 2)
    refined: Tensor = model.head(patches.reshape(len(tokens), -1, size_hw[0] // p, size_hw[1] // p))
    return refined


def normalized(image: Tensor, model: FeatureExtractor) -> Tensor:
    return (image - model.backbone.mean) / model.backbone.std
