"""Angular distance between a layer's input and the input of any later layer: what cutting the block between turns.

Gromov et al., "The Unreasonable Ineffectiveness of the Deeper Layers", arXiv 2403.17887, section 3.2:

    d(x_l, x_m) = arccos(cosine(x_l, x_m)) / pi,   mean over windows

for the n = m - l layers from l on; the block with the least distance is cut. All pairs come from one pass. As in the
paper, only a window's last token counts: it has seen the whole window, and so what waits for the later layers is
(layers + 1) vectors for each window of a batch, where all tokens would be as many times more as a window is long.
Layer-by-layer execution, which runs all the text through a layer before the next, holds them for all windows: 1,024
windows of 37 states of 4,096 float32 are 0.6 GB.

    # B batch, S states (layers + 1), D hidden
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.prune.importance.observers import Key, Observers, Results, input_of, output_of

METRIC = "angular"


class _Table:
    """Sums of distances between all pairs of states, filled as soon as a batch has passed the last layer."""

    def __init__(self, num_states: int) -> None:
        self.waiting: list[deque[Tensor]] = [deque() for _ in range(num_states)]
        self.total_SS = torch.zeros(num_states, num_states, dtype=torch.float64)
        self.num_windows = 0

    def add(self, state: int, last_BD: Tensor) -> None:
        self.waiting[state].append(last_BD.to(torch.float32, copy=True))  # a view would keep all tokens alive
        while all(self.waiting):
            self._count(torch.stack([queue.popleft() for queue in self.waiting], dim=1))

    def _count(self, states_BSD: Tensor) -> None:
        directions_BSD = nn.functional.normalize(states_BSD.double(), dim=-1)
        cosines_BSS = (directions_BSD @ directions_BSD.mT).clamp(-1, 1)
        self.total_SS += (torch.arccos(cosines_BSS) / math.pi).sum(0).cpu()
        self.num_windows += len(states_BSD)


class _State:
    """Notes a layer's output (or the first one's input, state 0); its result is its column of the table."""

    def __init__(self, table: _Table, state: int) -> None:
        self.table, self.state = table, state

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        states_BTD = output_of(output) if self.state else input_of(args, kwargs)
        self.table.add(self.state, states_BTD[:, -1])

    def result(self) -> Tensor:
        """Mean distances from the states before this one, (S,); zero from this one on."""
        return torch.cat(
            [
                self.table.total_SS[: self.state, self.state] / max(1, self.table.num_windows),
                torch.zeros(len(self.table.total_SS) - self.state, dtype=torch.float64),
            ]
        )


def observers(stacks: Sequence[Sequence[str]]) -> Observers:
    """Observers of the layers of each stack, by their module names."""
    found: Observers = {}
    for layers in stacks:
        table = _Table(len(layers) + 1)
        found[METRIC, "input", layers[0]] = _State(table, 0)
        found |= {(METRIC, "output", layer): _State(table, state) for state, layer in enumerate(layers, start=1)}
    return found


def distances(results: Results, stacks: Sequence[Sequence[str]]) -> Tensor:
    """(layers + 1, layers + 1): at [l, m] from the input of layer l to that of layer m > l, zero for m <= l.

    The last layer's output is the input of a layer after it. Layers of two stacks are counted through, and a block
    that would lie in both has distance 1, the largest there is.
    """
    total = sum(map(len, stacks))
    table = torch.ones(total + 1, total + 1, dtype=torch.float64).triu(1)
    first = 0
    for layers in stacks:
        keys: list[Key] = [(METRIC, "input", layers[0]), *((METRIC, "output", layer) for layer in layers)]
        own = torch.stack([results[key] for key in keys], dim=1)
        last = first + len(layers)
        table[first:last, first : last + 1] = own[:-1]
        first = last
    return table


def closest_block(distances_SS: Tensor, num_layers: int, among: range) -> range:
    """Those `num_layers` contiguous layers of `among` that turn the stream least; of equal ones the lowest."""
    starts = range(among.start, among.stop - num_layers + 1)
    first = min(starts, key=lambda start: distances_SS[start, start + num_layers].item())
    return range(first, first + num_layers)
