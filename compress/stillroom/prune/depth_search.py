"""Search for the layers to keep: what the model says without them decides, not what each layer does alone.

Single metrics rank layers as if cuts did not touch each other. Searches ask the cut model itself: KL to the dense model
on calibration text. Greedy removes the layer whose loss hurts least, again and again (SLEB, arXiv 2402.09025,
section 3.3; with KL instead of perplexity). The evolutionary search swaps cut layers for kept ones and keeps what is
better (EvoPress, arXiv 2410.14649, section 3: (1 + lambda), the number of swaps drawn as the smaller of two numbers).

A candidate shares its first layers with the set that it was made from, so their activations are kept (`anchor`) and a
candidate costs only the layers after its first difference, plus the head at the scored positions. The numbers are
those of a full pass, bit for bit.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stillroom.distill.losses import Head
from stillroom.models.blocks import Blocks
from stillroom.prune.agreement import Agreement, Comparison, Yardstick

Keep = tuple[int, ...]
"""Kept layers, ascending."""

MAX_SWAPS = 3


class DepthScorer:
    """Agreement with the dense model for any choice of layers; each choice is measured once."""

    def __init__(self, dense: Blocks, head: Head, windows_NT: Tensor, *, batch_size: int, stride: int) -> None:
        self.dense = dense
        self.batches = list(torch.split(windows_NT, batch_size))
        yardstick = Yardstick(head, stride=stride)
        self.known: dict[Keep, Agreement] = {}
        self.layers_run = 0
        """Layer passes over a batch so far: what a search costs."""
        self._anchor: Keep = ()
        self._states: list[list[Tensor]] = []
        self.num_layers = len(dense.layers)
        with torch.inference_mode():
            self._states = [[dense.embed(ids)] for ids in self.batches]
            self.anchor(tuple(range(self.num_layers)))
            for ids, states in zip(self.batches, self._states, strict=True):
                yardstick.add(ids, dense.normed(states[-1]))
            self.comparison = Comparison(yardstick, head)

    @torch.inference_mode()
    def anchor(self, keep: Keep) -> None:
        """Keep the activations along these layers, for candidates that begin with the same ones."""
        shared = _shared(self._anchor, keep)
        for states in self._states:
            del states[shared + 1 :]
            for index in keep[shared:]:
                states.append(self._layer(index, states[-1]))
        self._anchor = keep

    @torch.inference_mode()
    def score(self, keep: Keep) -> Agreement:
        """The agreement of the model with only these layers."""
        if keep not in self.known:
            shared = _shared(self._anchor, keep)
            kl = loss = count = 0.0
            for batch, states in enumerate(self._states):
                hidden = states[shared]
                for index in keep[shared:]:
                    hidden = self._layer(index, hidden)
                some = self.comparison.sums(batch, self.dense.normed(hidden))
                kl, loss, count = kl + some[0], loss + some[1], count + some[2]
            self.known[keep] = Agreement(kl / count, loss / count)
        return self.known[keep]

    def _layer(self, index: int, hidden_BTD: Tensor) -> Tensor:
        self.layers_run += 1
        return self.dense.layer(index, hidden_BTD)


def _shared(first: Keep, second: Keep) -> int:
    """How many layers two choices have in common at their start."""
    count = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        count += 1
    return count


def leave_one_out(scorer: DepthScorer) -> list[Agreement]:
    """The agreement without each layer."""
    everything = tuple(range(scorer.num_layers))
    scorer.anchor(everything)
    return [scorer.score(without(everything, layer)) for layer in everything]


def without(keep: Keep, layer: int) -> Keep:
    return tuple(i for i in keep if i != layer)


def contiguous(num_layers: int, count: int) -> list[Keep]:
    """All choices that cut one block of `count` layers."""
    return [
        tuple(i for i in range(num_layers) if not start <= i < start + count) for start in range(num_layers - count + 1)
    ]


def best_of(scorer: DepthScorer, candidates: Sequence[Keep]) -> Keep:
    """The candidate nearest to the dense model; of equal ones the first."""
    return min(candidates, key=lambda keep: scorer.score(keep).kl)


def greedy(scorer: DepthScorer, count: int, progress: Callable[[], None] = lambda: None) -> Keep:
    """The `count` layers that stay when the one that costs least goes, one after the other."""
    keep = tuple(range(scorer.num_layers))
    while len(keep) > count:
        scorer.anchor(keep)
        scored = []
        for layer in keep:
            scored.append((scorer.score(without(keep, layer)).kl, layer))
            progress()
        keep = without(keep, min(scored)[1])
    return keep


@dataclass(frozen=True)
class Evolution:
    """How long the evolutionary search goes on."""

    generations: int
    offspring: int


def evolve(
    scorer: DepthScorer,
    start: Keep,
    settings: Evolution,
    *,
    seed: int,
    progress: Callable[[], None] = lambda: None,
) -> Keep:
    """The best choice found by swapping cut layers for kept ones, from `start`; never worse than that."""
    chance = random.Random(seed)
    parent = start
    if not 0 < len(parent) < scorer.num_layers:
        return parent
    for _ in range(settings.generations):
        scorer.anchor(parent)
        children = [mutate(parent, scorer.num_layers, chance) for _ in range(settings.offspring)]
        for child in children:
            scorer.score(child)
            progress()
        parent = best_of(scorer, [parent, *children])
    return parent


def mutate(keep: Keep, num_layers: int, chance: random.Random) -> Keep:
    """As many layers, a few of them others."""
    cut = [i for i in range(num_layers) if i not in keep]
    most = min(MAX_SWAPS, len(cut), len(keep))
    swaps = min(chance.randint(1, most), chance.randint(1, most))
    restored, removed = chance.sample(cut, swaps), chance.sample(keep, swaps)
    return tuple(sorted((set(keep) - set(removed)) | set(restored)))
