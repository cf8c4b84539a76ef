"""Real vLLM: our command lines parse, a tiny model is served, benched, and nothing is left of a killed one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import httpx
import psutil
import pytest
import torch

from jobs import Kept
from stillroom.engines.contract import Installation, ServeConfig
from stillroom.engines.process import serve
from stillroom.engines.vllm_engine import Vllm
from stillroom.errors import EnvironmentCannot
from stillroom.recipe import Bench
from stillroom.speed.stage import bench_directory
from tiny import tiny_checkpoint

pytestmark = pytest.mark.engine

STARTUP_TIMEOUT_S = 300.0


@pytest.fixture(scope="module")
def vllm() -> Installation:
    installation = Vllm().find()
    assert installation is not None, "vLLM is not on this machine; run: stillroom engine install vllm"
    return installation


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest head that vLLM's CPU attention takes is 32."""
    path = tmp_path_factory.mktemp("vllm") / "tiny"
    return tiny_checkpoint(path, head_dim=32, num_hidden_layers=2, dtype=torch.bfloat16)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_vllms_own_parser_takes_our_command(device: str, vllm: Installation, checkpoint: Path) -> None:
    installation = Installation("vllm", vllm.python, vllm.version, device)  # type: ignore[arg-type]
    argv = Vllm().command(checkpoint, ServeConfig(port=8000, served_model_name="rose"), installation)
    parse = textwrap.dedent("""
        import json, sys
        try:
            from vllm.entrypoints.launchers.cli_args import make_arg_parser
        except ImportError:  # before 0.32
            from vllm.entrypoints.openai.cli_args import make_arg_parser
        from vllm.utils.argparse_utils import FlexibleArgumentParser
        parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(sys.argv[1:])
        print(json.dumps([parsed.model, parsed.served_model_name, parsed.host, parsed.port, parsed.max_model_len]))
    """)
    answer = subprocess.run([str(vllm.python), "-c", parse, *argv[3:]], capture_output=True, text=True, check=True)
    assert json.loads(answer.stdout.splitlines()[-1]) == [str(checkpoint), ["rose"], "127.0.0.1", 8000, 4096]


def test_a_tiny_model_is_served_and_benched(vllm: Installation, checkpoint: Path) -> None:
    assert Vllm().refuses(checkpoint, vllm) is None
    progress = Kept()
    config = Bench(engine="vllm", concurrency=(1, 2), prompt_tokens=16, output_tokens=8, max_model_len=128)
    measured = {m.name: m for m in bench_directory(checkpoint, config, progress)}
    assert measured["speed.c2.output_tok_s"].value > 0
    assert measured["speed.c2.output_tok_s"].n == 8
    assert measured["memory.peak_gib"].value > 0.1
    assert any("served by vllm" in line for line in progress.lines)


def test_a_killed_stillroom_leaves_no_vllm_behind(vllm: Installation, checkpoint: Path) -> None:
    script = textwrap.dedent("""
        import sys
        from pathlib import Path
        from stillroom.engines.process import serve_foreground
        serve_foreground(Path(sys.argv[1]), "vllm", {"port": 0, "max_model_len": 128, "served_model_name": "rose"})
    """)
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(checkpoint)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    url = process.stdout.readline().split()[4]
    body = {"model": "rose", "prompt": "The still", "max_tokens": 4, **Vllm().exactly(4)}
    answer = httpx.post(f"{url}/completions", json=body, timeout=60, trust_env=False).json()
    assert answer["usage"]["completion_tokens"] == 4
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 2
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(family, timeout=60)
    assert [member for member in alive if member.status() != psutil.STATUS_ZOMBIE] == []


def test_what_vllm_dies_of_is_shown(vllm: Installation, checkpoint: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(checkpoint, tmp_path / "broken"))
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])

    def start() -> None:
        config, log_path = ServeConfig(max_model_len=128), tmp_path / "engine.log"
        with serve(Vllm(), vllm, broken, config, log_path=log_path, startup_timeout_s=STARTUP_TIMEOUT_S):
            pass

    with pytest.raises(EnvironmentCannot, match=r"died at start.*\n(.*\n)*.*SafetensorError"):
        start()
