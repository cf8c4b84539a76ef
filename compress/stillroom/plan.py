"""The plan: from a recipe to the list of steps that a run takes, each with its key, before anything runs. No torch.

A step's key follows from its kind, its config, the fingerprints of the text it reads and the keys of the steps it
reads from. So the plan knows what is cached without asking anybody, and changing the quantization does not distill
again.

    import dense -> text (if the teacher writes) -> [stage -> verify -> evaluate]... -> baselines -> bench -> verdict
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from stillroom import text
from stillroom.artifact import Artifact, artifact_key, file_sha256, open_artifact
from stillroom.evaluation_text import EvaluationText, evaluation_text
from stillroom.models.source import ResolvedSource, resolve
from stillroom.prune.correction import load_table
from stillroom.recipe import Distill, Prune, Quantize, Recipe, TextSource
from stillroom.stage import STAGES, canonical_config
from stillroom.verdict.config import VerdictConfig

ARTIFACTS = "artifacts"


@dataclass(frozen=True)
class Step:
    """One thing to run: a row of the stage table applied to a config and to earlier steps."""

    name: str
    kind: str
    config: BaseModel
    inputs: Mapping[str, str]
    """Role -> name of the step whose artifact it reads."""
    text: tuple[TextSource, ...]
    seed: int
    key: str
    evaluated: EvaluationText | None = None
    """What `text` is kept clear of."""

    @property
    def dir_name(self) -> str:
        return f"{self.name.replace(':', '-')}-{self.key}"


@dataclass(frozen=True)
class Plan:
    """Steps in the order they run; `sources` are the resolved models by step name."""

    recipe: Recipe
    steps: tuple[Step, ...]
    sources: Mapping[str, ResolvedSource]

    def step(self, name: str) -> Step:
        return next(step for step in self.steps if step.name == name)

    def up_to(self, name: str) -> Plan:
        """This step, and the steps that it needs."""
        needed = {name}
        for step in reversed(self.steps):
            if step.name in needed:
                needed |= set(step.inputs.values())
        return dataclasses.replace(self, steps=tuple(step for step in self.steps if step.name in needed))


@dataclass
class _Builder:
    recipe: Recipe
    steps: dict[str, Step] = field(default_factory=dict)
    sources: dict[str, ResolvedSource] = field(default_factory=dict)

    def add(
        self,
        name: str,
        kind: str,
        config: BaseModel,
        inputs: Mapping[str, str] | None = None,
        sources: tuple[TextSource, ...] = (),
        *,
        seed: int | None = None,
        fingerprint: str | None = None,
        evaluated: EvaluationText | None = None,
    ) -> str:
        inputs = inputs or {}
        seed = self.recipe.seed if seed is None else seed
        determined: dict[str, Any] = {"config": _by_content(config), "seed": seed}
        if fingerprint is not None:
            determined["fingerprint"] = fingerprint
        if sources:
            determined["text"] = [[source.model_dump(mode="json"), text.fingerprint(source)] for source in sources]
        if evaluated is not None:
            determined["evaluated"] = evaluated.fingerprints()
        parents = {role: self.steps[step].key for role, step in inputs.items()}
        key = artifact_key(kind, STAGES[kind].version, determined, parents)
        self.steps[name] = Step(name, kind, config, inputs, sources, seed, key, evaluated)
        return name

    def add_model(self, name: str, source: Any) -> str:
        found = resolve(source)
        self.sources[name] = found
        # how a model is reached does not change it: its content or revision does
        config = source.model_copy(update={"source": found.kind, "revision": None})
        self.add(name, "import", config, fingerprint=found.fingerprint)
        self.steps[name] = Step(**{**vars(self.steps[name]), "config": source})
        return name

    def text_inputs(self, sources: tuple[TextSource, ...], role: str) -> dict[str, str]:
        """The steps in which the teacher writes for these sources; held-out text gets a seed of its own."""
        return {f"text:{s.label}": f"text:{role}.{s.label}" for s in sources if s.source == "teacher"}

    def add_teacher_text(self, sources: tuple[TextSource, ...], role: str) -> None:
        for source, seed in zip(sources, range(len(sources)), strict=True):
            if source.source == "teacher":
                name, offset = f"text:{role}.{source.label}", 1000 * (role == "heldout") + seed
                starts = () if source.starts is None else (source.starts,)
                self.add(name, "text", source, {"source": "dense"}, starts, seed=self.recipe.seed + offset)


def _by_content(config: BaseModel) -> dict[str, Any]:
    """The config as it determines a result: a file of measured speeds by what it says, not by where it lies."""
    determined = canonical_config(config)
    if isinstance(config, Prune) and config.target is not None and config.target.measured is not None:
        load_table(config.target.measured)  # whatever is wrong with it is said before anything runs
        determined["target"]["measured"] = file_sha256(config.target.measured)
    return determined


def make_plan(recipe: Recipe) -> Plan:
    """All steps of a recipe. Raises InputError or EnvironmentCannot when a model or text is not there."""
    for given in (*recipe.data.train, *recipe.data.heldout):
        text.check_text(given)
    build = _Builder(recipe)
    build.add_model("dense", recipe.model)
    build.add_teacher_text(recipe.data.train, "train")
    build.add_teacher_text(recipe.data.heldout, "heldout")
    train, heldout = recipe.data.train, recipe.data.heldout
    heldout_inputs = build.text_inputs(heldout, "heldout")
    evaluated = evaluation_text(recipe)

    def evaluate(variant: str) -> None:
        if recipe.evaluate is not None:
            reads = {"source": variant, **heldout_inputs}
            build.add(f"evaluate:{variant}", "evaluate", recipe.evaluate, reads, heldout)

    evaluate("dense")
    previous = "dense"
    for name, config in recipe.named_stages():
        source = config.source or previous
        inputs = {"source": source, **build.text_inputs(train, "train")}
        if isinstance(config, Distill | Quantize):
            inputs["dense"] = "dense"
        build.add(name, config.kind, config, inputs, train, evaluated=evaluated)
        reads = {"source": name, "reference": source, **heldout_inputs}
        build.add(f"verify:{name}", "verify", recipe.verify, reads, heldout)
        evaluate(name)
        previous = name
    for name, model in recipe.baselines.items():
        evaluate(build.add_model(f"baseline:{name}", model))
    _add_bench_and_verdict(build)
    return Plan(recipe, tuple(build.steps.values()), build.sources)


def _add_bench_and_verdict(build: _Builder) -> None:
    recipe = build.recipe
    variants = recipe.variants()
    inputs = {variant: variant for variant in variants}
    if recipe.bench is not None:
        baselines = [variant for variant in variants if variant.startswith("baseline:")]
        wanted = recipe.bench.variants or ("dense", recipe.final, *baselines)
        served = dict.fromkeys(recipe.final if name == "final" else name for name in wanted)
        build.add("bench", "bench", recipe.bench, {name: name for name in served})
        inputs["bench"] = "bench"
    inputs |= {name: name for name in build.steps if name.startswith(("verify:", "evaluate:"))}
    config = VerdictConfig(recipe=recipe.name, gates=recipe.gates, final=recipe.final, variants=variants)
    build.add("verdict", "verdict", config, inputs)


def cached(step: Step, run_dir: Path) -> Artifact | None:
    """The sealed artifact with this step's key, under whatever name it was made."""
    for path in sorted((run_dir / ARTIFACTS).glob(f"*-{step.key}")):
        if (artifact := open_artifact(path)) is not None:
            return artifact
    return None
