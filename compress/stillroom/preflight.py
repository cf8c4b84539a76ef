"""What a plan will cost and whether this machine can pay it, known before anything long starts. No torch.

Shapes are carried through the stages, so that a size that does not divide, a layer beyond the model or too small a
disk is an error in the first second and not after hours. Memory is a lower bound: weights and optimizer states, not
activations.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from stillroom.distill.breadth import narrow_by_recipe
from stillroom.engines.engine import find_engines
from stillroom.errors import EnvironmentCannot, InputError
from stillroom.home import home
from stillroom.machine import GIB, Machine, free_disk_bytes, this_machine
from stillroom.models.shape import ModelShape, shape_of, stored_dtype
from stillroom.plan import ARTIFACTS, Plan, Step, cached
from stillroom.prune import megatron
from stillroom.prune.cost import known_hardware
from stillroom.prune.preview import Preview, preview
from stillroom.prune.shapes import candidates, price_target
from stillroom.prune.targets import target_shape
from stillroom.quality.harness import check_task
from stillroom.quantize.scheme import select_modules
from stillroom.recipe import DepthSearch, Distill, ModelSource, Prune, Quantize, Target
from stillroom.refusals import check_step, check_tensors, check_weights_and_text
from stillroom.text import HUB

DISTILL_BYTES_PER_PARAM = 18
"""float32 master, gradient and two Adam moments, and a bfloat16 copy for the forward pass."""

VALIDATION_BYTES_PER_PARAM = 10
"""Of those without the moments: with a teacher cache, all that there is beside the teacher."""

DISTILL_CHECKPOINT_BYTES_PER_PARAM = 24
"""float32 master and two Adam moments, twice while a new checkpoint replaces the old one."""

LIBRARIES = ("torch", "transformers", "modelopt", "safetensors", "accelerate")


@dataclass(frozen=True)
class StepOutlook:
    """What is known about a step in advance; None where only the run will tell."""

    step: Step
    cached: bool
    shape: ModelShape | None = None
    """Of the model that the step writes."""
    weight_bytes: int | None = None
    memory_bytes: int | None = None
    disk_bytes: int = 0
    """The most that the step has on disk, scratch included."""
    teacher_cache_bytes: int = 0
    """The most that a distillation's teacher cache takes under stillroom's home, which other runs may have written."""
    prune: Preview | None = None
    """What a prune stage will do."""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outlook:
    plan: Plan
    steps: tuple[StepOutlook, ...]

    def as_json(self) -> dict[str, Any]:
        return {
            "recipe": self.plan.recipe.name,
            "steps": [
                {
                    "name": row.step.name,
                    "kind": row.step.kind,
                    "key": row.step.key,
                    "cached": row.cached,
                    "reads": dict(row.step.inputs),
                    "parameters": row.shape.num_params if row.shape else None,
                    "weight_bytes": row.weight_bytes,
                    "memory_bytes_at_least": row.memory_bytes,
                    "disk_bytes_at_most": row.disk_bytes,
                    **({"teacher_cache_bytes_at_most": row.teacher_cache_bytes} if row.teacher_cache_bytes else {}),
                    **({"prune": row.prune.as_json()} if row.prune else {}),
                    **({"warnings": list(row.warnings)} if row.warnings else {}),
                }
                for row in self.steps
            ],
            "disk_bytes": self.disk_bytes,
            "gates": list(self.plan.recipe.gates),
        }

    @property
    def disk_bytes(self) -> int:
        """What the remaining steps leave on disk, and the largest scratch beside it."""
        todo = [row for row in self.steps if not row.cached]
        kept = sum(row.weight_bytes or 0 for row in todo if row.disk_bytes)
        return kept + max((row.disk_bytes - (row.weight_bytes or 0) for row in todo if row.disk_bytes), default=0)

    def render(self) -> RenderableType:
        """For the terminal: a table, what each prune stage will do, and warnings."""
        said: list[RenderableType] = [self._table()]
        for row in self.steps:
            if row.teacher_cache_bytes:
                said.append(
                    Text(
                        f"{row.step.name}: a teacher cache of at most {row.teacher_cache_bytes / GIB:.2f} GiB in "
                        f"{home() / 'teacher-cache'}, unless it is there"
                    )
                )
            if row.prune is not None:
                said += [Text(row.step.name, "bold"), Padding(Text("\n".join(row.prune.lines())), (0, 0, 1, 2))]
            said += [Text(f"warning: {row.step.name}: {warning}", "yellow") for warning in row.warnings]
        return Group(*said)

    def _table(self) -> Table:
        todo = sum(not row.cached for row in self.steps)
        table = Table(
            title=f"{self.plan.recipe.name}: {todo} of {len(self.steps)} steps to run, "
            f"{self.disk_bytes / GIB:.2f} GiB of disk"
        )
        for column in ("step", "reads", "state"):
            table.add_column(column, overflow="fold")
        for column in ("layers", "parameters", "weights", "memory ≥"):
            table.add_column(column, justify="right")
        for row in self.steps:
            table.add_row(
                row.step.name,
                _reads(row.step),
                "sealed" if row.cached else "to run",
                str(row.shape.num_layers) if row.shape else "",
                f"{row.shape.num_params:,}" if row.shape else "",
                _gib(row.weight_bytes),
                _gib(row.memory_bytes),
            )
        return table


def outlook(plan: Plan, run_dir: Path | None) -> Outlook:
    """Sizes and costs of every step. Raises InputError for sizes that the model cannot be cut or quantized to."""
    check_tensors(plan)
    shapes: dict[str, ModelShape] = {}
    schemes: dict[str, str] = {}
    rows = []
    for step in plan.steps:
        if step.kind == "import":
            config = plan.sources[step.name].config
            if config is not None:
                shapes[step.name] = shape_of(config, plan.sources[step.name].given)
            asked = step.config.dtype if isinstance(step.config, ModelSource) else "auto"
            schemes[step.name] = stored_dtype(config or {}) if asked == "auto" else asked
        elif step.kind in ("prune", "distill", "quantize"):
            _carry_shape(step, shapes, schemes)
        check_step(step, shapes)
        is_cached = run_dir is not None and cached(step, run_dir) is not None
        row = _costs(plan, step, is_cached, shapes, schemes)
        preview_of = _preview(plan, step, run_dir, shapes, schemes)
        warnings = narrow_by_recipe(step.text, step.config) if isinstance(step.config, Distill) else []
        rows.append(dataclasses.replace(row, prune=preview_of, warnings=tuple(warnings)))
    return Outlook(plan, tuple(rows))


def require_runnable(plan: Plan, run_dir: Path) -> None:
    """Raise before any long work: EnvironmentCannot for memory, disk, libraries, engines; InputError for tasks and
    sizes."""
    view = outlook(plan, run_dir)
    todo = [row for row in view.steps if not row.cached]
    kinds = {row.step.kind for row in todo}
    if kinds - {"verdict"}:
        _require_libraries(plan, kinds)
    if "evaluate" in kinds and plan.recipe.evaluate is not None:
        for task in plan.recipe.evaluate.tasks:
            check_task(task)
    if "bench" in kinds and plan.recipe.bench is not None:
        _require_engine(plan.recipe.bench.engine)
    if any(isinstance(row.step.config, Prune) and row.step.config.backend == "megatron" for row in todo):
        megatron.require_image()
    machine = this_machine()
    for row in todo:
        _require_memory(row, machine)
    if (free := free_disk_bytes(run_dir)) < view.disk_bytes:
        raise EnvironmentCannot(
            f"{run_dir} needs {view.disk_bytes / GIB:.1f} GiB and {free / GIB:.1f} GiB are free; free some or "
            f"give --out elsewhere"
        )
    check_weights_and_text(plan, [row.step for row in todo])


def _carry_shape(step: Step, shapes: dict[str, ModelShape], schemes: dict[str, str]) -> None:
    source = step.inputs["source"]
    config = step.config
    schemes[step.name] = config.scheme if isinstance(config, Quantize) and config.scheme != "none" else schemes[source]
    if schemes[source] in ("fp8", "int8"):
        raise InputError(
            f"stage {step.name!r} reads {source!r}, which is quantized; prune, distill and quantize read "
            f"unquantized models: "
            "give it another `source`"
        )
    if source not in shapes:
        return
    shape = shapes[source]
    if isinstance(config, Prune):
        try:
            shape = _largest_candidate(config.target, shape) if config.target else target_shape(config, shape)
        except InputError as error:
            raise InputError(f"stage {step.name!r}: {error}") from error
    if isinstance(config, Quantize) and config.scheme != "none":
        select_modules(shape, config, f"stage {step.name!r}")
    shapes[step.name] = shape


def _preview(
    plan: Plan, step: Step, run_dir: Path | None, shapes: Mapping[str, ModelShape], schemes: Mapping[str, str]
) -> Preview | None:
    """What a prune stage will do, where its model's config is known."""
    source = step.inputs.get("source", "")
    if not isinstance(step.config, Prune) or source not in shapes:
        return None
    artifacts = (run_dir or Path("RUN")) / ARTIFACTS
    imported = plan.sources.get(source)
    source_dir = artifacts / plan.step(source).dir_name
    if imported is not None and imported.kind == "directory" and imported.path is not None:
        source_dir = imported.path
    try:
        return preview(
            step.config, shapes[source], source_dir, artifacts / step.dir_name, this_machine(), schemes[source]
        )
    except InputError as error:
        raise InputError(f"stage {step.name!r}: {error}") from error


def _largest_candidate(target: Target, shape: ModelShape) -> ModelShape:
    """The largest shape that the search for a target could take. This CPU's speeds are not measured for a plan: for
    them the dense shape is the bound."""
    if target.hardware == "cpu":
        without_speed = {"hardware": None, "latency_ms": None, "throughput": None, "measured": None}
        sizes_alone = target.model_copy(update=without_speed)
        pricing = price_target(sizes_alone, shape, None)
        if not pricing.missed(pricing.costs(shape)):
            return shape
        return _largest_candidate(sizes_alone, shape)
    hardware = known_hardware()[target.hardware] if target.hardware else None
    found = candidates(shape, price_target(target, shape, hardware))
    return max((candidate.shape for candidate in found), key=lambda candidate: candidate.num_params)


def _costs(
    plan: Plan, step: Step, is_cached: bool, shapes: Mapping[str, ModelShape], schemes: Mapping[str, str]
) -> StepOutlook:
    """Weights, memory at least, disk at most of one step."""
    own = shapes.get(step.name)
    weights = own.weight_bytes(schemes[step.name]) if own else None

    def bytes_of(name: str) -> int:
        return shapes[name].weight_bytes(schemes[name]) if name in shapes else 0

    memory = max((bytes_of(name) for name in step.inputs.values()), default=0) or weights
    disk, cache = weights or 0, 0
    if step.kind == "import" and plan.sources[step.name].kind == "directory":
        disk = 0
    if isinstance(step.config, ModelSource) and plan.sources[step.name].kind != "gguf" and step.config.dtype == "auto":
        memory = None  # its files are hashed where they lie
    if own is not None and isinstance(step.config, Distill):
        vocab_chunk = 3 * 4 * step.config.chunk_tokens * own.vocab_size
        training = own.num_params * DISTILL_BYTES_PER_PARAM + vocab_chunk
        memory = bytes_of("dense") + training
        if step.config.teacher_cache is not None:  # in memory with masters and their gradients, without moments
            memory = max(training, bytes_of("dense") + own.num_params * VALIDATION_BYTES_PER_PARAM + vocab_chunk)
            cache = step.config.teacher_cache_bytes(own.vocab_size)
        disk = bytes_of(step.name) + own.num_params * DISTILL_CHECKPOINT_BYTES_PER_PARAM
    if step.kind == "verdict":
        memory = None
    return StepOutlook(step, is_cached, own, weights, memory, disk, cache)


def _require_libraries(plan: Plan, kinds: set[str]) -> None:
    wanted = [*LIBRARIES]
    if "bench" in kinds:
        wanted.append("guidellm")
    if "evaluate" in kinds and plan.recipe.evaluate is not None and plan.recipe.evaluate.tasks:
        wanted.append("lm_eval")
    if any(source.source.startswith(HUB) for step in plan.steps for source in step.text):
        wanted.append("datasets")
    if missing := [name for name in wanted if importlib.util.find_spec(name) is None]:
        raise EnvironmentCannot(
            f"{', '.join(missing)} not installed; run: pip install 'stillroom[all]' (see README, Install)"
        )


def _require_engine(name: str) -> None:
    """An engine is there at all; whether it takes each checkpoint is seen once there is one."""
    found = find_engines()
    if name == "auto" and not found:
        raise EnvironmentCannot(
            "no serving engine is installed; run: stillroom engine install vllm (or set `bench: null`)"
        )
    if name != "auto" and name not in found:
        raise EnvironmentCannot(
            f"engine {name} is not on this machine (found: {', '.join(found) or 'none'}); run: stillroom engine "
            f"install vllm, "
            "or --set bench.engine=auto"
        )


def _require_memory(row: StepOutlook, machine: Machine) -> None:
    needed = row.memory_bytes or 0
    if isinstance(row.step.config, Prune) and _runs_from_disk(row.step.config):
        return
    if needed > machine.model_memory_bytes:
        where = machine.gpus[0].name if machine.gpus else "this machine"
        raise EnvironmentCannot(
            f"step {row.step.name!r} needs at least {needed / GIB:.1f} GiB for weights and optimizer; {where} has "
            f"{machine.model_memory_bytes / GIB:.1f} GiB"
        )


def _runs_from_disk(config: Prune) -> bool:
    """Whether a prune stage can do without the whole model in memory: nothing is asked for that runs all of it, but for
    what Megatron-Bridge's script searches on all GPUs."""
    searched = config.target is not None or config.depth_importance in get_args(DepthSearch)
    return not (searched and config.backend == "stillroom") and config.repair.kinds in ("auto", ())


def _reads(step: Step) -> str:
    if step.kind in ("bench", "verdict"):
        return f"{len(step.inputs)} results"
    return ", ".join(dict.fromkeys(step.inputs.values()))


def _gib(num_bytes: int | None) -> str:
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes else ""
