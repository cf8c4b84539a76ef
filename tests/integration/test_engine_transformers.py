"""Real `transformers serve`: the engine that is there without an installation, from a tiny model to figures."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from jobs import Kept
from stillroom.engines.contract import ServeConfig
from stillroom.engines.process import serve
from stillroom.engines.transformers_engine import Transformers
from stillroom.recipe import Bench
from stillroom.speed.stage import bench_directory
from tiny import tiny_checkpoint

INSTALLATION = Transformers().find()
if INSTALLATION is None:
    pytest.skip("what `transformers serve` needs is in the extra `evaluate`", allow_module_level=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("transformers") / "tiny", num_hidden_layers=2)


def test_answers_have_exactly_the_tokens_that_were_asked_for(checkpoint: Path, tmp_path: Path) -> None:
    engine, config = Transformers(), ServeConfig(max_model_len=256)
    assert INSTALLATION is not None
    with serve(
        engine, INSTALLATION, checkpoint, config, log_path=tmp_path / "engine.log", startup_timeout_s=120
    ) as server:
        for tokens in (3, 40):
            body = {"model": server.model_name, "prompt": "The still", "max_tokens": tokens, **engine.exactly(tokens)}
            answer = httpx.post(f"{server.base_url}/v1/completions", json=body, timeout=60, trust_env=False)
            assert answer.json()["usage"]["completion_tokens"] == tokens


def test_a_tiny_model_is_benched(checkpoint: Path) -> None:
    config = Bench(engine="transformers", concurrency=(2,), prompt_tokens=16, output_tokens=8, max_model_len=128)
    measured = {m.name: m for m in bench_directory(checkpoint, config, Kept())}
    assert measured["speed.c2.output_tok_s"].value > 0
    assert measured["speed.c2.ttft_ms"].value > 0
