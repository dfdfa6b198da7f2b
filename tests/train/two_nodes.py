"""Run some commands one after another in one process of a torchrun; for test_distributed.py.

    torchrun --nnodes 2 --node-rank 0 --nproc-per-node 1 ... -m tests.train.two_nodes JOBS.json OUT

JOBS.json is a list of argument lists of `equifeat`. Before them it writes what the collectives and
the sharding gave on this rank to OUT.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from equifeat.cli import run
from equifeat.model.extractor import build_extractor
from equifeat.train.distributed import all_gather, all_sum
from equifeat.train.sharded import shard_frozen

BACKBONE = "test_vit.r160_in1k"


def gathered() -> dict[str, Tensor]:
    """The gradient of the mean over ranks of a loss that needs every rank's tensor."""
    rank = dist.get_rank()
    own = (torch.arange(6.0).reshape(2, 3) + 10.0 * rank).requires_grad_()
    everything = all_gather(own)
    (grad,) = torch.autograd.grad(((rank + 1.0) * everything.square()).sum(), own)
    return {"gathered": everything.detach(), "grad": grad, "sum": all_sum(own.detach())}


def sharded() -> dict[str, Tensor]:
    """Features and gradients of a model whose frozen blocks are shards, beside the whole one's."""
    out: dict[str, Tensor] = {}
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for name in ("whole", "shards"):
        extractor = build_extractor(BACKBONE, weights="random", head="conv", lora_blocks=4)
        if name == "shards":
            shard_frozen(extractor, init_device_mesh("cpu", (dist.get_world_size(),)))
        features = extractor.dense(image).features
        out[f"{name}/features"] = features.detach()
        trained = extractor.trainable_parameters()
        grads = torch.autograd.grad(features.square().mean(), list(trained.values()))
        out |= {f"{name}/{key}": grad for key, grad in zip(trained, grads, strict=True)}
        held = [
            (value.to_local() if isinstance(value, DTensor) else value).numel()
            for block in extractor.backbone.blocks
            for value in block.parameters()
        ]
        out[f"held/{name}"] = torch.tensor(sum(held))
    return out


def main(jobs: Path, out: Path) -> None:
    dist.init_process_group("gloo")
    found = {**gathered(), **sharded()}
    torch.save(found, out / f"rank{os.environ['RANK']}.pt")
    for job in json.loads(jobs.read_text()):
        run(job)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
