"""Blocked nearest neighbours equal brute force and stay within the budget."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from equifeat.errors import CorrespondenceError, RecipeError
from equifeat.eval.matching import (
    MatchDtype,
    _max_of_columns,
    block_shape,
    factor,
    max_of_rows,
    mutual_nearest,
    nearest,
)
from tests.eval.allocations import Allocations


def descriptors(n: int, d: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, d, generator=g), dim=-1)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (23, 130), (130, 23), (64, 64), (0, 5)])
@pytest.mark.parametrize("budget", [4, 100, 4096, 2**26])
def test_equals_brute_force(n: int, m: int, budget: int) -> None:
    d0, d1 = descriptors(n, 16, 0), descriptors(m, 16, 1)
    full = d0 @ d1.T
    found = nearest(d0, d1, budget)
    best = full.argmax(1)
    assert torch.equal(found.matches0, best)
    torch.testing.assert_close(found.similarity, full.amax(1))
    mutual = mutual_nearest(d0, d1, budget)
    if n:
        agreed = full.argmax(0)[best] == torch.arange(n)
        assert torch.equal(mutual.matches0, torch.where(agreed, best, -1))
    assert len(mutual.matches0) == n


def test_never_builds_more_than_the_budget() -> None:
    n, m, d = 2000, 3000, 4
    d0, d1 = descriptors(n, d, 0), descriptors(m, d, 1)
    budget = 256 * 1024
    for match in (nearest, mutual_nearest):
        with Allocations() as seen:
            match(d0, d1, budget)
        assert seen.largest_bytes <= budget
        # A few small lists of N and M beside the one block.
        assert seen.peak_bytes < 1.5 * budget + 100 * (n + m)


def test_permutation_is_undone() -> None:
    d0 = descriptors(200, 32, 0)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    found = mutual_nearest(d0, d0[order], 10_000)
    assert torch.equal(order[found.matches0], torch.arange(200))


def test_half_types_are_matched_in_float32() -> None:
    d0, d1 = descriptors(50, 16, 0).half(), descriptors(60, 16, 1).half()
    found = nearest(d0, d1)
    assert found.similarity.dtype == torch.float32
    assert torch.equal(found.matches0, (d0.float() @ d1.float().T).argmax(1))


@pytest.mark.parametrize(("n", "m"), [(3000, 1200), (1100, 2500)])
def test_large_blocks_equal_brute_force(n: int, m: int) -> None:
    """Several blocks of a thousand rows and columns, with the groups that maxima are looked for."""
    d0, d1 = descriptors(n, 16, 0), descriptors(m, 16, 1)
    full = d0 @ d1.T
    best, back = full.argmax(1), full.argmax(0)
    found, mutual = nearest(d0, d1), mutual_nearest(d0, d1)
    assert float((found.matches0 == best).float().mean()) > 0.999  # sums in another order
    assert torch.allclose(found.similarity, full.amax(1), atol=1e-6)
    expected = torch.where(back[best] == torch.arange(n), best, -1)
    assert float((mutual.matches0 == expected).float().mean()) > 0.999
    assert torch.equal(mutual.similarity, found.similarity)


@pytest.mark.parametrize("budget", [40, 4096, 300_000, 2**26])
def test_of_equal_ones_the_first(budget: int) -> None:
    """Small whole numbers, whose products are exact in any order."""
    g = torch.Generator().manual_seed(0)
    d0 = torch.randint(-2, 3, (1100, 3), generator=g).float()
    d1 = torch.randint(-2, 3, (1050, 3), generator=g).float()
    if budget == 40:  # many small blocks
        d0, d1 = d0[:40], d1[:90]
    full = (d0 @ d1.T).tolist()
    best = [row.index(max(row)) for row in full]
    columns = [list(column) for column in zip(*full, strict=True)]
    back = [column.index(max(column)) for column in columns]
    for dtype in get_args(MatchDtype):
        assert nearest(d0, d1, budget, dtype).matches0.tolist() == best
        mutual = [j if back[j] == i else -1 for i, j in enumerate(best)]
        assert mutual_nearest(d0, d1, budget, dtype).matches0.tolist() == mutual


def test_groups_give_what_max_gives() -> None:
    g = torch.Generator().manual_seed(0)
    for shape in ((64, 128), (96, 192), (5, 256), (256, 5), (64, 64), (1, 1), (33, 65)):
        values = torch.randint(0, 4, shape, generator=g).float()
        for found, expected in (
            (max_of_rows(values), values.max(1)),
            (_max_of_columns(values), values.max(0)),
        ):
            assert torch.equal(found[0], expected.values)
            assert torch.equal(found[1], expected.indices)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_blocks_are_within_the_budget_and_cover(device: str) -> None:
    for n, m in ((1, 1), (20, 705_600), (705_600, 20), (30_000, 30_000), (1369, 1369), (0, 7)):
        for budget in (4, 400, 2**20, 2**26, 2**30):
            rows, columns = block_shape(n, m, budget, 4, torch.device(device))
            assert 1 <= columns <= m
            assert 1 <= rows <= max(n, 1)
            assert rows * columns * 4 <= budget
    assert block_shape(30_000, 30_000, 2**26, 4, torch.device("cuda")) == (512, 30_000)
    assert block_shape(30_000, 30_000, 2**26, 4, torch.device("cpu")) == (1024, 1024)
    assert block_shape(30_000, 90_000, 2**26, 4, torch.device("cuda")) == (512, 32_768)


def test_bfloat16_rounds_the_search_and_not_the_similarity() -> None:
    d0, d1 = descriptors(700, 64, 0), descriptors(900, 64, 1)
    exact, rough = nearest(d0, d1), nearest(d0, d1, dtype="bfloat16")
    rounded = d0.bfloat16().float() @ d1.bfloat16().float().T
    assert torch.equal(rough.matches0, rounded.argmax(1))
    assert 0.9 < float((exact.matches0 == rough.matches0).float().mean()) < 1
    own = (d0 * d1[rough.matches0]).sum(1)
    assert torch.allclose(rough.similarity, own, atol=1e-6)
    mutual = mutual_nearest(d0, d1, 20_000, dtype="bfloat16")
    assert torch.allclose(mutual.similarity, own, atol=1e-6)
    with Allocations() as seen:
        nearest(d0, d1, 50_000, dtype="bfloat16")
    assert seen.largest_bytes <= 65_000  # (the descriptors of a block beside the similarities)
    with pytest.raises(RecipeError, match="float32, bfloat16, not 'int8'"):
        factor(d0, torch.float32, "int8")


def test_autocast_and_gradients_leave_matching_alone() -> None:
    d0, d1 = descriptors(50, 16, 0).requires_grad_(), descriptors(60, 16, 1)
    expected = nearest(d0, d1)
    assert not expected.similarity.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest(d0, d1).similarity, expected.similarity)
    wide = nearest(d0.detach().double(), d1.double())
    assert wide.similarity.dtype == torch.float64


def test_nothing_to_match() -> None:
    with pytest.raises(CorrespondenceError, match="0 descriptors"):
        nearest(descriptors(3, 4, 0), torch.zeros(0, 4))
    with pytest.raises(RecipeError, match="budget_bytes=1 "):
        nearest(descriptors(3, 4, 0), descriptors(3, 4, 1), 1)
