"""Charts as inline SVG: drawn by matplotlib, coloured by the page, so that they follow its theme.

Every chart names unit and direction on its axes. Models differ by colour, by marker and by dash,
so that no one needs to tell colours apart; the colours are those of Okabe and Ito (2008).
"""

from __future__ import annotations

import html
import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from equifeat.metrics.unit_sums import Estimate

COLORS = 8
_MARKERS, _DASHES = "osD^vPX*", ("-", "--", "-.", ":")
# Stand-ins that no picture uses otherwise; the page's variables take their place.
_INK, _QUIET = "#01fe01", "#02fe02"
_SERIES = [f"#0{k}fd0{k}" for k in range(COLORS)]
_VARIABLES = {_INK: "--ink", _QUIET: "--line"} | {c: f"--c{k}" for k, c in enumerate(_SERIES)}
_LONGEST = 34
_counter = itertools.count()


class Axis(NamedTuple):
    """What an axis shows.

    Attributes:
        label: Name, unit and direction.
        higher: Whether more is better.
    """

    label: str
    higher: bool


def short(name: str, length: int = _LONGEST) -> str:
    """Return a name cut in its middle.

    Args:
        name: Any text.
        length: Longest result.

    Returns:
        At most that many characters.
    """
    if len(name) <= length:
        return name
    return f"{name[: length // 2]}…{name[-(length - length // 2 - 1) :]}"


def lines_chart(
    groups: Sequence[str], series: Mapping[str, Sequence[Estimate]], x_label: str, y: Axis, alt: str
) -> str:
    """Draw a metric over ordered groups, with interval bands.

    Args:
        groups: Names along x, in order.
        series: By model, one estimate a group.
        x_label: What the groups are.
        y: What is measured.
        alt: What the chart shows, for those who cannot see it.

    Returns:
        An SVG element.
    """
    with matplotlib.rc_context(_RC):
        figure, axes = _axes(5.4, 3.6 + 0.24 * len(series))
        at = np.arange(len(groups))
        for k, (name, found) in enumerate(series.items()):
            values = np.array([e.value for e in found])
            low, high = (np.array([getattr(e, end) for e in found]) for end in ("low", "high"))
            axes.plot(at, values, label=short(name), markersize=6, lw=1.8, **_look(k))
            axes.fill_between(at, low, high, color=_SERIES[k % COLORS], alpha=0.16, lw=0)
        axes.set_xticks(at, [short(g, 14) for g in groups])
        if len(groups) > 5:
            axes.tick_params("x", labelrotation=35)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y.label)
        axes.margins(x=0.04)
        _legend(figure, axes)
        return _svg(figure, alt)


def bars_chart(
    groups: Sequence[str], series: Mapping[str, Sequence[Estimate]], y: Axis, alt: str
) -> str:
    """Draw a metric by groups as horizontal bars with intervals.

    Args:
        groups: Names of the groups, from top to bottom.
        series: By model, one estimate a group.
        y: What is measured.
        alt: What the chart shows.

    Returns:
        An SVG element.
    """
    count = len(series)
    step = 0.8 / count
    with matplotlib.rc_context(_RC):
        figure, axes = _axes(5.4, 1.1 + 0.25 * count + len(groups) * (0.17 * count + 0.14))
        at = np.arange(len(groups))
        for k, (name, found) in enumerate(series.items()):
            place = at + (k - (count - 1) / 2) * step
            values = np.array([e.value for e in found])
            axes.barh(
                place,
                np.nan_to_num(values),
                height=step * 0.86,
                color=_SERIES[k % COLORS],
                label=short(name),
                alpha=0.8,
            )
            ends = np.array([[e.value - e.low, e.high - e.value] for e in found]).T.clip(0)
            known = np.isfinite(ends).all(0)
            if known.any():
                axes.errorbar(
                    values[known],
                    place[known],
                    xerr=ends[:, known],
                    fmt="none",
                    ecolor=_INK,
                    elinewidth=1.1,
                    capsize=2,
                )
        axes.set_yticks(at, [short(g, 22) for g in groups])
        axes.invert_yaxis()
        axes.set_ylim(len(groups) - 0.45, -0.55)
        axes.set_xlabel(y.label)
        axes.grid(axis="y", visible=False)
        _legend(figure, axes)
        return _svg(figure, alt)


def scatter_chart(
    points: Mapping[str, tuple[Estimate, Estimate]], x: Axis, y: Axis, alt: str
) -> str:
    """Draw one metric against another, a point a model, with intervals.

    Args:
        points: By model, x and y.
        x: What x shows.
        y: What y shows.
        alt: What the chart shows.

    Returns:
        An SVG element.
    """
    with matplotlib.rc_context(_RC):
        figure, axes = _axes(5.4, 3.6 + 0.24 * len(points))
        for k, (name, (a, b)) in enumerate(points.items()):
            axes.errorbar(
                [a.value],
                [b.value],
                xerr=_bars(a),
                yerr=_bars(b),
                markersize=7,
                elinewidth=1.0,
                capsize=2,
                label=short(name),
                **(_look(k) | {"linestyle": "none"}),
            )
        axes.set_xlabel(x.label)
        axes.set_ylabel(y.label)
        axes.margins(0.12)
        _legend(figure, axes)
        return _svg(figure, alt)


def radar_chart(axes_of: Sequence[Axis], series: Mapping[str, Sequence[float]], alt: str) -> str:
    """Draw models over several measures, each axis from 0 at its worse end, which it states.

    Args:
        axes_of: What each axis shows; at least three.
        series: By model, one value an axis.
        alt: What the chart shows.

    Returns:
        An SVG element.
    """
    ranges = [nice_top([values[i] for values in series.values()]) for i in range(len(axes_of))]
    turn = np.linspace(0, 2 * np.pi, len(axes_of), endpoint=False)
    with matplotlib.rc_context(_RC):
        # fixed places: an automatic layout makes the circle tiny to fit long labels
        height = 4.55 + 0.22 * len(series)
        figure = Figure(figsize=(5.4, height))
        FigureCanvasSVG(figure)
        axes: Any = figure.add_axes(
            (0.27, 1 - 3.55 / height, 0.46, 2.5 / height), projection="polar"
        )
        axes.set_theta_offset(np.pi / 2)
        axes.set_theta_direction(-1)
        for k, (name, values) in enumerate(series.items()):
            # away from the centre is better on every axis
            share = [
                v / top if axis.higher else 1 - v / top
                for v, top, axis in zip(values, ranges, axes_of, strict=True)
            ]
            axes.plot([*turn, turn[0]], [*share, share[0]], label=short(name), lw=1.8, **_look(k))
            axes.fill([*turn, turn[0]], [*share, share[0]], color=_SERIES[k % COLORS], alpha=0.06)
        axes.set_ylim(0, 1)
        axes.set_yticks([0.25, 0.5, 0.75, 1.0], [""] * 4)
        names = [
            f"{axis.label}\n{0 if axis.higher else top:g} to {top if axis.higher else 0:g}"
            for axis, top in zip(axes_of, ranges, strict=True)
        ]
        axes.set_xticks(turn, names, fontsize=10)
        axes.tick_params("x", pad=6)
        for text, angle in zip(axes.get_xticklabels(), turn, strict=True):
            side, up = math.sin(angle), math.cos(angle)
            text.set_verticalalignment("bottom" if up > 0.5 else "top" if up < -0.5 else "center")
            text.set_horizontalalignment(
                "center" if abs(side) < 0.1 else "left" if side > 0 else "right"
            )
        axes.spines["polar"].set_color(_QUIET)
        _legend(figure, axes)
        return _svg(figure, alt)


def nice_top(values: Sequence[float]) -> float:
    """Return a round number that is not below any of the values.

    Args:
        values: Not negative; NaN is left out.

    Returns:
        1, 2, 2.5, 4, 5 or 8 times a power of ten; 1 where there is none above 0.
    """
    top = max((v for v in values if math.isfinite(v)), default=0.0)
    if top <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(top))
    return next(
        float(f"{n * power:.6g}") for n in (1, 2, 2.5, 4, 5, 8, 10) if n * power >= top * (1 - 1e-9)
    )


_RC: Any = {
    # text stays text: sharp, selectable, read aloud
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 11,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.edgecolor": _QUIET,
    "grid.color": _QUIET,
    "axes.grid": True,
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


def _axes(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.add_subplot()


def _look(k: int) -> dict[str, Any]:
    return {
        "color": _SERIES[k % COLORS],
        "marker": _MARKERS[k % len(_MARKERS)],
        "linestyle": _DASHES[k // 2 % len(_DASHES)],
    }


def _bars(one: Estimate) -> list[list[float]] | None:
    if not (math.isfinite(one.low) and math.isfinite(one.high)):
        return None
    return [[max(0.0, one.value - one.low)], [max(0.0, one.high - one.value)]]


def _legend(figure: Figure, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    columns = 2 if len(labels) > 1 and max(map(len, labels)) <= 22 else 1
    place: Any = "outside lower center" if figure.get_layout_engine() else "lower center"
    figure.legend(handles, labels, loc=place, ncols=columns, frameon=False, fontsize=10)


def _svg(figure: Figure, alt: str) -> str:
    """The figure as an element that needs nothing outside and clashes with no other."""
    buffer = io.BytesIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": "equifeat"}):
        figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue().decode()
    text = re.sub(r"^.*?(?=<svg)", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*|<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    mark = f"g{next(_counter)}-"
    text = re.sub(r'\bid="', f'id="{mark}', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{mark}", text)
    text = re.sub(r'style="[^"]*"', _themed, text)
    box = re.search(r'viewBox="([^"]*)"', text)
    size = box[1] if box else "0 0 400 300"
    start = (
        f'<svg class="chart" viewBox="{size}" role="img" '
        f'aria-label="{html.escape(alt, quote=True)}">'
    )
    text = re.sub(r"<svg[^>]*>", lambda _: start, text, count=1)
    return text.replace("xlink:href", "href").strip()


def _themed(style: re.Match[str]) -> str:
    text = style[0].replace("'DejaVu Sans'", "inherit")
    text = re.sub(r"font: (\S+) [^;\"]*", r"font-size: \1", text)
    for stand_in, variable in _VARIABLES.items():
        text = text.replace(stand_in, f"var({variable})")
    return text
