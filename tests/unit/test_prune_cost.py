from __future__ import annotations

import dataclasses
from math import prod
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom.errors import InputError
from stillroom.models.family import families
from stillroom.models.shape import ModelShape, shape_of
from stillroom.prune.cost import (
    Hardware,
    Load,
    cached_tokens,
    check_load,
    costs_of,
    decode_ceiling_tok_s,
    decode_ms,
    known_hardware,
    kv_gb,
    memory_gb,
    prefill_ms,
    weight_gb,
)

QWEN3 = {
    "model_type": "qwen3",
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
}
WIDE: dict[str, Any] = {"hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False}
NARROW: dict[str, Any] = {"hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True}
EIGHT_B = shape_of(QWEN3 | WIDE, "Qwen3-8B")
FOUR_B = shape_of(QWEN3 | NARROW, "Qwen3-4B")
CUT = dataclasses.replace(EIGHT_B, num_layers=24)
H200 = known_hardware()["H200"]
MOE = shape_of(
    QWEN3 | NARROW | {"model_type": "qwen3_moe", "num_experts": 64, "num_experts_per_tok": 8,
                      "moe_intermediate_size": 768}, "MoE"
)  # fmt: skip


@pytest.mark.parametrize(("shape", "expected"), [(EIGHT_B, 586), (CUT, 817), (FOUR_B, 1088)])
def test_one_sequence_decodes_at_the_bandwidth_of_its_weights(shape: ModelShape, expected: float) -> None:
    """One H200, FP8: linear layers in 8 bits, the head in 16, the embedding looked up."""
    load = Load(batch=1, context=1, scheme="fp8")
    assert decode_ceiling_tok_s(shape, load, H200) == pytest.approx(expected, abs=0.5)
    assert costs_of(shape, load, H200).throughput == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("shape", "expected"), [(EIGHT_B, 33.7e3), (CUT, 49.6e3), (FOUR_B, 37.6e3)])
def test_at_a_large_batch_keys_and_values_bound_the_speed(shape: ModelShape, expected: float) -> None:
    load = Load(batch=256, context=1500, scheme="fp8", kv_cache="fp8")
    ceiling = decode_ceiling_tok_s(shape, load, H200)
    assert ceiling == pytest.approx(expected, rel=2e-3)
    throughput = costs_of(shape, load, H200).throughput
    assert throughput is not None
    assert 0.9 * ceiling < throughput < ceiling  # the linear layers are bound by computing there


@given(
    st.integers(1, 512), st.integers(1, 32768), st.sampled_from(["none", "fp8", "int8"]), st.sampled_from([1, 2, 4, 8])
)
def test_no_speed_is_above_its_ceiling_and_no_cut_costs_more(batch: int, context: int, scheme: str, gpus: int) -> None:
    load = Load(batch, context, scheme, tensor_parallel=gpus)
    assert 1e3 * batch / decode_ms(EIGHT_B, load, H200) <= decode_ceiling_tok_s(EIGHT_B, load, H200) * (1 + 1e-9)
    for field, size in (("num_layers", 30), ("hidden_size", 3840), ("intermediate_size", 8192),
                        ("num_attention_heads", 16)):  # fmt: skip
        smaller = dataclasses.replace(EIGHT_B, **{field: size})  # type: ignore[arg-type]
        before, after = costs_of(EIGHT_B, load, H200), costs_of(smaller, load, H200)
        assert after.params < before.params
        assert after.memory_gb < before.memory_gb
        assert (after.latency_ms or 0) < (before.latency_ms or 0)
        assert (after.throughput or 0) > (before.throughput or 0)


def test_memory_is_weights_in_the_scheme_and_the_cache_at_the_true_head_dim() -> None:
    """Against the bytes of every tensor, and of keys and values written out."""
    narrow = dataclasses.replace(EIGHT_B, hidden_size=2048)  # hidden / heads would be 64
    linear = sum(map(prod, narrow.linear_shapes().values()))
    rest = sum(map(prod, narrow.tensor_shapes().values())) - linear
    load = Load(batch=3, context=1000, scheme="nvfp4", kv_cache="fp8")
    cache = 2 * 36 * 8 * 128 * 1000 * 3
    assert memory_gb(narrow, load) == pytest.approx((linear * 9 / 16 + 2 * rest + cache) / 1e9)


@pytest.mark.parametrize("family", sorted(families()))
def test_parameters_are_counted_as_if_every_tensor_were_spelled_out(family: str) -> None:
    from tiny import tiny_config

    shape = shape_of(tiny_config(family).to_dict(), family)
    assert shape.num_params == sum(map(prod, shape.tensor_shapes().values()))
    assert shape.num_linear_params == sum(map(prod, shape.linear_shapes().values()))


def test_tensor_parallelism_splits_weights_and_copies_the_heads_that_are_too_few() -> None:
    few = dataclasses.replace(EIGHT_B, num_key_value_heads=2)
    for gpus, copies in ((2, 1), (8, 4)):
        load = Load(batch=4, context=4096, scheme="fp8", tensor_parallel=gpus)
        one = Load(batch=4, context=4096, scheme="fp8")
        expected = weight_gb(few, "fp8") / gpus + kv_gb(few, one) * copies / gpus
        assert memory_gb(few, load) == pytest.approx(expected)


def test_a_long_prompt_is_bound_by_computing_a_short_one_by_reading() -> None:
    linear, query, tokens = EIGHT_B.num_linear_params, 32 * 128, 8192
    flops = 2 * linear * tokens / 1979e12 + 36 * 4 * query * tokens * (tokens / 2) / 989.5e12
    head_s = 2 * 151936 * 4096 / 4.8e12
    load = Load(context=tokens, scheme="fp8")
    assert prefill_ms(EIGHT_B, load, H200) == pytest.approx(1e3 * (flops + head_s), rel=1e-3)
    one = Load(context=1, scheme="fp8")
    assert prefill_ms(EIGHT_B, one, H200) == pytest.approx(decode_ms(EIGHT_B, one, H200), rel=1e-3)


def test_gpus_that_share_a_model_pay_for_their_sums() -> None:
    """Two all-reduces a layer of batch x hidden x 2 bytes, each GPU sending 2 (n - 1) / n of them one way."""
    alone = Load(batch=64, context=1, scheme="fp8")
    shared = dataclasses.replace(alone, tensor_parallel=4)
    faster = H200.model_copy(update={"interconnect_gb_s": 1e12})
    sums_s = 2 * 36 * (2 * 3 / 4) * 64 * 4096 * 2 / 450e9
    assert decode_ms(EIGHT_B, shared, H200) - decode_ms(EIGHT_B, shared, faster) == pytest.approx(
        1e3 * sums_s, rel=1e-3
    )
    assert decode_ms(EIGHT_B, shared, faster) == pytest.approx(decode_ms(EIGHT_B, alone, H200) / 4, rel=0.01)


def test_sliding_layers_keep_only_their_window() -> None:
    gemma = {"model_type": "gemma3_text", "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 1,
             "hidden_size": 640, "intermediate_size": 2048, "vocab_size": 262144, "sliding_window": 512,
             "layer_types": ["sliding_attention"] * 5 + ["full_attention"]}  # fmt: skip
    shape = shape_of(gemma, "gemma")
    assert cached_tokens(shape, 256) == 256
    assert cached_tokens(shape, 6512) == pytest.approx((5 * 512 + 6512) / 6)
    mistral = {k: v for k, v in gemma.items() if k != "layer_types"} | {"model_type": "mistral"}
    assert cached_tokens(shape_of(mistral, "mistral"), 6512) == 512
    assert cached_tokens(shape_of(mistral | {"sliding_window": None}, "mistral"), 6512) == 6512


def test_experts_are_read_as_they_are_chosen_and_computed_by_the_token() -> None:
    def read_gb(batch: int) -> float:
        load = Load(batch, 1)
        return load.batch * 4800 / decode_ceiling_tok_s(MOE, load, H200)

    head = MOE.vocab_size * MOE.hidden_size
    always = MOE.num_linear_params - MOE.num_expert_params
    assert read_gb(1) == pytest.approx(2 * (always + MOE.num_expert_params / 8 + head) / 1e9, rel=0.01)
    assert read_gb(512) == pytest.approx(2 * (always + MOE.num_expert_params + head) / 1e9, rel=0.03)


@pytest.mark.parametrize(
    ("name", "load", "words"),
    [
        ("A100", Load(scheme="fp8"), "A100 does not compute fp8; it has bf16, int8.*H100, H200, B200, L40S"),
        ("H200", Load(scheme="nvfp4"), "hardware with it: B200"),
    ],
)
def test_hardware_without_the_format_is_refused_with_what_has_it(name: str, load: Load, words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_load(load, name, known_hardware()[name], EIGHT_B)


def test_a_machine_without_neighbours_cannot_share_a_model() -> None:
    alone = Hardware(memory_gb=16, bandwidth_gb_s=30, tflops={"bf16": 0.4})
    with pytest.raises(InputError, match="tensor_parallel 2 on cpu, which has no neighbours"):
        check_load(Load(tensor_parallel=2), "cpu", alone, EIGHT_B)


def test_the_speed_of_a_model_that_does_not_generate_is_not_priced() -> None:
    bert = shape_of({"model_type": "bert", "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 64,
                     "intermediate_size": 128, "vocab_size": 100, "max_position_embeddings": 64,
                     "type_vocab_size": 2}, "bert")  # fmt: skip
    with pytest.raises(InputError, match="decoder-only models, and bert is none; give params or memory_gb"):
        check_load(Load(), "H200", H200, bert)
    assert costs_of(bert, Load()).params == bert.num_params
