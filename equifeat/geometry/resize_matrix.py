"""Resizing along one axis as a matrix, for graphs that must run outside of torch.

Other runtimes have no antialiased resize, or one that differs; all of them multiply matrices.
The new size may be a symbol of torch.export.

Convention:
    Corners stay corners, as in `equifeat.geometry.pixels.resize`. A row has the shares of
    the old cells in one new cell.

    >>> linear_resize_matrix(2, 4)
    tensor([[1.0000, 0.0000],
            [0.7500, 0.2500],
            [0.2500, 0.7500],
            [0.0000, 1.0000]])
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from equifeat.geometry.pixels import SizeHW, TracedHW, resize

# Keys' cubic with the parameter of torch's antialiased kernel (Pillow's), and of its plain one.
_ANTIALIASED, _PLAIN = -0.5, -0.75


def linear_resize_matrix(old: int, new: int) -> Float[Tensor, "new old"]:
    """Return what `equifeat.geometry.pixels.resize` does along one axis, antialiased.

    Args:
        old: Cells before.
        new: Cells after.

    Returns:
        A matrix in float32 whose rows sum to 1.
    """
    return resize(torch.eye(old)[None, None], (new, old))[0, 0]


def cubic_resize_matrices(
    old_hw: SizeHW, new_hw: TracedHW, device: torch.device | str | None = None
) -> tuple[Float[Tensor, "h h_old"], Float[Tensor, "w w_old"]]:
    """Return what bicubic antialiased resizing to a size does (timm's position embedding).

    Args:
        old_hw: Rows and columns before.
        new_hw: Rows and columns after, perhaps symbols.
        device: Device of the result.

    Returns:
        The matrix along y, the matrix along x, in float32; identities when nothing changes.

    Convention:
        >>> rows, columns = cubic_resize_matrices((3, 2), (3, 2))
        >>> torch.equal(rows, torch.eye(3)), torch.equal(columns, torch.eye(2))
        (True, True)
    """

    def along(old: int, new: int | torch.SymInt) -> Tensor:
        count = _count(new, device)
        # Halves times whole numbers are exact; dividing first would round the places.
        distance = _centers(old, device) * count - _centers(new, device)[:, None] * old
        shares = _cubic(distance / count.clamp(min=old), _ANTIALIASED)
        return shares / shares.sum(dim=1, keepdim=True)

    return along(old_hw[0], new_hw[0]), along(old_hw[1], new_hw[1])


def reference_resize_matrices(
    old_hw: SizeHW, new_hw: TracedHW, device: torch.device | str | None = None
) -> tuple[Float[Tensor, "h h_old"], Float[Tensor, "w w_old"]]:
    """Return what DINOv2's own code does: bicubic by the factor (new + 0.1) / old, or nothing.

    Args:
        old_hw: Rows and columns before.
        new_hw: Rows and columns after, perhaps symbols.
        device: Device of the result.

    Returns:
        The matrix along y, the matrix along x, in float32; identities when neither side changes.
    """
    counts = [_count(new, device) for new in new_hw]
    same = (counts[0] == old_hw[0]) & (counts[1] == old_hw[1])

    def along(old: int, new: int | torch.SymInt, count: Tensor) -> Tensor:
        places = _centers(new, device)[:, None]
        at = places * (old / (count + 0.1)) - 0.5
        # Two cells more on each side, which repeat the border's value.
        cells = torch.arange(-2, old + 2, device=device)
        repeats = torch.eye(old, device=device)[cells.clamp(0, old - 1)]
        shares = _cubic(cells - at, _PLAIN) @ repeats
        return torch.where(same, (_centers(old, device) == places).to(shares), shares)

    return along(old_hw[0], new_hw[0], counts[0]), along(old_hw[1], new_hw[1], counts[1])


def _centers(cells: int | torch.SymInt, device: torch.device | str | None) -> Tensor:
    return torch.arange(cells, device=device, dtype=torch.float32) + 0.5


def _count(new: int | torch.SymInt, device: torch.device | str | None) -> Tensor:
    """A number of cells as a tensor, so that a symbol stays one in a trace."""
    return torch.ones(new, device=device).sum()


def _cubic(distance: Tensor, a: float) -> Tensor:
    """Keys' convolution kernel (Keys 1981), zero from a distance of 2 on."""
    d = distance.abs()
    near = ((a + 2.0) * d - (a + 3.0)) * d * d + 1.0
    far = (((d - 5.0) * d + 8.0) * d - 4.0) * a
    return torch.where(d <= 1.0, near, torch.where(d < 2.0, far, torch.zeros_like(d)))
