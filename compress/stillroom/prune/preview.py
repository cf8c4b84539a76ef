"""What a prune stage will do, said before it runs: from the recipe and the model's config alone. No torch.

What only the run can tell (which layers, which shape wins) is not guessed; how it will be found is said instead. The
machine is asked for its whole memory, the stage for what is free: a model at the very edge may be read from disk, and
its layers chosen by block influence, where the plan says `search`.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from stillroom.machine import WEIGHTS_SHARE, Machine
from stillroom.models.shape import ModelShape
from stillroom.prune import megatron
from stillroom.prune.explain import SIZE_AXES
from stillroom.prune.repair.kinds import forbidden, repair_kinds
from stillroom.prune.targets import target_shape
from stillroom.recipe import Prune, RepairKind, Target

SIZES = ("num_layers", "num_decoder_layers", *SIZE_AXES)
NOT_IN_MEMORY = "the model does not fit in this machine's memory"
FROM_DISK = f"{NOT_IN_MEMORY}, and is read layer by layer from disk"


@dataclass(frozen=True)
class Preview:
    """Of one prune stage; what does not apply is empty."""

    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Before and after, of those that are cut; none where a target's are searched for."""
    depth: str | None = None
    """How layers are chosen."""
    depth_why: str | None = None
    """Where `auto` is not `search`: the reason."""
    width: str | None = None
    """How channels, heads and experts are chosen."""
    search: str | None = None
    """The search for a target."""
    repair: tuple[RepairKind, ...] | None = None
    """Kinds of repair; None where they depend on what the search cuts."""
    not_repaired: Mapping[str, str] = field(default_factory=dict)
    """Where `auto` leaves no kind: why each is left out."""
    command: tuple[str, ...] = ()
    """Of `backend: megatron`."""

    def as_json(self) -> dict[str, Any]:
        return {
            "sizes": {size: list(numbers) for size, numbers in self.sizes.items()},
            "depth": self.depth,
            "width": self.width,
            "search": self.search,
            "repair": None if self.repair is None else list(self.repair),
            "not_repaired": dict(self.not_repaired),
            "command": list(self.command),
        }

    def lines(self) -> list[str]:
        """For a terminal."""
        found = []
        if self.sizes:
            found.append("cut: " + ", ".join(f"{size} {old:,} -> {new:,}" for size, (old, new) in self.sizes.items()))
        if self.search:
            found.append(f"search: {self.search}")
        if self.depth:
            found.append(f"layers: by {self.depth}" + (f" ({self.depth_why})" if self.depth_why else ""))
        if self.width:
            found.append(f"widths: by {self.width}")
        found.append(f"repair: {self._repair_words()}")
        if self.command:
            found.append(f"command: {shlex.join(self.command)}")
        return found

    def _repair_words(self) -> str:
        if self.repair is None:
            words = "what the cut allows" if self.command else "what each candidate's cut allows"
        else:
            reasons = "; ".join(f"{kind}: {why}" for kind, why in self.not_repaired.items())
            words = (", ".join(self.repair) or "none") + (f" ({reasons})" if reasons else "")
        return words + ", where the result tells what stayed" * bool(self.command and self.repair != ())


def preview(config: Prune, shape: ModelShape, source_dir: Path, out_dir: Path, machine: Machine, dtype: str) -> Preview:
    """What `config` will do to a model of `shape` whose weights are of `dtype`.

    Raises InputError for what the stage would refuse: sizes, repairs that cannot be done, what Megatron-Bridge's script
    cannot be told.
    """
    target = None if config.target is not None else target_shape(config, shape)
    sizes = {} if target is None else _cut_sizes(shape, target)
    in_memory = shape.weight_bytes(dtype) <= WEIGHTS_SHARE * machine.model_memory_bytes
    if config.backend == "megatron":
        gpus = max(1, len(machine.gpus))
        files = {"scores_dir": Path("SCORES"), "calibration_file": Path("CALIBRATION.jsonl")}
        command = tuple(megatron.command(config, shape, source_dir, out_dir, gpus, **files))
        kinds, reasons = _repair(config, shape, target, None if in_memory else NOT_IN_MEMORY)
        return Preview(sizes=sizes, repair=kinds, not_repaired=reasons, command=command)
    layers_go = target is None or target.total_layers < shape.total_layers
    widths_go = target is None or any(size in sizes for size in SIZE_AXES)
    depth, why = _depth(config, shape, in_memory) if layers_go else (None, None)
    from_disk = not in_memory and target is not None  # a search for a target is refused then
    kinds, reasons = _repair(config, shape, target, FROM_DISK if from_disk else None)
    return Preview(
        sizes=sizes,
        depth=depth,
        depth_why=why,
        width=config.width_importance if widths_go else None,
        search=None if config.target is None else _search_words(config.target),
        repair=kinds,
        not_repaired=reasons,
    )


def _cut_sizes(shape: ModelShape, target: ModelShape) -> dict[str, tuple[int, int]]:
    sizes = {size: (getattr(shape, size), getattr(target, size)) for size in SIZES}
    return {size: (before, after) for size, (before, after) in sizes.items() if after < before}


def _depth(config: Prune, shape: ModelShape, in_memory: bool) -> tuple[str, str | None]:
    """The method, with `auto` resolved, and why it is not the search."""
    if config.drop_layers is not None:
        return f"the recipe, {', '.join(map(str, config.drop_layers))} go", None
    if config.depth_importance != "auto":
        return config.depth_importance, None
    if shape.family.task != "causal_lm":
        return "block_influence", f"a search runs decoders layer by layer, and {shape.family.model_type} is none"
    return ("search", None) if in_memory else ("block_influence", FROM_DISK)


def _repair(
    config: Prune, shape: ModelShape, target: ModelShape | None, too_large: str | None
) -> tuple[tuple[RepairKind, ...] | None, dict[str, str]]:
    """The kinds, and where `auto` finds none, why; None for what depends on a search."""
    possible = None if target is None else repair_kinds(config.repair, shape, target)
    kinds: tuple[RepairKind, ...] = get_args(RepairKind)
    if possible != frozenset() and too_large and config.repair.kinds == "auto":
        return (), {"all": too_large}
    if target is None or possible is None:
        return (None if config.repair.kinds else ()), {}
    if possible or config.repair.kinds != "auto":
        return tuple(kind for kind in kinds if kind in possible), {}
    return (), {kind: why for kind in kinds if (why := forbidden(kind, shape, target))}


def _search_words(target: Target) -> str:
    words = {
        "params": "at most {:,.0f} parameters",
        "memory_gb": "at most {:,g} GB on each GPU",
        "latency_ms": "at most {:,g} ms between tokens",
        "throughput": "at least {:,g} tokens per second",
    }
    said = " and ".join(words[name].format(value) for name, value in target.given().items())
    if target.hardware:
        said += f" on {target.hardware}"
    if set(target.given()) - {"params"}:
        said += f" ({target.batch} x {target.context:,} tokens, {_formats(target)})"
    said += f"; {target.candidates} candidates"
    if target.rerank:
        said += f", the best {target.rerank} again after {target.rerank_tokens:,} tokens of distillation"
    return said


def _formats(target: Target) -> str:
    weights = "16-bit weights" if target.scheme == "none" else f"{target.scheme} weights"
    cache = "" if target.kv_cache == "none" else f", {target.kv_cache} KV cache"
    return f"{weights}{cache}" + (f", {target.tensor_parallel} GPUs" if target.tensor_parallel > 1 else "")
