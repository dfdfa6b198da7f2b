"""Rate of blocked matching against that of the plain matrix product, in one process, alternated.

Two plain products are timed: in matching's own blocks, whose results are thrown away unread, and
in larger ones of at most 4096 x 4096 entries (64 MiB in float32). Ratios are given to the faster.

Run: python -m tests.benchmarks.bench_matching [--device cuda] [--dtype bfloat16] [--n 8000]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from equifeat.eval.matching import (
    DEFAULT_BUDGET,
    block_shape,
    factor,
    mutual_nearest,
    nearest,
    product,
)
from tests.eval.allocations import Allocations

SIDE = 4096


def plain(d0: Tensor, d1: Tensor, shape: tuple[int, int]) -> None:
    """Compute all similarities in blocks, and nothing else."""
    rows, columns = shape
    buffer = torch.empty(rows * columns, device=d0.device)
    for i in range(0, len(d0), rows):
        a = d0[i : i + rows]
        for j in range(0, len(d1), columns):
            b = d1[j : j + columns]
            product(a, b, buffer[: len(a) * len(b)].view(len(a), len(b)))


def seconds(run: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> float:
    start = clock()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - start


def peak_mib(run: Callable[[], object], device: torch.device) -> float:
    """Memory that a run adds."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        peak = torch.cuda.max_memory_allocated(device)
        return float(peak - before) / 2**20
    seen = Allocations()
    with seen:
        run()
    return seen.peak_bytes / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=30_000, help="rows of descriptors0")
    parser.add_argument("--m", type=int, default=30_000, help="rows of descriptors1")
    parser.add_argument("--d", type=int, default=768, help="channels")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--budget", type=int, default=DEFAULT_BUDGET, help="bytes")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--clock",
        choices=("wall", "process"),
        default="wall",
        help="process: CPU seconds of this process, for one thread on a busy machine",
    )
    options = parser.parse_args()
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    device, dtype = torch.device(options.device), options.dtype
    n, m, d, budget = options.n, options.m, options.d, options.budget
    g = torch.Generator().manual_seed(0)
    d0, d1 = (F.normalize(torch.randn(k, d, generator=g), dim=-1).to(device) for k in (n, m))
    f0, f1 = (factor(x, torch.float32, dtype) for x in (d0, d1))
    own = block_shape(n, m, budget, 4, device)
    large = (min(n, SIDE), min(m, SIDE))
    runs: dict[str, Callable[[], object]] = {
        f"plain product, blocks {own[0]} x {own[1]}": lambda: plain(f0, f1, own),
        f"plain product, blocks {large[0]} x {large[1]}": lambda: plain(f0, f1, large),
        "nearest": lambda: nearest(d0, d1, budget, dtype),
        "mutual_nearest": lambda: mutual_nearest(d0, d1, budget, dtype),
    }
    out = sys.stdout.write
    threads = f"{torch.get_num_threads()} threads" if device.type == "cpu" else ""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    out(f"torch {torch.__version__}, {name} {threads}, {dtype}, N={n} M={m} D={d}")
    out(f", {options.clock} time, budget {budget / 2**20:g} MiB\n")
    small = (d0[:300], d1[:300])
    nearest(*small, budget, dtype)
    mutual_nearest(*small, budget, dtype)
    rates: dict[str, list[float]] = {key: [] for key in runs}
    for _ in range(options.repeats):
        for key, run in runs.items():
            rates[key].append(2e-9 * n * m * d / seconds(run, device, clock))
    products = [rates[key] for key in list(runs)[:2]]
    fastest = [max(pair) for pair in zip(*products, strict=True)]
    for key, found in rates.items():
        ratios = [rate / top for rate, top in zip(found, fastest, strict=True)]
        each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        out(
            f"{key:38s} {statistics.median(found):9.1f} GFLOP/s, "
            f"ratio {statistics.median(ratios):.2f} ({each})\n"
        )
    for key in ("nearest", "mutual_nearest"):
        out(f"{key}: {peak_mib(runs[key], device):.1f} MiB beside the descriptors\n")


if __name__ == "__main__":
    main()
