"""The bench stage whole: real guidellm, real HTTP, real processes; only the engine has no model behind it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fake_engine import FakeEngine
from jobs import Kept, artifact_at
from stillroom.engines.engine import ENGINES
from stillroom.errors import EnvironmentCannot
from stillroom.recipe import Bench
from stillroom.speed.stage import bench_directory, run
from stillroom.stage import Job
from tiny import tiny_checkpoint

pytest.importorskip("guidellm", reason="guidellm is in the extra `evaluate`")

CONFIG = {"engine": "auto", "concurrency": [1, 3], "prompt_tokens": 8, "output_tokens": 5, "max_model_len": 256}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("bench") / "dense", num_hidden_layers=2)


def use(monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    """Put the fake engine in vLLM's place."""
    monkeypatch.setitem(ENGINES, "vllm", FakeEngine(flags))


def job(tmp_path: Path, **model_dirs: Path) -> Job:
    inputs = {name.replace("__", ":"): artifact_at(path) for name, path in model_dirs.items()}
    for folder in ("out", "scratch"):
        (tmp_path / folder).mkdir(exist_ok=True)
    bench = Bench.model_validate(CONFIG)
    return Job("bench", bench, inputs, (), tmp_path / "out", tmp_path / "scratch", 0, Kept())


def test_variants_are_served_loaded_and_kept_and_a_refused_one_says_why(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bodies = tmp_path / "bodies.jsonl"
    use(monkeypatch, "--bodies", str(bodies))
    refused = tiny_checkpoint(tmp_path / "refused", num_hidden_layers=2)
    result = run(job(tmp_path, dense=checkpoint, baseline__small=refused))
    written = json.loads((tmp_path / "out" / "measurements.json").read_text())
    assert (written["engine"], written["engine_version"], written["device"]) == ("fake", "1.0", "cpu")
    assert written["variants"]["baseline:small"] == {"measurements": [], "refused": "no kernel for it", "levels": []}
    dense = {m["name"]: m for m in written["variants"]["dense"]["measurements"]}
    assert set(dense) == {
        *(f"speed.c{c}.{name}" for c in (1, 3) for name in ("output_tok_s", "ttft_ms", "itl_ms", "request_s")),
        "speed.output_tok_s", "speed.startup_s", "memory.peak_gib",
    }  # fmt: skip
    assert dense["speed.c1.output_tok_s"]["value"] > 0
    assert [dense[f"speed.c{c}.output_tok_s"]["n"] for c in (1, 3)] == [8, 12]
    assert result.details["refused"] == {"baseline:small": "no kernel for it"}

    requests: list[dict[str, Any]] = [json.loads(line) for line in bodies.read_text().splitlines()]
    loaded = [body for body in requests if " warm" not in body["prompt"]]
    assert len({body["prompt"] for body in loaded}) == 8 + 12  # none comes twice, so that no prefix cache helps
    assert {(body["max_tokens"], body["ignore_eos"], body["temperature"]) for body in loaded} == {(5, True, 0)}

    # killed and started again with an engine that would fail: what was measured is taken from scratch
    (tmp_path / "out" / "measurements.json").unlink()
    use(monkeypatch, "--die-at-start")
    run(job(tmp_path, dense=checkpoint, baseline__small=refused))
    assert json.loads((tmp_path / "out" / "measurements.json").read_text()) == written


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        # 2 + 3 warm-up requests come first
        (
            ("--fail-from-request", "8"),
            r"succeeded, \d+ failed and .*the engine's last lines:\n(.*\n)*fake engine ready",
        ),
        (("--fail-from-request", "1"), "answered 500 to the first requests"),
        (("--die-at-request", "9"), r"died under load; its last lines:\n(.*\n)*RuntimeError: the engine core died"),
    ],
)
def test_a_request_that_fails_or_an_engine_that_dies_is_a_failure_with_its_log(
    flags: tuple[str, ...], reason: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, *flags)
    with pytest.raises(EnvironmentCannot, match=reason):
        bench_directory(checkpoint, Bench.model_validate({**CONFIG, "concurrency": [3]}), Kept())
