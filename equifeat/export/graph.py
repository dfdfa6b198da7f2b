"""A model as one graph of tensor operations: what the exporters of ONNX and torch.export trace.

FeatureExtractor reads sizes as Python numbers, which a trace would freeze. Here everything that
depends on a fixed size is computed once, and a free size stays a tensor. Resizing is a product
with two small matrices, so that a runtime needs no antialiased resize of its own.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float
from torch import Tensor, nn

from equifeat.errors import ExportError
from equifeat.geometry.pixels import SizeHW, sample
from equifeat.geometry.resize_matrix import (
    cubic_resize_matrices,
    linear_resize_matrix,
    reference_resize_matrices,
)
from equifeat.model.backbone import Backbone
from equifeat.model.compiled import run_block
from equifeat.model.extractor import FeatureExtractor

Side = int | torch.SymInt

Dynamic = Literal["none", "batch", "size"]
"""What may change from call to call: nothing, the batch, or batch, height and width."""


def check_dynamic(dynamic: str, size_hw: SizeHW | None) -> None:
    """Refuse options of a graph's size that make no sense.

    Args:
        dynamic: One of `Dynamic`.
        size_hw: Height and width that were asked for, or None.

    Raises:
        ExportError: There is no such choice, or a free size has a size.
    """
    if dynamic not in get_args(Dynamic):
        kinds = ", ".join(get_args(Dynamic))
        raise ExportError(f"dynamic must be one of {kinds}, not {dynamic!r}")
    if dynamic == "size" and size_hw is not None:
        raise ExportError(
            f"dynamic 'size' takes images of every size, but height and width {size_hw[0]} and "
            f"{size_hw[1]} are given too: leave out one of the two"
        )


class DenseGraph(nn.Module):
    """Images to raw features; see `dense_graph`.

    Args:
        extractor: A model without an adapter, in float32; its modules are used, not copied.
        size_hw: The images' height and width; None for any multiples of the patch.

    Raises:
        ExportError: The ViT's blocks or positions are of a kind that has no such graph.
    """

    mean: Tensor
    std: Tensor
    rows: Tensor | None
    columns: Tensor | None

    def __init__(self, extractor: FeatureExtractor, size_hw: SizeHW | None) -> None:
        super().__init__()
        backbone = extractor.backbone
        vit = backbone.model
        self.size_hw = size_hw
        self.dim, self.patch_size = backbone.dim, backbone.patch_size
        self.grid_hw = None if size_hw is None else extractor.grid_hw(size_hw)
        self.register_buffer("mean", backbone.mean.clone())
        self.register_buffer("std", backbone.std.clone())
        whole = None
        if self.grid_hw is not None:
            whole = (self.grid_hw[0] * self.patch_size, self.grid_hw[1] * self.patch_size)
        for axis, name in enumerate(("rows", "columns")):
            matrix = None
            if whole is not None and size_hw is not None and whole[axis] != size_hw[axis]:
                matrix = linear_resize_matrix(size_hw[axis], whole[axis]).to(self.mean)
            self.register_buffer(name, matrix)
        self.embed, self.embed_norm = vit.patch_embed.proj, vit.patch_embed.norm
        self.position = _Position(backbone, self.grid_hw)
        self.rotary = _Rotary(backbone, self.grid_hw)
        self.norm_pre, self.norm = vit.norm_pre, vit.norm
        self.blocks = vit.blocks
        self.head = extractor.head

    def forward(self, images: Float[Tensor, "b 3 hp wp"]) -> Float[Tensor, "b d h w"]:
        """Return raw features.

        Args:
            images: RGB in [0, 1].

        Returns:
            A feature for every patch, in float32, not normalised.
        """
        if self.rows is not None:
            images = self.rows @ images
        if self.columns is not None:
            images = images @ self.columns.T
        x = (images - self.mean) / self.std
        maps = self.embed(x) if self.size_hw is not None else self._embed_whole(x)
        h, w = maps.shape[-2:] if self.grid_hw is None else self.grid_hw
        patches = self.embed_norm(maps.permute(0, 2, 3, 1)).flatten(1, 2)
        tokens = self.norm_pre(self.position(patches, h, w))
        rotary = self.rotary(h, w)
        for index, block in enumerate(self.blocks):
            tokens = run_block(block, tokens, self.rotary.of(index, rotary))
        patches = self.norm(tokens)[:, self.position.prefixes :]
        features: Tensor = self.head(patches.transpose(1, 2).unflatten(2, (h, w)))
        return features.float()

    def _embed_whole(self, images: Tensor) -> Tensor:
        """Embed the patches of images of any size.

        A convolution would silently leave out what is over at the border of an image that is not
        of whole patches; cutting into patches by a reshape fails in every runtime.
        """
        b, c, height, width = images.shape
        p = self.patch_size
        h, w = height // p, width // p
        cut = images.reshape(b, c, h, p, w, p).permute(0, 2, 4, 1, 3, 5).reshape(b, h, w, -1)
        out = F.linear(cut, self.embed.weight.flatten(1), self.embed.bias)
        return out.permute(0, 3, 1, 2)


class KeypointGraph(nn.Module):
    """Images and points to descriptors; see `keypoint_graph`.

    Args:
        dense: The graph of the images' features.
        point_scale: What points are multiplied by, see FeatureMap.
    """

    def __init__(self, dense: DenseGraph, point_scale: float = 1.0) -> None:
        super().__init__()
        self.dense, self.point_scale = dense, point_scale

    def forward(
        self, images: Float[Tensor, "b 3 hp wp"], keypoints: Float[Tensor, "b n 2"]
    ) -> Float[Tensor, "b n d"]:
        """Return the descriptors of points.

        Args:
            images: RGB in [0, 1].
            keypoints: xy in pixels of the images; points outside take the border's value.

        Returns:
            L2-normalised descriptors.
        """
        return self.both(images, keypoints)[1]

    def both(self, images: Tensor, keypoints: Tensor) -> tuple[Tensor, Tensor]:
        """Return the raw features and the descriptors of points.

        Args:
            images: As in `forward`.
            keypoints: As in `forward`.

        Returns:
            (B, D, h, w) features, (B, N, D) descriptors.
        """
        height, width = images.shape[-2:] if self.dense.size_hw is None else self.dense.size_hw
        features = self.dense(images)
        if self.point_scale != 1.0:
            keypoints = keypoints * self.point_scale
        values = sample(features, keypoints, (height, width))
        return features, F.normalize(values, dim=-1)


def dense_graph(extractor: FeatureExtractor, size_hw: SizeHW | None) -> DenseGraph:
    """Return a model's graph from images to raw features, its adapter folded in.

    Args:
        extractor: A model in float32; it is copied.
        size_hw: The images' height and width, any: they are resized to whole patches inside. None
            leaves both free, but the images must be of whole patches then.

    Returns:
        A module in eval mode: images (B, 3, H, W), RGB in [0, 1] → (B, D, h, w), equal to
        FeatureExtractor.dense up to rounding.

    Raises:
        ExportError: The model is in half precision, the size is not positive, or the ViT is of a
            kind that has no such graph.
    """
    if size_hw is not None and min(size_hw) < 1:
        raise ExportError(f"size must be height and width of 1 pixel or more, not {size_hw}")
    try:
        merged = extractor.merged()
    except ValueError as error:
        raise ExportError(f"the model cannot be exported: {error}") from error
    return DenseGraph(merged, size_hw).requires_grad_(False).eval()


def keypoint_graph(extractor: FeatureExtractor, size_hw: SizeHW | None) -> KeypointGraph:
    """Return a model's graph from images and points to descriptors, its adapter folded in.

    Args:
        extractor: A model in float32; it is copied.
        size_hw: As in `dense_graph`.

    Returns:
        A module in eval mode: images (B, 3, H, W) and keypoints (B, N, 2) → (B, N, D), equal to
        FeatureExtractor.at up to rounding, but points outside the image are not refused.

    Raises:
        ExportError: As in `dense_graph`.
    """
    return KeypointGraph(dense_graph(extractor, size_hw), extractor.point_scale).eval()


class _Position(nn.Module):
    """Adds the learned position embedding and puts class and register tokens in front."""

    prefix: Tensor | None
    grid: Tensor | None

    def __init__(self, backbone: Backbone, grid_hw: SizeHW | None) -> None:
        super().__init__()
        vit = backbone.model
        own_h, own_w = vit.patch_embed.grid_size
        self.own_hw: SizeHW = (own_h, own_w)
        self.like_reference = backbone.position == "reference"
        self.prefixes = backbone.num_prefix_tokens
        self.resampled_inside = grid_hw is None
        # What timm adds to patches of zeros is all that it adds, whatever the family.
        added = vit._pos_embed(torch.zeros(1, own_h, own_w, backbone.dim, device=backbone.device))
        tokens: Tensor = (added[0] if isinstance(added, tuple) else added).detach()
        prefix, grid = tokens[:, : self.prefixes], tokens[:, self.prefixes :]
        self.register_buffer("prefix", prefix.clone() if self.prefixes else None)
        if not bool(grid.any()):  # rotary families have none
            self.register_buffer("grid", None)
            return
        grid = grid.reshape(1, own_h, own_w, -1)
        self.register_buffer("grid", grid if grid_hw is None else self._resampled(grid, *grid_hw))

    def forward(self, patches: Tensor, h: Side, w: Side) -> Tensor:
        if self.grid is not None:
            grid = self._resampled(self.grid, h, w) if self.resampled_inside else self.grid
            patches = patches + grid.flatten(1, 2)
        if self.prefix is None:
            return patches
        return torch.cat([self.prefix.expand(patches.shape[0], -1, -1), patches], dim=1)

    def _resampled(self, grid: Tensor, h: Side, w: Side) -> Tensor:
        """Resample (1, own rows, own columns, D) to (1, h, w, D)."""
        matrices = reference_resize_matrices if self.like_reference else cubic_resize_matrices
        rows, columns = matrices(self.own_hw, (h, w), grid.device)
        by_rows = (rows @ grid.flatten(2)).reshape(1, h, self.own_hw[1], -1)
        return columns @ by_rows


class _Rotary(nn.Module):
    """The rotary embedding of each block, for the families that have one."""

    fixed: Tensor | None

    def __init__(self, backbone: Backbone, grid_hw: SizeHW | None) -> None:
        super().__init__()
        rope = getattr(backbone.model, "rope", None)
        self.each_block = bool(getattr(backbone.model, "rope_mixed", False))
        self.rope = rope if grid_hw is None else None
        fixed = None if rope is None or grid_hw is None else rope.get_embed(shape=grid_hw).detach()
        self.register_buffer("fixed", fixed)

    def forward(self, h: Side, w: Side) -> Tensor | None:
        """Return (N, 2 * head width), or (blocks, heads, N, 2 * head width), or None."""
        if self.rope is None:
            return self.fixed
        if hasattr(self.rope, "periods"):
            return self._dinov3(h, w)
        found: Tensor = self.rope.get_embed(shape=(h, w))
        return found

    def of(self, index: int, embedding: Tensor | None) -> Tensor | None:
        """Return the embedding of one block."""
        return embedding[index] if embedding is not None and self.each_block else embedding

    def _dinov3(self, h: Side, w: Side) -> Tensor:
        """Do what timm's get_embed does, which reads the size as a number and freezes it."""
        rope: Any = self.rope
        counts = [torch.ones(n, device=rope.periods.device).sum() for n in (h, w)]
        if rope.normalize_coords != "separate":
            both = torch.maximum if rope.normalize_coords == "max" else torch.minimum
            counts = [both(*counts)] * 2
        along = [
            2.0 * ((torch.arange(n, device=count.device) + 0.5 + rope.grid_offset) / count) - 1.0
            for n, count in zip((h, w), counts, strict=True)
        ]
        y, x = torch.meshgrid(*along, indexing="ij")
        places = torch.stack([y, x] if rope.grid_indexing == "ij" else [x, y], dim=-1)
        return torch.cat(rope._get_pos_embed_from_coords(places.flatten(0, 1)), dim=-1)
