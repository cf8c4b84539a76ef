from __future__ import annotations

import json
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from stillroom.artifact import Measurement
from stillroom.errors import InputError
from stillroom.quality import perplexity
from stillroom.quality.perplexity import WindowLosses, score_windows, text_measurements
from tiny import FAMILIES, tiny_model


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    """75 tokens: four windows of 16 and eleven over."""
    return torch.randint(3, 384, (75,), generator=torch.Generator().manual_seed(1))


def slow_losses(model: PreTrainedModel, ids: torch.Tensor, length: int, prefix: int | None) -> WindowLosses:
    """One token at a time: a forward pass over what comes before it, and the log-probability that it got."""
    start = [] if prefix is None else [prefix]
    width = length - len(start)
    nlls, counts = [], []
    for begin in range(0, len(ids), width):
        window = start + ids[begin : begin + width].tolist()
        nll = 0.0
        for position in range(1, len(window)):
            with torch.no_grad():
                logits = model(torch.tensor([window[:position]])).logits[0, -1].double()
            nll -= float(logits.log_softmax(0)[window[position]])
        if len(window) > 1:
            nlls.append(nll)
            counts.append(len(window) - 1)
    return WindowLosses(tuple(nlls), tuple(counts))


@pytest.mark.parametrize("prefix", [None, 0])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_equal_a_token_by_token_reference(family: str, prefix: int | None, ids: torch.Tensor) -> None:
    model = tiny_model(family)
    fast = score_windows(model, ids, sequence_length=16, batch_size=3, prefix=prefix)
    slow = slow_losses(model, ids, 16, prefix)
    assert fast.tokens_W == slow.tokens_W
    assert fast.nll_W == pytest.approx(slow.nll_W, rel=1e-5)


def test_with_a_prefix_every_token_of_the_text_is_scored_once(ids: torch.Tensor) -> None:
    losses = score_windows(tiny_model(), ids, sequence_length=16, batch_size=2, prefix=0)
    assert losses.tokens == len(ids)


def test_without_a_prefix_the_first_token_of_each_window_is_not_scored(ids: torch.Tensor) -> None:
    losses = score_windows(tiny_model(), ids, sequence_length=16, batch_size=2)
    assert losses.tokens_W == (15, 15, 15, 15, 10)


def test_a_last_window_of_one_token_has_nothing_to_score(ids: torch.Tensor) -> None:
    losses = score_windows(tiny_model(), ids[:33], sequence_length=16, batch_size=2)
    assert losses.tokens_W == (15, 15)


def test_a_text_shorter_than_a_window_is_one_window(ids: torch.Tensor) -> None:
    losses = score_windows(tiny_model(), ids[:10], sequence_length=16, batch_size=2)
    assert losses.tokens_W == (9,)
    assert losses.stderr is None


def test_the_batch_size_does_not_change_the_numbers(ids: torch.Tensor) -> None:
    model = tiny_model()
    one = score_windows(model, ids, sequence_length=16, batch_size=1)
    many = score_windows(model, ids, sequence_length=16, batch_size=64)
    assert one.nll_W == pytest.approx(many.nll_W, rel=1e-5)


def test_the_head_sees_only_a_chunk_of_tokens_at_a_time(ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen3")
    whole = score_windows(model, ids, sequence_length=16, batch_size=4)
    rows: list[int] = []
    model.get_output_embeddings().register_forward_pre_hook(
        lambda module, inputs: rows.append(inputs[0].shape[:-1].numel())
    )
    monkeypatch.setattr(perplexity, "CHUNK_ELEMENTS", 7 * 384)
    chunked = score_windows(model, ids, sequence_length=16, batch_size=4)
    assert max(rows[2:]) == 7  # the first two check the head itself
    assert chunked.nll_W == pytest.approx(whole.nll_W, rel=1e-5)


def test_gemmas_soft_cap_is_applied(ids: torch.Tensor) -> None:
    model = tiny_model("gemma3_text", final_logit_softcapping=5.0)
    fast = score_windows(model, ids[:20], sequence_length=16, batch_size=1)
    assert fast.nll_W == pytest.approx(slow_losses(model, ids[:20], 16, None).nll_W, rel=1e-5)


def test_a_family_that_scales_its_logits_outside_the_head_is_refused(ids: torch.Tensor) -> None:
    config = AutoConfig.for_model("granite", vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                                  num_attention_heads=2, num_key_value_heads=2, logits_scaling=8.0)  # fmt: skip
    with pytest.raises(InputError, match="'granite' changes its logits"):
        score_windows(AutoModelForCausalLM.from_config(config).eval(), ids, sequence_length=16, batch_size=1)


def test_a_text_of_a_few_tokens_is_refused(ids: torch.Tensor) -> None:
    with pytest.raises(InputError, match="has 5 tokens; at least 8"):
        score_windows(tiny_model(), ids[:5], sequence_length=16, batch_size=1)


def test_windows_beyond_the_models_context_are_refused(ids: torch.Tensor) -> None:
    with pytest.raises(InputError, match="4096 exceeds the model's context of 2048"):
        score_windows(tiny_model(), ids, sequence_length=4096, batch_size=1)


def test_a_model_that_computes_nan_is_refused(ids: torch.Tensor) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    with pytest.raises(InputError, match="not a finite number"):
        score_windows(model, ids, sequence_length=16, batch_size=1)


def test_progress_counts_every_scored_token(ids: torch.Tensor) -> None:
    done: list[int] = []
    score_windows(tiny_model(), ids, sequence_length=16, batch_size=2, prefix=0, on_tokens=done.append)
    assert done == sorted(done)
    assert done[-1] == len(ids)


@given(st.lists(st.floats(0.5, 8.0), min_size=2, max_size=40))
def test_with_equal_windows_the_error_is_that_of_a_plain_mean(losses: list[float]) -> None:
    windows = WindowLosses(tuple(15 * loss for loss in losses), (15,) * len(losses))
    expected = torch.tensor(losses, dtype=torch.float64).std() / math.sqrt(len(losses))
    assert windows.stderr == pytest.approx(float(expected), rel=1e-6, abs=1e-9)


def test_with_unequal_windows_the_error_is_what_resampling_windows_shows() -> None:
    draw = random.Random(3)
    counts = tuple(draw.choice((15, 15, 15, 9)) for _ in range(60))
    windows = WindowLosses(tuple(n * draw.gauss(3.0, 0.4) for n in counts), counts)
    resampled = []
    for _ in range(4000):
        chosen = [draw.randrange(60) for _ in range(60)]
        resampled.append(sum(windows.nll_W[i] for i in chosen) / sum(counts[i] for i in chosen))
    assert windows.stderr == pytest.approx(float(torch.tensor(resampled).std()), rel=0.08)


def test_tokens_that_err_together_do_not_count_as_many_samples() -> None:
    """Tokens that all share their window's difficulty: the spread over tokens would claim a quarter of the error."""
    draw = random.Random(5)
    difficulty = [draw.gauss(3.0, 0.5) for _ in range(40)]
    windows = WindowLosses(tuple(16 * d for d in difficulty), (16,) * 40)
    by_token = float(torch.tensor(difficulty).repeat_interleave(16).std()) / math.sqrt(40 * 16)
    assert windows.stderr is not None
    assert windows.stderr / by_token == pytest.approx(4.0, rel=0.05)


@settings(max_examples=50)
@given(st.floats(0.1, 9.0), st.integers(100, 10_000), st.floats(1.0, 6.0))
def test_the_three_measures_say_the_same(loss: float, num_tokens: int, bytes_per_token: float) -> None:
    windows = WindowLosses((loss * 10, loss * 12), (10, 12))
    num_bytes = round(num_tokens * bytes_per_token)
    by_name = _by_name(text_measurements("heldout", windows, num_tokens=num_tokens, num_bytes=num_bytes))
    ppl, bits = by_name["quality.heldout.perplexity"], by_name["quality.heldout.bits_per_byte"]
    assert math.log(ppl.value) == pytest.approx(by_name["quality.heldout.loss"].value)
    assert bits.value * num_bytes * math.log(2) == pytest.approx(loss * num_tokens)
    assert {m.n for m in by_name.values()} == {22}
    assert {m.higher_is_better for m in by_name.values()} == {False}


def test_the_error_of_perplexity_follows_by_the_delta_method() -> None:
    windows = WindowLosses((30.0, 34.0, 29.0), (10, 10, 10))
    by_name = _by_name(text_measurements("heldout", windows, num_tokens=33, num_bytes=120))
    ppl, loss = by_name["quality.heldout.perplexity"], by_name["quality.heldout.loss"]
    assert loss.stderr is not None
    shifted = (math.exp(loss.value + loss.stderr) - math.exp(loss.value - loss.stderr)) / 2
    assert ppl.stderr == pytest.approx(shifted, rel=0.01)


def test_an_unknown_error_stays_unknown() -> None:
    measured = text_measurements("heldout", WindowLosses((30.0,), (10,)), num_tokens=11, num_bytes=40)
    assert [m.stderr for m in measured] == [None, None, None]
    assert json.loads(measured[0].model_dump_json())["stderr"] is None


def _by_name(measured: tuple[Measurement, ...]) -> dict[str, Measurement]:
    return {m.name: m for m in measured}
