"""What a prune stage did and what it cost, layer by layer and size by size, read from its sealed artifact. No torch.

Nothing is measured here: the stage wrote what it measured into its manifest and importance.json, and any reader gets
the same explanation from them, on the terminal (explain_table.py), as JSON and in the report. What was not measured is
None: with layers that the recipe names, for example, no layer is left out to see what that costs.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from stillroom.artifact import Artifact
from stillroom.errors import InputError

IMPORTANCE_FILE = "importance.json"
"""All scores of a prune stage, beside the weights."""

SIZE_AXES = {
    "hidden_size": "hidden",
    "intermediate_size": "ffn",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_groups",
    "num_experts": "experts",
    "moe_intermediate_size": "expert_ffn",
}
"""The scores that tell what cutting a size takes."""


class Frozen(BaseModel):
    # a KL may be infinite, and has to survive its JSON
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, ser_json_inf_nan="strings")


class RepairTried(Frozen):
    """One place that was solved for; KL to the unpruned model in nats per token of calibration text kept apart."""

    modules: tuple[str, ...]
    """As the unpruned model calls them."""
    kind: Literal["fold", "reconstruct", "refit", "readout"]
    strength: float
    """The ridge penalty, relative to the mean of the Gram matrix's diagonal."""
    kl_before: float
    kl_after: float
    kept: bool
    """Only what lowered the KL."""

    @property
    def gain(self) -> float:
        """By how much the KL fell; 0 for what was undone."""
        return self.kl_before - self.kl_after if self.kept else 0.0


class LayerCut(Frozen):
    """One layer of the unpruned model."""

    index: int
    """Counted through both stacks of an encoder-decoder."""
    stack: Literal["encoder", "decoder"] | None = None
    """Where there are two."""
    stays: bool
    kl_without: float | None = None
    """KL to the unpruned model when this layer alone is left out, in nats per token."""
    score: float | None = None
    """By `Explanation.score_method`."""
    importance_lost: dict[str, float] = {}
    """Share of the importance that went, by axis; empty where the layer goes as a whole or stays as it is."""
    kept_units: dict[str, tuple[int, ...]] = {}
    """Heads, KV groups and experts that stay, where some went."""
    repairs: tuple[RepairTried, ...] = ()

    @property
    def gain(self) -> float | None:
        """By how much repair here lowered the KL; None where none was tried."""
        return sum(repair.gain for repair in self.repairs) if self.repairs else None


class SizeCut(Frozen):
    """One size of the model that was cut."""

    size: str
    before: int
    after: int
    params_saved: int | None = None
    """That this cut alone would save; cuts overlap, so together they save less than the sum."""
    importance_lost: float | None = None
    """Share of the importance along this size that went, averaged over the layers that stay; of layers: their share of
    the sum of all layers' KL, or score."""


class Explanation(Frozen):
    """A prune stage."""

    name: str
    key: str
    """Of its artifact."""
    backend: Literal["stillroom", "megatron"] = "stillroom"
    depth_method: str | None = None
    """How layers were chosen; `given` where the recipe names them, None where none went."""
    width_method: str | None = None
    """How channels, heads and experts were; None where none went."""
    score_method: str | None = None
    """What the layers' scores are."""
    layers: tuple[LayerCut, ...] = ()
    """None of them where ModelOpt's pruner was used and `not_recovered` says why its result does not tell."""
    not_recovered: str | None = None
    sizes: tuple[SizeCut, ...]
    params_before: int
    params_after: int
    kl_cut: float | None = None
    """KL to the unpruned model after the cut, nats per token of calibration text kept apart; None: not compared."""
    kl: float | None = None
    """After repair."""
    head_repairs: tuple[RepairTried, ...] = ()
    """Of the output head, which belongs to no layer."""
    searched_shapes: int = 0
    """Shapes that were tried for a target."""
    calibration_samples: int = 0
    calibration_tokens: int = 0

    @property
    def dropped(self) -> tuple[int, ...]:
        return tuple(layer.index for layer in self.layers if not layer.stays)


def explain(artifact: Artifact) -> Explanation:
    """The explanation of a prune stage's artifact. Raises InputError for another kind of artifact."""
    manifest = artifact.manifest
    if manifest.kind != "prune":
        raise InputError(f"{artifact.path} is of kind {manifest.kind}; only the result of a prune stage is explained")
    details = manifest.details
    tables = _tables(artifact)
    score_method = _score_method(details, tables)
    layers = _layers(details, _layer_scores(tables, score_method))
    sizes = _sizes(details, layers)
    cut = {size.size for size in sizes}
    return Explanation(
        name=manifest.name,
        key=manifest.key,
        backend=details.get("backend", "stillroom"),
        depth_method=_depth_method(manifest.config, details) if cut & {"num_layers", "num_decoder_layers"} else None,
        width_method=details.get("width_importance") if cut & set(SIZE_AXES) else None,
        score_method=score_method,
        layers=layers,
        not_recovered=details.get("not_recovered"),
        sizes=sizes,
        params_before=details["params_before"],
        params_after=details["params_after"],
        kl_cut=details.get("kl_cut"),
        kl=details.get("kl"),
        head_repairs=tuple(_repair(r) for r in details.get("repairs", ()) if r["layer"] is None),
        searched_shapes=details.get("searched_shapes", 0),
        calibration_samples=details.get("calibration_samples", 0),
        calibration_tokens=details.get("calibration_tokens", 0),
    )


def _tables(artifact: Artifact) -> dict[str, Any]:
    path = artifact.path / IMPORTANCE_FILE
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _depth_method(config: dict[str, Any], details: dict[str, Any]) -> str | None:
    return "given" if config.get("drop_layers") is not None else details.get("depth_importance")


def _score_method(details: dict[str, Any], tables: dict[str, Any]) -> str | None:
    """The metric that chose the layers, else block influence, which is measured beside a search."""
    return next((m for m in (details.get("depth_importance"), "block_influence") if m in tables), None)


def _layer_scores(tables: dict[str, Any], method: str | None) -> list[float] | None:
    """One for each layer; of `angular`, whose table is of blocks, those of single layers."""
    if method is None:
        return None
    if method == "angular":
        return [row[layer + 1] for layer, row in enumerate(tables[method][:-1])]
    return list(tables[method])


def _layers(details: dict[str, Any], scores: list[float] | None) -> tuple[LayerCut, ...]:
    kept, dropped = details.get("kept_layers", ()), details.get("dropped_layers", ())
    costs = details.get("layer_kl")
    encoder = details["sizes_before"]["num_layers"] if details["sizes_before"].get("num_decoder_layers") else None
    return tuple(
        LayerCut(
            index=layer,
            stack=None if encoder is None else "encoder" if layer < encoder else "decoder",
            stays=layer in kept,
            kl_without=None if costs is None else costs[layer],
            score=None if scores is None else scores[layer],
            importance_lost=_of_layer(details.get("importance_lost", {}), kept, layer),
            kept_units=_of_layer(details.get("kept_units", {}), kept, layer),
            repairs=tuple(_repair(r) for r in details.get("repairs", ()) if r["layer"] == layer),
        )
        for layer in sorted((*kept, *dropped))
    )


def _of_layer(tables: dict[str, list[Any]], kept: list[int], layer: int) -> dict[str, Any]:
    """One layer's entries of tables whose rows are the layers that stay."""
    if layer not in kept:
        return {}
    row = kept.index(layer)
    return {axis: rows[row] for axis, rows in tables.items() if rows[row] not in (None, [])}


def _repair(recorded: dict[str, Any]) -> RepairTried:
    return RepairTried.model_validate({name: value for name, value in recorded.items() if name != "layer"})


def _sizes(details: dict[str, Any], layers: tuple[LayerCut, ...]) -> tuple[SizeCut, ...]:
    before, after = details["sizes_before"], details["sizes_after"]
    return tuple(
        SizeCut(
            size=size,
            before=before[size],
            after=after[size],
            params_saved=details.get("params_saved_alone", {}).get(size),
            importance_lost=_lost(size, details, layers),
        )
        for size in before
        if after[size] < before[size]
    )


def _lost(size: str, details: dict[str, Any], layers: tuple[LayerCut, ...]) -> float | None:
    if size == "hidden_size":
        return details.get("hidden_importance_lost")
    if size in SIZE_AXES:
        shares = [layer.importance_lost[axis] for axis in [SIZE_AXES[size]] for layer in layers
                  if axis in layer.importance_lost]  # fmt: skip
        return sum(shares) / len(shares) if shares else None
    stack = [layer for layer in layers if layer.stack in (None, "decoder" if "decoder" in size else "encoder")]
    weights = [layer.score if layer.kl_without is None else layer.kl_without for layer in stack]
    if None in weights or not (total := sum(weight for weight in weights if weight is not None)):
        return None
    return sum(w for w, layer in zip(weights, stack, strict=True) if w is not None and not layer.stays) / total
