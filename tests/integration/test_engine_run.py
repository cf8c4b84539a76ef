"""The demo's whole path on a tiny model with the real vLLM, killed in the middle of its bench.

Stock vLLM serves the unpruned, the pruned and distilled, and the INT8 checkpoint; FP8 is refused on CPUs without AMX,
with the reason in the verdict.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import httpx
import pytest

from runs import stillroom, stillroom_command, tiny_recipe
from stillroom.engines.engine import ENGINES

pytestmark = pytest.mark.engine

BENCH = {
    "engine": "vllm",
    "variants": ["dense", "distill", "fp8", "int8"],
    "concurrency": [1, 4],
    "prompt_tokens": 16,
    "output_tokens": 8,
    "max_model_len": 256,
}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed while it benched its second variant, and then finished."""
    folder = tmp_path_factory.mktemp("engine-run")
    recipe = tiny_recipe(
        folder, bench=BENCH, gates=["speed.output_tok_s >= 0.01 * dense", "size.weight_bytes <= 0.9 * dense"]
    )
    home = Path(os.environ.get("STILLROOM_HOME", Path.home() / ".cache" / "stillroom"))
    command = stillroom_command("run", recipe, "--out", "run", "--json")  # relative, as people type it
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=folder)
    assert process.stdout is not None
    for line in process.stdout:
        event = json.loads(line)
        if event.get("step") == "bench" and event["event"] == "progress" and event["done"] == 1:
            process.kill()
            break
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    answer = stillroom("run", recipe, "--out", "run", home=home, cwd=folder)
    assert answer.returncode == 0, answer.stderr
    return folder / "run"


def test_every_variant_that_the_engine_takes_has_throughput(run_dir: Path) -> None:
    verdict = json.loads((run_dir / "verdict.json").read_text())
    assert verdict["passed"] is True
    rows = {row["variant"]: row["measurements"] for row in verdict["rows"]}
    for variant in ("dense", "distill", "int8"):
        assert rows[variant]["speed.c4.output_tok_s"]["value"] > 0
        assert rows[variant]["memory.peak_gib"]["value"] > 0
    assert rows["int8"]["size.weight_bytes"]["value"] < rows["distill"]["size.weight_bytes"]["value"]


def test_fp8_is_served_or_refused_with_its_reason(run_dir: Path) -> None:
    verdict = json.loads((run_dir / "verdict.json").read_text())
    row = next(row for row in verdict["rows"] if row["variant"] == "fp8")
    installation = ENGINES["vllm"].find()
    assert installation is not None
    fp8 = next((run_dir / "artifacts").glob("fp8-*"))
    refused = ENGINES["vllm"].refuses(fp8, installation)
    assert ("speed.output_tok_s" in row["measurements"]) == (refused is None)
    assert refused is None or refused in json.dumps(row, ensure_ascii=False)
    assert row["measurements"]["verify.passed"]["value"] == 1


def test_a_run_is_served_by_its_directory_and_stops_cleanly(run_dir: Path) -> None:
    command = stillroom_command("serve", run_dir, "--engine", "vllm", "--port", 0, "--max-model-len", 256)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    url = process.stdout.readline().split()[4]
    names = [model["id"] for model in httpx.get(f"{url}/models", timeout=60, trust_env=False).json()["data"]]
    assert names == ["int8"]
    body = {"model": "int8", "messages": [{"role": "user", "content": "Roses?"}], "max_tokens": 5}
    answer = httpx.post(f"{url}/chat/completions", json=body, timeout=60, trust_env=False).json()
    assert answer["choices"][0]["message"]["role"] == "assistant"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
