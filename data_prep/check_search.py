"""Find the correction that makes views fit together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.check_case import (
    Case,
    focal_case,
    intrinsics_cases,
    known_ratio,
    pose_cases,
    ray_case,
    shifted_cases,
    with_scale,
)
from data_prep.check_order import order_cases, shuffled_case
from data_prep.check_reproject import (
    Cameras,
    Score,
    choose_pairs,
    costs,
    residuals,
    score,
)
from data_prep.check_surface import Surface
from equifeat.seeding import numpy_generator

Array = NDArray[Any]
_POINTS, _FEW = 400, 60
# In units of the mean logarithm of the residual: 0.12 is a residual an eighth smaller everywhere.
_MARGIN = 0.12
_BATCH = 192
_CACHED = 64  # surfaces of 640 px are about 10 MB each
_SMALLEST_RATIO = 0.015
_MOST_FIXES = 3
_OF_POSES = {"axes", "handedness", "direction", "rows"}


class Verdict(NamedTuple):
    """What the search found.

    Attributes:
        before: Score of the capture as it was given.
        after: Score with the corrections; the same when nothing was corrected.
        case: The corrected capture, or the given one.
        pairs: The pairs of views that were compared.
    """

    before: Score
    after: Score
    case: Case
    pairs: list[tuple[int, int]]

    @property
    def consistent(self) -> bool:
        """Whether the capture fits together as it was given."""
        return self.before.consistent and not self.case.fixes


class Judge:
    """Scores readings of one capture.

    Args:
        surface: Gives the surface of a view, or None where there is too little of it.
        usable: Views that show something.
        count: Pairs of views to compare.
    """

    def __init__(
        self, surface: Callable[[int], Surface | None], usable: Sequence[int], count: int
    ) -> None:
        self.surface = lru_cache(_CACHED)(surface)
        self.usable = list(usable)
        self.count = count
        some = [self.surface(i) for i in self.usable[:: max(len(self.usable) // 8, 1)]]
        found = [s for s in some if s is not None]
        self.extent = float(np.median([s.extent for s in found])) if found else 0.0
        noise = [s.noise * float(np.median(s.depth)) for s in found]
        self.noise = float(np.median(noise)) / self.extent if found else 0.0

    def pairs(self, case: Case) -> list[tuple[int, int]]:
        """Return the pairs of views to compare.

        Args:
            case: Its poses decide.
        """
        return choose_pairs(case.poses(), self.usable, self.count)

    def found(
        self, cases: Sequence[Case], pairs: Sequence[tuple[int, int]], points: int
    ) -> list[Array]:
        """Reproject in both directions of each pair.

        Args:
            cases: H readings.
            pairs: Pairs of views.
            points: Points a view.

        Returns:
            One (H, N) array of residuals a directed pair.
        """
        # Most readings of a batch share their poses.
        known = {(id(c.given), c.convention, c.order): c for c in cases}
        read = {key: c.poses() for key, c in known.items()}
        poses = np.stack([read[id(c.given), c.convention, c.order] for c in cases])
        cameras = Cameras(
            poses,
            np.stack([case.K for case in cases]),
            np.array([case.scale for case in cases]),
            np.array([case.to_z for case in cases]),
        )
        out = []
        for pair in pairs:
            for i, j in (pair, pair[::-1]):
                source, target = self.surface(i), self.surface(j)
                if source is None or target is None:
                    continue
                rng = numpy_generator(0, i, j)
                rows = rng.permutation(len(source.xy))[:points]
                out.append(residuals(source, target, i, j, cameras, rows, self.extent))
        return out

    def scores(
        self,
        cases: Iterable[Case],
        pairs: Sequence[tuple[int, int]],
        points: int = _POINTS,
        ceiling: float | None = None,
    ) -> list[tuple[Score, Array]]:
        """Score readings.

        Args:
            cases: The readings.
            pairs: Pairs of views.
            points: Points a view.
            ceiling: Where residuals are clipped, None for the usual place.

        Returns:
            The score of each, and its (P,) costs by directed pair.
        """
        every = list(cases)
        out: list[tuple[Score, Array]] = []
        for start in range(0, len(every), _BATCH):
            found = self.found(every[start : start + _BATCH], pairs, points)
            if not found:
                return [(Score(0.0, 0.0, 0.0, 0.0, 0), np.zeros(0))] * len(every)
            by_pair = np.stack([costs(f, ceiling) for f in found], axis=1)
            whole = score(np.concatenate(found, axis=1), self.noise, ceiling)
            out += list(zip(whole, by_pair, strict=True))
        return out


def search(judge: Judge, case: Case, names: Sequence[str]) -> Verdict:
    """Score a capture and look for what is wrong with it.

    Args:
        judge: Scores readings.
        case: The capture as given.
        names: Names of the pictures, for faults of order.

    Returns:
        The verdict; its case carries the corrections, none when the capture is fine or when no
        correction helps.
    """
    pairs = judge.pairs(case)
    before = judge.scores([case], pairs)[0][0]
    best, after = case, before
    for _ in range(_MOST_FIXES):
        better = _improve(judge, best, pairs, names)
        if better is None:
            break
        best = better
        after = judge.scores([best], judge.pairs(best) if best.order else pairs)[0][0]
        if best.order:
            pairs = judge.pairs(best)
    if not after.consistent:
        best, after = case, before
    return Verdict(before, after, best, pairs)


def _improve(
    judge: Judge, case: Case, pairs: list[tuple[int, int]], names: Sequence[str]
) -> Case | None:
    """The simplest reading that is clearly better, or None."""
    base, base_costs = judge.scores([case], pairs)[0]
    singles = _singles(judge, case, pairs, base.consistent)
    single = _pick(judge, singles, pairs, base_costs)
    if single and single[1].consistent:
        return single[0]
    if base.consistent:
        return None
    ordered = _ordered(judge, case, names)
    if ordered:
        return ordered
    # What is cheap to try comes first.
    poses = [] if case.kinds & _OF_POSES else list(pose_cases(case, thorough=False))
    doubles = [c for p in poses for c in _readings(p)]
    if not case.fixes:
        doubles += pose_cases(case, thorough=True)
    double = _pick(judge, doubles, pairs, base_costs)
    if double is None or not double[1].consistent:
        scaled = _scaled(judge, [*poses, *_readings(case)], pairs)
        double = _pick(judge, scaled, pairs, base_costs)
    if double and double[1].consistent:
        return double[0]
    for other in [] if case.order else order_cases(case, names):
        its_pairs = judge.pairs(other)
        for candidate in _scaled(judge, [other], its_pairs)[:1]:
            if judge.scores([candidate], its_pairs)[0][0].consistent:
                return candidate
    shuffled = shuffled_case(judge, case) if case.order is None else None
    return shuffled


def _readings(case: Case) -> list[Case]:
    out = [] if "ray" in case.kinds else [ray_case(case)]
    return out if "K" in case.kinds else [*out, *intrinsics_cases(case)]


def _singles(judge: Judge, case: Case, pairs: list[tuple[int, int]], close: bool) -> list[Case]:
    out = _readings(case)
    if not case.kinds & _OF_POSES:
        out += pose_cases(case, thorough=False)
    if "K" not in case.kinds:
        shifted = [(0.0, case), *shifted_cases(case)]
        tried = [s.cost for s, _ in judge.scores([c for _, c in shifted], pairs)]
        shift, half = shifted[int(np.argmin(tried))]
        if abs(shift) == 0.5:
            out.append(half)
        # Intrinsics of views that nearly fit are off by little.
        factor = _refined(judge, partial(focal_case, case), pairs, 1.0, 0.03, 4 if close else 40)
        factor = _refined(judge, partial(focal_case, case), pairs, factor, 0.003, 10)
        if abs(factor - 1) > _SMALLEST_RATIO:
            out.append(focal_case(case, factor))
    if "unit" not in case.kinds:
        # Views that nearly fit cannot be wrong by a factor of ten.
        out += _scaled(judge, [case], pairs, few=False, ratios=np.ones(1) if close else None)
    return out


def _scaled(
    judge: Judge,
    cases: list[Case],
    pairs: list[tuple[int, int]],
    few: bool = True,
    ratios: Array | None = None,
) -> list[Case]:
    """The best factors of the depth for the most promising of some readings."""
    cases = [case for case in cases if "unit" not in case.kinds]
    ratios = np.geomspace(1e-5, 1e5, 201) if ratios is None else ratios
    used = pairs[:6] if few else pairs
    trials = [
        (i, ratio, with_scale(case, ratio)) for i, case in enumerate(cases) for ratio in ratios
    ]
    rough = np.array(
        [s.cost for s, _ in judge.scores([t[2] for t in trials], used, _FEW, ceiling=0.5)]
    )
    out = []
    seen: set[int] = set()
    for k in np.argsort(rough):
        i, ratio, _ = trials[int(k)]
        if i in seen:
            continue
        seen.add(i)
        base = cases[i]
        for width, steps in ((0.02, 7), (0.003, 8)):
            ratio = _refined(judge, partial(with_scale, base), pairs, ratio, width, steps)
        if abs(ratio - 1) > _SMALLEST_RATIO:
            out.append(with_scale(base, known_ratio(ratio)))
        if len(seen) >= 8:
            break
    return out


def _refined(
    judge: Judge,
    make: Callable[[float], Case],
    pairs: list[tuple[int, int]],
    start: float,
    width: float,
    steps: int,
) -> float:
    """The best of factors around start, steps to each side."""
    factors = start * np.exp(np.arange(-steps, steps + 1) * width)
    found = judge.scores([make(f) for f in factors], pairs, 2 * _FEW)
    return float(factors[int(np.argmin([s.cost for s, _ in found]))])


def _pick(
    judge: Judge, cases: list[Case], pairs: list[tuple[int, int]], base_costs: Array
) -> tuple[Case, Score] | None:
    """The simplest of the clearly better readings."""
    if not cases:
        return None
    # All are looked at with few points, the best few of them with all.
    rough = np.array([s.cost for s, _ in judge.scores(cases, pairs, _FEW)])
    chosen = [cases[int(k)] for k in np.argsort(rough)[:12]]
    found = judge.scores(chosen, pairs)
    best: tuple[Case, Score] | None = None
    for candidate, (score_, by_pair) in zip(chosen, found, strict=True):
        gain = base_costs - by_pair
        sure = 2 * float(gain.std()) / max(len(gain), 1) ** 0.5
        if float(gain.mean()) < max(_MARGIN, sure):
            continue
        if best is None or _rank(candidate, score_) < _rank(*best):
            best = candidate, score_
    return best


def _rank(case: Case, score_: Score) -> tuple[bool, float]:
    # Another correction must earn its place, as a better fit must be clear.
    return not score_.consistent, score_.cost + 0.5 * _MARGIN * len(case.fixes)


def _ordered(judge: Judge, case: Case, names: Sequence[str]) -> Case | None:
    """The first of the usual other orders of the poses that fits."""
    if case.order is not None:
        return None
    best: tuple[float, Case] | None = None
    for candidate in order_cases(case, names):
        result = judge.scores([candidate], judge.pairs(candidate), 2 * _FEW)[0][0]
        if result.consistent and (best is None or result.cost < best[0]):
            best = result.cost, candidate
    return best[1] if best else None
