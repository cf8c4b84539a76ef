"""An explanation on a terminal: what went of each layer, what went of each size, and what that cost.

Columns of what was not measured, or not cut, are left out. KL is to the unpruned model, in nats per token of
calibration text; what is reported on other text is `evaluate`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from stillroom.prune.explain import Explanation, LayerCut, SizeCut
from stillroom.verdict.columns import count, number

SIZE_WORDS = {
    "num_layers": "layers",
    "num_decoder_layers": "decoder layers",
    "hidden_size": "hidden channels",
    "intermediate_size": "FFN channels",
    "num_attention_heads": "query heads",
    "num_key_value_heads": "KV groups",
    "num_experts": "experts",
    "moe_intermediate_size": "expert FFN channels",
}
AXIS_WORDS = {
    "ffn": "FFN",
    "heads": "heads",
    "kv_groups": "KV",
    "cross_heads": "cross",
    "experts": "experts",
    "expert_ffn": "expert FFN",
}
METHOD_WORDS = {"block_influence": "block influence", "angular": "angular distance"}


@dataclass(frozen=True)
class _Column:
    head: str
    write: Callable[[LayerCut], str]
    left: bool = False


def render_explanation(explained: Explanation) -> RenderableType:
    """Layers, the units that stay, sizes, and the sum of it."""
    parts: list[RenderableType] = [Padding(Text(chosen_words(explained), "bold"), (1, 0, 0, 0))]
    if _measured(explained):
        parts.append(_layers(explained))
    if any(layer.kept_units for layer in explained.layers):
        parts.append(_units(explained))
    if explained.sizes:
        parts.append(_sizes(explained))
    parts.append(Padding(Text(cost_words(explained)), (0, 0, 1, 0)))
    return Group(*parts)


def chosen_words(explained: Explanation) -> str:
    """What was cut, and how it was chosen."""
    gone = f"{len(explained.dropped)} of {len(explained.layers)} layers went ({ranges(explained.dropped)})"
    if explained.backend == "megatron":
        words = [f"{explained.name}: cut by ModelOpt's mcore_minitron"]
        words += [gone] * bool(explained.dropped)
        if explained.not_recovered:
            words.append(f"the result does not tell which layers and channels went: {explained.not_recovered}")
        return "; ".join(words)
    words = []
    if explained.dropped:
        how = "as the recipe says" if explained.depth_method == "given" else f"by {method(explained.depth_method)}"
        words.append(f"{gone}, {how}")
    if widths := [SIZE_WORDS[s.size] for s in explained.sizes if "layers" not in s.size]:
        words.append(f"{_listed(widths)} cut by {method(explained.width_method)}")
    if explained.searched_shapes:
        words.append(f"the best of {explained.searched_shapes} shapes that were tried")
    return f"{explained.name}: {'; '.join(words) or 'nothing was cut'}"


def cost_words(explained: Explanation) -> str:
    """The total: parameters, and KL before and after repair."""
    before, after = explained.params_before, explained.params_after
    words = f"{count(before)} to {count(after)} parameters ({after / before:.1%})"
    if explained.kl_cut is None or explained.kl is None:
        return f"{words}; what the cut costs was not measured"
    words += f"; KL to the unpruned model {number(explained.kl_cut)} nats/token"
    tried = [r for layer in explained.layers for r in layer.repairs] + list(explained.head_repairs)
    if not tried:
        return f"{words}, nothing repaired"
    kept = sum(repair.kept for repair in tried)
    share = f" ({explained.kl / explained.kl_cut - 1:+.0%})" if 0 < explained.kl_cut < math.inf else ""
    return f"{words}, {number(explained.kl)} repaired{share}, {kept} of {len(tried)} repairs kept"


def ranges(numbers: Sequence[int]) -> str:
    """0-3, 7, 9-10."""
    parts: list[list[int]] = []
    for n in sorted(numbers):
        if parts and n == parts[-1][-1] + 1:
            parts[-1].append(n)
        else:
            parts.append([n])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def method(name: str | None) -> str:
    """A method's name in words."""
    return METHOD_WORDS.get(name or "", (name or "").replace("_", " "))


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _measured(explained: Explanation) -> list[_Column]:
    """The columns that there is anything in."""
    layers = explained.layers
    columns = [
        _Column("KL without", lambda layer: _number(layer.kl_without)),
        _Column(method(explained.score_method), lambda layer: _number(layer.score)),
        *(_Column(f"{words} lost", _share_of(axis)) for axis, words in AXIS_WORDS.items()),
        _Column("repaired", _repairs, left=True),
        _Column("KL by it", lambda layer: "" if layer.gain is None else f"{-layer.gain:+.4f}" if layer.gain else "0"),
    ]
    return [column for column in columns if any(column.write(layer) for layer in layers)]


def _layers(explained: Explanation) -> Table:
    table = _table()
    table.add_column("layer", justify="right")
    table.add_column("")
    columns = _measured(explained)
    for column in columns:
        table.add_column(column.head, justify="left" if column.left else "right", overflow="fold")
    for layer in explained.layers:
        cells = [column.write(layer) for column in columns]
        table.add_row(_name(layer), "" if layer.stays else "goes", *cells, style="" if layer.stays else "red")
    return table


def _units(explained: Explanation) -> Table:
    """Which heads, KV groups and experts stay."""
    axes = [axis for axis in AXIS_WORDS if any(axis in layer.kept_units for layer in explained.layers)]
    table = _table()
    table.add_column("layer", justify="right")
    for axis in axes:
        words = {"kv_groups": "KV groups", "cross_heads": "cross heads"}.get(axis, axis)
        table.add_column(f"{words} that stay", overflow="fold")
    for layer in explained.layers:
        if layer.stays:
            table.add_row(_name(layer), *(ranges(layer.kept_units.get(axis, ())) for axis in axes))
    return table


def _sizes(explained: Explanation) -> Table:
    table = _table()
    table.add_column("size")
    for head in ("before", "after", "kept", "parameters saved, alone", "importance lost"):
        table.add_column(head, justify="right")
    for size in explained.sizes:
        table.add_row(*size_cells(size))
    saved = explained.params_before - explained.params_after
    kept = f"{explained.params_after / explained.params_before:.0%}"
    table.add_section()
    table.add_row("parameters", f"{explained.params_before:,}", f"{explained.params_after:,}", kept, f"{saved:,}", "")
    return table


def size_cells(size: SizeCut) -> tuple[str, ...]:
    """One row: the size, before, after, what stays, parameters, share of the importance."""
    saved = "" if size.params_saved is None else f"{size.params_saved:,}"
    lost = "" if size.importance_lost is None else f"{size.importance_lost:.1%}"
    return SIZE_WORDS[size.size], f"{size.before:,}", f"{size.after:,}", f"{size.after / size.before:.0%}", saved, lost


def _name(layer: LayerCut) -> str:
    return str(layer.index) if layer.stack is None else f"{layer.stack} {layer.index}"


def _share_of(axis: str) -> Callable[[LayerCut], str]:
    return lambda layer: f"{layer.importance_lost[axis]:.1%}" if axis in layer.importance_lost else ""


def _repairs(layer: LayerCut) -> str:
    """`fold, refit 2 of 3`: the kinds that were kept, and how many of all that were tried."""
    if not layer.repairs:
        return ""
    kept = list(dict.fromkeys(repair.kind for repair in layer.repairs if repair.kept))
    return f"{', '.join(kept) or 'none'} {sum(r.kept for r in layer.repairs)} of {len(layer.repairs)}"


def _number(value: float | None) -> str:
    return "" if value is None else number(value, 3)


def _table() -> Table:
    return Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
