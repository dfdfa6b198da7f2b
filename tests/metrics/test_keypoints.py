"""PCK against loops written from the published definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from equifeat.errors import RecipeError
from equifeat.metrics.keypoints import correct_keypoints, mean_pck, pair_weights, pck_length

ALPHAS = (0.05, 0.1, 0.15)


def made(seed: int = 0) -> list[tuple[str, Tensor, Tensor, float]]:
    """Pairs of several sizes: category, found, true, length."""
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for category, counts in {"cat": (3, 9, 1), "dog": (20, 2), "hen": (7,)}.items():
        for n in counts:
            true = torch.rand(n, 2, generator=generator, dtype=torch.float64) * 200
            found = true + torch.randn(n, 2, generator=generator, dtype=torch.float64) * 12
            pairs.append((category, found, true, 100.0 + 10 * n))
    return pairs


def slow(pairs: list[tuple[str, Tensor, Tensor, float]], alpha: float, mean: str) -> float:
    """Loops over points, categories and pairs, with math only."""
    hits: dict[str, list[list[int]]] = {}
    for category, found, true, length in pairs:
        one = []
        for (x, y), (u, v) in zip(found.tolist(), true.tolist(), strict=True):
            one.append(int(math.hypot(x - u, y - v) <= alpha * length))
        hits.setdefault(category, []).append(one)
    if mean == "images":
        shares = [sum(one) / len(one) for many in hits.values() for one in many]
        return 100 * sum(shares) / len(shares)
    if mean == "points":
        every = [h for many in hits.values() for one in many for h in one]
        return 100 * sum(every) / len(every)
    total = weight = 0.0
    for many in hits.values():
        every = [h for one in many for h in one]
        w = len(many) if mean == "pairs" else 1
        total += w * sum(every) / len(every)
        weight += w
    return 100 * total / weight


@pytest.mark.parametrize("mean", ["images", "points", "categories", "pairs"])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_means_against_loops(mean: str, alpha: float) -> None:
    pairs = made()
    correct = [correct_keypoints(found, true, length, alpha) for _, found, true, length in pairs]
    got = mean_pck(correct, [c for c, *_ in pairs], mean)  # type: ignore[arg-type]
    assert got == pytest.approx(slow(pairs, alpha, mean), abs=1e-9)
    assert 0 < got < 100


def test_the_means_differ_and_empty_pairs_say_nothing() -> None:
    pairs = made()
    correct = [correct_keypoints(found, true, length, 0.1) for _, found, true, length in pairs]
    names = [c for c, *_ in pairs]
    means = {m: mean_pck(correct, names, m) for m in ("images", "points", "categories", "pairs")}
    assert len({round(v, 6) for v in means.values()}) == 4
    none = torch.zeros(0, dtype=torch.bool)
    for mean, value in means.items():
        more = mean_pck([*correct, none], [*names, "cat"], mean)  # type: ignore[arg-type]
        assert more == pytest.approx(value)
    assert math.isnan(mean_pck([none], ["cat"], "points"))
    assert pair_weights([0, 4], ["cat", "dog"], "categories") == [0.0, 1.0]


def test_weights_by_hand() -> None:
    counts, names = [2, 6, 4], ["a", "a", "b"]
    assert pair_weights(counts, names, "points") == [2.0, 6.0, 4.0]
    assert pair_weights(counts, names, "categories") == [0.25, 0.75, 1.0]
    assert pair_weights(counts, names, "pairs") == [0.5, 1.5, 1.0]


def test_lengths() -> None:
    keypoints = torch.tensor([[10.0, 20.0], [40.0, 25.0], [12.0, 90.0]])
    box = torch.tensor([5.0, 6.0, 65.0, 36.0])
    assert pck_length("image", (120, 300), keypoints) == 300.0
    assert pck_length("box", (120, 300), keypoints, box) == 60.0
    assert pck_length("box-kp", (120, 300), keypoints) == 70.0
    assert math.isnan(pck_length("box-kp", (120, 300), keypoints[:0]))
    with pytest.raises(RecipeError, match="basis=box-kp"):
        pck_length("box", (120, 300), keypoints)


def test_the_threshold_itself_is_correct() -> None:
    true = torch.zeros(3, 2, dtype=torch.float64)
    found = torch.tensor([[3.0, 4.0], [5.0, 0.001], [0.0, 0.0]], dtype=torch.float64)
    assert correct_keypoints(found, true, 50.0, 0.1).tolist() == [True, False, True]
