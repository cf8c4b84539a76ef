from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest

from results import REFUSED, VARIANTS, finished_run
from stillroom.artifact import environment
from stillroom.verdict.join import build_verdict
from stillroom.verdict.report import draw, render_html, write_report
from stillroom.verdict.verdict import Row, Verdict, load_verdict

HOSTILE = "<script>alert('x')</script>&\"quoted\""

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Tags in order, text, and whether every tag was closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def verdict(tmp_path: Path) -> Verdict:
    config, inputs = finished_run(tmp_path / "run")
    return build_verdict(config, inputs, environment(), seed=0)


def test_the_page_names_every_variant_gate_and_the_sentence(verdict: Verdict) -> None:
    page = Page(render_html(verdict))
    assert page.open == []
    for words in (*VARIANTS, *(gate.gate for gate in verdict.gates), verdict.sentence, "Passed: 3 of 3 gates"):
        assert words in page.text


def test_the_page_loads_nothing_and_runs_nothing(verdict: Verdict) -> None:
    html = render_html(verdict)
    tags = {tag for tag, _ in Page(html).tags}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    assert "http" not in html
    assert not re.search(r"url\(|@import|javascript:| on\w+=", html)


def test_what_comes_from_outside_is_escaped(verdict: Verdict) -> None:
    row = verdict.rows[3]
    hostile = row.model_copy(
        update={"variant": HOSTILE, "path": HOSTILE, "notes": (HOSTILE,), "config": {HOSTILE: HOSTILE},
                "not_measured": {"speed": HOSTILE}, "kind": HOSTILE}
    )  # fmt: skip
    evil = verdict.model_copy(
        update={"rows": (*verdict.rows[:3], hostile, verdict.rows[4]), "final": HOSTILE, "recipe": HOSTILE,
                "sentence": HOSTILE, "environment": {HOSTILE: HOSTILE}, "bench": {"engine": HOSTILE},
                "losses": {HOSTILE: verdict.losses["distill"]}}
    )  # fmt: skip
    html = render_html(evil)
    page = Page(html)
    assert page.open == []
    assert "<script" not in html
    assert HOSTILE in page.text


def test_plots_are_valid_xml_with_a_title_and_a_description(verdict: Verdict, tmp_path: Path) -> None:
    write_report(verdict, tmp_path)
    files = sorted(path.name for path in tmp_path.glob("*.svg"))
    assert files == ["cut-prune.svg", "loss-distill.svg", "quality-throughput.svg", "weights.svg"]
    for name in files:
        root = ElementTree.parse(tmp_path / name).getroot()
        space = "{http://www.w3.org/2000/svg}"
        assert root.tag == f"{space}svg"
        assert root.get("role") == "img"
        for child in ("title", "desc"):
            found = root.find(f"{space}{child}")
            assert found is not None
            assert found.text
            assert found.get("id", "") in root.get("aria-labelledby", "").split()


def test_ids_on_the_page_are_unique(verdict: Verdict) -> None:
    ids = [attrs["id"] for _, attrs in Page(render_html(verdict)).tags if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_everything_drawn_lies_inside_the_drawing(verdict: Verdict) -> None:
    for svg in draw(verdict).values():
        root = ElementTree.fromstring(svg)
        _, _, width, height = map(float, root.get("viewBox", "").split())
        for element in root.iter():
            for name, most in (("x", width), ("cx", width), ("y", height), ("cy", height)):
                assert 0 <= float(element.get(name, 0)) <= most


def test_only_what_was_measured_is_drawn(tmp_path: Path) -> None:
    config, inputs = finished_run(tmp_path, bench=False, gates=())
    verdict = build_verdict(config, inputs, {}, seed=0)
    assert "quality-throughput" not in draw(verdict)
    page = Page(render_html(verdict))
    assert page.text.count("not measured") >= len(VARIANTS)
    assert "this recipe has no bench" in page.text
    assert "No gates given" in page.text


def test_a_refusal_is_shown_with_its_reason(tmp_path: Path) -> None:
    config, inputs = finished_run(tmp_path, refused=("int8",))
    page = Page(render_html(build_verdict(config, inputs, {}, seed=0)))
    assert f"refused: {REFUSED}" in page.text
    assert "Failed: 2 of 3 gates" in page.text


def test_a_verdict_of_one_point_is_drawn(tmp_path: Path) -> None:
    """One variant with both numbers, no spread on either axis."""
    config, inputs = finished_run(tmp_path)
    verdict = build_verdict(config, inputs, {}, seed=0)
    only = verdict.model_copy(update={"rows": tuple(_plain(r, keep=r.variant == "dense") for r in verdict.rows)})
    assert "dense" in draw(only)["quality-throughput"]


def _plain(row: Row, *, keep: bool) -> Row:
    """Without speed unless it is kept, and without errors."""
    numbers = {
        n: m.model_copy(update={"stderr": None}) for n, m in row.measurements.items() if keep or "speed" not in n
    }
    return row.model_copy(update={"measurements": numbers})


def test_the_report_is_made_again_from_verdict_json_alone(verdict: Verdict, tmp_path: Path) -> None:
    (tmp_path / "verdict.json").write_text(verdict.model_dump_json(), encoding="utf-8")
    path = write_report(load_verdict(tmp_path), tmp_path)
    assert path == tmp_path / "report.html"
    assert path.read_text(encoding="utf-8") == render_html(verdict) == render_html(load_verdict(tmp_path))
