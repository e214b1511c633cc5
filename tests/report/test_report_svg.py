"""Charts: round ticks, and nothing drawn outside its frame."""

import re

from hypothesis import given
from hypothesis import strategies as st

from tempo_fast.report.svg import WIDTH, Mark, Series, interval_chart, line_chart, thin, tick_label, ticks

finite = st.floats(-1e6, 1e6, allow_nan=False).map(lambda x: round(x, 6))


@given(finite, st.floats(1e-3, 1e6))
def test_ticks_are_inside_ascending_and_few(low, width):
    found = ticks(low, low + width)
    assert all(low - 1e-6 * width <= t <= low + width * (1 + 1e-6) for t in found)
    assert found == sorted(set(found)) and 1 <= len(found) <= 12


def test_tick_labels_are_short():
    assert [tick_label(x) for x in (0.0, -0.0, 0.25, 100.0, 1e-6, 250000.0)] == ["0", "0", "0.25", "100", "1e-6", "2e5"]


@given(st.integers(1, 900))
def test_thinning_keeps_ends_and_means(n):
    points = [(float(i), float(i % 7)) for i in range(n)]
    out = thin(points, 50)
    assert len(out) == min(n, 50)
    if n % 50 == 0:
        assert abs(sum(y for _, y in out) / len(out) - sum(y for _, y in points) / n) < 1e-9


@given(st.lists(st.lists(finite, min_size=1, max_size=6), min_size=1, max_size=4), st.booleans())
def test_lines_stay_in_the_frame(runs, bounded):
    at, pieces, bands = 0, [], []
    for values in runs:
        pieces.append([(float(at + i + 1), v) for i, v in enumerate(values)])
        bands.append(("r=4", float(at + 1), float(at + len(values))))
        at += len(values)
    svg = line_chart("x", [Series("a", "c1", pieces)], bands, bounds=(0.0, 1.0) if bounded else (None, None), rule=0.5)
    for x, y in re.findall(r'cx="([-\d.]+)" cy="([-\d.]+)"', svg):
        assert 40 <= float(x) <= WIDTH and 0 <= float(y) <= 220
    assert svg.count("<circle") == at


@given(st.lists(st.tuples(finite, st.floats(0, 10), st.floats(0, 10)), min_size=1, max_size=8))
def test_intervals_hold_their_value(rows):
    marks = [Mark(f"m{i}", "c1", v, v - a, v + b) for i, (v, a, b) in enumerate(rows)] + [Mark("none", "c0", None)]
    svg = interval_chart("x", marks)
    spans = re.findall(r'class="span c1" x1="([-\d.]+)" x2="([-\d.]+)"', svg)
    dots = re.findall(r'cx="([-\d.]+)"', svg)
    assert len(spans) == len(dots) == len(rows)
    for (a, b), x in zip(spans, dots, strict=True):
        assert 92 <= float(a) <= float(x) <= float(b) <= WIDTH - 52
