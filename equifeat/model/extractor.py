"""FeatureExtractor: images → frozen backbone with an adapter → head → features at points."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from equifeat.errors import RecipeError
from equifeat.geometry.pixels import SizeHW, resize
from equifeat.model.adapter import LoraAdapter, adapts_stored_weight
from equifeat.model.backbone import Backbone, Position, load_backbone
from equifeat.model.compiled import CompiledBlocks
from equifeat.model.feature_map import FeatureMap, TrunkState
from equifeat.model.head import Head, HeadKind
from equifeat.model.hub_mixin import HubMixin
from equifeat.model.inputs import (
    ImageFeatures,
    Images,
    ManyImages,
    Points,
    gather,
    keypoints_of,
    size_of,
    unit_floats,
)
from equifeat.model.weights import WeightsSource

Sampling = Literal["exact", "reference"]


class FeatureExtractor(HubMixin, nn.Module):
    """Dense features of images of any size.

    An image is resized to whole patches, so features cover the image exactly, corner to corner;
    points are always given in pixels of the image itself.

    Args:
        backbone: The frozen ViT. It may be shared with other extractors: an adapter acts only
            while its own extractor runs.
        adapter: LoRA of the last blocks, or None.
        head: Refinement of the feature map.
    """

    recompute: bool = False
    """Whether the tail's blocks run again for their gradients instead of keeping activations."""

    half_head: bool = False
    """Whether the head runs in the backbone's half precision too; see `half_precision`."""

    sampling: Sampling = "exact"
    """Where points are sampled: "reference" repeats a fault of the reference (docs/convert.md)."""

    def __init__(
        self, backbone: Backbone, adapter: LoraAdapter | None = None, head: Head | None = None
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.adapter = adapter
        self.head = head if head is not None else Head("none", backbone.dim)

    @property
    def dim(self) -> int:
        """Number of channels D of a feature."""
        return self.backbone.dim

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels of the resized image."""
        return self.backbone.patch_size

    @property
    def point_scale(self) -> float:
        """What points are multiplied by before they are sampled: 1 but for a repeated fault."""
        # The reference divides coordinates by 14 whatever the patch is.
        return self.patch_size / 14 if self.sampling == "reference" else 1.0

    @property
    def tail_blocks(self) -> int:
        """How many of the last blocks gradients pass through."""
        return self.backbone.depth - self.adapter.first_block if self.adapter is not None else 0

    def dense(
        self,
        images: Images,
        resolution: int | None = None,
        at: Literal["patch", "image"] = "patch",
        *,
        overlap: int = 1,
        layers: Sequence[int] = (-1,),
        norm: bool = True,
    ) -> FeatureMap:
        """Return a feature for every patch, or for every pixel.

        Args:
            images: (B, 3, H, W) RGB in [0, 1] or uint8, or an image, or a list of images of one
                size: tensors (3, H, W), arrays (H, W, 3), PIL images, paths; see docs/images.md.
            resolution: Patches on the longer side; None keeps the image's own size, rounded to
                whole patches.
            at: "patch" gives the map of patches, "image" one bilinearly resized to H × W.
            overlap: Patches start every patch_size / overlap pixels of the resized image, with
                positions resampled to the larger grid. The map then leaves a margin of the image
                uncovered, see FeatureMap.
            layers: Blocks whose tokens are taken, counted like list indices: -1 is the last. The
                head refines the last block's map only.
            norm: Apply the ViT's final norm (to every layer's tokens).

        Returns:
            The features, not normalised; of several layers, their L2-normalised features
            concatenated: (B, len(layers) * D, h, w).

        Raises:
            ImageError: The images have a wrong shape, type or range, or different sizes.
            RecipeError: resolution is below 1, patch_size / overlap is no whole number, or there
                is no such layer.
        """
        batch = unit_floats(gather(images), self.backbone.device)
        state = self.trunk(batch, resolution, overlap=overlap, layers=layers)
        out = self.tail(state, layers=layers, norm=norm)
        return out if at == "patch" else out.at_image()

    def at(self, images: Images, keypoints: Points, resolution: int | None = None) -> Tensor:
        """Return the descriptors of points.

        Args:
            images: As in `dense`.
            keypoints: (B, N, 2) xy in pixels of the images; (N, 2) for a single one.
            resolution: As in `dense`.

        Returns:
            (B, N, D) L2-normalised descriptors; the same as `dense(images).sample(keypoints)`.

        Raises:
            ImageError: The images have a wrong shape, type or range.
            KeypointError: A point lies outside its image, or the shape is wrong.
        """
        batch = gather(images)
        points = keypoints_of(keypoints, len(batch), size_of(batch))
        maps = self.tail(self.trunk(unit_floats(batch, self.backbone.device), resolution))
        return maps.sample(points.to(maps.features.device))

    def dense_many(
        self, images: ManyImages, resolution: int | None = None, **options: Any
    ) -> Iterator[ImageFeatures]:
        """Give name, features and time of images, one after the other, without gradients.

        The images may be a folder, a glob pattern, a video, or anything that gives images, paths
        or videos when iterated; sizes may differ. Nothing is read before its turn. The options are
        those of `equifeat.model.many.dense_many`.
        """
        from equifeat.model.many import dense_many  # which builds upon this module

        return dense_many(self, images, resolution, **options)

    def dense_tiled(
        self, images: Images, resolution: int | None = None, **options: Any
    ) -> FeatureMap:
        """Return the map of huge images, made of overlapping windows, without gradients.

        The grid is that of `dense`. Attention sees one window at a time, so that features
        differ from the untiled ones unless one window holds the image. The options are those of
        `equifeat.model.tiling.dense_tiled`.
        """
        from equifeat.model.tiling import dense_tiled  # which builds upon this module

        return dense_tiled(self, images, resolution, **options)

    def forward(self, images: Images, resolution: int | None = None) -> FeatureMap:
        """Return `dense`."""
        return self.dense(images, resolution)

    def trunk(
        self,
        images: Tensor,
        resolution: int | None = None,
        *,
        overlap: int = 1,
        layers: Sequence[int] = (-1,),
    ) -> TrunkState:
        """Run what never changes in training: resizing and the frozen blocks, without gradients.

        Args:
            images: (B, 3, H, W) RGB in [0, 1].
            resolution: As in `dense`.
            overlap: As in `dense`.
            layers: As in `dense`: the state has passed none of these blocks but the first.

        Returns:
            A state to store, or to give to `tail`.
        """
        size_hw = (int(images.shape[-2]), int(images.shape[-1]))
        grid_hw = self.grid_hw(size_hw, resolution)
        whole = (grid_hw[0] * self.patch_size, grid_hw[1] * self.patch_size)
        with torch.no_grad():
            resized = resize(images.to(self.backbone.device), whole)
            left = max(self.tail_blocks, self.backbone.depth - 1 - min(self._layer_numbers(layers)))
            state = self.backbone.trunk(resized, left, overlap)
        margin = state.margin_yx
        margin = (margin[0] * size_hw[0] / whole[0], margin[1] * size_hw[1] / whole[1])
        return state._replace(size_hw=size_hw, margin_yx=margin)

    def tail(
        self, state: TrunkState, *, layers: Sequence[int] = (-1,), norm: bool = True
    ) -> FeatureMap:
        """Run the adapted blocks, the final norm and the head.

        Args:
            state: What `trunk` gave, perhaps stored in between.
            layers: As in `dense`.
            norm: As in `dense`.

        Returns:
            The features of the patches, as `dense` gives them.

        Raises:
            ValueError: The state comes from an extractor with fewer adapted blocks, or it has
                passed one of the layers.
        """
        numbers, last = self._layer_numbers(layers), self.backbone.depth - 1
        if state.blocks_done > self.backbone.depth - self.tail_blocks:
            raise ValueError(
                f"the state has passed {state.blocks_done} blocks, but adapted blocks begin after "
                f"{self.backbone.depth - self.tail_blocks}: make it with this extractor's trunk()"
            )
        around = None if self.adapter is None else self._attached
        found = self.backbone.layers(state, numbers, norm, around, self.recompute)
        pairs = zip(numbers, found, strict=True)
        maps = [self._refined(one) if number == last else one for number, one in pairs]
        if len(maps) > 1:
            maps = [torch.cat([F.normalize(one.float(), dim=1) for one in maps], dim=1)]
        return FeatureMap(maps[0], state.size_hw, state.margin_yx, self.point_scale)

    def _refined(self, features: Tensor) -> Tensor:
        with self.backbone.precision() if self.half_head else nullcontext():
            out: Tensor = self.head(features)
        return out.to(features.dtype) if self.half_head else out

    def _layer_numbers(self, layers: Sequence[int]) -> list[int]:
        depth = self.backbone.depth
        wrong = [layer for layer in layers if not -depth <= layer < depth]
        if wrong or not layers:
            asked = wrong[0] if wrong else tuple(layers)
            raise RecipeError(
                f"layers has {asked}, but {self.backbone.name} has the blocks 0 to {depth - 1}, "
                f"or -{depth} to -1."
            )
        return [layer % depth for layer in layers]

    def _attached(self, index: int) -> AbstractContextManager[None]:
        assert self.adapter is not None
        return self.adapter.attached(self.backbone.blocks, only=index)

    def compute_in(self, dtype: torch.dtype) -> None:
        """Run the ViT in mixed precision, with a half-precision copy of its weights only.

        What trains stays in float32. The backbone changes for all that share it.

        Args:
            dtype: torch.bfloat16 or torch.float16.
        """
        blocks = self.backbone.blocks
        # Where LoRA is added to a stored weight, rounding that weight would lose small updates.
        adds = self.adapter is not None and adapts_stored_weight(blocks)
        self.backbone.compute_in(dtype, blocks[-self.tail_blocks :] if adds else ())

    def half_precision(self, dtype: torch.dtype = torch.bfloat16) -> FeatureExtractor:
        """Run the ViT and the head in half precision from now on: for inference on GPUs.

        Features stay float32, as do norms, positions, tokens between blocks and LoRA's own weights.
        The backbone changes for good, and for all that share it.

        Args:
            dtype: torch.bfloat16 or torch.float16.

        Returns:
            This extractor.

        Raises:
            RecipeError: The type is another one, or the backbone is in the other half type.
        """
        if dtype not in (torch.bfloat16, torch.float16):
            raise RecipeError(f"half precision is torch.bfloat16 or torch.float16, not {dtype}")
        try:
            self.compute_in(dtype)
        except ValueError as error:
            raise RecipeError(str(error)) from error
        self.half_head = True
        return self

    def compile_blocks(self, backend: str | Callable[..., object] = "inductor") -> FeatureExtractor:
        """Run the blocks compiled by torch.compile from now on, for all who share the backbone.

        Compiling happens in the first call, and again when sizes first change. Where it fails,
        there is one warning and all goes on without. Returns this extractor.
        """
        self.backbone.run_block = CompiledBlocks(backend)
        return self

    def grid_hw(self, size_hw: SizeHW, resolution: int | None = None) -> SizeHW:
        """Return how many patches an image of some size is resized to.

        Args:
            size_hw: Height and width of the image.
            resolution: Patches on the longer side, or None for the image's own size.

        Returns:
            Rows and columns, each at least 1. The shorter side is rounded to the nearest patch
            (rounded down with position or sampling "reference", as the reference does).
        """
        if resolution is None:
            return _whole(size_hw[0] / self.patch_size), _whole(size_hw[1] / self.patch_size)
        if resolution < 1:
            raise RecipeError(f"resolution must be at least 1 patch, not {resolution}")
        longer = max(size_hw)
        if "reference" in (self.backbone.position, self.sampling):
            h, w = (int(side * 8 * resolution / longer) // 8 for side in size_hw)
            return max(1, h), max(1, w)
        h, w = (_whole(side * resolution / longer) for side in size_hw)
        return h, w

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of the adapter and the head; nothing else ever trains.

        Returns:
            Parameters by name.
        """
        return {name: value for name, value in self.named_parameters() if value.requires_grad}

    def raw(self) -> FeatureExtractor:
        """Return the raw ViT: the same backbone (shared, not copied), no adapter, no head.

        Returns:
            Another extractor.
        """
        return FeatureExtractor(self.backbone)

    def merged(self) -> FeatureExtractor:
        """Return a copy whose backbone has the adapter folded into its weights.

        Returns:
            An extractor with a backbone of its own and no adapter; for export, not for saving.

        Raises:
            ValueError: Only a half-precision copy of the weights is left.
        """
        if self.backbone.compute_dtype is not None:
            raise ValueError(
                f"the weights are in {self.backbone.compute_dtype}: load the model folder to merge"
            )
        out = copy.deepcopy(self)
        if out.adapter is not None:
            out.adapter.fold_into(out.backbone.blocks)
            out.backbone.mark(WeightsSource("merged"))
            out.adapter = None
        return out


def build_extractor(
    backbone: str | Backbone,
    weights: str = "packaged",
    head: HeadKind = "none",
    lora_rank: int = 4,
    lora_alpha: float | None = None,
    lora_blocks: int = 4,
    *,
    position: Position = "timm",
    seed: int = 0,
) -> FeatureExtractor:
    """Build an untrained extractor.

    Args:
        backbone: timm's name of a ViT, or a backbone to share (weights and position are its own).
        weights: "packaged", "hub", "random" or the path of a file.
        head: "none", "conv" or "residual".
        lora_rank: Rank of the updates of q and v.
        lora_alpha: Their scale is alpha / rank; None means alpha = rank.
        lora_blocks: How many of the last blocks are adapted; 0 for no LoRA.
        position: How a learned position embedding is resampled, "timm" or "reference".
        seed: Seed of everything random at the start: LoRA, head and random weights.

    Returns:
        The extractor, on the CPU or where a given backbone is. With head "none" or "residual" it
        gives exactly the features of the raw ViT.

    Raises:
        ModelNameError: timm knows no such plain ViT.
        WeightsError: The weights are missing, altered or of another model.
        RecipeError: An option is out of range.
    """
    if isinstance(backbone, str):
        backbone = load_backbone(backbone, weights, position=position, seed=seed)
    if lora_blocks < 0:
        raise RecipeError(f"lora_blocks must be 0 or more, not {lora_blocks}")
    adapter = None
    if lora_blocks:
        adapter = LoraAdapter(backbone.blocks, lora_blocks, lora_rank, lora_alpha, seed)
    extractor = FeatureExtractor(backbone, adapter, Head(head, backbone.dim, seed))
    return extractor.to(backbone.device)


def _whole(patches: float) -> int:
    return max(1, int(patches + 0.5))
