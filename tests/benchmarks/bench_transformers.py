"""How far features in transformers' classes are from equifeat's, by image size.

python -m tests.benchmarks.bench_transformers
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F  # noqa: N812

from equifeat.export.transformers_ import to_transformers
from equifeat.model.extractor import build_extractor

SIZES = ((140, 140), (224, 224), (224, 308), (448, 448), (518, 518), (700, 700))


@torch.no_grad()
def main() -> None:
    """Print a Markdown table of DINOv2 ViT-S/14."""
    model = build_extractor("vit_small_patch14_dinov2.lvd142m", "packaged", lora_blocks=0).eval()
    vits = (
        to_transformers(model),
        to_transformers(model, (518, 518)),
        to_transformers(model, (224, 224)),
    )
    noise = torch.rand(1, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    for size_hw in SIZES:
        image = F.interpolate(noise, size_hw, mode="bicubic").clamp(0, 1)
        expected = model.dense(image).features
        row = [f"{size_hw[0]} × {size_hw[1]}"]
        for vit in vits:
            tokens = vit((image - model.backbone.mean) / model.backbone.std).last_hidden_state
            found = tokens[:, model.backbone.num_prefix_tokens :].mT.reshape(expected.shape)
            off = float((found - expected).abs().max() / expected.abs().max())
            cosine = float(F.cosine_similarity(found, expected, dim=1).mean())
            row.append(f"{off:.0e} (cosine {cosine:.4f})" if off > 1e-5 else f"{off:.0e}")
        sys.stdout.write("| " + " | ".join(row) + " |\n")


if __name__ == "__main__":
    main()
