"""The reference (3DCorrEnhance) once more, independent of the project: its files and its forward.

Written after finetune.py, finetune_timm.py and utils/functions.py of qq456cvb/3DCorrEnhance (commit
06a94d9), for families of which no checkpoint is at hand. `sample_like_reference` is held against
the reference's own numbers in tests/parity.

    python -m tests.reference_layout

writes tests/golden/model_v2_reference_sampling, once: a frozen model is never written again.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.transforms import functional

from tests.helpers import GOLDEN

FROZEN = GOLDEN / "model_v2_reference_sampling"
FROZEN_BACKBONE = GOLDEN / "model_backbones" / "test_vit.safetensors"


def write_checkpoint(
    path: Path, dim: int, blocks: int, rank: int = 4, seed: int = 0, **changes: Any
) -> dict[str, Any]:
    """Write what Lightning writes for the reference; a change to None takes a key away."""
    generator = torch.Generator().manual_seed(seed)

    def parameter(*shape: int, scale: float) -> nn.Parameter:
        return nn.Parameter(scale * torch.randn(shape, generator=generator))

    conv = {
        "weight": parameter(dim, dim, 3, 3, scale=0.05).detach(),
        "bias": parameter(dim, scale=0.1).detach(),
    }
    count = range(2 * blocks)
    content: dict[str, Any] = {
        "epoch": 3,
        "global_step": 40_000,
        "pytorch-lightning_version": "2.2.5",
        "state_dict": {"refine_conv": conv},
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 4}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_path": "last.ckpt"}},
        "optimizer_states": [{"state": {}, "param_groups": [{"lr": 1e-5}]}],
        "lr_schedulers": [],
        **{f"w_a_{index:03d}": parameter(rank, dim, scale=0.3) for index in count},
        **{f"w_b_{index:03d}": parameter(dim, rank, scale=0.3) for index in count},
    }
    content.update(changes)
    content = {key: value for key, value in content.items() if value is not None}
    torch.save(content, path)
    return content


class LoraQkv(nn.Module):
    """q and v of a fused layer with the checkpoint's updates."""

    def __init__(self, qkv: nn.Module, q: tuple[Tensor, Tensor], v: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.qkv, self.q, self.v = qkv, q, v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        (qa, qb), (va, vb) = self.q, self.v
        return torch.cat([q + x @ qa.T @ qb.T, k, v + x @ va.T @ vb.T], dim=-1)


def with_lora(vit: Any, content: dict[str, Any]) -> Any:
    """Wrap the last blocks of a timm model of one's own."""
    pairs = sum(key.startswith("w_a_") for key in content)
    for place, block in enumerate(vit.blocks[-pairs // 2 :]):
        q, v = (
            (content[f"w_a_{index:03d}"].detach(), content[f"w_b_{index:03d}"].detach())
            for index in (2 * place, 2 * place + 1)
        )
        block.attn.qkv = LoraQkv(block.attn.qkv, q, v)
    return vit


def sample_like_reference(
    features: Tensor, points: Tensor, h: int, w: int, patch: int = 14
) -> Tensor:
    """Sample (B, D, N) at points of an h × w picture; the reference leaves the patch at 14."""
    last = torch.tensor([(side - patch) // patch * patch + patch / 2 for side in (w, h)])
    scale = 2 / (last - patch / 2)
    grid = scale * points + (1 - last * scale)
    found = F.grid_sample(features, grid[:, None], align_corners=True, padding_mode="border")
    return found.squeeze(-2)


class Reference:
    """The reference's forward for a timm model that carries the checkpoint's LoRA."""

    def __init__(self, vit: Any, content: dict[str, Any], target_side: int) -> None:
        self.vit, self.conv, self.target = vit, content["state_dict"]["refine_conv"], target_side
        mean, std = (vit.pretrained_cfg[key] for key in ("mean", "std"))
        self.mean, self.std = (torch.tensor(value).view(3, 1, 1) for value in (mean, std))

    @torch.no_grad()
    def patch_map(self, images: Tensor) -> Tensor:
        """(B, D, h, w) after the convolution."""
        height, width = images.shape[-2:]
        side = self.target
        if height > width:
            size = (side, int(width * side / height))
        else:
            size = (int(height * side / width), side)
        h, w = size[0] // 8, size[1] // 8
        patch = self.vit.patch_embed.patch_size[0]
        resized = functional.resize(images, [h * patch, w * patch])
        tokens = self.vit.forward_features((resized - self.mean) / self.std)
        skipped = self.vit.num_prefix_tokens
        maps = tokens[:, skipped:].reshape(len(images), h, w, -1).permute(0, 3, 1, 2)
        return F.conv2d(maps, self.conv["weight"], self.conv["bias"], padding=1)

    def at(self, images: Tensor, points: Tensor) -> Tensor:
        """(B, N, D) descriptors, with the reference's fault where patches are not 14 wide."""
        maps = self.patch_map(images)
        (h, w), patch = maps.shape[-2:], self.vit.patch_embed.patch_size[0]
        factor = torch.tensor([w * patch / images.shape[-1], h * patch / images.shape[-2]])
        found = sample_like_reference(maps, points * factor, h * 14, w * 14)
        return F.normalize(found.permute(0, 2, 1), dim=-1)

    def dense(self, images: Tensor) -> Tensor:
        """(B, D, H, W) descriptors of all pixels; here the reference has no fault."""
        found = functional.resize(self.patch_map(images), list(images.shape[-2:]))
        return F.normalize(found, dim=1)


def frozen_inputs() -> dict[str, Tensor]:
    """An image that is no whole number of patches, on whose grid rounding and flooring differ."""
    generator = torch.Generator().manual_seed(5)
    image = torch.rand(1, 3, 78, 103, generator=generator)
    edge = torch.tensor([[[0.5, 0.5], [102.5, 77.5], [95.0, 3.0]]])
    inside = torch.rand(1, 9, 2, generator=generator) * torch.tensor([103.0, 78.0])
    return {"image": image, "keypoints": torch.cat([edge, inside], dim=1)}


def main() -> None:
    """Write the frozen model of format version 2."""
    from equifeat.convert import convert_command
    from equifeat.files import atomic_folder, sha256_of

    if FROZEN.exists():
        raise SystemExit(f"{FROZEN} is there already: frozen models are never written again")
    os.chdir(FROZEN_BACKBONE.parent)  # a bare name in config.json
    with atomic_folder(FROZEN) as new:
        checkpoint = new / "last.ckpt"
        content = write_checkpoint(checkpoint, 64, 4, seed=3)
        backbone, file = "test_vit.r160_in1k", FROZEN_BACKBONE.name
        # the command wants a folder of its own
        convert_command(checkpoint, new / "model", backbone, file, "reference")
        for path in (new / "model").iterdir():
            path.rename(new / path.name)
        (new / "model").rmdir()
        checkpoint.unlink()
        import timm

        vit = timm.create_model(backbone, num_classes=0, dynamic_img_size=True).eval()
        vit.load_state_dict(load_file(FROZEN_BACKBONE))
        own, inputs = Reference(with_lora(vit, content), content, 80), frozen_inputs()
        expected = {
            "descriptors": own.at(inputs["image"], inputs["keypoints"]),
            "dense": own.dense(inputs["image"])[:, :, ::8, ::8],
        }
        expected = {key: value.contiguous() for key, value in expected.items()}
        save_file({**inputs, **expected}, new / "expected.safetensors")
        files = sorted(path for path in new.iterdir())
        lines = [f"{sha256_of(path)}  {path.name}\n" for path in files]
        (new / "SHA256SUMS").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
