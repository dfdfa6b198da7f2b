"""Negatives from the other pairs of a batch, of one rank or of all."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from equifeat.data.batch import PairBatch
from equifeat.errors import RecipeError
from equifeat.loss import ExtraNegatives
from equifeat.seeding import torch_generator
from equifeat.train.distributed import all_gather, rank, world_size

NegativesKind = Literal["pair", "batch", "global"]

# Apart from the random streams of draws, which are (seed, stream, draw).
_STREAM = 0x6E656761


def extra_negatives(
    descriptors1: Sequence[Tensor],
    batch: PairBatch,
    kind: NegativesKind,
    limit: int,
    seed: int,
) -> list[ExtraNegatives | None]:
    """Return for each pair of a batch the descriptors of view 1 of the other pairs.

    Every pair offers its share of the limit, keypoints that depend on (seed, draw) only, so the
    same negatives meet however the pairs are spread over ranks.

    Args:
        descriptors1: B tensors (N, D) of view 1, with their graph.
        batch: The B pairs.
        kind: "pair" for none, "batch" for the pairs of this rank, "global" for those of all ranks,
            which must have B pairs each.
        limit: Most negatives a pair gets; with more other pairs than this, one of each.
        seed: Seed of the run.

    Returns:
        B times the extra negatives, or None where there is no other pair.
    """
    b = len(batch)
    spread = kind == "global"
    pairs = b * world_size() if spread else b
    if kind == "pair" or pairs == 1:
        return [None] * b
    share = max(1, limit // (pairs - 1))
    device, dim = descriptors1[0].device, descriptors1[0].shape[1]
    offered = descriptors1[0].new_zeros(b, share, dim)
    # xyz, and whether there is a keypoint at all: pairs have different numbers of them.
    places = torch.zeros(b, share, 4, device=device)
    for i, chosen in enumerate(_choose(batch, share, seed)):
        count = len(chosen)
        chosen = chosen.to(device)
        offered[i, :count] = descriptors1[i][chosen]
        places[i, :count, :3] = batch.points3d1[i][chosen].float()
        places[i, :count, 3] = 1.0
    objects = torch.tensor([_number(name) for name, _ in batch.keys1], device=device)
    if spread:
        offered, places, objects = all_gather(offered), all_gather(places), all_gather(objects)
    first = rank() * b if spread else 0
    out: list[ExtraNegatives | None] = []
    for own in range(first, first + b):
        there = places[..., 3] > 0
        there[own] = False
        same = (objects == objects[own])[:, None].expand_as(there)
        out.append(ExtraNegatives(offered[there], places[..., :3][there], same[there]))
    return out


def check_negatives(kind: NegativesKind, batch_size: int, ranks: int) -> None:
    """Refuse negatives of other pairs where there never are other pairs.

    Args:
        kind: As in `extra_negatives`.
        batch_size: Pairs in a batch of one rank.
        ranks: Number of ranks.

    Raises:
        RecipeError: There is one pair only.
    """
    if kind != "pair" and batch_size * (ranks if kind == "global" else 1) == 1:
        more = " or more ranks" if kind == "global" else ""
        raise RecipeError(
            f"model.negatives={kind} needs other pairs, but data.batch_size is 1: use a larger "
            f"one{more}, or negatives=pair"
        )


def _choose(batch: PairBatch, share: int, seed: int) -> list[Tensor]:
    """Return at most `share` different rows of the keypoints of each view 1."""
    chosen = []
    for points, draw in zip(batch.points3d1, batch.draws, strict=True):
        rows = torch.arange(len(points))
        if len(points) > share:
            rows = torch.randperm(len(points), generator=torch_generator(seed, _STREAM, draw))
        chosen.append(rows[:share])
    return chosen


def _number(name: str) -> int:
    """Return 63 bits that stand for an object's name on every rank."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1
