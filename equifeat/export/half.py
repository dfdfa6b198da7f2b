"""A model's graph in float16 where that is safe: attention, MLP and the head's convolution."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from equifeat.errors import ExportError
from equifeat.export.graph import DenseGraph


class _Half(nn.Module):
    """A module that computes in float16 between float32 neighbours."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module.half()

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        out: Tensor = self.module(x.half(), *args, **options)
        return out.float()


def to_half(graph: DenseGraph) -> None:
    """Let a graph compute in float16; what it takes and gives stays float32.

    The tokens between blocks, the norms before and after them, layer scales, positions and the
    patch embedding stay in float32: sums over many blocks would overflow or lose digits, and they
    cost next to nothing.

    Args:
        graph: The graph; changed in place.

    Raises:
        ExportError: The blocks of this ViT are not an attention and an MLP.
    """
    for block in graph.blocks:
        parts = {name: getattr(block, name, None) for name in ("attn", "mlp")}
        for name, part in parts.items():
            if not isinstance(part, nn.Module):
                raise ExportError(
                    f"half precision needs blocks of attention and MLP, but this backbone's "
                    f"{type(block).__name__} has no {name!r}: export it in float32"
                )
            setattr(block, name, _Half(part))
    if graph.head.conv is not None:
        graph.head.conv.half()  # the head widens its sum again
