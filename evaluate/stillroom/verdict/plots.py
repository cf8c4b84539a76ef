"""Plots as SVG written by hand: no script, no network, a title and a description for those who do not see them.

Colours are classes, and PLOT_CSS gives them for light and dark, so one drawing serves the page, a file of its own and
paper. Meaning is never in colour alone: dense is a square, a stage a circle, a baseline a diamond, and the variant that
is judged is filled. In the frontier of a search a square cuts depth alone, a diamond width alone, a circle both; what
was ranked again has a dot, and the winner is filled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

PLOT_CSS = """
.plot{--ink:#26231e;--soft:#6d675d;--grid:#e4ddd1;--accent:#a4461c;--cool:#2f6672;--paper:#fffdf9;
font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;font-size:13px}
@media (prefers-color-scheme:dark){.plot{--ink:#ece6da;--soft:#a59c8d;--grid:#37332d;--accent:#f0925f;--cool:#7cc0cd;
--paper:#1e1c19}}
@media print{.plot{--ink:#000;--soft:#444;--grid:#ccc;--accent:#a4461c;--cool:#2f6672;--paper:#fff}}
.plot text{fill:var(--ink)}.plot .small{font-size:11px}.plot .soft{fill:var(--soft)}.plot .strong{font-weight:650}
.plot .grid{stroke:var(--grid);stroke-width:1}.plot .axis{stroke:var(--soft);stroke-width:1}
.plot .frontier{stroke:var(--soft);stroke-width:1.5;stroke-dasharray:5 4;fill:none}
.plot .curve{stroke:var(--accent);stroke-width:2;fill:none;stroke-linejoin:round}
.plot .error{stroke:var(--soft);stroke-width:1.5}
.plot .mark{fill:var(--paper);stroke:var(--cool);stroke-width:2.2}
.plot .mark.final{fill:var(--accent);stroke:var(--accent)}.plot .mark.baseline{stroke:var(--soft)}
.plot .dot{fill:var(--cool)}.plot .label,.plot .strong{paint-order:stroke;stroke:var(--paper);stroke-width:4px}
.plot .bar{fill:var(--cool)}.plot .bar.final{fill:var(--accent)}.plot .bar.baseline{fill:var(--soft)}
.plot .bar.dropped{fill:var(--accent)}.plot .bar.kept{fill:var(--cool);opacity:.55}.plot .bar.gain{fill:var(--cool)}
.plot .paper{fill:var(--paper)}
"""

Look = Literal["dense", "stage", "final", "baseline"]

LETTER = 7.0
"""Width of a letter at 13 px, on average and a little more."""
LOG_FROM = 30
"""Columns whose largest is so many times the smallest stand on a logarithmic axis."""


@dataclass(frozen=True)
class Point:
    """One variant in the plane."""

    label: str
    x: float
    y: float
    look: Look
    y_error: float | None = None


@dataclass(frozen=True)
class Bar:
    label: str
    value: float
    text: str
    """Written behind the bar."""
    look: Look


@dataclass(frozen=True)
class Tried:
    """One shape that a search tried."""

    label: str
    cost: float
    kl: float
    cut: Literal["depth", "width", "both"]
    named: bool
    """Its label is written beside it."""
    reranked: bool = False
    winner: bool = False


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


@dataclass(frozen=True)
class Panel:
    """One value for each layer, or None."""

    label: str
    values: tuple[float | None, ...]
    look: Literal["kept", "gain"] = "kept"
    height: float = 150.0
    write: Callable[[float], str] = _short


@dataclass(frozen=True)
class _Axis:
    """A linear axis from data to pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def standalone(svg: str) -> str:
    """The drawing as a file of its own, with its colours inside."""
    head, _, rest = svg.partition(">")
    head = head.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{head}><style>{escape(PLOT_CSS, quote=False)}</style>{rest}\n'


def scatter(
    points: Sequence[Point], *, plot_id: str, x_label: str, y_label: str, higher_is_better: bool, title: str
) -> str:
    """Quality against throughput, better always up and to the right, with the frontier of what nothing else beats."""
    width, height, left, right, top, bottom = 760, 430, 74, 24, 34, 56
    x_ticks = ticks(0, max(p.x for p in points) * 1.12)
    spread = [p.y + sign * (p.y_error or 0) for p in points for sign in (-1, 1)]
    margin = 0.12 * (max(spread) - min(spread)) or 0.1 * abs(spread[0]) or 1.0
    y_ticks = ticks(min(spread) - margin, max(spread) + margin)
    x = _Axis(x_ticks[0], x_ticks[-1], left, width - right)
    y_ends = (height - bottom, top) if higher_is_better else (top, height - bottom)
    y = _Axis(y_ticks[0], y_ticks[-1], *y_ends)
    body = _grid(x, y, x_ticks, y_ticks, x_label, y_label, width=width, height=height)
    best = frontier(points, higher_is_better=higher_is_better)
    if len(best) > 1:
        body.append(f'<polyline class="frontier" points="{" ".join(f"{x(p.x):.1f},{y(p.y):.1f}" for p in best)}"/>')
    for p in points:
        if p.y_error:
            ends = f'y1="{y(p.y - p.y_error):.1f}" y2="{y(p.y + p.y_error):.1f}"'
            body.append(f'<line class="error" x1="{x(p.x):.1f}" x2="{x(p.x):.1f}" {ends}/>')
    body += [_mark(p.look, x(p.x), y(p.y)) for p in points]
    body += _labels([(p, x(p.x), y(p.y)) for p in points], width - right, (top, height - bottom))
    desc = "; ".join(f"{p.label}: {_short(p.y)} at {_short(p.x)}" for p in points)
    leading = ", ".join(p.label for p in best)
    hint = f"{y_label} against {x_label}, better is up and right. {desc}. On the frontier: {leading}."
    return _svg(plot_id, width, height, title, hint, body)


def searched(tried: Sequence[Tried], *, plot_id: str, x_label: str, cheaper_is_less: bool, title: str) -> str:
    """What every tried shape costs and loses: KL downwards, so better is up, and the line of what nothing beats."""
    width, height, left, right, top, bottom = 760, 430, 74, 24, 34, 56
    costs = [t.cost for t in tried]
    spread = max(costs) - min(costs) or abs(costs[0]) * 0.1 or 1.0
    x_ticks = ticks(min(costs) - 0.08 * spread, max(costs) + 0.08 * spread)
    y_ticks = ticks(0, max(t.kl for t in tried) * 1.05)
    x = _Axis(x_ticks[0], x_ticks[-1], left, width - right)
    y = _Axis(y_ticks[0], y_ticks[-1], top, height - bottom)
    body = _grid(x, y, x_ticks, y_ticks, x_label, "KL to dense after repair, nats/token", width=width, height=height)
    sign = -1 if cheaper_is_less else 1
    points = [Point(t.label, sign * t.cost, t.kl, "final" if t.winner else "stage") for t in tried]
    best = frontier(points, higher_is_better=False)
    if len(best) > 1:
        line = " ".join(f"{x(sign * p.x):.1f},{y(p.y):.1f}" for p in best)
        body.append(f'<polyline class="frontier" points="{line}"/>')
    for t in sorted(tried, key=lambda t: (t.winner, t.reranked)):  # the winner lies on top
        body.append(f"<g><title>{escape(f'{t.label}: {_short(t.kl)}')}</title>{_tried_mark(t, x(t.cost), y(t.kl))}</g>")
    named = [(p, x(t.cost), y(t.kl)) for p, t in zip(points, tried, strict=True) if t.named]
    others = [(x(t.cost), y(t.kl)) for t in tried if not t.named]
    body += _labels(named, width - right, (top, height - bottom), others)
    desc = "; ".join(f"{t.label}: {_short(t.kl)} at {_short(t.cost)}" for t in tried)
    won = ", ".join(t.label for t in tried if t.winner)
    return _svg(plot_id, width, height, title, f"KL against {x_label}, better is up. {desc}. Winner: {won}.", body)


def bars(items: Sequence[Bar], *, plot_id: str, title: str) -> str:
    """Horizontal bars from zero, each with its number."""
    step, width, top = 34, 560, 8
    left = min(190.0, 16 + LETTER * max(len(item.label) for item in items))
    room = width - left - 16 - LETTER * max(len(item.text) for item in items)
    x = _Axis(0, max(item.value for item in items) or 1.0, left, left + room)
    body = []
    for i, item in enumerate(items):
        y = top + i * step
        strong = " strong" if item.look == "final" else ""
        length = max(1.0, x(item.value) - left)
        body.append(_text(left - 10, y + 19, _clip(item.label, 25), "end", css=f"label{strong}"))
        body.append(
            f'<rect class="bar {item.look}" x="{left:.1f}" y="{y + 4}" width="{length:.1f}" height="22" rx="3"/>'
        )
        body.append(_text(left + length + 8, y + 19, item.text, css=f"soft{strong}"))
    desc = "; ".join(f"{item.label}: {item.text}" for item in items)
    return _svg(plot_id, width, top + step * len(items) + 4, title, desc, body)


def curve(points: Sequence[tuple[float, float]], *, plot_id: str, x_label: str, y_label: str, title: str) -> str:
    """One line, as of a loss over tokens."""
    width, height, left, right, top, bottom = 560, 280, 66, 24, 30, 52
    x_ticks = ticks(0, max(px for px, _ in points))
    y_ticks = ticks(min(py for _, py in points), max(py for _, py in points))
    x = _Axis(x_ticks[0], x_ticks[-1], left, width - right)
    y = _Axis(y_ticks[0], y_ticks[-1], height - bottom, top)
    body = _grid(x, y, x_ticks, y_ticks, x_label, y_label, width=width, height=height)
    body.append(f'<polyline class="curve" points="{" ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points)}"/>')
    first, last = points[0][1], points[-1][1]
    return _svg(plot_id, width, height, title, f"{y_label} from {_short(first)} to {_short(last)}.", body)


def layers(panels: Sequence[Panel], dropped: Sequence[int], *, plot_id: str, x_label: str, title: str) -> str:
    """One column for each layer, panel under panel; layers that went are told by colour and by a mark below."""
    width, left, right, gap = 760, 74, 16, 46
    number = len(panels[0].values)
    slot = (width - left - right) / number
    body: list[str] = []
    top = 30.0
    for panel in panels:
        bottom = top + panel.height
        body += _columns(panel, dropped, left, width - right, top, bottom)
        top = bottom + gap
    last = top - gap
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100) if slot * n >= 24)
    for layer in range(number):
        middle = left + (layer + 0.5) * slot
        if layer in dropped:
            body.append(_text(middle, last + 13, "×", "middle", css="small strong"))
        if layer % every == 0:
            body.append(_text(middle, last + 28, str(layer), "middle", css="small soft"))
    body.append(_text((left + width - right) / 2, last + 48, x_label, "middle"))
    gone = ", ".join(map(str, dropped)) or "none"
    hint = f"{'; '.join(panel.label for panel in panels)}, for each of {number} layers; cut: {gone}."
    return _svg(plot_id, width, last + 56, title, hint, body)


def _columns(panel: Panel, dropped: Sequence[int], left: float, right: float, top: float, bottom: float) -> list[str]:
    """One panel; a layer without a value has no column."""
    marks, is_log = _marks(panel)
    place: Callable[[float], float] = math.log10 if is_log else float
    y = _Axis(place(marks[0]), place(marks[-1]), bottom, top)
    base = y(place(marks[0] if is_log else 0.0))
    parts = [_text(6, top - 14, f"{panel.label}{', log scale' if is_log else ''}")]
    for mark in marks:
        at = y(place(mark))
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(_text(left - 10, at + 4, panel.write(mark), "end", css="small soft"))
    slot = (right - left) / len(panel.values)
    for layer, value in enumerate(panel.values):
        if value is None:
            continue
        end = y(place(min(max(value, marks[0]), marks[-1]))) if math.isfinite(value) else top
        look = "dropped" if layer in dropped else panel.look
        said = escape(f"layer {layer}{' (cut)' if layer in dropped else ''}: {panel.write(value)}")
        box = f'x="{left + (layer + 0.14) * slot:.1f}" y="{min(base, end):.1f}" width="{0.72 * slot:.1f}"'
        parts.append(f'<g><title>{said}</title><rect class="bar {look}" {box} height="{abs(base - end):.1f}"/></g>')
    parts.append(f'<line class="axis" x1="{left}" x2="{right}" y1="{base:.1f}" y2="{base:.1f}"/>')
    return parts


def _marks(panel: Panel) -> tuple[list[float], bool]:
    """Where the axis has lines, and whether it is logarithmic."""
    known = [value for value in panel.values if value is not None and math.isfinite(value)] or [0.0]
    least, most = min(known), max(known)
    if 0 < least * LOG_FROM < most:
        powers = range(math.floor(math.log10(least)), math.ceil(math.log10(most)) + 1)
        return [10.0**power for power in powers], True
    low, high = min(least, 0.0), max(most, 0.0)
    if high - low < 1e-30:  # all are zero, to what floats can divide
        low, high = 0.0, 1.0
    return ticks(low, high, about=4 if panel.height > 100 else 2), False


def frontier(points: Sequence[Point], *, higher_is_better: bool) -> list[Point]:
    """Points that no other point beats on one axis without losing on the other, from slow to fast."""
    sign = 1 if higher_is_better else -1
    best: list[Point] = []
    for p in sorted(points, key=lambda p: (-p.x, -sign * p.y)):
        if not best or sign * p.y > sign * best[-1].y:
            best.append(p)
    return best[::-1]


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers that enclose [low, high]."""
    if high <= low:
        high = low + (abs(low) * 0.1 or 1.0)
    raw = (high - low) / about
    power: float = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    digits = max(12, 3 - math.floor(math.log10(step)))
    return [round(i * step, digits) for i in range(first, last + 1)]


def _grid(
    x: _Axis,
    y: _Axis,
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    x_label: str,
    y_label: str,
    *,
    width: int,
    height: int,
) -> list[str]:
    left, right = x.start, x.end
    low = max(y.start, y.end)
    parts = _horizontal(y, y_ticks, left, right, y_label)
    for tick in x_ticks:
        parts.append(_text(x(tick), low + 20, _tick(tick), "middle"))
    parts.append(_text((left + right) / 2, height - 10, x_label, "middle"))
    parts.append(f'<line class="axis" x1="{left}" x2="{right}" y1="{low}" y2="{low}"/>')
    return parts


def _horizontal(y: _Axis, y_ticks: Sequence[float], left: float, right: float, y_label: str) -> list[str]:
    parts = [_text(6, 16, y_label)]
    for tick in y_ticks:
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(_text(left - 10, y(tick) + 4, _tick(tick), "end"))
    return parts


def _mark(look: Look, x: float, y: float) -> str:
    if look == "dense":
        return f'<rect class="mark dense" x="{x - 6:.1f}" y="{y - 6:.1f}" width="12" height="12"/>'
    if look == "baseline":
        around = f"{x:.1f},{y - 8:.1f} {x + 8:.1f},{y:.1f} {x:.1f},{y + 8:.1f} {x - 8:.1f},{y:.1f}"
        return f'<polygon class="mark baseline" points="{around}"/>'
    return f'<circle class="mark {look}" cx="{x:.1f}" cy="{y:.1f}" r="{8 if look == "final" else 6.5}"/>'


def _tried_mark(tried: Tried, x: float, y: float) -> str:
    final = " final" if tried.winner else ""
    dot = f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' if tried.reranked and not tried.winner else ""
    if tried.cut == "depth":
        return f'<rect class="mark{final}" x="{x - 6:.1f}" y="{y - 6:.1f}" width="12" height="12"/>{dot}'
    if tried.cut == "width":
        around = f"{x:.1f},{y - 8:.1f} {x + 8:.1f},{y:.1f} {x:.1f},{y + 8:.1f} {x - 8:.1f},{y:.1f}"
        return f'<polygon class="mark{final}" points="{around}"/>{dot}'
    return f'<circle class="mark{final}" cx="{x:.1f}" cy="{y:.1f}" r="6.5"/>{dot}'


def _labels(
    placed: Sequence[tuple[Point, float, float]],
    right: float,
    vertical: tuple[float, float],
    unnamed: Sequence[tuple[float, float]] = (),
) -> list[str]:
    """Names beside their points, each at the first of eight places where it covers no point and no other name."""
    taken = [(x - 9, y - 9, x + 9, y + 9) for x, y in (*((x, y) for _, x, y in placed), *unnamed)]
    parts = []
    for p, x, y in placed:
        wide = LETTER * len(_clip(p.label, 40))
        places: list[tuple[float, float, str]] = [
            (x + 14, y + 4, "start"), (x - 14, y + 4, "end"), (x, y - 15, "middle"), (x, y + 24, "middle"),
            (x + 12, y - 12, "start"), (x + 12, y + 20, "start"), (x - 12, y - 12, "end"), (x - 12, y + 20, "end"),
        ]  # fmt: skip
        boxes = [_text_box(px, py, wide, anchor) for px, py, anchor in places]

        def cost(i: int, boxes: Sequence[tuple[float, float, float, float]] = boxes) -> float:
            box = boxes[i]
            outside = box[2] > right or box[0] < 74 or box[1] < vertical[0] or box[3] > vertical[1]
            return 10 * outside + sum(_overlap(box, other) for other in taken) + 0.01 * i

        chosen = min(range(len(places)), key=cost)
        px, py, anchor = places[chosen]
        taken.append(boxes[chosen])
        parts.append(_text(px, py, _clip(p.label, 40), anchor, css="strong" if p.look == "final" else "label"))
    return parts


def _text(x: float, y: float, words: str, anchor: str = "start", *, css: str = "soft") -> str:
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _text_box(x: float, y: float, wide: float, anchor: str) -> tuple[float, float, float, float]:
    start = x - {"start": 0.0, "middle": wide / 2, "end": wide}[anchor]
    return (start, y - 11, start + wide, y + 4)


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _svg(plot_id: str, width: float, height: float, title: str, desc: str, body: Sequence[str]) -> str:
    named = escape(plot_id, quote=True)
    return (
        f'<svg class="plot" role="img" viewBox="0 0 {width} {height}" '
        f'aria-labelledby="{named}-title {named}-desc"><title id="{named}-title">{escape(title)}</title>'
        f'<desc id="{named}-desc">{escape(desc)}</desc>{"".join(body)}</svg>'
    )


def _tick(value: float) -> str:
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if abs(value) >= factor:
            scale = 1e3 if unit == "k" else factor
            return f"{value / scale:g}{unit}"
    return f"{value:,g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _clip(label: str, most: int) -> str:
    return label if len(label) <= most else label[: most - 1] + "…"
