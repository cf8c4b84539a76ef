"""What lies at a path: a run, an artifact, or any plain checkpoint directory, described without opening a weight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stillroom.artifact import Artifact, open_artifact
from stillroom.errors import InputError
from stillroom.models.shape import read_config, shape_of
from stillroom.models.weights import tensor_entries
from stillroom.pipeline import RUN_FILE
from stillroom.prune.explain import Explanation, explain

SHAPE_FIELDS = (
    "num_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "tied",
)  # fmt: skip


def inspect_path(path: Path) -> dict[str, Any]:
    """Facts about a run (its steps), an artifact (its manifest and model) or a checkpoint directory (its model).

    Raises InputError where there is none of these.
    """
    if (path / RUN_FILE).is_file():
        content = json.loads((path / RUN_FILE).read_text(encoding="utf-8"))
        steps = {name: _manifest_facts(open_artifact(path / place)) for name, place in content["artifacts"].items()}
        return {"run": str(path), "recipe": content["recipe"], "final": content["final"], "steps": steps}
    artifact = open_artifact(path)
    if artifact is None and not (path / "config.json").is_file():
        raise InputError(
            f"{path} is no run, no artifact and no Hugging Face checkpoint directory (config.json is missing)"
        )
    facts: dict[str, Any] = {"path": str(path)}
    if artifact is not None:
        facts["artifact"] = _manifest_facts(artifact)
    model_dir = artifact.model_dir if artifact else path
    if (model_dir / "config.json").is_file():
        facts["model"] = model_facts(model_dir)
    return facts


def explain_path(path: Path) -> list[Explanation]:
    """The explanations behind a path: of a run, all its finished prune stages in order; of a prune artifact, its own.

    Raises InputError where there is none.
    """
    if (path / RUN_FILE).is_file():
        places = json.loads((path / RUN_FILE).read_text(encoding="utf-8"))["artifacts"].values()
        found = [artifact for place in places if (artifact := open_artifact(path / place)) is not None]
        pruned = [explain(artifact) for artifact in found if artifact.manifest.kind == "prune"]
        if not pruned:
            raise InputError(f"{path} is a run without a finished prune stage; run its recipe with `stillroom prune`")
        return pruned
    artifact = open_artifact(path)
    if artifact is None:
        raise InputError(f"{path} is no run and no artifact of one; give RUN or RUN/artifacts/prune-KEY")
    return [explain(artifact)]


def model_facts(model_dir: Path) -> dict[str, Any]:
    """Family, dimensions, parameters, bytes by dtype, quantization, KV cache per token."""
    config = read_config(model_dir)
    shape = shape_of(config, str(model_dir))
    bytes_by_dtype: dict[str, int] = {}
    for entry in tensor_entries(model_dir).values():
        bytes_by_dtype[entry.dtype] = bytes_by_dtype.get(entry.dtype, 0) + entry.num_bytes
    return {
        "family": shape.family.model_type,
        **{field: getattr(shape, field) for field in SHAPE_FIELDS},
        "parameters": shape.num_params,
        "weight_bytes": sum(bytes_by_dtype.values()),
        "bytes_by_dtype": bytes_by_dtype,
        "kv_cache_bytes_per_token": shape.kv_bytes_per_token(),
        "quantization": quantization_name(config),
    }


def quantization_name(config: dict[str, Any]) -> str:
    """How a config.json says it is quantized: `modelopt FP8`, `compressed-tensors int-quantized`, or `none`."""
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict):
        return "none"
    method = quantization.get("quant_method", "unknown")
    return f"{method} {quantization.get('quant_algo') or quantization.get('format') or ''}".strip()


def render_inspection(facts: dict[str, Any]) -> str:
    """The facts as indented lines."""
    return "\n".join(_lines(facts, 0))


def _lines(value: dict[str, Any], depth: int) -> list[str]:
    lines = []
    for key, entry in value.items():
        if isinstance(entry, dict) and entry:
            lines += [f"{'  ' * depth}{key}:", *_lines(entry, depth + 1)]
        else:
            lines.append(
                f"{'  ' * depth}{key}: {entry:,}"
                if isinstance(entry, int) and entry >= 10_000
                else f"{'  ' * depth}{key}: {entry}"
            )
    return lines


def _manifest_facts(artifact: Artifact | None) -> dict[str, Any]:
    if artifact is None:
        return {"sealed": False}
    manifest = artifact.manifest
    return {
        "kind": manifest.kind,
        "key": manifest.key,
        "seconds": manifest.seconds,
        "files": len(manifest.files),
        "measurements": {m.name: m.value for m in manifest.measurements},
        "details": {name: value for name, value in manifest.details.items() if not isinstance(value, list | dict)},
    }
