"""Stock vLLM opens pruned and repaired checkpoints and computes what transformers computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from jobs import artifact_at, job_of
from stillroom.engines.contract import ServeConfig
from stillroom.engines.process import serve
from stillroom.engines.vllm_engine import Vllm
from stillroom.models.load import load_model
from stillroom.models.shape import read_config
from stillroom.prune import stage
from stillroom.recipe import Calibration, Prune, SearchBudget
from tiny import tiny_checkpoint, tiny_text_file

pytestmark = pytest.mark.engine

PROMPT = list(range(10, 34))
NEW_TOKENS = 8
SHARE_OF_SPREAD = 0.05
"""How far log probabilities may be apart, of their standard deviation over the vocabulary."""

CUTS: dict[str, dict[str, Any]] = {
    "llama": {"num_layers": 3, "intermediate_size": 96},
    "qwen2": {"num_layers": 3, "intermediate_size": 96},
    "qwen3": {"num_layers": 3, "hidden_size": 96, "num_key_value_heads": 1},
    "gemma3_text": {"num_layers": 3, "intermediate_size": 96},
}


@pytest.mark.parametrize("family", CUTS)
def test_vllm_gives_a_pruned_model_the_log_probabilities_that_transformers_gives_it(
    family: str, tmp_path: Path
) -> None:
    dense = tiny_checkpoint(tmp_path / "dense", family, hidden_size=128, head_dim=32, dtype=torch.bfloat16)
    config = Prune(
        **CUTS[family],
        calibration=Calibration(samples=8, sequence_length=32, batch_size=4),
        search=SearchBudget(tokens=64, generations=1, offspring=2, finalists=1),
    )
    text = tiny_text_file(tmp_path / "text.txt")
    job = job_of(config, {"source": artifact_at(dense)}, text, tmp_path / "job")
    stage.run(job)
    assert read_config(job.out_dir)["num_hidden_layers"] == 3
    answer = _completion(job.out_dir, tmp_path)
    tokens = [int(token.removeprefix("token_id:")) for token in answer["tokens"]]
    given = torch.tensor([PROMPT + tokens])
    with torch.inference_mode():
        log_probabilities = load_model(job.out_dir)(given).logits[0].float().log_softmax(-1)
    scored = log_probabilities[len(PROMPT) - 1 : -1]
    expected = scored.gather(-1, given[0, len(PROMPT) :, None]).squeeze(-1)
    apart = (torch.tensor(answer["token_logprobs"]) - expected).abs().mean().item()
    assert apart < SHARE_OF_SPREAD * scored.std().item()  # both compute in bfloat16, in other orders


def _completion(model_dir: Path, tmp_path: Path) -> dict[str, Any]:
    """The log probabilities of a greedy completion by vLLM."""
    installation = Vllm().find()
    assert installation is not None, "vLLM is not on this machine; run: stillroom engine install vllm"
    config, log_path = ServeConfig(max_model_len=128, served_model_name="rose"), tmp_path / "engine.log"
    body = {"model": "rose", "prompt": PROMPT, "max_tokens": NEW_TOKENS, "temperature": 0, "logprobs": 1,
            "return_tokens_as_token_ids": True, **Vllm().exactly(NEW_TOKENS)}  # fmt: skip
    with serve(Vllm(), installation, model_dir, config, log_path=log_path, startup_timeout_s=300.0) as server:
        response = httpx.post(f"{server.base_url}/v1/completions", json=body, timeout=120, trust_env=False)
    logprobs: dict[str, Any] = response.json()["choices"][0]["logprobs"]
    return logprobs
