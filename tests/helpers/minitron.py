"""What ModelOpt's mcore_minitron leaves of a model: slices, in the order of importance, and no number changed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from stillroom.export.checkpoint import copy_companions
from stillroom.models.shape import ModelShape
from stillroom.models.tensors import read_tensor
from stillroom.models.weights import family_entries
from stillroom.prune.cut import Cut, cut_shape, selected, source_places
from stillroom.prune.surgery import source_shape


def sliced_checkpoint(dense: Path, cut: Cut, out: Path, dtype: torch.dtype | None = None) -> ModelShape:
    """The parts of `dense` that `cut` names, in the order in which it names them; returns their shape."""
    shape = source_shape(dense)
    target = cut_shape(shape, cut)
    entries = family_entries(dense, shape.family)
    tensors = {
        name: selected(source, read_tensor(entries[source]), shape, cut).to(dtype).contiguous()
        for name, source in source_places(shape, target, cut).items()
        if source in entries
    }
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    copy_companions(dense, out)
    (out / "config.json").write_text(json.dumps(target.config))
    return target


def random_cut(shape: ModelShape, sizes: Mapping[str, int], seed: int) -> Cut:
    """Sizes by their names in a config, of parts drawn by chance and in an order drawn by chance; heads as Megatron
    keeps them, as many of each group, which stays where it is."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(size: str, before: int) -> tuple[int, ...]:
        return tuple(torch.randperm(before, generator=generator)[: sizes[size]].tolist())

    layers = tuple(range(shape.num_layers))
    if "num_layers" in sizes:
        layers = tuple(sorted(drawn("num_layers", shape.num_layers)))
    fields: dict[str, Any] = {}
    if "hidden_size" in sizes:
        fields["hidden"] = drawn("hidden_size", shape.hidden_size)
    if "intermediate_size" in sizes:
        fields["ffn"] = {layer: drawn("intermediate_size", shape.intermediate_size) for layer in layers}
    if "num_attention_heads" in sizes:
        groups = shape.num_key_value_heads
        if shape.family.one_key_value_head_a_head:
            fields["heads"] = {layer: drawn("num_attention_heads", groups) for layer in layers}
        else:
            each, after = shape.num_attention_heads // groups, sizes["num_attention_heads"] // groups
            fields["heads"] = {
                layer: tuple(
                    group * each + head
                    for group in range(groups)
                    for head in torch.randperm(each, generator=generator)[:after].tolist()
                )
                for layer in layers
            }
    if "num_experts" in sizes:
        fields["experts"] = {layer: drawn("num_experts", shape.num_experts) for layer in layers}
    if "moe_intermediate_size" in sizes:
        fields["expert_ffn"] = {
            layer: {expert: drawn("moe_intermediate_size", shape.moe_intermediate_size) for expert in kept}
            for layer in layers
            for kept in [fields["experts"][layer] if "experts" in fields else range(shape.num_experts)]
        }
    return dataclasses.replace(Cut(layers), **fields)


def cut_as_minitron(dense: Path, sizes: Mapping[str, int], out: Path, seed: int = 0) -> None:
    """What the prune script would write for `--prune_export_config`, but for the importance, which is by chance."""
    names = {"ffn_hidden_size": "intermediate_size", "num_moe_experts": "num_experts"}
    shape = source_shape(dense)
    named = {names.get(name, name): size for name, size in sizes.items()}
    sliced_checkpoint(dense, random_cut(shape, named, seed), out)
