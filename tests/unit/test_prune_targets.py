"""What a Prune config makes of a shape: exact counts, rewritten configs, errors that say what to do."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest

from stillroom.errors import InputError
from stillroom.models.shape import ModelShape, shape_of
from stillroom.prune.targets import target_shape
from stillroom.recipe import Prune

QWEN3_8B: dict[str, Any] = {
    "model_type": "qwen3",
    "num_hidden_layers": 36,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
    "max_window_layers": 36,
}
SMOLLM2_135M: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
SMOLLM2_BIASED = SMOLLM2_135M | {"attention_bias": True}
QWEN2_TINY: dict[str, Any] = {
    "model_type": "qwen2",
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 384,
}
GEMMA3_TINY: dict[str, Any] = {
    **QWEN2_TINY,
    "model_type": "gemma3_text",
    "head_dim": 16,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
}


def shape(config: dict[str, Any]) -> ModelShape:
    return shape_of(config, "test")


def test_the_shipped_qwen3_cuts_have_the_expected_sizes() -> None:
    deep = target_shape(Prune(num_layers=24), shape(QWEN3_8B))
    assert shape(QWEN3_8B).num_params == 8_190_735_360
    assert deep.num_params == 8_190_735_360 - 12 * (
        4096 * 4096 * 2 + 2 * 4096 * 1024 + 3 * 4096 * 12288 + 2 * 4096 + 256
    )
    assert (deep.config["num_hidden_layers"], deep.config["max_window_layers"]) == (24, 24)
    wide = target_shape(Prune(intermediate_size=9216, hidden_size=3584), shape(QWEN3_8B))
    assert (wide.config["hidden_size"], wide.config["intermediate_size"], wide.config["head_dim"]) == (3584, 9216, 128)
    assert shape_of(wide.config, "again").num_params == wide.num_params


def test_the_rewritten_config_describes_the_same_shape() -> None:
    target = target_shape(Prune(drop_layers=(1, 2), num_key_value_heads=1), shape(GEMMA3_TINY))
    assert target == dataclasses.replace(shape_of(target.config, "again"))
    assert target.config["layer_types"] == ["sliding_attention", "full_attention"]
    assert target.config["num_attention_heads"] == 2  # each KV group brings its query heads
    assert GEMMA3_TINY["num_hidden_layers"] == 4


def test_chosen_layers_cut_the_per_layer_lists() -> None:
    target = target_shape(Prune(num_layers=2), shape(GEMMA3_TINY), keep_layers=(1, 3))
    assert target.config["layer_types"] == ["full_attention", "full_attention"]


def test_a_count_of_bottom_layers_becomes_the_count_of_those_that_stay() -> None:
    windowed = shape(QWEN3_8B | {"max_window_layers": 28})
    assert target_shape(Prune(drop_layers=(0, 30)), windowed).config["max_window_layers"] == 27
    assert (
        target_shape(Prune(drop_layers=(35,)), shape(QWEN3_8B | {"max_window_layers": 99})).config["max_window_layers"]
        == 35
    )


def test_a_per_layer_list_of_another_length_is_refused() -> None:
    broken = shape(GEMMA3_TINY | {"layer_types": ["full_attention"] * 3})
    with pytest.raises(InputError, match="layer_types has 3 entries for 4 layers"):
        target_shape(Prune(num_layers=2), broken)


@pytest.mark.parametrize(
    ("base", "fields", "message"),
    [
        (QWEN3_8B, {"num_layers": 40}, "num_layers 40 is above the model's 36.*give 1 to 36"),
        (QWEN3_8B, {"drop_layers": (3, 36)}, "drop_layers names layer 36; the model has layers 0 to 35"),
        (QWEN3_8B, {"drop_layers": (-1,)}, "drop_layers names layer -1"),
        (QWEN2_TINY, {"drop_layers": (0, 1, 2, 3)}, "names all 4 layers"),
        (QWEN3_8B, {"hidden_size": 8192}, "hidden_size 8192 is above the model's 4096"),
        (QWEN3_8B, {"intermediate_size": 9217}, "intermediate_size 9217 is odd.*9216 or 9218"),
        (QWEN3_8B, {"num_attention_heads": 20}, r"num_attention_heads 20 with 8 KV groups.*\[8, 16, 24, 32\]"),
        (
            QWEN3_8B,
            {"num_attention_heads": 16, "num_key_value_heads": 2},
            r"16 with 2 KV groups.*its 4 .*\[2, 4, 6, 8\]",
        ),
        (QWEN3_8B, {"num_key_value_heads": 9}, "num_key_value_heads 9 is above the model's 8"),
        (SMOLLM2_BIASED, {"hidden_size": 512}, "hidden_size 512 with num_attention_heads 9: transformers.*504 or 522"),
        (QWEN2_TINY, {"hidden_size": 48}, "hidden_size 48.*must stay 16; use hidden_size 64 with these heads"),
        (QWEN2_TINY, {"num_key_value_heads": 1}, "hidden_size 64 with num_attention_heads 2.*use hidden_size 32"),
    ],
)
def test_a_wrong_size_says_what_is_allowed(base: dict[str, Any], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        target_shape(Prune(**fields), shape(base))


def test_qwen2_keeps_its_head_size_when_hidden_and_heads_are_cut_together() -> None:
    target = target_shape(Prune(hidden_size=32, num_key_value_heads=1), shape(QWEN2_TINY))
    assert (target.hidden_size, target.num_attention_heads, target.config["head_dim"]) == (32, 2, 16)


def test_a_llama_whose_heads_do_not_divide_its_width_is_written_as_the_same_mistral() -> None:
    target = target_shape(Prune(hidden_size=512), shape(SMOLLM2_135M))
    written = {f: target.config[f] for f in ("model_type", "architectures", "sliding_window", "head_dim")}
    assert written == {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "sliding_window": None,
        "head_dim": 64,
    }
    assert target.family.model_type == "mistral"
    assert target_shape(Prune(hidden_size=522), shape(SMOLLM2_135M)).config["model_type"] == "llama"


def test_targets_import_no_torch() -> None:
    code = "import sys, stillroom.prune.targets; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}).returncode == 0
