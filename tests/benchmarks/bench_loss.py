"""Time and memory of the losses, and of plain forms of smooth_ap, in one process.

Run: python -m tests.benchmarks.bench_loss [--device cuda] [--repeats 5]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from equifeat.loss import (
    count_positives,
    info_nce,
    multi_positive_ap,
    smooth_ap,
    soft_labels,
    transport,
)
from tests.eval.allocations import Allocations

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def sigma(x: Tensor, tau: float) -> Tensor:
    return 1.0 / (1.0 + torch.exp((-x / tau).clamp(-50.0, 50.0)))


def gathered(d0: Tensor, d1: Tensor, p0: Tensor, p1: Tensor, tau: float = 0.01) -> Tensor:
    """All positives at once: one row of similarities gathered a positive, autograd for the rest."""
    distances = (p0[:, None] - p1[None]).norm(dim=-1)
    row, col = (distances < 5e-3).nonzero(as_tuple=True)
    similarity = (d0 @ d1.T)[row]
    positive = similarity.gather(1, col[:, None])
    negative = (distances > 0.1)[row].to(similarity.dtype)
    a = 1.0 + sigma(positive - 1.0, tau)
    b = 1.0 + sigma(1.0 - positive, tau)
    ap1 = a / (a + (sigma(similarity - 1.0, tau) * negative).sum(1, keepdim=True))
    ap2 = b / (b + (sigma(similarity - positive, tau) * negative).sum(1, keepdim=True))
    loss: Tensor = (1.0 - (ap1 + ap2) / 2.0).mean()
    return loss


def looped(d0: Tensor, d1: Tensor, p0: Tensor, p1: Tensor, tau: float = 0.01) -> Tensor:
    """One positive after the other."""
    terms = []
    for i in range(len(d0)):
        distance = (p1 - p0[i]).norm(dim=-1)
        similarity = d1 @ d0[i]
        negatives = similarity[distance > 0.1]
        for j in (distance < 5e-3).nonzero()[:, 0].tolist():
            s = similarity[j]
            a, b = 1.0 + sigma(s - 1.0, tau), 1.0 + sigma(1.0 - s, tau)
            ap1 = a / (a + sigma(negatives - 1.0, tau).sum())
            ap2 = b / (b + sigma(negatives - s, tau).sum())
            terms.append(1.0 - (ap1 + ap2) / 2.0)
    return torch.stack(terms).mean()


def surface(n: int, same: bool, device: str, seed: int = 0) -> Inputs:
    """Points of a sphere of diameter 1: the same in both views, or drawn independently."""
    g = torch.Generator().manual_seed(seed)
    p0 = 0.5 * F.normalize(torch.randn(n, 3, generator=g), dim=-1)
    p1 = p0 if same else 0.5 * F.normalize(torch.randn(n, 3, generator=g), dim=-1)
    d0, d1 = (F.normalize(torch.randn(n, 384, generator=g), dim=-1).to(device) for _ in "01")
    return d0.requires_grad_(), d1.requires_grad_(), p0.to(device), p1.to(device)


def patches(n: int, places: int, device: str) -> Inputs:
    """Points at few places: many positives a row."""
    d0, d1, _, _ = surface(n, True, device)
    g = torch.Generator().manual_seed(1)
    at = 0.5 * F.normalize(torch.randn(places, 3, generator=g), dim=-1)
    p0, p1 = (at[torch.randint(places, (n,), generator=g)].to(device) for _ in "01")
    return d0, d1, p0, p1


def measure(loss: Callable[..., Tensor], case: Inputs, repeats: int) -> tuple[float, float]:
    """Seconds (best of the repeats) and peak MiB of one value with gradients."""

    def once() -> None:
        torch.autograd.grad(loss(*case), case[:2])
        if case[0].is_cuda:
            torch.cuda.synchronize()

    once()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        once()
        best = min(best, time.perf_counter() - start)
    with Allocations() as seen:
        once()
    return best, seen.peak_bytes / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    device = options.device
    cases = {
        "covisible, N=M=1000": surface(1000, True, device),
        "reference, N=M=3000": surface(3000, False, device),
        "dense, N=M=600": patches(600, 40, device),
    }
    out = sys.stdout.write
    out(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, float32, D=384\n")
    for name, case in cases.items():
        positives = count_positives(*case[2:])
        ours, ours_mib = measure(smooth_ap, case, options.repeats)
        out(f"{name}, {positives} positives: smooth_ap {ours:.4f} s, {ours_mib:.0f} MiB\n")
        for form in (gathered, looped):
            difference = abs(float(form(*case).detach()) - float(smooth_ap(*case).detach()))
            seconds, mib = measure(form, case, 1 if form is looped else options.repeats)
            out(
                f"  {form.__name__:8s} {seconds:.4f} s ({seconds / ours:.1f}x), "
                f"{mib:.0f} MiB ({mib / ours_mib:.1f}x), value differs by {difference:.1e}\n"
            )
        for other in (multi_positive_ap, info_nce, soft_labels, transport):
            seconds, mib = measure(other, case, options.repeats)
            out(f"  {other.__name__:17s} {seconds:.4f} s ({seconds / ours:.1f}x), {mib:.0f} MiB\n")


if __name__ == "__main__":
    main()
