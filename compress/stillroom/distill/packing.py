"""Documents laid end to end and cut into windows of one length, without padding; and reading them apart again.

Between documents goes the tokenizer's end token. A tokenizer that starts every text with a bos token (Llama 3, Gemma)
gets one at the start of each document and of each window as well, because such models put their attention sink there
and answer nonsense without it.

Where a document starts cannot be told from its tokens (a chat template writes end tokens inside a document), so every
token carries its position in its document. Given as `position_ids`, without a cache and without an attention mask,
transformers lets tokens attend within their document only (`masking_utils.find_packed_sequence_indices`: a position
that does not follow the one before starts a sequence), in every kind of attention and with a sliding window too; and
rotary embeddings count anew. A window in which one document ends and another starts is then read as if each were alone.

Shapes: N windows, B of a forward pass, T tokens, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Borders:
    """The special tokens that packing puts between documents."""

    bos: int | None
    """Starts each document and each window, where the tokenizer itself adds it."""
    eos: int | None
    """Ends each document."""


@dataclass(frozen=True)
class Windows:
    """What training and calibration read."""

    ids: Tensor
    """(N, T) int32"""
    positions: Tensor | None = None
    """(N, T) int32: of each token in its document, from 0, and anew in the next window. None: read across borders."""
    counted: Tensor | None = None
    """(N, T) bool: the positions that count for the loss (`losses.counted_positions`). None: all."""

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, which: slice | Tensor) -> Windows:
        positions, counted = (None if part is None else part[which] for part in (self.positions, self.counted))
        return Windows(self.ids[which], positions, counted)

    def to(self, device: torch.device) -> Windows:
        """The same there, the ids int64."""
        positions, counted = (None if part is None else part.to(device) for part in (self.positions, self.counted))
        return Windows(self.ids.to(device, torch.int64), positions, counted)


def borders(tokenizer: PreTrainedTokenizerBase) -> Borders:
    """What this tokenizer puts around a text."""
    starts_with = list(tokenizer("a")["input_ids"])[:1]
    bos = tokenizer.bos_token_id
    return Borders(bos=bos if starts_with == [bos] else None, eos=tokenizer.eos_token_id)


@dataclass
class Packer:
    """Takes documents, gives windows, and keeps what does not fill one yet."""

    around: Borders
    sequence_length: int
    ids: list[int] = field(default_factory=list)
    """Laid down and not yet cut."""
    starts: list[bool] = field(default_factory=list)
    """Of each of those, whether a document starts there."""

    def add(self, document: list[int]) -> None:
        """Lay a document down, not empty, with the border where neither side brings it."""
        bos, eos = self.around.bos, self.around.eos
        if self.ids and eos is not None and eos not in (self.ids[-1], document[0]):
            self._append([eos], start=False)
        self._append([bos, *document] if bos is not None and document[0] != bos else document, start=True)

    def _append(self, ids: list[int], *, start: bool) -> None:
        self.ids += ids
        self.starts += [start] + [False] * (len(ids) - 1)

    def cut(self) -> list[tuple[Tensor, Tensor]]:
        """Ids (T,) int32 and starts (T,) bool of whole windows, which leave."""
        bos, length = self.around.bos, self.sequence_length
        windows = []
        start = 0
        while len(self.ids) - start >= length:
            missing_bos = bos is not None and self.ids[start] != bos
            end = start + length - missing_bos
            first = [bos] if missing_bos else []
            ids = torch.tensor([*first, *self.ids[start:end]], dtype=torch.int32)
            windows.append((ids, torch.tensor([*(False for _ in first), *self.starts[start:end]])))
            start = end
        del self.ids[:start], self.starts[:start]
        return windows


def as_windows(cut: list[tuple[Tensor, Tensor]]) -> Windows:
    """What was cut, at least one, with a position in place of each start."""
    ids, starts = torch.stack([ids for ids, _ in cut]), torch.stack([starts for _, starts in cut])
    at = torch.arange(ids.shape[1], dtype=torch.int32).expand_as(ids)
    return Windows(ids, at - at.where(starts, 0).cummax(dim=1).values)


def last_hidden(model: PreTrainedModel, batch: Windows) -> Tensor:
    """Last hidden states, (B, T, D), of windows that are on the model's device."""
    positions = {} if batch.positions is None else {"position_ids": batch.positions.long()}
    output: Any = model.base_model(batch.ids, use_cache=False, **positions)
    hidden: Tensor = output.last_hidden_state
    return hidden
