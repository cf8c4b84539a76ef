"""`stillroom engine install`: what can be known without an hour of downloads. The whole is a test under marker
`engine`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from stillroom.engines import install
from stillroom.engines.contract import Installation
from stillroom.engines.install import _ASK_REQUIREMENTS, _new_virtualenv, install_engine
from stillroom.engines.interpreters import versions_in
from stillroom.errors import EnvironmentCannot, InputError


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STILLROOM_HOME", str(tmp_path))
    return tmp_path


def test_only_vllm_can_be_installed() -> None:
    with pytest.raises(InputError, match="allowed: vllm"):
        install_engine("tensorrt-llm")


def test_what_is_there_is_not_installed_again(home: Path) -> None:
    folder = home / "engines" / "vllm"
    folder.mkdir(parents=True)
    record = {"python": sys.executable, "version": "0.32.0", "device": "cpu"}
    (folder / "installed.json").write_text(json.dumps(record))
    assert install_engine("vllm") == Installation("vllm", Path(sys.executable), "0.32.0", "cpu")


def test_a_full_disk_is_said_before_anything_is_made(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "free_disk_bytes", lambda path: 2**30)
    with pytest.raises(EnvironmentCannot, match=r"GiB of disk, .* has 1\.0; set STILLROOM_HOME"):
        install_engine("vllm")
    assert not (home / "engines").exists()


def test_a_virtualenv_replaces_what_a_killed_installation_left(home: Path) -> None:
    folder = home / "engines" / "vllm"
    folder.mkdir(parents=True)
    (folder / "half").touch()
    python = _new_virtualenv(folder)
    assert not (folder / "half").exists()
    assert set(versions_in(python, ("pip", "torch")) or ()) == {"pip"}


def test_requirements_leave_out_what_is_named_and_extras() -> None:
    command = [sys.executable, "-c", _ASK_REQUIREMENTS, "httpx", "certifi"]
    requirements = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert {"anyio", "httpcore==1.*"} <= set(requirements)
    assert not any("extra ==" in line or line.startswith("certifi") for line in requirements)
