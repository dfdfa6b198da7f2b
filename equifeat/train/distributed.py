"""Collectives that training needs beside those of DDP: sums, and a gather with gradient."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch import distributed as dist


def world_size() -> int:
    """Return the number of processes of this run.

    Returns:
        1 where no process group was set up.
    """
    return dist.get_world_size() if _is_up() else 1


def rank() -> int:
    """Return the number of this process.

    Returns:
        0 where no process group was set up.
    """
    return dist.get_rank() if _is_up() else 0


def all_sum(values: Tensor) -> Tensor:
    """Return the sum over all ranks, the same on each.

    Args:
        values: A detached tensor of one shape on all ranks.

    Returns:
        A new tensor.
    """
    total = values.clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def all_gather(values: Tensor) -> Tensor:
    """Return the tensors of all ranks in the order of ranks; gradients flow back to each.

    The gradient that a rank receives is the sum of what every rank's loss says of its tensor. DDP
    then averages over ranks: together this is the gradient of the mean of all ranks' losses.

    Args:
        values: (B, ...) of one shape on all ranks.

    Returns:
        (W B, ...).
    """
    if world_size() == 1:
        return values
    return cast(Tensor, _AllGather.apply(values))


class _AllGather(torch.autograd.Function):
    # torch.distributed.nn.functional.all_gather does the same and is deprecated since torch 2.13.

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        values = values.contiguous()
        out = values.new_empty(world_size() * len(values), *values.shape[1:])
        dist.all_gather_into_tensor(out, values)
        ctx.rows = len(values)
        return out

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        # Not reduce_scatter, which gloo has in newer versions of torch only.
        grad = grad_output.contiguous().clone()
        dist.all_reduce(grad)
        return grad[rank() * ctx.rows : (rank() + 1) * ctx.rows]


def _is_up() -> bool:
    return dist.is_available() and dist.is_initialized()
