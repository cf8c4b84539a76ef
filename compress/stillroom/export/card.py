"""The model card: README.md of an exported checkpoint, with the front matter that model hubs read. No torch.

It says what the model came from, what was done to it, what that costs in honesty (a dequantized source, a quantized
KV cache), and how to serve it. Only what the stage knows is written: sizes come from the two config.json files, so
they are right however many stages lie between. Quality is in the run's report, measured after this file is sealed."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from stillroom.artifact import Manifest
from stillroom.export.tensorrt_llm import TensorRTOptions, serve_command
from stillroom.models.shape import ModelShape, read_config, shape_of
from stillroom.stage import Job

CARD = "README.md"

SIZES = (
    ("layers", "num_layers"), ("hidden size", "hidden_size"), ("FFN size", "intermediate_size"),
    ("attention heads", "num_attention_heads"), ("KV heads", "num_key_value_heads"), ("parameters", "num_params"),
)  # fmt: skip

LICENSE_TEXTS = (
    ("apache-2.0", r"Apache License\s+Version 2\.0"),
    ("mit", r"MIT License|Permission is hereby granted, free of charge"),
    ("llama3", r"META LLAMA 3 COMMUNITY LICENSE"),
    ("llama3.1", r"LLAMA 3\.1 COMMUNITY LICENSE"),
    ("llama3.2", r"LLAMA 3\.2 COMMUNITY LICENSE"),
    ("gemma", r"Gemma Terms of Use"),
)
"""Identifiers that hubs use, by a phrase of the licence's text."""


@dataclass(frozen=True)
class CardFacts:
    """What a card is written from."""

    name: str
    base_model: str
    """As the recipe named it."""
    origin: str
    """Where the weights came from, if that is more than the name: `dequantized from ...`."""
    license: str | None
    dense: ModelShape | None
    result: ModelShape
    steps: Sequence[tuple[str, Mapping[str, Any]]]
    """Kind and details of the stages that are known, in order."""
    model_dir_name: str = "MODEL_DIR"
    limitations: Sequence[str] = field(default_factory=tuple)


def card_of_job(job: Job, details: Mapping[str, Any]) -> str:
    """The card of what a quantize job writes, from its out_dir and the manifests that it can see."""
    dense = job.inputs.get("dense", job.source)
    steps = [_step(job.source.manifest)] if job.source.manifest.kind in ("prune", "distill") else []
    steps.append(("quantize", details))
    origin = str(dense.manifest.details.get("origin", dense.name))
    return model_card(
        CardFacts(
            name=job.name,
            base_model=str(dense.manifest.details.get("source", dense.name)),
            origin=origin,
            license=find_license(job.source.model_dir) or find_license(dense.model_dir),
            dense=_shape(dense.model_dir),
            result=_shape(job.out_dir),
            steps=steps,
            limitations=_limitations(origin, details),
        )
    )


def model_card(facts: CardFacts) -> str:
    """README.md: YAML front matter, then what was done, how to serve it, limitations."""
    front: dict[str, Any] = {
        "base_model": facts.base_model,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
    }
    if facts.license:
        front["license"] = facts.license
    front["tags"] = ["stillroom", *dict.fromkeys(tag for kind, details in facts.steps for tag in _tags(kind, details))]
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {facts.name}",
        f"A smaller {facts.base_model}, made by stillroom. Weights: {facts.origin}.",
        "## What was done\n\n" + "\n".join(f"- {line}" for line in _done(facts)),
    ]
    if table := _size_table(facts):
        sections.append(table)
    sections.append("## Serving\n\n" + _serving(facts))
    if facts.limitations:
        sections.append("## Limitations\n\n" + "\n".join(f"- {line}" for line in facts.limitations))
    return "\n\n".join(sections) + "\n"


def find_license(model_dir: Path) -> str | None:
    """The licence's identifier: from a README's front matter, or recognised from the text of a LICENSE file."""
    readme = model_dir / CARD
    if readme.is_file():
        match = re.match(r"---\n(.*?)\n---", readme.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
        try:
            front = yaml.safe_load(match[1]) if match else None
        except yaml.YAMLError:
            front = None
        if isinstance(front, dict) and isinstance(front.get("license"), str):
            return str(front["license"])
    for path in sorted(model_dir.glob("LICENSE*")):
        text = path.read_text(encoding="utf-8", errors="replace")
        for identifier, phrase in LICENSE_TEXTS:
            if re.search(phrase, text):
                return identifier
    return None


def _shape(model_dir: Path) -> ModelShape:
    return shape_of(read_config(model_dir), str(model_dir))


def _step(manifest: Manifest) -> tuple[str, Mapping[str, Any]]:
    return manifest.kind, {**manifest.details, "tokens": manifest.tokens}


def _tags(kind: str, details: Mapping[str, Any]) -> list[str]:
    if kind != "quantize":
        return [{"prune": "pruned", "distill": "distilled"}[kind]]
    scheme = details["scheme"]
    return {"fp8": ["fp8", "modelopt"], "int8": ["int8", "compressed-tensors"], "none": []}[scheme]


def _done(facts: CardFacts) -> list[str]:
    lines = []
    if facts.dense is not None and facts.dense.num_params > facts.result.num_params:
        share = 1 - facts.result.num_params / facts.dense.num_params
        lines.append(f"Pruned: {share:.0%} of the parameters are gone (sizes below).")
    for kind, details in facts.steps:
        if kind == "distill" and details.get("tokens"):
            lines.append(f"Distilled from the unpruned model on {details['tokens']:,} tokens.")
        if kind == "quantize":
            lines.append(_quantized(details))
    return lines


def _quantized(details: Mapping[str, Any]) -> str:
    before, after = details["weight_bytes_before"], details["weight_bytes_after"]
    sizes = f"{before / 1e6:,.1f} MB of weights became {after / 1e6:,.1f} MB"
    if details["scheme"] == "none":
        return f"Not quantized: {after / 1e6:,.1f} MB of weights."
    method = {
        "fp8": "FP8 (E4M3, one scale a tensor, calibrated activation scales)",
        "int8": "INT8 W8A8 (weights per output channel, activations per token)",
    }[details["scheme"]]
    extra = ", after SmoothQuant" if details.get("modules_smoothed") else ""
    cache = ", with scales for an FP8 KV cache" if details.get("kv_cache") == "fp8" else ""
    return (
        f"Quantized to {method}{extra}{cache} with NVIDIA Model Optimizer {details['modelopt']}: "
        f"{details['modules_quantized']} linear modules, {details['calibration_tokens']:,} calibration tokens; {sizes}."
    )


def _size_table(facts: CardFacts) -> str:
    if facts.dense is None or facts.dense.num_params == facts.result.num_params:
        return ""
    rows = [f"| {label} | {getattr(facts.dense, name):,} | {getattr(facts.result, name):,} |" for label, name in SIZES]
    return "\n".join(["| | original | this model |", "|---|---|---|", *rows])


def _serving(facts: CardFacts) -> str:
    scheme = next((details["scheme"] for kind, details in facts.steps if kind == "quantize"), "none")
    commands = [["stillroom", "serve", facts.model_dir_name], ["vllm", "serve", facts.model_dir_name]]
    if scheme != "int8":
        commands.append(serve_command(facts.model_dir_name, TensorRTOptions()))
    text = "\n".join("    " + shlex.join(command) for command in commands)
    if scheme == "fp8":
        text += (
            "\n\nPlain transformers opens this checkpoint without an error and computes wrong: it drops the scales. "
            "Use an engine, or `stillroom.export.dequantize.load_dequantized`."
        )
    if scheme == "int8":
        text += "\n\nTensorRT-LLM and SGLang do not take this INT8 form; for them quantize with scheme fp8."
    return text


def _limitations(origin: str, details: Mapping[str, Any]) -> list[str]:
    lines = [
        "Compressed models lose most on what the training and calibration text did not cover: measure on your own task."
    ]
    if "dequantized" in origin:
        lines.append(f"The original was already quantized ({origin}): its error is part of the reference too.")
    if details.get("kv_cache") == "fp8":
        lines.append("The error of the FP8 KV cache is not part of stillroom's offline quality figures.")
    return lines
