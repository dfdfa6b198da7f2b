"""The recipes of the families come from this table: `python -m tests.recipe_table` writes them.

So they cannot drift apart: test_recipes.py asks that every file is exactly what is written here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import timm
import torch

from tests.helpers import ROOT

RECIPES = ROOT / "recipes"

# What the estimates stand on; docs/recipes.md explains them.
STEPS = 10_000
TUNED_BLOCKS = 4
LORA_RANK = 16  # of our recipes; the reference has 4 and a convolution
H100_BF16 = 0.4 * 989e12
H100_FP32 = 0.5 * 67e12
DRAW_SECONDS = 0.0493  # one augmented draw at 512 px on one core, docs/performance.md
WORKERS = 4
BYTES_FP32 = 440  # of activations a token and channel; a CPU step takes 360 to 490
BYTES_BF16 = 270


@dataclass(frozen=True)
class Entry:
    """One recipe.

    Args:
        name: Name of the file without its suffix.
        title: The backbone in words.
        backbone: timm's name.
        weights: The recipe's model.weights.
        position: How a learned position embedding is resampled, of a reference recipe.
        note: What a user of this backbone must know, one line.
        published: Rows of the paper's tables, before → finetuned.
    """

    name: str
    title: str
    backbone: str
    weights: str = "hub"
    position: str = "timm"
    note: str = ""
    published: tuple[str, ...] = ()

    @property
    def reference(self) -> bool:
        """Whether the recipe has the paper's settings."""
        return self.name.startswith("reference_")


_DINOV3 = "DINOv3 licence: read its terms first; timm's copy leaves out the biases, which are 0."
_MAE = "CC-BY-NC-4.0: no commercial use."
_QUICK = "OpenAI trained with QuickGELU; the name without quickgelu would run with another one."
_POOLED = "This model has no norm after its last block: the tokens are those of the residual sum."
_RADIO = "Exact at 512 px; elsewhere timm resamples positions in another way than C-RADIO's code."
_IBOT = "timm has no iBOT weights: download checkpoint_teacher.pth (github.com/bytedance/ibot)."

FAMILIES = (
    Entry("dinov2_small", "DINOv2 ViT-S/14", "vit_small_patch14_dinov2.lvd142m"),
    Entry("dinov2_base", "DINOv2 ViT-B/14", "vit_base_patch14_dinov2.lvd142m"),
    Entry("dinov2_large", "DINOv2 ViT-L/14", "vit_large_patch14_dinov2.lvd142m"),
    Entry("dinov2_giant", "DINOv2 ViT-g/14", "vit_giant_patch14_dinov2.lvd142m"),
    Entry(
        "dinov2_reg_small",
        "DINOv2 ViT-S/14 with registers",
        "vit_small_patch14_reg4_dinov2.lvd142m",
    ),
    Entry(
        "dinov2_reg_base", "DINOv2 ViT-B/14 with registers", "vit_base_patch14_reg4_dinov2.lvd142m"
    ),
    Entry(
        "dinov2_reg_large",
        "DINOv2 ViT-L/14 with registers",
        "vit_large_patch14_reg4_dinov2.lvd142m",
    ),
    Entry(
        "dinov2_reg_giant",
        "DINOv2 ViT-g/14 with registers",
        "vit_giant_patch14_reg4_dinov2.lvd142m",
    ),
    Entry("dinov3_small", "DINOv3 ViT-S/16", "vit_small_patch16_dinov3.lvd1689m", note=_DINOV3),
    Entry("dinov3_base", "DINOv3 ViT-B/16", "vit_base_patch16_dinov3.lvd1689m", note=_DINOV3),
    Entry("dinov3_large", "DINOv3 ViT-L/16", "vit_large_patch16_dinov3.lvd1689m", note=_DINOV3),
    Entry("clip_laion2b_base", "CLIP ViT-B/16 (LAION-2B)", "vit_base_patch16_clip_224.laion2b"),
    Entry("clip_laion2b_large", "CLIP ViT-L/14 (LAION-2B)", "vit_large_patch14_clip_224.laion2b"),
    Entry(
        "clip_openai_base",
        "CLIP ViT-B/16 (OpenAI)",
        "vit_base_patch16_clip_quickgelu_224.openai",
        note=_QUICK,
    ),
    Entry(
        "clip_openai_large",
        "CLIP ViT-L/14 (OpenAI)",
        "vit_large_patch14_clip_quickgelu_224.openai",
        note=_QUICK,
    ),
    Entry("siglip2_base", "SigLIP 2 ViT-B/16", "vit_base_patch16_siglip_512.v2_webli"),
    Entry("siglip2_large", "SigLIP 2 ViT-L/16", "vit_large_patch16_siglip_512.v2_webli"),
    Entry("siglip2_so400m", "SigLIP 2 So400m/14", "vit_so400m_patch14_siglip_378.v2_webli"),
    Entry("siglip2_giant", "SigLIP 2 ViT-g-opt/16", "vit_giantopt_patch16_siglip_384.v2_webli"),
    Entry("mae_base", "MAE ViT-B/16", "vit_base_patch16_224.mae", note=_MAE),
    Entry("mae_large", "MAE ViT-L/16", "vit_large_patch16_224.mae", note=_MAE),
    Entry("deit3_small", "DeiT-III ViT-S/16", "deit3_small_patch16_224.fb_in1k"),
    Entry("deit3_base", "DeiT-III ViT-B/16", "deit3_base_patch16_224.fb_in1k"),
    Entry("deit3_large", "DeiT-III ViT-L/16", "deit3_large_patch16_224.fb_in1k"),
    Entry("eva02_small", "EVA-02 ViT-S/14", "eva02_small_patch14_224.mim_in22k", note=_POOLED),
    Entry("eva02_base", "EVA-02 ViT-B/14", "eva02_base_patch14_224.mim_in22k", note=_POOLED),
    Entry("eva02_large", "EVA-02 ViT-L/14", "eva02_large_patch14_224.mim_m38m", note=_POOLED),
    Entry("dino_small", "DINO (v1) ViT-S/16", "vit_small_patch16_224.dino"),
    Entry("dino_base", "DINO (v1) ViT-B/16", "vit_base_patch16_224.dino"),
    # iBOT's ViTs are DINO's, its statistics too; only the weights differ.
    Entry(
        "ibot_small",
        "iBOT ViT-S/16",
        "vit_small_patch16_224.dino",
        weights="weights/ibot_vits16.pth",
        note=_IBOT,
    ),
    Entry(
        "ibot_base",
        "iBOT ViT-B/16",
        "vit_base_patch16_224.dino",
        weights="weights/ibot_vitb16.pth",
        note=_IBOT,
    ),
    Entry(
        "c_radio_v3_base", "C-RADIOv3 ViT-B/16", "vit_base_patch16_radio_v3.c_radio", note=_RADIO
    ),
    Entry(
        "c_radio_v3_large", "C-RADIOv3 ViT-L/16", "vit_large_patch16_radio_v3.c_radio", note=_RADIO
    ),
    Entry(
        "c_radio_v3_giant", "C-RADIOv3 ViT-g/16", "vit_giant_patch16_radio_v3.c_radio", note=_RADIO
    ),
    Entry(
        "c_radio_v4_so400m",
        "C-RADIOv4 So400m/16",
        "vit_so400m_patch16_radio_v4.c_radio",
        note=_RADIO,
    ),
    Entry(
        "c_radio_v4_huge", "C-RADIOv4 ViT-H/16", "vit_huge_patch16_radio_v4.c_radio", note=_RADIO
    ),
)


def _published(objaverse: str, mvimgnet: str, onepose: str, tapvid: str, pascal: str) -> Any:
    return (
        f"Objaverse PCDP@.05 / APE %: {objaverse}",
        f"MVImgNet PCDP@.05 / APE %: {mvimgnet}",
        f"OnePose-LowTexture 1/3/5 cm-deg: {onepose}",
        f"TAP-Vid-DAVIS AJ/delta/OA: {tapvid}",
        f"PF-PASCAL PCK .05/.10/.15: {pascal}",
    )


REFERENCES = (
    Entry(
        "reference_dinov2_small",
        "DINOv2 ViT-S/14",
        "vit_small_patch14_dinov2.lvd142m",
        weights="packaged",
        position="reference",
    ),
    Entry(
        "reference_dinov2_base",
        "DINOv2 ViT-B/14",
        "vit_base_patch14_dinov2.lvd142m",
        position="reference",
        published=_published(
            "22.60→30.61 / 19.12→17.98",
            "62.09→71.74 / 6.24→4.96",
            "9.43/48.45/67.45→13.58/58.03/77.35",
            "40.40/58.11/81.46→46.85/63.84/84.15",
            "42.18/56.90/65.59→47.24/60.76/67.57",
        ),
    ),
    Entry(
        "reference_dinov2_reg_base",
        "DINOv2 ViT-B/14 with registers",
        "vit_base_patch14_reg4_dinov2.lvd142m",
        published=_published(
            "23.05→22.81 / 19.51→19.48",
            "64.54→64.35 / 6.06→5.90",
            "9.95/52.65/71.72→13.41/59.32/78.64",
            "37.89/55.43/80.77→44.91/62.23/83.85",
            "38.29/53.74/61.94→44.44/57.27/65.27",
        ),
    ),
    Entry(
        "reference_mae_base",
        "MAE ViT-B/16",
        "vit_base_patch16_224.mae",
        note=_MAE,
        published=_published(
            "16.25→22.57 / 20.58→19.88",
            "59.10→73.76 / 6.73→4.76",
            "4.41/20.76/32.27→10.27/39.37/52.97",
            "29.99/48.16/77.27→36.04/54.97/77.27",
            "11.98/20.16/28.16→14.45/23.79/32.56",
        ),
    ),
    Entry(
        "reference_clip_base",
        "CLIP ViT-B/16",
        "vit_base_patch16_clip_384.laion2b_ft_in12k_in1k",
        note="LAION-2B, then fine-tuned on ImageNet-12k and -1k: the paper's choice.",
        published=_published(
            "17.05→22.54 / 20.11→19.17",
            "46.63→60.23 / 11.34→8.42",
            "2.85/19.65/33.84→6.72/35.63/52.94",
            "25.86/41.17/79.28→32.13/49.31/79.09",
            "13.87/24.85/35.13→20.39/32.36/42.58",
        ),
    ),
    Entry(
        "reference_deit3_base",
        "DeiT-III ViT-B/16",
        "deit3_base_patch16_224.fb_in1k",
        published=_published(
            "18.07→23.39 / 19.72→19.00",
            "54.63→67.31 / 8.34→5.89",
            "2.55/16.85/31.67→7.20/33.24/49.43",
            "26.80/42.06/78.45→32.55/48.41/78.49",
            "17.73/31.17/41.17→20.24/33.29/41.62",
        ),
    ),
)
ENTRIES = FAMILIES + REFERENCES


class Shape(NamedTuple):
    """What the estimates and the table of docs/recipes.md need of an architecture.

    Attributes:
        patch: Side of a patch.
        prefix: Class and register tokens.
        dim: Width.
        depth: Blocks.
        params: Parameters of the model without classifier.
        block_params: Parameters of one block.
        position: "learned", "RoPE" or both.
        qkv: "fused" or "split", and what biases there are.
    """

    patch: int
    prefix: int
    dim: int
    depth: int
    params: int
    block_params: int
    position: str
    qkv: str


@cache
def shape(backbone: str) -> Shape:
    """Ask timm; nothing is allocated."""
    with torch.device("meta"):
        model: Any = timm.create_model(backbone, num_classes=0, dynamic_img_size=True)
    attn = model.blocks[-1].attn
    learned = model.pos_embed is not None
    rope = getattr(model, "rope", None) is not None
    if attn.qkv is None:
        qkv = "split"
    elif attn.qkv.bias is not None:
        qkv = "fused"
    else:
        qkv = "fused, no k bias" if getattr(attn, "q_bias", None) is not None else "fused, no bias"

    def count(module: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    return Shape(
        patch=int(model.patch_embed.patch_size[0]),
        prefix=int(model.num_prefix_tokens),
        dim=int(model.embed_dim),
        depth=len(model.blocks),
        params=count(model),
        block_params=count(model.blocks[-1]),
        position=" + ".join(["learned"] * learned + ["RoPE"] * rope),
        qkv=qkv,
    )


def step_flops(of: Shape, patches: int, pairs: int, conv: bool) -> float:
    """Operations of one training step: two images a pair, gradients through the last blocks."""
    tokens = patches + of.prefix
    linear, attention = 2.0 * of.block_params * tokens, 4.0 * tokens**2 * of.dim
    forward = of.depth * (linear + attention)
    # Frozen matrices need the gradient of their input only; attention is computed once more.
    backward = TUNED_BLOCKS * (linear + 2.5 * attention)
    head = 3 * 2.0 * 9 * of.dim**2 * patches if conv else 0.0
    return 2 * pairs * (forward + backward + head)


def memory_gib(of: Shape, patches: int, pairs: int, per_value: int, conv: bool) -> int:
    """GPU memory in whole GiB: weights, trained ones with Adam, activations, 1 GiB of the rest."""
    rank, head = (4, 9 * of.dim**2 + of.dim) if conv else (LORA_RANK, 0)
    trained = head + TUNED_BLOCKS * 2 * 2 * rank * of.dim
    activations = 2 * pairs * (patches + of.prefix) * of.dim * per_value
    return math.ceil((4 * of.params + 16 * trained + activations) / 2**30 + 1)


def _hours(seconds: float) -> str:
    hours = STEPS * seconds / 3600
    return f"{hours:.1f} h" if hours >= 0.95 else f"{60 * hours:.0f} min"


def _common_header(entry: Entry, first: list[str], memory: int, *time: str) -> list[str]:
    lines = [
        *first,
        "",
        "Command:   equifeat render MESHES --out "
        + ("runs/reference/views" if entry.reference else "runs/views"),
        f"           equifeat fit --config recipes/{entry.name}.yaml",
    ]
    if entry.note:
        lines.append(f"Weights:   {entry.note}")
    if entry.weights.startswith("weights/"):
        lines += [f"           Save it as {entry.weights} or give --model.weights its path."]
    kind = "a GPU" if entry.reference else "a GPU with bfloat16"
    lines += [
        f"Hardware:  {kind} and {memory} GiB of its memory (estimate), {WORKERS} CPU cores.",
        f"Time:      {time[0]}",
    ]
    return lines + [f"           {line}" for line in time[1:]]


def render(entry: Entry) -> str:
    """Return the text of a recipe's file."""
    of = shape(entry.backbone)
    if entry.reference:
        return _render_reference(entry, of)
    patches, pairs = 40 * 40, 4
    flops = step_flops(of, patches, pairs, conv=False)
    compute, loading = flops / H100_BF16, pairs * DRAW_SECONDS / WORKERS
    bound = "the loader" if loading > compute else "the GPU"
    first = [f"{entry.title} on the rendered views of many objects: our defaults."]
    lines = _common_header(
        entry,
        first,
        memory_gib(of, patches, pairs, BYTES_BF16, conv=False),
        f"at least {_hours(max(compute, loading))} for {STEPS:,} steps on one H100 (estimate; "
        f"{flops / 1e12:.1f} TFLOP a step;",
        f"limited by {bound}).",
    )
    lines += [
        "Numbers:   none known for this backbone and size; docs/recipe.md has DINOv2-S at 448 px,",
        "           where these choices were made against the published ones.",
        "Not yet measured: this recipe on any GPU.",
        "docs/recipes.md says how the estimates are made. The same command resumes.",
    ]
    return (
        _comment(lines)
        + f"""seed_everything: 0
run:
  dir: runs/{entry.name}
  save_every: 100
model:
  backbone: {entry.backbone}
  weights: {entry.weights}
  head: none
  lora_rank: {LORA_RANK}
  lora_blocks: {TUNED_BLOCKS}
  loss: info_nce
  both_directions: true
  tau: 0.05
  pos_radius: 0.005
  neg_radius: 0.1
  resolution: 40
  lr: 1.0e-3
  weight_decay: 1.0e-4
data:
  views: runs/views
  batch_size: {pairs}
  num_workers: {WORKERS}
  sampler: covisible
  num_keypoints: 500
  min_angle_deg: 0.0
  max_angle_deg: 120.0
  augment: true
trainer:
  max_steps: {STEPS}
  accelerator: auto
  devices: 1
  precision: bf16-mixed
  gradient_clip_val: 1.0
ckpt_path: last
"""
    )


def _render_reference(entry: Entry, of: Shape) -> str:
    patches = 80 * 80
    flops = step_flops(of, patches, 1, conv=True)
    compute, loading = flops / H100_FP32, DRAW_SECONDS / WORKERS
    first = [
        f"The published recipe (3DCorrEnhance, arXiv 2411.19458) on {entry.title}:",
        "random 3x3 convolution, lr 1e-5, batch 1, 10,000 steps, 80x80 patches, independent",
        "keypoints, its augmentations. Its faults (half pixel, patch-16 coordinates) are left out.",
    ]
    lines = _common_header(
        entry,
        first,
        memory_gib(of, patches, 1, BYTES_FP32, conv=True),
        f"at least {_hours(max(compute, loading))} for {STEPS:,} steps on one H100 (estimate; "
        f"{flops / 1e12:.1f} TFLOP a step;",
        "limited by the GPU in float32).",
    )
    if entry.published:
        lines += ["Numbers:   as published, before → finetuned; not reproduced here:"]
        lines += [f"           {row}" for row in entry.published]
        lines += ["           (the paper does not say what PCDP and APE are divided by)."]
    else:
        lines += ["Numbers:   the paper gives none for ViT-S."]
    lines += [
        "Not yet measured: this recipe to its end, and on any GPU.",
        "docs/recipes.md says how the estimates are made. The same command resumes.",
    ]
    return (
        _comment(lines)
        + f"""seed_everything: 0
run:
  dir: runs/{entry.name}
  save_every: 100
model:
  backbone: {entry.backbone}
  weights: {entry.weights}
  position: {entry.position}
  head: conv
  lora_rank: 4
  lora_blocks: {TUNED_BLOCKS}
  loss: smooth_ap
  both_directions: false
  tau: 0.01
  pos_radius: 0.005
  neg_radius: 0.1
  resolution: 80
  lr: 1.0e-5
  weight_decay: 1.0e-4
  warmup_steps: 0
  schedule: constant
data:
  views: runs/reference/views
  batch_size: 1
  num_workers: {WORKERS}
  sampler: reference
  num_keypoints: 3000
  min_angle_deg: 0.0
  max_angle_deg: 120.0
  augment: true
  background: black
trainer:
  max_steps: {STEPS}
  accelerator: auto
  devices: 1
  precision: 32-true
  gradient_clip_val: 1.0
ckpt_path: last
"""
    )


def _comment(lines: list[str]) -> str:
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)


def docs_row(entry: Entry) -> str:
    """Return the recipe's row of the table in docs/recipes.md."""
    of = shape(entry.backbone)
    config: Any = timm.models.get_pretrained_cfg(entry.backbone)
    hub = entry.weights in ("hub", "packaged")
    cells = (
        f"`{entry.name}`",
        f"`{entry.backbone}`",
        f"{of.params / 1e6:.0f} M",
        str(of.patch),
        str(of.prefix),
        of.position,
        of.qkv,
        config.license if hub else "see its repository",
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    for item in ENTRIES:
        (RECIPES / f"{item.name}.yaml").write_text(render(item), encoding="utf-8")
