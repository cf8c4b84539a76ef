"""Static checks of a checkpoint directory: everything that can be known to be wrong without running the model.

What a family and config.json promise is compared with what lies on disk, tensor by tensor, scales included, so that an
engine neither refuses the directory nor, worse, fills a gap with a default.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from stillroom.errors import InputError
from stillroom.export.dequantize import INPUT_SCALE, WEIGHT_SCALE, Quantization, read_quantization, read_tensor
from stillroom.export.tensorrt_llm import problems
from stillroom.models.load import load_tokenizer
from stillroom.models.shape import ModelShape, read_config, shape_of
from stillroom.models.weights import INDEX, TensorEntry, tensor_entries

SAFETENSORS_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
CODES = {"fp8": "F8_E4M3", "int8": "I8"}
"""How safetensors calls the dtype of a quantized weight."""

PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


@dataclass(frozen=True)
class Fact:
    """The outcome of one check."""

    check: str
    ok: bool
    found: str
    """What is there; of many, the first few."""


def check_checkpoint(model_dir: Path) -> list[Fact]:
    """All checks, in order. Raises InputError when there is no config.json, or when family or scheme are not known."""
    config = read_config(model_dir)
    shape = shape_of(config, str(model_dir))
    quantization = read_quantization(model_dir)
    try:
        entries = tensor_entries(model_dir)
    except InputError as error:
        return [Fact("weight files are whole", False, str(error))]
    scales = expected_scales(shape, quantization)
    total = sum(entry.num_bytes for entry in entries.values())
    facts = [
        Fact("weight files are whole", True, f"{len(entries)} tensors, {total:,} bytes"),
        _fact("the index matches the files", _index_errors(model_dir, entries)),
        _fact("every tensor is there, in its shape", _shape_errors(shape.tensor_shapes() | scales, entries)),
        _fact("no tensor is too many", _extra_tensors(shape, scales, entries)),
        _fact("dtypes are as config.json says", _dtype_errors(shape, quantization, entries)),
        _fact("the head is tied as config.json says", _tied_errors(shape, entries)),
        _fact("no weight is NaN or infinite", _not_finite(entries)),
    ]
    if quantization.kind != "none":
        facts.append(_fact("scales are positive and finite", _scale_errors(scales, entries)))
    if quantization.kind == "fp8":
        facts.append(_fact("TensorRT-LLM reads what is meant", problems(model_dir)))
    facts.append(_fact("the tokenizer opens and fits", _tokenizer_errors(model_dir, shape)))
    facts.append(_fact("nothing is pickled", sorted(p.name for p in model_dir.iterdir() if p.suffix in PICKLED)))
    return facts


def expected_scales(shape: ModelShape, quantization: Quantization) -> dict[str, tuple[int, ...]]:
    """The scales that a quantized checkpoint of this shape carries."""
    shapes = shape.tensor_shapes()
    scales: dict[str, tuple[int, ...]] = {}
    for name in quantization.modules:
        if quantization.kind == "fp8":
            scales |= {f"{name}{WEIGHT_SCALE}": (), f"{name}{INPUT_SCALE}": ()}
        else:
            scales[f"{name}{WEIGHT_SCALE}"] = (shapes[f"{name}.weight"][0], 1)
    if quantization.kv_cache_fp8:
        for layer in range(shape.num_layers):
            attention = f"{shape.family.layers}.{layer}.self_attn"
            scales |= {f"{attention}.k_proj.k_scale": (), f"{attention}.v_proj.v_scale": ()}
    return scales


def _fact(check: str, errors: Iterable[str]) -> Fact:
    found = list(errors)
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return Fact(check, not found, "; ".join(found[:3]) + more if found else "yes")


def _index_errors(model_dir: Path, entries: Mapping[str, TensorEntry]) -> Iterator[str]:
    if not (model_dir / INDEX).is_file():
        return
    weight_map = json.loads((model_dir / INDEX).read_text(encoding="utf-8"))["weight_map"]
    for name in sorted(weight_map.keys() | entries.keys()):
        written = entries[name].file.name if name in entries else None
        if weight_map.get(name) != written:
            yield f"{name} is in {written or 'no file'}, the index says {weight_map.get(name, 'nothing')}"


def _shape_errors(expected: Mapping[str, tuple[int, ...]], entries: Mapping[str, TensorEntry]) -> Iterator[str]:
    for name, wanted in expected.items():
        if name not in entries:
            yield f"{name} is missing"
        elif entries[name].shape != wanted:
            yield f"{name} is {entries[name].shape}, not {wanted}"


def _extra_tensors(
    shape: ModelShape, scales: Mapping[str, object], entries: Mapping[str, TensorEntry]
) -> Iterator[str]:
    known = {*shape.places, *scales, *shape.family.tied_tensors}
    names = ((name, shape.family.current_name(name)) for name in entries)
    yield from (name for name, current in names if current not in known and not shape.family.is_ignored(current))


def _dtype_errors(shape: ModelShape, quantization: Quantization, entries: Mapping[str, TensorEntry]) -> Iterator[str]:
    codes = {f"{name}.weight" for name in quantization.modules}
    plain = SAFETENSORS_DTYPES.get(str(shape.config.get("dtype") or shape.config.get("torch_dtype")))
    if plain is None:
        yield "config.json names no dtype"
        return
    for name in shape.tensor_shapes():
        wanted = CODES[quantization.kind] if name in codes else plain
        if name in entries and entries[name].dtype != wanted:
            yield f"{name} is {entries[name].dtype}, not {wanted}"


def _tied_errors(shape: ModelShape, entries: Mapping[str, TensorEntry]) -> Iterator[str]:
    """Engines ignore a tied head that is written all the same: harmless when equal, another model when not."""
    embedding, head = shape.family.embedding, shape.family.tied_tensors[0]
    both = head in entries and embedding in entries
    if shape.tied and both and not torch.equal(read_tensor(entries, head), read_tensor(entries, embedding)):
        yield f"config.json ties {head.removesuffix('.weight')} to {embedding}, but a different {head} is there"


def _not_finite(entries: Mapping[str, TensorEntry]) -> Iterator[str]:
    for name, entry in entries.items():
        if entry.dtype.startswith(("F", "BF")):
            tensor = read_tensor(entries, name)
            finite = (tensor.float() if entry.dtype == CODES["fp8"] else tensor).isfinite()
            if not bool(finite.all()):
                yield f"{name} has {int((~finite).sum())} such values"


def _scale_errors(scales: Iterable[str], entries: Mapping[str, TensorEntry]) -> Iterator[str]:
    for name in scales:
        if name in entries:
            values = read_tensor(entries, name).float()
            if not bool((values.isfinite() & (values > 0)).all()):
                yield f"{name} goes down to {values.min().item():g}"


def _tokenizer_errors(model_dir: Path, shape: ModelShape) -> Iterator[str]:
    try:
        tokenizer = load_tokenizer(model_dir)
    except (InputError, OSError, ValueError, KeyError) as error:
        yield " ".join(str(error).split())
        return
    # without added tokens: Gemma 3's text models come with an image token beyond their embeddings
    if tokenizer.vocab_size > shape.vocab_size:
        yield f"it has {tokenizer.vocab_size} tokens, the model {shape.vocab_size}"
