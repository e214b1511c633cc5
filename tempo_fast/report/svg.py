"""Charts as inline SVG, coloured by the page's style sheet, so that they follow light and dark.

Coordinates are drawn for a width of about 380 px: one column on a phone, three on a desktop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 380
Point = tuple[float, float]


@dataclass
class Series:
    """A line: ``css`` names its colour class; ``runs`` are its unbroken pieces."""

    label: str
    css: str
    runs: list[list[Point]]

    @property
    def points(self) -> list[Point]:
        return [p for run in self.runs for p in run]


def ticks(low: float, high: float, n: int = 5) -> list[float]:
    """About ``n`` round numbers inside [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / n
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_label(value: float) -> str:
    """Short, without a sign on zero."""
    if value == 0:
        return "0"
    if abs(value) >= 1e5 or abs(value) < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:g}"


def thin(points: Sequence[Point], most: int = 240) -> list[Point]:
    """At most ``most`` points: means over equal bins."""
    if len(points) <= most:
        return list(points)
    edges = [round(i * len(points) / most) for i in range(most + 1)]
    bins = [points[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    return [(sum(x for x, _ in b) / len(b), sum(y for _, y in b) / len(b)) for b in bins]


def line_chart(
    name: str,
    series: Sequence[Series],
    bands: Sequence[tuple[str, float, float]],
    *,
    bounds: tuple[float | None, float | None] = (None, None),
    rule: float | None = None,
    height: int = 220,
) -> str:
    """Lines over optimizer steps.

    Args:
        name: what a screen reader says.
        series: lines, at least one with a point.
        bands: (label, first x, last x) of the stages, shaded in turn.
        bounds: fixed lower and upper end of the y axis, each None to take the data's.
        rule: a dashed horizontal line, such as chance.
        height: of the drawing in px.
    """
    left, right, top, bottom = 46, 8, 22, 26
    xs = [x for s in series for x, _ in s.points] + [x for _, a, b in bands for x in (a, b)]
    ys = [y for s in series for _, y in s.points] + ([rule] if rule is not None else [])
    x0, x1 = min(xs), max(xs)
    x1 = x1 if x1 > x0 else x0 + 1
    y0 = min(ys) if bounds[0] is None else bounds[0]
    y1 = max(ys) if bounds[1] is None else bounds[1]
    if y1 - y0 < 1e-12:
        y0, y1 = y0 - (abs(y0) * 0.1 or 0.5), y1 + (abs(y1) * 0.1 or 0.5)
    pad = (y1 - y0) * 0.06
    y0, y1 = (y0 - pad if bounds[0] is None else y0), (y1 + pad if bounds[1] is None else y1)

    def px(x: float) -> float:
        return round(left + (x - x0) / (x1 - x0) * (WIDTH - left - right), 1)

    def py(y: float) -> float:
        return round(top + (y1 - min(max(y, y0), y1)) / (y1 - y0) * (height - top - bottom), 1)

    out = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(name)}">']
    for i, (label, a, b) in enumerate(bands):
        start = px(a) if i == 0 else (px(a) + px(bands[i - 1][2])) / 2
        end = px(b) if i == len(bands) - 1 else (px(b) + px(bands[i + 1][1])) / 2
        if i % 2 == 0:
            out.append(
                f'<rect class="band" x="{start}" y="{top}" width="{end - start:.1f}" height="{height - top - bottom}"/>'
            )
        if end - start > 7 * len(label):
            out.append(f'<text class="axis mid" x="{(start + end) / 2:.1f}" y="{top - 8}">{escape(label)}</text>')
    for value in ticks(y0, y1, 4):
        out.append(f'<line class="grid" x1="{left}" x2="{WIDTH - right}" y1="{py(value)}" y2="{py(value)}"/>')
        out.append(f'<text class="axis end" x="{left - 6}" y="{py(value) + 4}">{tick_label(value)}</text>')
    for value in (v for v in ticks(x0, x1, 5) if v == int(v)):
        out.append(f'<text class="axis mid" x="{px(value)}" y="{height - 8}">{tick_label(value)}</text>')
    if rule is not None:
        out.append(f'<line class="rule" x1="{left}" x2="{WIDTH - right}" y1="{py(rule)}" y2="{py(rule)}"/>')
    for s in series:
        for run in s.runs:
            points = thin(run)
            if len(points) > 1:
                path = " ".join(f"{px(x)},{py(y)}" for x, y in points)
                out.append(f'<polyline class="line {s.css}" points="{path}"/>')
            if len(points) <= 40:
                out += [
                    f'<circle class="dot {s.css}" cx="{px(x)}" cy="{py(y)}" r="2.2">'
                    f"<title>{escape(s.label)}, step {x:g}: {y:.4g}</title></circle>"
                    for x, y in points
                ]
    out.append(
        f'<line class="base" x1="{left}" x2="{WIDTH - right}" y1="{height - bottom}" y2="{height - bottom}"/></svg>'
    )
    return "".join(out)


@dataclass
class Mark:
    """A row of an interval chart; ``value`` None leaves it empty."""

    label: str
    css: str
    value: float | None
    lo: float = 0.0
    hi: float = 0.0


def interval_chart(
    name: str, marks: Sequence[Mark], *, rule: float | None = None, bounds: tuple[float, float] | None = None
) -> str:
    """A dot with its interval per row, its value to the right; ``rule`` is a dashed line, such as chance; ``bounds``
    are the ends of the axis, by default the data's."""
    left, right, top, row = 92, 52, 6, 24
    known = [m for m in marks if m.value is not None]
    ends = [x for m in known for x in (m.lo, m.hi, m.value or 0.0)] + ([rule] if rule is not None else [])
    x0, x1 = bounds or (min(ends), max(ends))
    pad = max((x1 - x0) * 0.06, 0.01)
    x0, x1 = x0 - pad, x1 + pad
    height = top + row * len(marks) + 24
    floor = top + row * len(marks)

    def px(x: float) -> float:
        return round(left + (x - x0) / (x1 - x0) * (WIDTH - left - right), 1)

    out = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(name)}">']
    for value in ticks(x0, x1, 4):
        out.append(f'<line class="grid" x1="{px(value)}" x2="{px(value)}" y1="{top}" y2="{floor}"/>')
        out.append(f'<text class="axis mid" x="{px(value)}" y="{height - 8}">{tick_label(value)}</text>')
    if rule is not None:
        out.append(f'<line class="rule" x1="{px(rule)}" x2="{px(rule)}" y1="{top}" y2="{floor}"/>')
    for i, m in enumerate(marks):
        y = top + row * i + row / 2
        out.append(f'<text class="name end" x="{left - 10}" y="{y + 4}">{escape(m.label)}</text>')
        if m.value is None:
            out.append(f'<text class="axis" x="{WIDTH - right + 8}" y="{y + 4}">–</text>')
            continue
        out.append(f'<line class="span {m.css}" x1="{px(m.lo)}" x2="{px(m.hi)}" y1="{y}" y2="{y}"/>')
        title = f"{escape(m.label)}: {m.value:.3f} [{m.lo:.3f}, {m.hi:.3f}]"
        out.append(f'<circle class="dot {m.css}" cx="{px(m.value)}" cy="{y}" r="5"><title>{title}</title></circle>')
        out.append(f'<text class="value" x="{WIDTH - right + 8}" y="{y + 4}">{m.value:.2f}</text>')
    return "".join(out) + "</svg>"
