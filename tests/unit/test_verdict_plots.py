from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom.verdict.plots import Look, Point, frontier, scatter, ticks

positive = st.floats(1e-3, 1e6)


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_enclose_the_data_with_a_few_round_numbers(low: float, spread: float) -> None:
    found = ticks(low, low + spread)
    assert found[0] <= low + 1e-6 * spread
    assert found[-1] >= low + spread * (1 - 1e-6) or found[-1] == pytest.approx(low + spread)
    assert 2 <= len(found) <= 12
    assert found == sorted(set(found))


@given(st.lists(st.tuples(positive, positive), min_size=1, max_size=12, unique=True), st.booleans())
def test_the_frontier_is_what_no_point_beats(pairs: list[tuple[float, float]], higher: bool) -> None:
    points = [Point(str(i), x, y, "stage") for i, (x, y) in enumerate(pairs)]
    sign = 1 if higher else -1

    def beaten(p: Point) -> bool:
        return any(q.x >= p.x and sign * q.y >= sign * p.y and (q.x, q.y) != (p.x, p.y) for q in points)

    assert set(frontier(points, higher_is_better=higher)) == {p for p in points if not beaten(p)}


@pytest.mark.parametrize("higher", [True, False])
def test_better_is_always_up(higher: bool) -> None:
    better, worse = (2.0, 1.0) if higher else (1.0, 2.0)
    points = [Point("good", 10, better, "dense"), Point("bad", 10, worse, "baseline")]
    svg = scatter(points, plot_id="p", x_label="x", y_label="y", higher_is_better=higher, title="t")
    root = ElementTree.fromstring(svg)
    square = next(e for e in root.iter("rect") if e.get("class") == "mark dense")
    diamond = next(e for e in root.iter("polygon"))
    assert float(square.get("y", "")) < float(diamond.get("points", "").split(",")[1].split()[0])


def test_names_of_close_points_do_not_cover_each_other() -> None:
    looks: tuple[Look, ...] = ("dense", "stage", "stage", "final", "baseline")
    points = [Point(f"variant-{i}", 100 + 2 * i, 10 + 0.1 * i, look) for i, look in enumerate(looks)]
    svg = scatter(points, plot_id="p", x_label="x", y_label="y", higher_is_better=False, title="t")
    boxes = []
    for text in ElementTree.fromstring(svg).iter("text"):
        if (text.text or "").startswith("variant-"):
            x, y, wide = float(text.get("x", "")), float(text.get("y", "")), 7.0 * 9
            start = x - {"start": 0, "middle": wide / 2, "end": wide}[text.get("text-anchor", "start")]
            boxes.append((start, y - 11, start + wide, y + 4))
    overlaps = [
        (a, b)
        for i, a in enumerate(boxes)
        for b in boxes[:i]
        if a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
    ]
    assert len(boxes) == len(points)
    assert overlaps == []
