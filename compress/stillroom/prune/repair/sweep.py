"""Repair a cut model from its first layer to its last, each linear module by a closed form, and only where it pays.

The dense model and the cut one read the same calibration text side by side. What the cut model carries from layer to
layer drifts from what the dense one carries; each module that writes into the residual stream can be solved for what
would bring it back (ridge.py), given what the modules before it, already repaired, give it. So later modules mend what
earlier ones could not. Solving for the dense model's state after cut layers also stands for these layers.

    fold         before cut layers: the down projection, followed by one linear map (ReplaceMe)
    reconstruct  where channels or heads went: output and down projection (GRAIL; SlimGPT)
    refit        the same projections of any other layer, toward the dense model's states
    readout      where hidden channels went: modules that read the residual stream learn to say from the kept channels
                 what they said from all of them; the head too. A head that is tied to the embeddings stays, and the
                 last layer is solved for the state from which it says the most of what it said

Each proposal is tried on text that it was not solved on, which the model then reads to its end: KL to the dense model
must fall, or the weight stays. No shape changes, no parameter is added.

    B batch, T tokens, D hidden of the dense model, d hidden of the cut one, K inputs of a module, V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillroom.distill.losses import Head, head_of
from stillroom.models.blocks import Blocks
from stillroom.models.family import Family
from stillroom.prune.agreement import Comparison, Yardstick
from stillroom.prune.repair.kinds import has_ffn_output
from stillroom.prune.repair.ridge import LeastSquares, fold, ridge
from stillroom.prune.repair.sites import Site, caught, caught_until, grouped, matrix, oriented, readers_of, set_matrix
from stillroom.recipe import RepairKind

STRENGTHS: dict[RepairKind, tuple[float, ...]] = {
    "fold": (0.003, 0.03),
    "reconstruct": (0.003, 0.03, 0.3),
    "refit": (0.003, 0.03, 0.2),
    "readout": (0.0003, 0.003, 0.03),
}
"""Ridge penalties that are tried, relative to the mean of the Gram matrix's diagonal."""


PATIENCE = 2
LEAST_GAIN = 0.003
"""So many layers in a row that bring less than this share of the KL end the repair until the next cut: what a cut does
is mended in the few layers after it."""


@dataclass(frozen=True)
class Attempt:
    """What was tried at one place, and what came of it; KL in nats per token of held-out calibration text."""

    layer: int | None
    """Of the dense model; None for the head."""
    modules: tuple[str, ...]
    kind: RepairKind
    """The kind that did best."""
    strength: float
    kl_before: float
    kl_after: float

    @property
    def kept(self) -> bool:
        return self.kl_after < self.kl_before


@dataclass(frozen=True)
class Pair:
    """The dense model, and the one cut from it."""

    dense: Blocks
    cut: Blocks
    family: Family
    layers: tuple[int, ...]
    """The dense model's layers that the cut one has."""
    hidden: tuple[int, ...] | None
    """Its kept hidden channels, in its order; None for all as they were."""
    narrowed: bool
    """Whether FFN channels or heads went."""
    kept_rows: Callable[[str, Tensor], Tensor]
    """What stays of a dense matrix, by its tensor name, along all axes but the hidden one."""


@dataclass
class _DenseLayer:
    """What the dense model says of one batch, from a kept layer to the next one that is kept."""

    middle: Tensor
    """After the layer's attention, (B, T, D)."""
    after: Tensor
    """As the next kept layer gets it, (B, T, D)."""
    read: dict[str, Tensor]
    """What the layer's readers read, (B, T, D), by name."""


Proposal = tuple[RepairKind, float, list[Tensor]]
"""Kind, strength, and a weight for each module of a site."""


class Sweep:
    """One repair, from the first layer to the last."""

    def __init__(
        self,
        pair: Pair,
        kinds: frozenset[RepairKind],
        windows_NT: Tensor,
        heldout_NT: Tensor,
        *,
        batch_size: int,
        stride: int,
    ) -> None:
        self.pair, self.kinds = pair, kinds
        self.readers = readers_of(pair.family) if pair.hidden is not None and "readout" in kinds else ()
        self.attempts: list[Attempt] = []
        self.changed: set[str] = set()
        """Modules of the cut model that have new weights."""
        with torch.inference_mode():
            self._read_text(windows_NT, heldout_NT, batch_size, stride)

    def _read_text(self, windows_NT: Tensor, heldout_NT: Tensor, batch_size: int, stride: int) -> None:
        """Bring all text to the first layers, and note what the dense model makes of the held-out one."""
        pair = self.pair
        self.dense = [pair.dense.embed(ids) for ids in torch.split(windows_NT, batch_size)]
        self.cut = [pair.cut.embed(ids) for ids in torch.split(windows_NT, batch_size)]
        self.heldout = [pair.cut.embed(ids) for ids in torch.split(heldout_NT, batch_size)]
        self.yardstick = Yardstick(_detached(head_of(pair.dense.model)), stride=stride)
        for ids in torch.split(heldout_NT, batch_size):
            states = pair.dense.run(pair.dense.embed(ids), range(len(pair.dense.layers)))
            self.yardstick.add(ids, pair.dense.normed(states))
        self.comparison = Comparison(self.yardstick, _detached(head_of(pair.cut.model)))
        self.kl = self.heldout_kl(0)

    @torch.inference_mode()
    def run(self, progress: Callable[[int, int], None]) -> None:
        """Repair the cut model in place; `progress` is told layers done and in all."""
        pair = self.pair
        num_dense = len(pair.dense.layers)
        self.dense = [pair.dense.run(states, range(pair.layers[0])) for states in self.dense]
        everywhere = pair.narrowed or pair.hidden is not None
        patience = PATIENCE if everywhere or pair.layers[0] > 0 else 0  # nothing to mend before the first difference
        for layer, source in enumerate(pair.layers):
            following = (*pair.layers, num_dense)[layer + 1]
            seen = [self._dense_layer(states, source, following) for states in self.dense]
            if everywhere or following > source + 1:
                patience = PATIENCE
            if patience:
                before = self.kl
                self._repair_layer(layer, source, following, seen)
                patience = PATIENCE if self.kl < (1 - LEAST_GAIN) * before else patience - 1
            self.cut = [pair.cut.layer(layer, states) for states in self.cut]
            self.heldout = [pair.cut.layer(layer, states) for states in self.heldout]
            self.dense = [batch.after for batch in seen]
            progress(layer + 1, len(pair.layers))
        if self.readers and not self._tied:
            self._repair_head()

    def heldout_kl(self, layer: int) -> float:
        """KL(dense || cut) of the held-out text, whose states enter this layer of the cut model."""
        total = count = 0.0
        for batch, states in enumerate(self.heldout):
            states = self.pair.cut.run(states, range(layer, len(self.pair.layers)))
            kl, _, positions = self.comparison.sums(batch, self.pair.cut.normed(states))
            total, count = total + kl, count + positions
        return total / count

    @property
    def _tied(self) -> bool:
        model = self.pair.cut.model
        return bool(model.get_output_embeddings().weight is model.get_input_embeddings().weight)

    def _dense_layer(self, states: Tensor, source: int, following: int) -> _DenseLayer:
        """Run the dense model from one kept layer to the next."""
        attention = self.pair.family.attention_output.format(layer=source)
        readers = {name: name.format(layer=source) for name in self.readers}
        with caught(self.pair.dense.model, [attention, *readers.values()]) as seen:
            after = self.pair.dense.layer(source, states)
        return _DenseLayer(
            middle=states + seen[attention][1],
            after=self.pair.dense.run(after, range(source + 1, following)),
            read={name: seen[module][0] for name, module in readers.items()},
        )

    def _repair_layer(self, layer: int, source: int, following: int, seen: list[_DenseLayer]) -> None:
        gap = following > source + 1
        last = following == len(self.pair.dense.layers)
        readers = self._reader_sites(layer)
        for site in readers[:1]:
            self._try(layer, source, site, self._readout(layer, source, site, seen))
        self._try_writer(layer, source, "attention", (self._kept(batch.middle) for batch in seen), gap=False)
        for site in readers[1:]:
            self._try(layer, source, site, self._readout(layer, source, site, seen))
        after = [batch.after for batch in seen]
        by_head = last and self._tied and self.readers
        goals = self._from_which_the_head_reads(after) if by_head else (self._kept(states) for states in after)
        self._try_writer(layer, source, "ffn", goals, gap=gap)

    def _try_writer(
        self, layer: int, source: int, role: Literal["attention", "ffn"], goals: Iterable[Tensor], *, gap: bool
    ) -> None:
        """Solve for what brings the residual stream to the goals, what it should be (B, T, d) after this module."""
        kind: RepairKind = "reconstruct" if self.pair.narrowed else "refit"
        wanted: list[RepairKind] = [k for k in (kind, "fold") if k in self.kinds and (k != "fold" or gap)]
        family = self.pair.family
        if not wanted or (role == "ffn" and not has_ffn_output(family)):
            return
        name = family.attention_output if role == "attention" else family.ffn_output
        module = self.pair.cut.model.get_submodule(name.format(layer=layer))
        weight = matrix(module)
        sums = LeastSquares(weight.shape[1], weight.shape[0], weight.device)
        for states, goal in zip(self.cut, goals, strict=True):
            inputs, target = self._writer_sample(layer, role, name.format(layer=layer), states, goal)
            sums.add(inputs, target, _evenly(goal))
        proposals: list[Proposal] = [
            (kind, strength, [(fold if kind == "fold" else ridge)(sums, weight, strength)])
            for kind in wanted
            for strength in STRENGTHS[kind]
        ]
        self._try(layer, source, Site(role, (name,)), proposals)

    def _writer_sample(self, layer: int, role: str, module: str, states: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
        """What the module sees (n, K), and what its product with the weight should be (n, d)."""
        if role == "attention":
            with caught_until(self.pair.cut.model, module) as seen:
                self.pair.cut.layer(layer, states)
            written = states + seen[module][1]
        else:
            with caught(self.pair.cut.model, [module]) as seen:
                written = self.pair.cut.layer(layer, states)
        inputs, said = seen[module]
        product = (
            said if (bias := getattr(self.pair.cut.model.get_submodule(module), "bias", None)) is None else said - bias
        )
        return inputs.flatten(0, 1), (goal.float() - written.float() + product.float()).flatten(0, 1)

    def _kept(self, dense_BTD: Tensor) -> Tensor:
        """The kept channels of dense states, in the cut model's order."""
        return dense_BTD if self.pair.hidden is None else dense_BTD[..., list(self.pair.hidden)]

    def _reader_sites(self, layer: int) -> list[Site]:
        if not self.readers:
            return []
        with caught(self.pair.cut.model, [name.format(layer=layer) for name in self.readers]) as seen:
            self.pair.cut.layer(layer, self.heldout[0])
        return grouped(seen, self.readers, layer)

    def _readout(self, layer: int, source: int, site: Site, seen: list[_DenseLayer]) -> list[Proposal]:
        """Weights that say from the kept channels what the dense ones say from all: kept rows @ M, with M the best
        linear map (D, d) from what the cut modules read to what the dense ones do."""
        model = self.pair.cut.model
        names = [name.format(layer=layer) for name in site.modules]
        hidden = self.pair.hidden
        assert hidden is not None
        sums = LeastSquares(len(hidden), self.dense[0].shape[-1], self.dense[0].device)
        for states, batch in zip(self.cut, seen, strict=True):
            with caught_until(model, names[0]) as reads:
                self.pair.cut.layer(layer, states)
            target = batch.read[site.modules[0]].flatten(0, 1)
            sums.add(reads[names[0]][0].flatten(0, 1), target, torch.ones(len(target), device=target.device))
        rows = []
        for name in site.modules:
            module = self.pair.dense.model.get_submodule(name.format(layer=source))
            weight = self.pair.kept_rows(f"{name.format(layer=source)}.weight", module.weight)
            rows.append(oriented(module, weight))
        return self._reading(sums, rows)

    def _reading(self, sums: LeastSquares, rows: Sequence[Tensor]) -> list[Proposal]:
        """Weights (outputs, D) of the dense model after the best map (D, d), drawn toward picking the kept channels."""
        everything = torch.eye(sums.products_KD.shape[1], dtype=torch.float64, device=sums.gram_KK.device)
        selection = everything[:, list(self.pair.hidden or ())]
        mappings = [(strength, ridge(sums, selection, strength)) for strength in STRENGTHS["readout"]]
        return [("readout", strength, [row.double() @ mapping for row in rows]) for strength, mapping in mappings]

    def _from_which_the_head_reads(self, after: list[Tensor]) -> list[Tensor]:
        """The states (B, T, d) from which the tied head says the most of what it says from the dense ones (B, T, D):
        with W the dense head, Wk its kept columns and g the final norm's scale, (Wk^T Wk)^-1 Wk^T W g x / gk."""
        hidden = list(self.pair.hidden or ())
        weight = head_of(self.pair.dense.model).weight.detach().float()
        kept = weight[:, hidden]
        mapping = torch.linalg.solve((kept.T @ kept).double(), (kept.T @ weight).double()).float()
        norm: Any = self.pair.dense.final_norm
        scale = norm.weight.detach().float() + self.pair.family.norm_offset
        return [((states.float() * scale) @ mapping.T / scale[hidden]).to(states.dtype) for states in after]

    def _try(self, layer: int, source: int, site: Site, proposals: list[Proposal]) -> None:
        """Set the proposal that brings the held-out text nearest to the dense model; none where none does."""
        names = [name.format(layer=layer) for name in site.modules]
        self._set_best(names, proposals, layer, source, tuple(n.format(layer=source) for n in site.modules))

    def _set_best(
        self, names: list[str], proposals: list[Proposal], layer: int, source: int | None, called: tuple[str, ...]
    ) -> None:
        modules = [self.pair.cut.model.get_submodule(name) for name in names]
        before = [matrix(module).clone() for module in modules]
        tried: list[tuple[float, RepairKind, float, list[Tensor]]] = []
        for kind, strength, weights in proposals:
            _set(modules, weights)
            if names == ["lm_head"]:
                self.comparison = Comparison(self.yardstick, _detached(head_of(self.pair.cut.model)))
            tried.append((self.heldout_kl(layer), kind, strength, weights))
        kl, kind, strength, weights = min(tried, key=lambda attempt: attempt[0])
        attempt = Attempt(source, called, kind, strength, self.kl, kl)
        _set(modules, weights if attempt.kept else before)
        if attempt.kept:
            self.kl = kl
            self.changed.update(names)
        self.attempts.append(attempt)

    def _repair_head(self) -> None:
        """Solve for a head that says from the kept channels what the dense one says from all."""
        dense_states = [self.pair.dense.normed(states) for states in self.dense]
        states = [self.pair.cut.normed(states) for states in self.cut]
        sums = LeastSquares(states[0].shape[-1], dense_states[0].shape[-1], states[0].device)
        for inputs, target in zip(states, dense_states, strict=True):
            flat = target.flatten(0, 1)
            sums.add(inputs.flatten(0, 1), flat, torch.ones(len(flat), device=flat.device))
        proposals = self._reading(sums, [head_of(self.pair.dense.model).weight.detach()])
        self._set_best(["lm_head"], proposals, len(self.pair.layers), None, ("lm_head",))


def _set(modules: Sequence[nn.Module], weights: Sequence[Tensor]) -> None:
    for module, weight in zip(modules, weights, strict=True):
        set_matrix(module, weight)


def _detached(head: Head) -> Head:
    return Head(head.weight.detach(), head.softcap)


def _evenly(goal_BTd: Tensor) -> Tensor:
    """Weights (n,) under which every token counts by its relative error: some tokens' states are a hundred times the
    others', and a norm follows anyway."""
    return goal_BTd.float().flatten(0, 1).square().mean(-1).clamp_min(1e-12).reciprocal()
