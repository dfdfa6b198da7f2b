"""Poses in another order than the pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data_prep.check_case import Case, Fix
from data_prep.check_reproject import LEAST_AGREE

if TYPE_CHECKING:
    from data_prep.check_search import Judge

Array = NDArray[Any]
_SHIFTS = (1, -1, 2, -2, 3, -3)
_MOST_SHUFFLED = 48  # views: the search grows with the third power
_POINTS = 80


def order_cases(case: Case, names: Sequence[str]) -> Iterator[Case]:
    """Yield the usual mistakes: shifted, reversed, sorted as text instead of by number.

    Args:
        case: What to correct.
        names: Names of the pictures, in their order.
    """
    count = len(case.given)
    if count < 3:
        return
    every = np.arange(count)
    for shift in _SHIFTS:
        if count > abs(shift) + 1:
            late = "late" if shift > 0 else "early"
            many = f"{abs(shift)} picture{'s' if abs(shift) > 1 else ''}"
            yield _with_order(case, np.roll(every, -shift), f"the poses come {many} too {late}")
    yield _with_order(case, every[::-1], "the poses are in reversed order")
    by_text = np.array(sorted(every, key=lambda i: str(int(i))))
    if not np.array_equal(by_text, every):
        # The pose of picture i stands where i stands in the other sorting, or the reverse.
        what = "pictures or poses were sorted as text (1, 10, 11, 2) instead of by number"
        yield _with_order(case, by_text, what)
        yield _with_order(case, np.argsort(by_text), what)
    by_name = np.array(sorted(every, key=lambda i: names[int(i)]))
    if not np.array_equal(by_name, every) and not np.array_equal(by_name, by_text):
        what = "the poses follow the alphabetical order of the pictures' names"
        yield _with_order(case, np.argsort(by_name), what)


def shuffled_case(judge: Judge, case: Case) -> Case | None:
    """Find out which pose belongs to which view when no simple rule does.

    Every pose is tried for the first view; the others are then placed by what fits to it, and
    those that it does not see by what fits to those.

    Args:
        judge: Scores readings.
        case: The capture.

    Returns:
        The reordered case, or None where no assignment fits or there are too many views.
    """
    views = judge.usable
    if not 4 <= len(views) <= _MOST_SHUFFLED or len(views) != len(case.given):
        return None
    best: tuple[int, list[int]] | None = None
    for anchor in views[:2]:
        for pose in range(len(views)):
            placed = _place(judge, case, anchor, pose)
            if best is None or len(placed) > best[0]:
                best = len(placed), _filled(placed, len(views))
            if best[0] == len(views):
                break
    if best is None or best[0] < max(4, len(views) // 2):
        return None
    order = np.array(best[1])
    moved = int((order != np.arange(len(order))).sum())
    what = f"the poses are shuffled: {moved} of {len(order)} views have another view's pose"
    return _with_order(case, order, what)


def _place(judge: Judge, case: Case, anchor: int, pose: int) -> dict[int, int]:
    """Assign poses to views, starting from one assignment."""
    placed = {anchor: pose}
    fresh = [anchor]
    while fresh:
        source = fresh.pop(0)
        left = [v for v in judge.usable if v not in placed]
        free = [p for p in range(len(case.given)) if p not in placed.values()]
        if not left:
            break
        for view in left:
            trials = []
            for candidate in free:
                order = np.arange(len(case.given))
                order[source], order[view] = placed[source], candidate
                trials.append(dataclasses.replace(case, order=tuple(int(v) for v in order)))
            if not trials:
                break
            found = [s for s, _ in judge.scores(trials, [(source, view)], _POINTS)]
            good = [
                k for k, s in enumerate(found) if s.consistency > 0.85 and s.agree > 3 * LEAST_AGREE
            ]
            # Two poses that fit alike decide nothing: another view will.
            if len(good) == 1:
                placed[view] = free[good[0]]
                free.remove(free[good[0]])
                fresh.append(view)
        if source == anchor and len(placed) < 2:
            break
    return placed


def _filled(placed: dict[int, int], count: int) -> list[int]:
    left = [p for p in range(count) if p not in placed.values()]
    return [placed[v] if v in placed else left.pop(0) for v in range(count)]


def _with_order(case: Case, order: Array, wrong: str) -> Case:
    numbers = tuple(int(v) for v in order)
    shown = ", ".join(str(v) for v in numbers[:8]) + (", ..." if len(numbers) > 8 else "")
    fix = Fix("order", wrong, f"reorder the poses: view i wants pose number {shown}")
    return case.fixed(fix, order=numbers)
