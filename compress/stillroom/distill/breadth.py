"""Whether the text of a distillation is too narrow: nearly all from one source, or the same again and again.

Distilling on narrow text undoes what it does not show: as reported with ModelOpt, MMLU-Pro of a pruned model fell from
40.6 to 11.3, because it no longer followed instructions. And text that is read more than four times is worth less than
new text (Muennighoff et al., arXiv 2305.16264). What the unpruned model writes from nothing is not counted as one kind,
since it is a sample of all that it says. Nothing here imports torch: the plan asks too, by weights and given lengths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stillroom.recipe import Distill, TextSource
from stillroom.text import TEACHER

MOST_OF_ONE = 0.9
"""The largest share of one source that is no cause for a warning."""

MOST_PASSES = 4


def narrow_by_recipe(sources: Sequence[TextSource], config: Distill) -> list[str]:
    """Warnings that a recipe's own numbers give, where a source says how many tokens it has."""
    shares = _shares(sources)
    passes = {s.label: config.tokens * shares[s.label] / s.tokens for s in sources if s.tokens is not None}
    return narrow(sources, passes)


def narrow(sources: Sequence[TextSource], passes: Mapping[str, float]) -> list[str]:
    """Warnings about a blend, of which training reads each source `passes` times, by label."""
    shares = _shares(sources)
    one_kind = [
        f"{shares[source.label]:.0%} of the training text is from {source.label}: distilling on narrow text undoes "
        "what it does not show (MMLU-Pro 40.6 -> 11.3 where instructions were lacking); blend in other kinds, or text "
        "that the unpruned model writes (`teacher`)"
        for source in sources
        if shares[source.label] > MOST_OF_ONE and (source.source != TEACHER or source.starts is not None)
    ]
    again = [
        f"{label} is read {number:.1f} times: beyond {MOST_PASSES} times text is worth less than new text (arXiv "
        "2305.16264); give more of it, or lower its weight"
        for label, number in passes.items()
        if number > MOST_PASSES
    ]
    return one_kind + again


def _shares(sources: Sequence[TextSource]) -> dict[str, float]:
    """Of all tokens, by label; a blend keeps to its weights."""
    total = sum(source.weight for source in sources)
    return {source.label: source.weight / total for source in sources}
