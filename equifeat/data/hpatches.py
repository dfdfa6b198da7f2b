"""Sequences of pictures related by homographies: HPatches and the Oxford affine set.

HPatches (github.com/hpatches/hpatches-dataset): i_NAME (light) and v_NAME (viewpoint) folders with
1.ppm to 6.ppm and H_1_2 to H_1_6. Oxford (robots.ox.ac.uk/~vgg/research/affine): graf, wall, … with
img1.ppm to img6.ppm (boat: .pgm) and H1to2p to H1to6p. The matrices carry points of picture 1,
(0, 0) being the first pixel's centre, as OpenCV's warpPerspective takes them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from equifeat.data.text_files import MAX_ANNOTATION_BYTES, read_text
from equifeat.errors import EvalDataError

Layout = Literal["hpatches", "oxford"]
# Pictures above 1200 x 1600 px, left out since D2-Net (hpatches_sequences, download.sh).
LARGE = frozenset(
    [
        *("i_contruction", "i_crownnight", "i_dc", "i_pencils", "i_whitebuilding"),
        *("v_artisans", "v_astronautis", "v_talent"),
    ]
)
_OTHERS = range(2, 7)


class PlanePair(NamedTuple):
    """Two pictures of a plane, or from one place.

    Attributes:
        name: Unique.
        sequence: Its folder's name.
        change: "viewpoint" or "illumination"; empty where the names do not tell.
        image0: Picture 1 of the sequence.
        image1: Another one.
        file: Where the homography was read.
        H: (3, 3) float64 from picture 0 to picture 1, corner convention.
    """

    name: str
    sequence: str
    change: str
    image0: Path
    image1: Path
    file: Path
    H: Tensor


def read_planes(root: Path, layout: Layout, large: bool = True) -> list[PlanePair]:
    """Read all sequences of a folder.

    Args:
        root: Folder of the sequences, or one sequence.
        layout: Names of the files.
        large: Whether the 8 sequences of `LARGE` are read.

    Returns:
        Five pairs a sequence, sequences by name.

    Raises:
        EvalDataError: There is no sequence, or a file is damaged.
    """
    first = ("1.ppm",) if layout == "hpatches" else ("img1.ppm", "img1.pgm", "img1.png")
    folders = [root, *sorted(p for p in root.iterdir() if p.is_dir())] if root.is_dir() else []
    pairs = []
    for folder in folders:
        start = next((folder / name for name in first if (folder / name).is_file()), None)
        if start is None or (not large and folder.name in LARGE):
            continue
        for k in _OTHERS:
            file = folder / (f"H_1_{k}" if layout == "hpatches" else f"H1to{k}p")
            name = f"{k}.ppm" if layout == "hpatches" else f"img{k}{start.suffix}"
            change = {"i_": "illumination", "v_": "viewpoint"}.get(folder.name[:2], "")
            pairs.append(
                PlanePair(
                    f"{folder.name} 1-{k}",
                    folder.name,
                    change if layout == "hpatches" else "",
                    start,
                    folder / name,
                    file,
                    _read_homography(file),
                )
            )
    if not pairs:
        raise EvalDataError(f"{root}: no folder in it has a picture {' or '.join(first)}.")
    return pairs


def corner_homography(H: Float[Tensor, "3 3"]) -> Float[Tensor, "3 3"]:
    """Turn a homography between integer-centred pixels into the corner convention.

    Args:
        H: (3, 3) for points whose first pixel centre is (0, 0).

    Returns:
        (3, 3) for points whose first pixel centre is (0.5, 0.5).
    """
    shift = torch.eye(3, dtype=H.dtype)
    shift[:2, 2] = 0.5
    back = torch.eye(3, dtype=H.dtype)
    back[:2, 2] = -0.5
    return shift @ H @ back


def _read_homography(file: Path) -> Tensor:
    words = read_text(file, MAX_ANNOTATION_BYTES).split()
    try:
        H = torch.tensor([float(word) for word in words], dtype=torch.float64).reshape(3, 3)
    except (ValueError, RuntimeError) as error:
        raise EvalDataError(f"{file}: is not nine numbers ({error}); unpack it again.") from error
    if not bool(H.isfinite().all()) or float(H.det().abs()) < 1e-12:
        raise EvalDataError(f"{file}: {H.tolist()} is no homography; unpack it again.")
    return corner_homography(H)
