"""Augment a view: affine on image, mask, depth, keypoints and K together, then colour.

Every random number comes from the generator that is passed in; kornia is called with explicit
parameters, so the global random state is neither read nor changed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import kornia
import numpy as np
import torch
from jaxtyping import Bool, Float
from kornia.geometry.transform import warp_affine
from torch import Tensor

from equifeat.data.lighting import relight
from equifeat.errors import RecipeError
from equifeat.geometry.camera import Camera
from equifeat.geometry.pixels import (
    SizeHW,
    crop,
    from_integer_centers,
    inside,
    normalize_xy,
    pixel_centers,
    resize,
    to_integer_centers,
)
from equifeat.image_files import read_image

BACKGROUNDS = ("black", "noise", "gradient")
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class AugmentedView(NamedTuple):
    """A view after augmentation.

    Attributes:
        image: (3, H, W) RGB in [0, 1].
        mask: (H, W) whether the object is there.
        depth: (H, W) z-depth, 0 = background.
        camera: Intrinsics of the new image: K is multiplied by the affine map.
        keypoints: (N, 2) pixels of the new image, also those that left it.
        kept: (N,) whether the keypoint is inside the new image.
        changed: Whether the image differs from the one that was given.
    """

    image: Tensor
    mask: Tensor
    depth: Tensor
    camera: Camera
    keypoints: Tensor
    kept: Tensor
    changed: bool


@dataclass(frozen=True)
class Augment:
    """What may happen to a view; the defaults are the reference's ranges.

    Args:
        affine_p: Probability of the affine map.
        shift: Largest shift as a share of the image's sides.
        scale: Largest relative change of scale.
        rotate_deg: Largest rotation in degrees.
        blur_p: Probability of a Gaussian blur.
        blur_sigma: Largest sigma of the blur in pixels.
        noise_p: Probability of sensor noise.
        noise_std: Largest standard deviation of the noise (1 = white), at least a quarter of it is
            drawn; half of its variance grows with brightness, as in a camera.
        clahe_p: Probability of local histogram equalisation (CLAHE) of the luminance.
        clahe_clip: Largest clip limit of CLAHE, at least 1.
        color_p: Probability of a change of brightness and contrast.
        brightness: Largest change of brightness (1 = white); darkening stops at half of the mean.
        contrast: Largest relative change of contrast.
        light_p: Probability of light on the object from a random direction.
        light: Largest relative change of brightness by it.
        versions: 0 augments every view of every pair anew. With N each view has N augmented
            versions that stay the same for the whole run, so that what is frozen of them can be
            kept (`model.trunk_cache_mb`).
    """

    affine_p: float = 0.5
    shift: float = 0.25
    scale: float = 0.25
    rotate_deg: float = 45.0
    blur_p: float = 0.5
    blur_sigma: float = 1.0
    noise_p: float = 0.5
    noise_std: float = 0.03
    clahe_p: float = 0.5
    clahe_clip: float = 4.0
    color_p: float = 0.5
    brightness: float = 0.2
    contrast: float = 0.2
    light_p: float = 0.0
    light: float = 0.5
    versions: int = 0

    def __post_init__(self) -> None:
        for name in ("affine_p", "blur_p", "noise_p", "clahe_p", "color_p", "light_p"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise RecipeError(
                    f"augment.{name} is {getattr(self, name)}: a probability is between 0 and 1"
                )
        for name in ("shift", "rotate_deg", "blur_sigma", "noise_std", "brightness"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise RecipeError(f"augment.{name} is {getattr(self, name)}: use 0 or more")
        for name in ("scale", "contrast", "light"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise RecipeError(f"augment.{name} is {getattr(self, name)}: use 0 to below 1")
        if not 1.0 <= self.clahe_clip < math.inf:
            raise RecipeError(f"augment.clahe_clip is {self.clahe_clip}: use 1 or more")
        if self.versions < 0:
            raise RecipeError(f"augment.versions is {self.versions}: use 0 or more")

    def draw_affine(self, size_hw: SizeHW, rng: np.random.Generator) -> Float[Tensor, "3 3"] | None:
        """Draw the affine map of one image: rotation and scale about its middle, then a shift.

        Args:
            size_hw: Height and width of the image.
            rng: Source of every random number.

        Returns:
            (3, 3) map from old to new pixels (corner convention, float64), or None for no map.
        """
        lucky = rng.random() < self.affine_p
        dx, dy, grow, turn = rng.uniform(-1.0, 1.0, size=4)
        if not lucky:
            return None
        h, w = size_hw
        scale, angle = 1.0 + grow * self.scale, math.radians(turn * self.rotate_deg)
        c, s = scale * math.cos(angle), scale * math.sin(angle)
        middle = torch.tensor([w / 2, h / 2], dtype=torch.float64)
        shift = torch.tensor([dx * self.shift * w, dy * self.shift * h], dtype=torch.float64)
        A = torch.eye(3, dtype=torch.float64)
        A[:2, :2] = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
        A[:2, 2] = middle + shift - A[:2, :2] @ middle
        return A

    def photometric(
        self, image: Float[Tensor, "3 h w"], rng: np.random.Generator
    ) -> tuple[Float[Tensor, "3 h w"], bool]:
        """Blur, add noise, equalise, change brightness and contrast, each with its probability.

        Args:
            image: RGB in [0, 1].
            rng: Source of every random number.

        Returns:
            The image, clamped to [0, 1], and whether anything was done.
        """
        blur, noise, clahe, color = rng.random(4) < (
            self.blur_p,
            self.noise_p,
            self.clahe_p,
            self.color_p,
        )
        amount = rng.random(3)
        bright, contrast = rng.uniform(-1.0, 1.0, size=2)
        out = image[None]
        if blur and self.blur_sigma > 0:
            sigma = max(1e-3, float(amount[0]) * self.blur_sigma)
            side = 2 * math.ceil(2 * sigma) + 1
            out = kornia.filters.gaussian_blur2d(out, (side, side), (sigma, sigma))
        if noise:
            std = (0.25 + 0.75 * float(amount[1])) * self.noise_std
            normal = torch.from_numpy(rng.standard_normal(tuple(out.shape), dtype=np.float32))
            out = (out + normal * std * (0.5 + 0.5 * out).sqrt()).clamp(0.0, 1.0)
        if clahe:
            limit = 1.0 + float(amount[2]) * (self.clahe_clip - 1.0)
            ycc = kornia.color.rgb_to_ycbcr(out)
            y = kornia.enhance.equalize_clahe(ycc[:, :1].clamp(0.0, 1.0), limit, (8, 8))
            out = kornia.color.ycbcr_to_rgb(torch.cat([y, ycc[:, 1:]], dim=1)).clamp(0.0, 1.0)
        if color:
            out = kornia.enhance.adjust_contrast(out, 1.0 + float(contrast) * self.contrast)
            lit = out[:, :, out[0].amax(dim=0) > 0]
            # Dark objects would lose every detail: at most half of their mean is taken away.
            darkest = -0.5 * float(lit.mean()) if lit.numel() else 0.0
            change = max(float(bright) * self.brightness, darkest)
            out = kornia.enhance.adjust_brightness(out, change)
        return out[0].clamp(0.0, 1.0), bool(blur or noise or clahe or color)


def apply_affine(A: Float[Tensor, "3 3"], xy: Float[Tensor, "n 2"]) -> Float[Tensor, "n 2"]:
    """Move pixels by an affine map of the image plane.

    Args:
        A: (3, 3) map, corner pixel convention.
        xy: (N, 2) pixels.

    Returns:
        (N, 2) pixels of the warped image.
    """
    A = A.to(xy.device, torch.float64)
    return (xy.double() @ A[:2, :2].mT + A[:2, 2]).to(xy.dtype)


def warp(
    image: Float[Tensor, "c h w"], A: Float[Tensor, "3 3"], mode: str = "bilinear"
) -> Float[Tensor, "c h w"]:
    """Warp an image by an affine map; what comes from outside is 0.

    Args:
        image: What to warp.
        A: (3, 3) map from old to new pixels, corner pixel convention.
        mode: "bilinear" or "nearest".

    Returns:
        The warped image, of the same size.
    """
    # kornia's pixels are integer-centred: its matrix is ours seen through the two border functions.
    frame = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    moved = to_integer_centers(apply_affine(A, from_integer_centers(frame)))
    matrix = torch.stack([moved[1] - moved[0], moved[2] - moved[0], moved[0]], dim=1)
    h, w = image.shape[-2:]
    out: Tensor = warp_affine(
        image[None].double() if mode == "nearest" else image[None],
        matrix[None].to(torch.float64 if mode == "nearest" else image.dtype),
        (h, w),
        mode=mode,
        padding_mode="zeros",
        align_corners=True,
    )
    return out[0].to(image.dtype)


def check_background(background: str) -> None:
    """Check that a background is one of the names or a folder with images.

    Args:
        background: "black", "noise", "gradient" or a folder.

    Raises:
        RecipeError: Neither.
    """
    if background not in BACKGROUNDS and not _background_files(background):
        raise RecipeError(
            f"background {background!r} is neither {', '.join(BACKGROUNDS)} nor a folder with "
            f"images ({' '.join(_IMAGE_SUFFIXES)})"
        )


def draw_background(
    background: str, size_hw: SizeHW, rng: np.random.Generator
) -> Float[Tensor, "3 h w"]:
    """Draw a background.

    Args:
        background: "black", "noise" (colour noise at a random scale), "gradient" (between two
            colours, in a random direction) or a folder of images (a random crop of one).
        size_hw: Height and width.
        rng: Source of every random number.

    Returns:
        (3, H, W) RGB in [0, 1].

    Raises:
        ImageError: An image of the folder cannot be read.
    """
    h, w = size_hw
    if background == "black":
        return torch.zeros(3, h, w)
    if background == "noise":
        cell = 2 ** int(rng.integers(0, 6))
        small = rng.random((1, 3, -(-h // cell), -(-w // cell)), dtype=np.float32)
        return resize(torch.from_numpy(small), size_hw)[0].clamp(0.0, 1.0)
    if background == "gradient":
        first, second = torch.from_numpy(rng.random((2, 3, 1, 1), dtype=np.float32))
        angle = float(rng.uniform(0.0, 2.0 * math.pi))
        along = normalize_xy(pixel_centers(size_hw), size_hw) @ torch.tensor(
            [math.cos(angle), math.sin(angle)]
        )
        share = along / (2.0 * math.sqrt(2.0)) + 0.5
        return torch.lerp(first.expand(3, h, w), second.expand(3, h, w), share)
    files = _background_files(background)
    file = files[int(rng.integers(len(files)))]
    image = read_image(file)
    factor = max(h / image.shape[-2], w / image.shape[-1])
    covering = (
        max(h, round(image.shape[-2] * factor)),
        max(w, round(image.shape[-1] * factor)),
    )
    image = resize(image[None], covering)
    top = int(rng.integers(covering[0] - h + 1))
    left = int(rng.integers(covering[1] - w + 1))
    return crop(image, (left, top), size_hw)[0].clamp(0.0, 1.0)


def augment_view(
    image: Float[Tensor, "3 h w"],
    mask: Bool[Tensor, "h w"],
    depth: Float[Tensor, "h w"],
    camera: Camera,
    keypoints: Float[Tensor, "n 2"],
    augment: Augment | None,
    background: str,
    rng: np.random.Generator,
) -> AugmentedView:
    """Move a view and everything that belongs to it, then change its background and colours.

    Order: light, affine, background, colours; a black background is black again afterwards.

    Args:
        image: RGB in [0, 1].
        mask: Where the object is.
        depth: z-depth, unchanged by a map of the image plane but for its place.
        camera: Intrinsics.
        keypoints: (N, 2) pixels of the image.
        augment: What may happen, or None for the background only.
        background: See `draw_background`.
        rng: Source of every random number.

    Returns:
        The new view. Its camera projects the same 3D points to the new keypoints.
    """
    changed = False
    size_hw = camera.size_hw
    if augment and augment.light_p:
        # A stream of its own: all other random numbers are the same with and without light.
        of_light = rng.spawn(1)[0]
        if of_light.random() < augment.light_p:
            image = relight(image, mask, depth, camera, augment.light, of_light)
            changed = True
    A = augment.draw_affine(size_hw, rng) if augment else None
    if A is not None:
        image = warp(image, A)
        # Mask and depth take the nearest pixel of the same warp, so that they agree.
        both = warp(torch.stack([mask.to(depth.dtype), depth]), A, "nearest")
        mask, depth = both[0] > 0.5, both[1]
        camera = Camera((A.to(camera.K.device) @ camera.K.double()).to(camera.K.dtype), size_hw)
        keypoints = apply_affine(A, keypoints)
        image = image * mask
        changed = True
    if background != "black":
        image = torch.where(mask, image, draw_background(background, size_hw, rng))
        changed = True
    if augment is not None:
        image, touched = augment.photometric(image, rng)
        if touched and background == "black":
            image = image * mask
        changed = changed or touched
    return AugmentedView(image, mask, depth, camera, keypoints, inside(keypoints, size_hw), changed)


@lru_cache(maxsize=8)
def _background_files(background: str) -> tuple[Path, ...]:
    folder = Path(background)
    if not folder.is_dir():
        return ()
    return tuple(sorted(f for f in folder.iterdir() if f.suffix.lower() in _IMAGE_SUFFIXES))
