"""LoRA on the queries and values of the last blocks; PEFT's files in and out. Only peft importer.

W_q x → W_q x + (alpha / rank) B_q A_q x, and the same for v; keys are never touched
(Hu et al. 2021, arXiv 2106.09685; A kaiming-uniform with a = √5, B zero).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import save_file
from torch import Tensor, nn

from equifeat.errors import CheckpointError, RecipeError, WeightsError
from equifeat.model.weights import State, describe_mismatch, read_tensors
from equifeat.seeding import torch_generator

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
_PEFT_PREFIX = "base_model.model.blocks"


class LowRank(nn.Module):
    """One low-rank update B A of a matrix.

    Args:
        in_features: Width of what the matrix takes.
        out_features: Width of what it gives.
        rank: Inner width.
        generator: Random numbers for A.
    """

    def __init__(
        self, in_features: int, out_features: int, rank: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(rank, in_features))
        self.b = nn.Parameter(torch.zeros(out_features, rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5), generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """Return B A x.

        Args:
            x: (..., in_features).

        Returns:
            (..., out_features).
        """
        return F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype))

    def matrix(self) -> Tensor:
        """Return B A.

        Returns:
            (out_features, in_features).
        """
        return self.b @ self.a


class _Updated(nn.Module):
    """A layer and its update."""

    def __init__(self, layer: nn.Module, update: LowRank, scale: float) -> None:
        super().__init__()
        self.layer, self.update, self.scale = layer, update, scale

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x) + self.scale * self.update(x)
        return out


class _UpdatedQkv(nn.Module):
    """A layer that gives q, k and v in a row, and the updates of q and v."""

    def __init__(self, layer: nn.Module, q: LowRank, v: LowRank, scale: float) -> None:
        super().__init__()
        self.layer, self.q, self.v, self.scale = layer, q, v, scale

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.layer(x).chunk(3, dim=-1)
        q, v = q + self.scale * self.q(x), v + self.scale * self.v(x)
        return torch.cat([q, k, v], dim=-1)


class LoraAdapter(nn.Module):
    """Low-rank updates of q and v in the last blocks of a ViT.

    The ViT itself is not changed: updates act only inside `attached`, so several adapters
    (and the raw model) share one backbone. One backbone must not be used by two threads at once.

    Args:
        blocks: All transformer blocks of the ViT, with `attn.qkv` or `attn.q_proj`/`v_proj`.
        last: How many of the last blocks are adapted, ≥ 1.
        rank: Rank of each update.
        alpha: Updates are scaled by alpha / rank; None means alpha = rank.
        seed: Seed of the initial A; B is zero, so a new adapter changes nothing at all.

    Raises:
        RecipeError: rank or last is out of range.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        last: int,
        rank: int = 4,
        alpha: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 1 <= last <= len(blocks):
            raise RecipeError(f"lora_blocks is {last}, but the backbone has {len(blocks)} blocks")
        if rank < 1:
            raise RecipeError(f"lora_rank must be at least 1, not {rank}")
        self.rank = rank
        self.alpha = float(rank if alpha is None else alpha)
        self.first_block = len(blocks) - last
        self.blocks = nn.ModuleDict()
        for index in range(self.first_block, len(blocks)):
            dim, out_q, out_v = _widths(blocks[index])
            pair = {
                part: LowRank(dim, out, rank, torch_generator(seed, index, stream))
                for stream, (part, out) in enumerate((("q", out_q), ("v", out_v)))
            }
            self.blocks[str(index)] = nn.ModuleDict(pair)

    @property
    def scale(self) -> float:
        """Factor of every update, alpha / rank."""
        return self.alpha / self.rank

    def pair(self, index: int) -> tuple[LowRank, LowRank]:
        """Return the updates of q and v of a block.

        Args:
            index: The block's number in the ViT.

        Returns:
            The update of q, the update of v.
        """
        both = cast(nn.ModuleDict, self.blocks[str(index)])
        return cast(LowRank, both["q"]), cast(LowRank, both["v"])

    @contextmanager
    def attached(self, blocks: Sequence[nn.Module], only: int | None = None) -> Iterator[None]:
        """Let the updates act on a ViT inside the `with` block.

        Args:
            blocks: All transformer blocks of the ViT.
            only: Number of one block; None for all. A block that is not adapted stays as it is.
        """
        indices = [int(key) for key in self.blocks if only in (None, int(key))]
        replaced: list[tuple[Any, str, nn.Module]] = []
        try:
            for index in indices:
                attn = _attention(blocks[index])
                for name, stand_in in self._stand_ins(attn, *self.pair(index)).items():
                    replaced.append((attn, name, getattr(attn, name)))
                    setattr(attn, name, stand_in)
            yield
        finally:
            for attn, name, original in replaced:
                setattr(attn, name, original)

    def _stand_ins(self, attn: Any, q: LowRank, v: LowRank) -> dict[str, nn.Module]:
        """Return what takes the place of layers of one attention.

        Stand-ins and not hooks, because torch.compile sees that a layer has become another type,
        but not that a hook has come or gone.
        """
        if attn.qkv is None:
            return {
                "q_proj": _Updated(attn.q_proj, q, self.scale),
                "v_proj": _Updated(attn.v_proj, v, self.scale),
            }
        if not _reads_weight_only(attn):
            return {"qkv": _UpdatedQkv(attn.qkv, q, v, self.scale)}
        # timm's EvaAttention with separate biases reads qkv.weight and never calls qkv.
        stand_in = nn.Module()
        weight = attn.qkv.weight
        stand_in.weight = weight + self._fused_update(q, v).to(weight.dtype)
        return {"qkv": stand_in}

    def _fused_update(self, q: LowRank, v: LowRank) -> Tensor:
        return self.scale * torch.cat([q.matrix(), torch.zeros_like(q.matrix()), v.matrix()])

    @torch.no_grad()
    def fold_into(self, blocks: Sequence[nn.Module]) -> None:
        """Add the updates to a ViT's own weights, for good.

        Args:
            blocks: All transformer blocks of the ViT.
        """
        for key in self.blocks:
            q, v = self.pair(int(key))
            attn = _attention(blocks[int(key)])
            if attn.qkv is None:
                attn.q_proj.weight += self.scale * q.matrix()
                attn.v_proj.weight += self.scale * v.matrix()
            else:
                attn.qkv.weight += self._fused_update(q, v)

    def peft_state(self, blocks: Sequence[nn.Module]) -> State:
        """Return the adapter under PEFT's names.

        On a fused qkv the two updates of rank r become one of rank 2r:
        A = [A_q; A_v], B = [B_q 0; 0 0; 0 B_v].

        Args:
            blocks: All transformer blocks of the ViT.

        Returns:
            Tensors by name.
        """
        state: State = {}
        for key in self.blocks:
            q, v = self.pair(int(key))
            base = f"{_PEFT_PREFIX}.{key}.attn"
            if _attention(blocks[int(key)]).qkv is None:
                for name, part in (("q_proj", q), ("v_proj", v)):
                    state[f"{base}.{name}.lora_A.weight"] = part.a
                    state[f"{base}.{name}.lora_B.weight"] = part.b
            else:
                up = torch.zeros(3 * q.b.shape[0], 2 * self.rank, dtype=q.b.dtype)
                up[: q.b.shape[0], : self.rank] = q.b.detach()
                up[-v.b.shape[0] :, self.rank :] = v.b.detach()
                state[f"{base}.qkv.lora_A.weight"] = torch.cat([q.a, v.a])
                state[f"{base}.qkv.lora_B.weight"] = up
        return {name: value.detach().cpu().contiguous() for name, value in state.items()}

    def save_peft(self, folder: Path, blocks: Sequence[nn.Module], backbone_name: str) -> None:
        """Write the adapter so that stock PEFT loads it on the same timm model.

        Models whose attention reads qkv.weight directly (timm's EVA with separate biases) need
        PEFT's merge_and_unload(): an unmerged PEFT layer would never be called by them.

        Args:
            folder: Where to write.
            blocks: All transformer blocks of the ViT.
            backbone_name: timm's name, kept in the file for readers.
        """
        import peft

        state = self.peft_state(blocks)
        factor = 2 if any(".qkv." in name for name in state) else 1
        alpha = factor * self.alpha
        config = peft.LoraConfig(
            r=factor * self.rank,
            lora_alpha=cast(int, int(alpha) if alpha.is_integer() else alpha),
            target_modules=sorted({_target(name) for name in state}),
            lora_dropout=0.0,
            bias="none",
            inference_mode=True,
            base_model_name_or_path=f"timm/{backbone_name}",
        )
        config.save_pretrained(str(folder))
        save_file(state, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})

    @torch.no_grad()
    def load_peft(self, folder: Path, blocks: Sequence[nn.Module]) -> None:
        """Read what `save_peft` wrote, strictly.

        Args:
            folder: Where it is.
            blocks: All transformer blocks of the ViT.

        Raises:
            CheckpointError: A file is missing or damaged, or a name, shape, rank or scale differs.
        """
        path = folder / ADAPTER_WEIGHTS
        try:
            found = read_tensors(path)
        except WeightsError as error:
            raise CheckpointError(f"{folder} is incomplete: {error}") from error
        expected = self.peft_state(blocks)
        problem = describe_mismatch(expected, found)
        if problem:
            raise CheckpointError(f"{path} does not fit the adapter in config.json: {problem}")
        factor = 2 if any(".qkv." in name for name in expected) else 1
        wanted = {"r": factor * self.rank, "lora_alpha": factor * self.alpha}
        try:
            config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
            differing = [key for key, value in wanted.items() if config[key] != value]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder / ADAPTER_CONFIG} cannot be read: {error}") from error
        if differing:
            key = differing[0]
            raise CheckpointError(
                f"{folder / ADAPTER_CONFIG} has {key} {config[key]}, but config.json asks for "
                f"{wanted[key]:g}: the two files are not of one model"
            )
        for key in self.blocks:
            q, v = self.pair(int(key))
            base = f"{_PEFT_PREFIX}.{key}.attn"
            if factor == 1:
                for name, part in (("q_proj", q), ("v_proj", v)):
                    part.a.copy_(found[f"{base}.{name}.lora_A.weight"])
                    part.b.copy_(found[f"{base}.{name}.lora_B.weight"])
                continue
            down, up = found[f"{base}.qkv.lora_A.weight"], found[f"{base}.qkv.lora_B.weight"]
            width = q.b.shape[0]
            up_q, up_v = up[:width, : self.rank], up[-width:, self.rank :]
            if int(up.count_nonzero()) != int(up_q.count_nonzero() + up_v.count_nonzero()):
                raise CheckpointError(f"{path} changes more than q and v of block {key}")
            q.a.copy_(down[: self.rank])
            v.a.copy_(down[self.rank :])
            q.b.copy_(up_q)
            v.b.copy_(up_v)


def merge_with_peft(model: nn.Module, folder: Path) -> Any:
    """Load an adapter with stock PEFT and fold it in, as somebody without this package does.

    Args:
        model: A timm model; its weights are changed.
        folder: What `LoraAdapter.save_peft` wrote.

    Returns:
        The timm model.
    """
    import peft

    return peft.PeftModel.from_pretrained(model, str(folder)).merge_and_unload()


def _attention(block: nn.Module) -> Any:
    """Return a block's attention; `qkv` of it is None when q, k, v are separate."""
    attn: Any = getattr(block, "attn", None)
    if attn is None or not hasattr(attn, "qkv"):
        raise RecipeError(
            f"LoRA needs attn.qkv or attn.q_proj, which this backbone's {type(block).__name__} "
            "lacks: choose another backbone, or set lora_blocks to 0 and train the head alone"
        )
    return attn


def _reads_weight_only(attn: Any) -> bool:
    separate_bias = getattr(attn, "q_bias", None) is not None
    return separate_bias and not getattr(attn, "qkv_bias_separate", False)


def adapts_stored_weight(blocks: Sequence[nn.Module]) -> bool:
    """Return whether LoRA acts on a stored weight, because attention never calls its layer.

    Args:
        blocks: All transformer blocks of the ViT.

    Returns:
        True for some EVA models; everywhere else LoRA acts on what the layers return.
    """
    return any(_reads_weight_only(getattr(block, "attn", None)) for block in blocks)


def _widths(block: nn.Module) -> tuple[int, int, int]:
    """Return the widths of the input, of q and of v of a block's attention."""
    attn = _attention(block)
    if attn.qkv is None:
        return attn.q_proj.in_features, attn.q_proj.out_features, attn.v_proj.out_features
    width = attn.qkv.out_features // 3
    return attn.qkv.in_features, width, width


def _target(name: str) -> str:
    """Return the module a PEFT tensor belongs to, as timm names it."""
    return name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0]
