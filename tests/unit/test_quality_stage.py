from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs import Kept, artifact_at, job_of
from stillroom.artifact import Measurement
from stillroom.errors import InputError
from stillroom.quality import stage
from stillroom.quality.stage import evaluate_directory, run
from stillroom.recipe import Evaluate, TextSource
from tiny import tiny_checkpoint, tiny_text_file

CONFIG = Evaluate(perplexity_tokens=512, sequence_length=64, batch_size=2)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return tiny_text_file(tmp_path / "heldout.txt")


def test_the_stage_measures_each_text_and_writes_what_it_measured(model_dir: Path, text: Path, tmp_path: Path) -> None:
    job = job_of(CONFIG, {"source": artifact_at(model_dir)}, text, tmp_path / "job")
    result = run(job)
    assert [m.name for m in result.measurements] == [
        f"quality.heldout.{metric}" for metric in ("perplexity", "bits_per_byte", "loss")
    ]
    ppl = result.measurements[0]
    assert ppl.stderr is not None
    assert ppl.n == result.tokens == 512 - 8  # the first token of each of eight windows
    written = json.loads((job.out_dir / "measurements.json").read_text())
    assert tuple(Measurement.model_validate(m) for m in written["measurements"]) == result.measurements


def test_a_killed_stage_measures_only_what_is_missing(
    model_dir: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(CONFIG, {"source": artifact_at(model_dir)}, text, tmp_path / "job")
    first = run(job)

    def never(path: Path) -> None:
        raise AssertionError("all is measured, so the model need not be opened")

    monkeypatch.setattr(stage, "load_fake_quantized", never)
    assert run(job).measurements == first.measurements


def test_a_directory_is_measured_as_the_stage_would(model_dir: Path, text: Path, tmp_path: Path) -> None:
    job = job_of(CONFIG, {"source": artifact_at(model_dir)}, text, tmp_path / "job")
    measured = evaluate_directory(model_dir, CONFIG, (TextSource(source=str(text)),), Kept())
    assert measured == run(job).measurements


def test_a_text_of_a_few_words_is_refused(model_dir: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("one")
    with pytest.raises(InputError, match="at least 8 are needed"):
        evaluate_directory(model_dir, CONFIG, (TextSource(source=str(short)),), Kept())
