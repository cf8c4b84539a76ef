"""Sealed artifacts with numbers in them, as a finished run leaves them, for the verdict to join."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stillroom.artifact import Artifact, Manifest, Measurement, artifact_key, environment, seal
from stillroom.verdict.config import VerdictConfig

STAGES = ("prune", "distill", "int8")
BASELINE = "baseline:smol-sibling"
VARIANTS = ("dense", *STAGES, BASELINE)
GATES = (
    "quality.python-docs.perplexity <= 1.5 * dense",
    "size.weight_bytes <= 0.6 * dense",
    "speed.output_tok_s >= 1.3 * dense",
)

PARAMS = {"dense": 134.5e6, "prune": 109.7e6, "distill": 109.7e6, "int8": 109.7e6, BASELINE: 99.1e6}
WEIGHT_BYTES = {"dense": 269.1e6, "prune": 219.4e6, "distill": 219.4e6, "int8": 138.4e6, BASELINE: 198.2e6}
LOSS = {"dense": 2.412, "prune": 3.021, "distill": 2.701, "int8": 2.709, BASELINE: 2.952}
ACCURACY = {"dense": 0.552, "prune": 0.428, "distill": 0.504, "int8": 0.501, BASELINE: 0.471}
TOK_S = {"dense": 131.0, "int8": 189.0, BASELINE: 166.0}
REFUSED = "the engine died at start: ValueError: head size 60 is not supported"


def measurement(name: str, value: float, unit: str, **more: Any) -> Measurement:
    return Measurement(name=name, value=value, unit=unit, **more)


def text_numbers(label: str, loss: float, *, bytes_per_token: float = 3.4) -> list[Measurement]:
    values = {"perplexity": math.exp(loss), "bits_per_byte": loss / math.log(2) / bytes_per_token, "loss": loss}
    units = {"perplexity": "ppl", "bits_per_byte": "bits/byte", "loss": "nats/token"}
    return [
        measurement(f"quality.{label}.{metric}", v, units[metric], n=16352, stderr=0.012 * v, higher_is_better=False)
        for metric, v in values.items()
    ]


def task_numbers(task: str, accuracy: float) -> list[Measurement]:
    return [
        measurement(f"quality.{task}.{metric}", value, "fraction", n=400, higher_is_better=True,
                    stderr=math.sqrt(value * (1 - value) / 399))
        for metric, value in (("acc", accuracy + 0.03), ("acc_norm", accuracy))
    ]  # fmt: skip


def speed_numbers(tok_s: float) -> list[Measurement]:
    def rate(name: str, value: float, n: int) -> Measurement:
        return measurement(name, value, "tok/s", n=n, stderr=0.02 * value, higher_is_better=True)

    numbers = [rate("speed.output_tok_s", tok_s, 64)]
    for level, share in ((1, 0.24), (4, 0.71), (16, 1.0)):
        first_ms = 3600 * level / tok_s
        numbers += [
            rate(f"speed.c{level}.output_tok_s", share * tok_s, 4 * level),
            measurement(f"speed.c{level}.ttft_ms", first_ms, "ms", n=4 * level, higher_is_better=False),
        ]
    return [*numbers, measurement("memory.peak_gib", 2.05 - tok_s / 1300, "GiB", higher_is_better=False)]


def finished_run(
    folder: Path,
    *,
    gates: Sequence[str] = GATES,
    tasks: bool = True,
    bench: bool = True,
    overrides: Mapping[str, Sequence[Measurement]] | None = None,
    refused: Sequence[str] = (),
    failed_verification: Sequence[str] = (),
) -> tuple[VerdictConfig, dict[str, Artifact]]:
    """Config and inputs of a verdict; `overrides` replaces or adds measurements of a variant by name."""
    inputs: dict[str, Artifact] = {}
    extra = overrides or {}

    def add(role: str, kind: str, numbers: Sequence[Measurement] = (), **more: Any) -> None:
        inputs[role] = artifact(folder, role, kind, numbers, **more)

    for variant in VARIANTS:
        kind = {"dense": "import", BASELINE: "import", "int8": "quantize"}.get(variant, variant)
        sizes = [
            measurement("size.parameters", PARAMS[variant], "parameters", higher_is_better=False),
            measurement("size.weight_bytes", WEIGHT_BYTES[variant], "bytes", higher_is_better=False),
        ]
        add(variant, kind, sizes, **_stage_extras(variant))
        quality = text_numbers("python-docs", LOSS[variant]) + (
            task_numbers("arc_easy", ACCURACY[variant]) if tasks else []
        )
        add(f"evaluate:{variant}", "evaluate", _replaced(quality, extra.get(variant, ())))
        if variant in STAGES:
            failures = ["lm_head.weight has no scale"] if variant in failed_verification else []
            drift = [measurement("verify.kl", 0.013, "nats/token", n=4096, higher_is_better=False)]
            add(f"verify:{variant}", "verify", drift, details={"passed": not failures, "failures": failures})
    if bench:
        served: dict[str, dict[str, Any]] = {}
        for variant, tok_s in TOK_S.items():
            numbers = _replaced(speed_numbers(tok_s), extra.get(variant, ()), speed=True)
            served[variant] = {"measurements": [m.model_dump(mode="json") for m in numbers], "refused": None}
        for variant in refused:
            served[variant] = {"measurements": [], "refused": REFUSED}
        facts = {"engine": "vllm", "engine_version": "0.32.0+cpu", "hardware": "2 CPU cores", "prompt_tokens": 512}
        content = {**facts, "variants": served}
        add("bench", "bench", files={"measurements.json": content})
    config = VerdictConfig(recipe="smollm2-135m-cpu", final="int8", variants=VARIANTS, gates=tuple(gates))
    return config, inputs


def artifact(
    folder: Path,
    role: str,
    kind: str,
    numbers: Sequence[Measurement] = (),
    *,
    details: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    files: Mapping[str, Any] | None = None,
) -> Artifact:
    """A sealed directory with these measurements and JSON files."""
    work = folder / f"work-{role.replace(':', '-')}"
    work.mkdir(parents=True)
    for name, content in (files or {}).items():
        (work / name).write_text(json.dumps(content), encoding="utf-8")
    manifest = Manifest(
        kind=kind, name=role, key=artifact_key(kind, 1, {"role": role}, {}), stage_version=1, config=config or {},
        parents={}, files={}, environment=environment(), seed=0, seconds=12.5, measurements=tuple(numbers),
        details=details or {},
    )  # fmt: skip
    return seal(work, folder / f"{role.replace(':', '-')}-{manifest.key}", manifest)


def _stage_extras(variant: str) -> dict[str, Any]:
    if variant == "prune":
        return {"details": prune_details(), "config": {"num_layers": 24}, "files": {"importance.json": prune_scores()}}
    if variant == "distill":
        points = [{"step": i, "tokens": 2048 * i, "loss": 0.42 + 1.1 * math.exp(-i / 12) + 0.03 * math.sin(i * 2.1)}
                  for i in range(1, 65)]  # fmt: skip
        return {"files": {"loss.json": points}, "config": {"tokens": 131072, "learning_rate": 1e-4}}
    return {"config": {"scheme": "int8"}} if variant == "int8" else {}


def prune_scores() -> dict[str, Any]:
    """Block influence of 30 layers, as importance.json has it."""
    wave = [0.38 * math.exp(-i / 2) + 0.05 + 0.03 * math.sin(i * 1.7) + 0.2 * (i == 29) for i in range(30)]
    return {"calibration_windows": 64, "block_influence": wave}


def prune_details() -> dict[str, Any]:
    """What a prune stage says that searched for 6 of 30 layers, cut a third of the FFN and repaired what it could."""
    cost = [4.0 if i == 0 else 0.03 + 0.4 * math.exp(-i / 3) + 0.02 * math.sin(i * 2.3) for i in range(30)]
    dropped = sorted(sorted(range(30), key=lambda i: cost[i])[:6])
    kept = [i for i in range(30) if i not in dropped]
    kl, repairs = 0.91, []
    for number, layer in enumerate(kept[8:16]):
        after = kl - 0.06 / (1 + number) if number != 3 else kl + 0.01
        name = f"model.layers.{layer}.mlp.down_proj"
        repairs.append({"layer": layer, "modules": [name], "kind": "reconstruct", "strength": 0.03, "kl_before": kl,
                        "kl_after": after, "kept": after < kl})  # fmt: skip
        kl = min(kl, after)
    return {
        "kept_layers": kept, "dropped_layers": dropped, "depth_importance": "search", "width_importance": "minitron",
        "layer_kl": cost, "kl_cut": 0.91, "kl": kl, "repairs": repairs,
        "importance_lost": {"ffn": [0.05 + 0.001 * (layer % 7) for layer in kept]}, "hidden_importance_lost": None,
        "kept_units": {}, "sizes_before": {"num_layers": 30, "intermediate_size": 1536},
        "sizes_after": {"num_layers": 24, "intermediate_size": 1024}, "params_before": 134_515_008,
        "params_after": 93_000_000, "params_saved_alone": {"num_layers": 21_240_576, "intermediate_size": 26_542_080},
        "searched_shapes": 0, "calibration_samples": 64, "calibration_tokens": 131072,
    }  # fmt: skip


def _replaced(
    numbers: Sequence[Measurement], extra: Sequence[Measurement], *, speed: bool = False
) -> list[Measurement]:
    """The numbers with those of `extra` in their place; speed ones go with speed."""
    fitting = {m.name: m for m in extra if m.name.startswith(("speed.", "memory.")) == speed}
    return [m for m in numbers if m.name not in fitting] + list(fitting.values())
