"""Which ViTs transformers' DINOv2 can be; their tensors under timm's and under its names.

The names are those of files on the hub (`attention.attention.query`), which transformers 4 has in
memory too and transformers 5 renames when it loads (`attention.q_proj`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from equifeat.errors import ExportError
from equifeat.model.backbone import Backbone
from equifeat.model.weights import State

TAKES = (
    "transformers' DINOv2 takes ViTs with a class token, learned positions, GELU and no norm "
    "before the blocks, such as DINOv2, DINO, MAE, DeiT III and timm's augreg: give --to timm"
)

_TOP = {
    "cls_token": "embeddings.cls_token",
    "reg_token": "embeddings.register_tokens",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
_BLOCK = {
    "norm1": "norm1",
    "attn.proj": "attention.output.dense",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_SCALES = {"ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1"}
_QKV = ("query", "key", "value")
# transformers 5 in memory → checkpoints
_IN_MEMORY = {
    "attention.q_proj.": "attention.attention.query.",
    "attention.k_proj.": "attention.attention.key.",
    "attention.v_proj.": "attention.attention.value.",
    "attention.o_proj.": "attention.output.dense.",
    "mlp.down_proj.": "mlp.weights_out.",
}
_GATES = ("mlp.gate_proj.", "mlp.up_proj.")


def check_dinov2(backbone: Backbone) -> bool:
    """Refuse what differs from DINOv2 in something other than names and shapes of tensors.

    Args:
        backbone: The ViT.

    Returns:
        Whether its MLP is gated.

    Raises:
        ExportError: It cannot be written as DINOv2.
    """
    model = backbone.model
    block: Any = model.blocks[0]
    mlp = getattr(block, "mlp", None)
    swiglu = type(mlp).__name__ == "GluMlp"
    act = getattr(mlp, "act", None)
    fits = {
        f"it is a {type(model).__name__}": type(model).__name__ == "VisionTransformer",
        f"its blocks are {type(block).__name__}": type(block).__name__ == "Block",
        "it has no class token": getattr(model, "cls_token", None) is not None,
        "it has no learned positions": model.pos_embed is not None,
        "its positions are not square": backbone.native_hw[0] == backbone.native_hw[1],
        "its activation is not GELU": swiglu
        or (isinstance(act, nn.GELU) and act.approximate == "none"),
        "it normalises only after pooling": isinstance(model.norm, nn.LayerNorm),
    }
    for trait, fine in fits.items():
        if not fine:
            raise ExportError(f"{backbone.name!r} is not like DINOv2 ({trait}): {TAKES}")
    return swiglu


def dinov2_options(backbone: Backbone, side: int) -> dict[str, Any]:
    """Return the configuration of transformers' DINOv2 for a ViT.

    Args:
        backbone: A ViT that passed `check_dinov2`.
        side: Height and width in pixels of the image that its position embedding fits.

    Returns:
        Arguments of Dinov2Config.
    """
    model, block = backbone.model, backbone.model.blocks[0]
    swiglu = type(block.mlp).__name__ == "GluMlp"
    return {
        "hidden_size": backbone.dim,
        "num_hidden_layers": backbone.depth,
        "num_attention_heads": int(block.attn.num_heads),
        "mlp_ratio": 4 if swiglu else block.mlp.fc1.out_features // backbone.dim,
        "use_swiglu_ffn": swiglu,
        "hidden_act": "gelu",
        "layer_norm_eps": float(model.norm.eps),
        "image_size": side,
        "patch_size": backbone.patch_size,
        "qkv_bias": block.attn.qkv.bias is not None,
    }


def block_names(swiglu: bool) -> dict[str, str]:
    """Return the names of a block's linear layers and norms, timm's to transformers'.

    Args:
        swiglu: Whether the MLP is gated.

    Returns:
        Names without `.weight` and `.bias`; all but q, k, v and the layer scales.
    """
    gated = {"mlp.fc1": "mlp.weights_in", "mlp.fc2": "mlp.weights_out"} if swiglu else {}
    return {**_BLOCK, **gated}


def to_transformers_names(state: State, depth: int, patches: int, swiglu: bool) -> State:
    """Rename the tensors of a timm ViT with a class token.

    Args:
        state: timm's tensors, LoRA folded in.
        depth: Number of blocks.
        patches: Number of patches that the position embedding is for.
        swiglu: Whether the MLP is gated.

    Returns:
        All tensors of a Dinov2WithRegistersModel; of a Dinov2Model when `register_tokens` is taken
        out. Layer scales that timm's model lacks are ones. Tensors with an unknown name keep it.
    """
    left = dict(state)
    out = {new: left.pop(old) for old, new in _TOP.items() if old in left}
    like = out["embeddings.cls_token"]
    dim = int(like.shape[-1])
    position = out["embeddings.position_embeddings"]
    if position.shape[1] == patches:  # the class token has no position of its own
        position = torch.cat([like.new_zeros(1, 1, dim), position], dim=1)
        out["embeddings.position_embeddings"] = position
    out["embeddings.mask_token"] = like.new_zeros(1, dim)
    out.setdefault("embeddings.register_tokens", like.new_zeros(1, 0, dim))
    for index in range(depth):
        theirs, ours = f"encoder.layer.{index}.", f"blocks.{index}."
        for kind in ("weight", "bias"):
            for old, new in block_names(swiglu).items():
                if f"{ours}{old}.{kind}" in left:
                    out[f"{theirs}{new}.{kind}"] = left.pop(f"{ours}{old}.{kind}")
            fused = left.pop(f"{ours}attn.qkv.{kind}", None)
            if fused is not None:
                for part, value in zip(_QKV, fused.chunk(3), strict=True):
                    out[f"{theirs}attention.attention.{part}.{kind}"] = value.contiguous()
        for old, new in _SCALES.items():
            out[theirs + new] = left.pop(ours + old, like.new_ones(dim))
    return {**out, **left}


def to_timm_names(state: State, depth: int, swiglu: bool, registers: bool) -> State:
    """Undo `to_transformers_names` for DINOv2's own models, to the bit.

    Args:
        state: Tensors under the names of checkpoints.
        depth: Number of blocks.
        swiglu: Whether the MLP is gated.
        registers: Whether the model has register tokens; timm then has the class token's position
            added to the token itself.

    Returns:
        timm's tensors; the mask token, which it lacks, is left out.
    """
    out: State = {}
    for old, new in _TOP.items():
        if new in state and (old != "reg_token" or registers):
            out[old] = state[new]
    if registers:
        of_class, of_patches = out["pos_embed"].tensor_split((1,), dim=1)
        out["cls_token"] = out["cls_token"] + of_class
        out["pos_embed"] = of_patches
    for index in range(depth):
        theirs, ours = f"encoder.layer.{index}.", f"blocks.{index}."
        for kind in ("weight", "bias"):
            for old, new in block_names(swiglu).items():
                out[f"{ours}{old}.{kind}"] = state[f"{theirs}{new}.{kind}"]
            parts = [state[f"{theirs}attention.attention.{part}.{kind}"] for part in _QKV]
            out[f"{ours}attn.qkv.{kind}"] = torch.cat(parts)
        for old, new in _SCALES.items():
            out[ours + old] = state[theirs + new]
    return out


def checkpoint_names(state: State) -> State:
    """Rename what a model of transformers 5 has in memory to the names of checkpoints.

    Args:
        state: `model.state_dict()` of any version of transformers.

    Returns:
        The same tensors; gates and values of a gated MLP joined.
    """
    out: State = {}
    for name, value in state.items():
        new = name
        for old, checkpoint in _IN_MEMORY.items():
            new = new.replace(old, checkpoint)
        if _GATES[0] in name:
            pair = [value, state[name.replace(*_GATES)]]
            new, value = name.replace(_GATES[0], "mlp.weights_in."), torch.cat(pair)
        if _GATES[1] not in name:
            out[new] = value
    return out


def memory_name(name: str) -> str:
    """Return what transformers 5 calls a tensor in memory.

    Args:
        name: Its name in a checkpoint.

    Returns:
        The name; the same where 5 did not rename it.
    """
    for memory, checkpoint in _IN_MEMORY.items():
        name = name.replace(checkpoint, memory)
    return name
