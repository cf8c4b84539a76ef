from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom.verdict.plots import Look, Panel, Point, Tried, frontier, layers, scatter, searched, ticks

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


def search_of(costs: list[float]) -> list[Tried]:
    kinds = ("depth", "width", "both", "both")
    return [
        Tried(f"shape {i}", cost, 1.0 + i, kinds[i % 4], named=i < 2, reranked=i < 3, winner=i == 1)  # type: ignore[arg-type]
        for i, cost in enumerate(costs)
    ]


def test_every_tried_shape_is_drawn_by_what_was_cut_and_the_winner_is_filled() -> None:
    tried = search_of([90.0, 95.0, 99.0, 97.0])
    svg = searched(tried, plot_id="s", x_label="parameters", cheaper_is_less=True, title="t")
    root = ElementTree.fromstring(svg)
    marks = [e for e in root.iter() if (e.get("class") or "").startswith("mark")]
    assert sorted(e.tag for e in marks) == ["circle", "circle", "polygon", "rect"]
    assert [e.tag for e in marks if "final" in (e.get("class") or "")] == ["polygon"]
    assert sum(e.get("class") == "dot" for e in root.iter("circle")) == 2  # the winner was ranked again too
    assert [e.text for e in root.iter("text") if (e.text or "").startswith("shape")] == ["shape 0", "shape 1"]
    assert "Winner: shape 1" in svg


@pytest.mark.parametrize("costs", [[5.0], [5.0, 5.0, 5.0], [0.001, 1e9]])
def test_a_search_of_few_or_equal_costs_is_drawn(costs: list[float]) -> None:
    svg = searched(search_of(costs), plot_id="s", x_label="ms", cheaper_is_less=False, title="t")
    assert "nan" not in svg
    ElementTree.fromstring(svg)


def columns(*panels: Panel, dropped: tuple[int, ...] = ()) -> ElementTree.Element:
    return ElementTree.fromstring(layers(panels, dropped, plot_id="l", x_label="layer", title="t"))


def bars_of(root: ElementTree.Element, look: str) -> list[ElementTree.Element]:
    return [e for e in root.iter("rect") if e.get("class") == f"bar {look}"]


@given(st.lists(st.floats(-1e3, 1e3) | st.none(), min_size=1, max_size=80).filter(any))
def test_every_layer_with_a_value_has_one_column_inside_the_drawing(values: list[float | None]) -> None:
    root = columns(Panel("score", tuple(values)), Panel("gain", tuple(values), "gain", 60.0))
    height = float(root.get("viewBox", "").split()[3])
    known = sum(value is not None for value in values)
    assert (len(bars_of(root, "kept")), len(bars_of(root, "gain"))) == (known, known)
    for bar in bars_of(root, "kept") + bars_of(root, "gain"):
        assert float(bar.get("y", "")) >= 0
        assert float(bar.get("y", "")) + float(bar.get("height", "")) <= height


def test_layers_that_went_are_marked_and_not_by_colour_alone() -> None:
    root = columns(Panel("score", (1.0, 2.0, 3.0, 4.0)), dropped=(1, 2))
    assert len(bars_of(root, "dropped")) == 2
    assert sum(text.text == "×" for text in root.iter("text")) == 2
    assert "layer 2 (cut): 3" in [title.text for title in root.iter("title")]
    assert "cut: 1, 2" in (root.findtext("desc") or "")


def test_scores_of_very_different_size_stand_on_a_logarithmic_axis() -> None:
    low, middle, high = (float(b.get("height", "")) for b in bars_of(columns(Panel("KL", (0.01, 0.1, 10.0))), "kept"))
    assert low == 0.0
    assert middle == pytest.approx(high / 3, abs=0.1)
    assert "KL, log scale" in [text.text for text in columns(Panel("KL", (0.01, 0.1, 10.0))).iter("text")]
    assert "KL" in [text.text for text in columns(Panel("KL", (1.0, 10.0))).iter("text")]
