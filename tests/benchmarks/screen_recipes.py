"""Short finetunings that differ in one choice each: which axes of a recipe are worth measuring?

    python -m tests.benchmarks.screen_recipes --views runs/ablations/views \
        --out runs/ablations/screen [--rows base,rank64] [--seeds 0,1] [--patches 32]

Every row finetunes DINOv2-S for 300 steps at 224 px (16 × 16 patches) in bfloat16 on the views of
one object and is scored on the objects of `select`: 24 pairs an object, 150 points a pair. A row
takes about 90 s of one core, so that dozens can be looked at (8 min with --patches 32, the full
448 px); what wins is measured properly by `equifeat sweep`. Some rows try heads and LoRA targets
that equifeat does not offer: they live here. Finished rows are kept; the same command prints them
again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from equifeat.data.augment import Augment
from equifeat.data.batch import collate_pairs
from equifeat.data.pairs import PairSource
from equifeat.data.views import open_views
from equifeat.eval.equivariance import evaluate_equivariance
from equifeat.files import atomic_file
from equifeat.geometry.pixels import resize
from equifeat.model.adapter import LowRank
from equifeat.model.extractor import FeatureExtractor
from equifeat.seeding import torch_generator
from equifeat.train.module import EquivariantFinetune
from equifeat.train.schedule import lr_factor

BACKBONE = "vit_small_patch14_dinov2.lvd142m"
STEPS = 300
METRICS = ("PCDP@.05", "PCDP@.10", "PCDP@.20", "APE")
MLP_AND_PROJ = ("attn.proj", "mlp.fc1", "mlp.fc2")


class Sum(nn.Module):
    """x plus what another module makes of it; that begins at zero."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        last: Any = layers[-1]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the same shape."""
        out: Tensor = x + self.layers(x)
        return out


class Concat(nn.Module):
    """The normalised features beside those of a randomly begun convolution: 2 D channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of twice the channels."""
        return torch.cat([F.normalize(x, dim=1), F.normalize(self.conv(x), dim=1)], dim=1)


class Upsample(nn.Module):
    """Twice the map's sides: bilinear, plus a learned depthwise part that begins at zero."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.learned = nn.ConvTranspose2d(dim, dim, 2, 2, groups=dim)
        nn.init.zeros_(self.learned.weight)
        assert self.learned.bias is not None
        nn.init.zeros_(self.learned.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of twice the height and width."""
        h, w = x.shape[-2:]
        out: Tensor = resize(x, (2 * h, 2 * w)) + self.learned(x)
        return out


class Fusion(nn.Module):
    """x plus 1 × 1 convolutions, zero at the start, of the tokens after earlier blocks."""

    def __init__(self, extractor: FeatureExtractor, numbers: Sequence[int]) -> None:
        super().__init__()
        dim, self.seen = extractor.dim, dict[int, Tensor]()
        self.parts = nn.ModuleDict({str(n): nn.Conv2d(dim, dim, 1) for n in numbers})
        for value in self.parts.parameters():
            nn.init.zeros_(value)
        self.norm: Callable[[Tensor], Tensor] = extractor.backbone.model.norm
        self.prefix = extractor.backbone.num_prefix_tokens
        for n in numbers:
            extractor.backbone.blocks[n].register_forward_hook(self._keep(n))

    def _keep(self, number: int) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, given, tokens: self.seen.update({number: tokens})

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the same shape."""
        for name, conv in self.parts.items():
            tokens = self.norm(self.seen[int(name)])[:, self.prefix :]
            x = x + conv(tokens.transpose(1, 2).reshape(x.shape))
        return x


def widen_lora(extractor: FeatureExtractor, names: Sequence[str], rank: int, seed: int) -> None:
    """Put low-rank updates on further layers of the adapted blocks."""
    updates = nn.ModuleDict()
    blocks = extractor.backbone.blocks
    for number in range(len(blocks) - extractor.tail_blocks, len(blocks)):
        layers = dict(blocks[number].named_modules())
        for stream, name in enumerate(names):
            layer: Any = layers[name]
            made = torch_generator(seed, number, 2 + stream)
            update = LowRank(layer.in_features, layer.out_features, rank, made)
            layer.register_forward_hook(lambda _, given, out, add=update: out + add(given[0]))
            updates[f"{number}_{name}".replace(".", "_")] = update
    extractor.add_module("further_lora", updates)


HEADS: dict[str, Callable[[FeatureExtractor], nn.Module]] = {
    "pointwise": lambda e: Sum(nn.Conv2d(e.dim, e.dim, 1)),
    "depthwise": lambda e: Sum(nn.Conv2d(e.dim, e.dim, 3, padding=1, groups=e.dim)),
    "bottleneck": lambda e: Sum(
        nn.Conv2d(e.dim, 256, 1),
        nn.Conv2d(256, 256, 5, padding=2, groups=256),
        nn.GELU(),
        nn.Conv2d(256, e.dim, 1),
    ),
    "concat": lambda e: Concat(e.dim),
    "upsample": lambda e: Upsample(e.dim),
    "fusion": lambda e: Fusion(e, (9, 10)),
}

BASE: dict[str, Any] = {
    "head": "none",
    "lora_rank": 16,
    "loss": "info_nce",
    "tau": 0.05,
    "both_directions": True,
    "lr": 1e-3,
}
AP = {"loss": "smooth_ap", "tau": 0.01, "both_directions": False}
SMALL = {"lora_rank": 4, "tau": 0.03}  # where the search for a head began
NOTHING = Augment(
    affine_p=0.0,
    shift=0.0,
    scale=0.0,
    rotate_deg=0.0,
    blur_p=0.0,
    noise_p=0.0,
    clahe_p=0.0,
    color_p=0.0,
)
# By row: options of the module that differ from BASE, options of the draws, the set of views, a
# head of this file and its learning rate, further layers with LoRA.
ROWS: dict[str, dict[str, Any]] = {
    "raw": {"model": {"lr": 0.0}, "steps": 1},
    "reference": {
        "model": {"head": "conv", "lora_rank": 4, "lr": 1e-5, **AP},
        "data": {"sampler": "reference", "num_keypoints": 3000},
    },
    "former_default": {"model": {"head": "residual", "lora_rank": 4, "lr": 3e-4, **AP}},
    # heads
    "small": {"model": SMALL},
    "small_residual": {"model": {**SMALL, "head": "residual", "lr": 3e-4}},
    "small_residual_slow": {"model": {**SMALL, "head": "residual", "lr": 1e-4}},
    "small_pointwise": {"model": {**SMALL, "lr": 3e-4}, "head": "pointwise"},
    "base": {},
    "pointwise": {"head": "pointwise", "head_lr": 1e-4},
    "depthwise": {"head": "depthwise"},
    "bottleneck": {"head": "bottleneck"},
    "concat": {"head": "concat", "head_lr": 1e-4},
    "fusion": {"head": "fusion"},
    "upsample": {"head": "upsample", "head_lr": 1e-4},
    # LoRA
    "rank4": {"model": {"lora_rank": 4}},
    "rank64": {"model": {"lora_rank": 64, "tau": 0.03}},
    "mlp": {"model": {"tau": 0.03}, "layers": MLP_AND_PROJ},
    "blocks2": {"model": {"lora_blocks": 2}},
    "blocks6": {"model": {"lora_blocks": 6}},
    # losses
    "smooth_ap": {"model": AP},
    "one_direction": {"model": {"both_directions": False}},
    "tau03": {"model": {"tau": 0.03}},
    "tau10": {"model": {"tau": 0.1}},
    "soft_labels": {"model": {"loss": "soft_labels"}},
    "multi_positive_ap": {"model": {"loss": "multi_positive_ap", "tau": 0.01}},
    "transport": {"model": {"loss": "transport", "both_directions": False}},
    "near_negatives": {"model": {"neg_radius": 0.03}},
    # optimisation
    "lr5e-4": {"model": {"lr": 5e-4}},
    "cosine": {"model": {"schedule": "cosine", "warmup_steps": 20}},
    "ema": {"model": {"ema_decay": 0.99}},
    # draws
    "keypoints1500": {"data": {"num_keypoints": 1500}},
    "hard": {"data": {"sampler": "hard"}},
    "all_angles": {"data": {"max_angle_deg": 180.0}},
    "curriculum": {"data": {"curriculum_draws": 200}},
    "all_objects": {"views": "train"},
    # pictures
    "augmented": {"data": {"augment": Augment()}},
    "turned": {"data": {"augment": replace(NOTHING, affine_p=0.5, rotate_deg=180.0)}},
    "colors": {"data": {"augment": replace(Augment(), affine_p=0.0)}},
    "lit": {"data": {"augment": replace(NOTHING, light_p=0.7, light=0.5)}},
    "noise_background": {"data": {"background": "noise"}},
    # preservation
    "preserve1": {"model": {"preserve": "features", "preserve_weight": 1.0}},
    "relations": {"model": {"preserve": "relations", "preserve_weight": 10.0}},
}


def fit(row: dict[str, Any], seed: int, views: Path, patches: int) -> EquivariantFinetune:
    """Finetune as a row says."""
    torch.manual_seed(seed)
    options = {**BASE, **row.get("model", {})}
    model = EquivariantFinetune(
        BACKBONE, "packaged", resolution=patches, trunk_cache_mb=2048, seed=seed, **options
    )
    extractor = model.extractor
    if "layers" in row:
        widen_lora(extractor, row["layers"], model.hparams["lora_rank"], seed)
    if "head" in row:
        extractor.head = HEADS[row["head"]](extractor)  # type: ignore[assignment]
    objects = open_views(views / row.get("views", "one"))
    draws: dict[str, Any] = {"num_keypoints": 500, **row.get("data", {})}
    source = PairSource(objects, seed=seed, **draws)
    head = list(extractor.head.parameters())
    rest = [
        p for n, p in extractor.named_parameters() if p.requires_grad and not n.startswith("head.")
    ]
    lr = model.hparams["lr"]
    groups = [{"params": rest, "lr": lr}]
    if head:
        groups.append({"params": head, "lr": row.get("head_lr", lr)})
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-4)
    factor = lr_factor(model.hparams["schedule"], model.hparams["warmup_steps"], STEPS)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    model.train()
    for step in range(row.get("steps", STEPS)):
        batch = collate_pairs([source.draw(step)])  # geometry needs all its digits: no autocast
        with autocast():
            loss = model.training_step(batch, step)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_([p for g in groups for p in g["params"]], 1.0)
        optimizer.step()
        scheduler.step()
        model.average.update(extractor.trainable_parameters())
    return model.eval()


def autocast() -> Any:
    """Matrix products in bfloat16: twice as fast on CPUs that have it, and as GPUs train."""
    return torch.autocast("cpu", torch.bfloat16)


class _Autocast:
    """A model that runs as it was trained."""

    def __init__(self, extractor: FeatureExtractor) -> None:
        self.extractor = extractor

    def dense(self, images: Tensor, resolution: int | None = None) -> Any:
        """Return the map of images."""
        with autocast():
            return self.extractor.dense(images, resolution)


def score(extractor: FeatureExtractor, views: Path, patches: int) -> dict[str, Any]:
    """Score a model on the objects that choices are made by: means, and PCDP@.10 by view change."""
    result = evaluate_equivariance(
        {"model": _Autocast(extractor)},
        open_views(views / "select"),
        pairs=24,
        points=150,
        target_stride=5,
        resolution=patches,
        device="cpu",
    )
    means = {metric: score.mean for metric, score in result.summary("model").items()}
    bins = [result.summary("model", within)["PCDP@.10"].mean for within in result.bins]
    return {"means": means, "bins": bins}


def table_row(name: str, seed: int, found: dict[str, Any]) -> str:
    """Return a line of the table."""
    cells = [f"{found['means'][metric]:.2f}" for metric in METRICS]
    by_angle = " ".join(f"{value:.1f}" for value in found["bins"])
    rest = (by_angle, f"{found['trained']:,}", f"{found['seconds']:.0f} s")
    return f"| {' | '.join((name, str(seed), *cells, *rest))} |\n"


def main() -> None:
    """Run the rows that are missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--views", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--patches", type=int, default=16)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for name in given.rows.split(","):
        for seed in map(int, given.seeds.split(",")):
            file = given.out / f"{name}_{given.patches}_{seed}.json"
            if not file.exists():
                start = time.monotonic()
                model = fit(ROWS[name], seed, given.views, given.patches)
                with model.averaged():
                    found = score(model.extractor, given.views, given.patches)
                found["trained"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
                found["seconds"] = time.monotonic() - start
                with atomic_file(file) as path:
                    path.write_text(json.dumps(found))
            sys.stdout.write(table_row(name, seed, json.loads(file.read_text())))
            sys.stdout.flush()


if __name__ == "__main__":
    main()
