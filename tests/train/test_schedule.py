from __future__ import annotations

import math

import pytest

from equifeat.errors import RecipeError
from equifeat.train.schedule import lr_factor


def test_warm_up_rises_linearly_then_cosine_falls_to_zero() -> None:
    factor = lr_factor("cosine", 4, 104)
    assert [factor(i) for i in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert factor(4) == 1.0
    assert factor(54) == pytest.approx(0.5)
    assert factor(104) == pytest.approx(0.0)
    assert all(factor(i) >= factor(i + 1) for i in range(4, 104))


def test_constant_without_an_end() -> None:
    factor = lr_factor("constant", 0, math.inf)
    assert factor(0) == factor(10**6) == 1.0


@pytest.mark.parametrize(("warmup", "total"), [(0, math.inf), (10, 10), (-1, 10)])
def test_numbers_that_make_no_schedule_are_refused(warmup: int, total: float) -> None:
    with pytest.raises(RecipeError):
        lr_factor("cosine", warmup, total)
