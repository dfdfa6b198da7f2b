"""Run a block of a ViT: plainly, or compiled for as long as compiling works."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

RunBlock = Callable[[nn.Module, Tensor, Tensor | None], Tensor]


def run_block(block: nn.Module, tokens: Tensor, rope: Tensor | None) -> Tensor:
    """Run one block.

    Args:
        block: A block of timm's.
        tokens: (B, N, D).
        rope: Rotary embedding for the blocks that take one, else None.

    Returns:
        (B, N, D).
    """
    out: Tensor = block(tokens) if rope is None else block(tokens, rope=rope)
    return out


class CompiledBlocks:
    """Runs blocks compiled by torch.compile; goes on without, after a warning, when that fails.

    All equal blocks share one compiled program, so that compiling takes as long as for one block.
    A first run with gradients must be rehearsed, forward and backward, because torch.compile
    compiles the backward pass only when it happens, deep in the training loop.

    Args:
        backend: Backend of torch.compile.
    """

    def __init__(self, backend: str | Callable[..., object] = "inductor") -> None:
        self.failure: str | None = None
        self._compiled: RunBlock = torch.compile(run_block, backend=backend)
        self._rehearsed: set[bool] = set()

    def __call__(self, block: nn.Module, tokens: Tensor, rope: Tensor | None) -> Tensor:
        """Run one block.

        Args:
            block: A block of timm's.
            tokens: (B, N, D).
            rope: Rotary embedding for the blocks that take one, else None.

        Returns:
            (B, N, D).
        """
        if self.failure is None:
            try:
                return self._compiled(block, tokens, rope)
            except Exception as error:
                from torch._dynamo.exc import TorchDynamoException  # loads in a second

                if not isinstance(error, TorchDynamoException):
                    raise
                self._give_up(error)
        return run_block(block, tokens, rope)

    def rehearsed(self, tokens: Tensor) -> bool:
        """Return whether nothing is left to rehearse.

        Args:
            tokens: What a block is about to get.

        Returns:
            False before the first run with gradients.
        """
        known = self.failure is not None or tokens.requires_grad in self._rehearsed
        return known or not torch.is_grad_enabled()

    def rehearse(self, block: nn.Module, tokens: Tensor, rope: Tensor | None) -> None:
        """Run a block forward and backward once; nothing of it is kept.

        Args:
            block: A block of timm's.
            tokens: (B, N, D).
            rope: Rotary embedding for the blocks that take one, else None.
        """
        self._rehearsed.add(tokens.requires_grad)
        inputs: list[Tensor] = [p for p in block.parameters() if p.requires_grad]
        # The weight of LoRA's stand-in for a layer is no parameter.
        attributes = [value for module in block.modules() for value in vars(module).values()]
        inputs += [a for a in attributes if isinstance(a, Tensor) and a.requires_grad]
        copy = tokens.detach()
        if tokens.requires_grad:
            inputs.append(copy.requires_grad_())
        try:
            out = self._compiled(block, copy, rope)
            if inputs:
                torch.autograd.grad(out.float().sum(), inputs, allow_unused=True)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # backends raise what they like
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # Dynamo's first line names the backend, the next one says what happened to it.
        told = 2 if lines and lines[0].endswith(":") else 1
        reason = " ".join(lines[:told])[:200] or type(error).__name__
        self.failure = reason
        warnings.warn(
            f"torch.compile failed ({reason}); going on without it",
            RuntimeWarning,
            stacklevel=3,
        )
