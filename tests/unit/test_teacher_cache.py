"""The teacher on disk: the same bits after a kill, shared by students, refused where it is another's, of known size."""

from __future__ import annotations

import gc
import json
import resource
import shutil
import signal
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from runs import tiny_recipe
from stage_jobs import Killed, Remembered, artifact_at, job_for, kill_at
from stillroom.distill import stage, teacher_cache
from stillroom.distill.packing import Windows
from stillroom.distill.teacher_cache import TeacherCache, open_cache, write_cache
from stillroom.distill.train import Student, train
from stillroom.errors import EnvironmentCannot, InputError
from stillroom.models.load import load_model, load_tokenizer
from stillroom.plan import make_plan
from stillroom.preflight import outlook
from stillroom.recipe import Distill, SampledTeacher, TextSource, load_recipe, teacher_cache_token_bytes
from stillroom.stage import Job
from tiny import tiny_checkpoint, tiny_model, tiny_text_file

SAMPLED = {"kind": "sampled", "draws": 20}
TOP_K = {"kind": "top_k", "k": 16}


def distill(**overrides: Any) -> Distill:
    fields: dict[str, Any] = {
        "tokens": 8 * 4 * 16, "sequence_length": 16, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-3,
        "min_learning_rate": 1e-4, "chunk_tokens": 10, "save_every_steps": 3, "teacher_cache": SAMPLED,
    }  # fmt: skip
    return Distill(**(fields | overrides))


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home of the test's own, and shards of two windows."""
    monkeypatch.setenv("STILLROOM_HOME", str(tmp_path / "home"))
    token_bytes = teacher_cache_token_bytes(SampledTeacher(kind="sampled", draws=20), 384)
    monkeypatch.setattr(teacher_cache, "SHARD_BYTES", 2 * 16 * token_bytes)


def some_windows(num: int = 7) -> Windows:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 384, (num, 16), generator=generator, dtype=torch.int32)
    counted = torch.rand(num, 16, generator=generator) < 0.7
    counted[2:4] = False  # a shard without any
    return Windows(ids, counted=counted)


def opened(tmp_path: Path, config: Distill, windows: Windows, *, seed: int = 0) -> TeacherCache:
    dense = tmp_path / "dense"
    if not dense.exists():
        tiny_checkpoint(dense, seed=0)
    return open_cache(config, windows, dense, load_tokenizer(dense), 384, seed=seed)


def written(tmp_path: Path, config: Distill, progress: Remembered | None = None) -> TeacherCache:
    windows = some_windows()
    cache = opened(tmp_path, config, windows)
    teacher = load_model(tmp_path / "dense")
    write_cache(cache, teacher, windows, config, seed=0, progress=progress or Remembered())
    return cache


def shards(cache: TeacherCache) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(cache.path.glob("shard-*"))}


@pytest.mark.parametrize("kind", [SAMPLED, TOP_K, {"kind": "sampled", "draws": 20, "proposal_power": 0.8}])
def test_a_window_is_read_back_as_the_teacher_said_it(tmp_path: Path, kind: dict[str, Any]) -> None:
    config, windows = distill(teacher_cache=kind, temperature=2.0), some_windows()
    cache = written(tmp_path, config)
    which = torch.tensor([5, 0, 3])
    with torch.no_grad():
        p = (load_model(tmp_path / "dense")(windows.ids.long()).logits / 2.0).softmax(-1)
    assert windows.counted is not None
    of_counted = p[which][windows.counted[which]]
    found = cache.read(which, torch.device("cpu"))
    assert len(found.ids_NK) == len(of_counted)
    theirs = of_counted.gather(1, found.ids_NK)
    assert bool((theirs[found.weights_NK > 0] > 0).all())
    if kind["kind"] == "top_k":
        torch.testing.assert_close(found.weights_NK, theirs, rtol=0, atol=1e-5)
        torch.testing.assert_close(found.outside_N, 1 - theirs.sum(-1), rtol=0, atol=1e-5)
    else:
        torch.testing.assert_close(found.weights_NK.sum(-1), torch.ones(len(theirs)), rtol=0, atol=2e-4)
        torch.testing.assert_close(found.entropy_N, torch.special.entr(of_counted).sum(-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [SAMPLED, TOP_K, {"kind": "top_k", "k": 300}])
def test_it_takes_no_more_than_was_said(tmp_path: Path, kind: dict[str, Any]) -> None:
    config, windows = distill(teacher_cache=kind), some_windows()
    cache = written(tmp_path, config)
    tensors = [load_file(path) for path in sorted(cache.path.glob("shard-*"))]
    stored = sum(t.nbytes for part in tensors for name, t in part.items() if name not in ("rows", "pairs"))
    assert windows.counted is not None
    most = int(windows.counted.sum()) * cache.token_bytes
    assert stored == most if kind["kind"] == "top_k" else stored < most


@pytest.mark.parametrize("killed_at", [1, 4, 5, 7])
def test_an_interrupted_pass_goes_on_with_the_same_bits(tmp_path: Path, killed_at: int) -> None:
    whole = shards(written(tmp_path, distill()))
    shutil.rmtree(tmp_path / "home" / "teacher-cache")
    with pytest.raises(Killed):
        written(tmp_path, distill(), kill_at(killed_at))
    again = Remembered()
    cache = written(tmp_path, distill(), again)
    first = 2 * ((killed_at - 1) // 2)  # two windows a shard, in a batch of two
    assert again.updates[0][0] == min(first + 2, 7)
    assert shards(cache) == whole
    assert len(whole) == 4


def test_draws_follow_from_seed_and_window(tmp_path: Path) -> None:
    """So a window says the same whatever came before it."""
    windows = some_windows()
    cache = written(tmp_path, distill())
    few = windows[:3]
    other = opened(tmp_path, distill(), few)
    write_cache(other, load_model(tmp_path / "dense"), few, distill(), seed=0, progress=Remembered())
    a, b = (c.read(torch.tensor([0]), torch.device("cpu")) for c in (cache, other))
    assert torch.equal(a.ids_NK, b.ids_NK)
    reseeded = opened(tmp_path, distill(), few, seed=1)
    assert reseeded.key != other.key
    write_cache(reseeded, load_model(tmp_path / "dense"), few, distill(), seed=1, progress=Remembered())
    assert not torch.equal(reseeded.read(torch.tensor([0]), torch.device("cpu")).ids_NK, b.ids_NK)


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then writing fails with EFBIG, as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    whole = shards(written(tmp_path, distill()))
    shutil.rmtree(tmp_path / "home" / "teacher-cache")
    with pytest.raises(Killed):
        written(tmp_path, distill(), kill_at(3))
    cache, teacher = opened(tmp_path, distill(), some_windows()), load_model(tmp_path / "dense")
    with files_of_at_most(300), pytest.raises(EnvironmentCannot, match="make room and run again, it goes on after"):
        write_cache(cache, teacher, some_windows(), distill(), seed=0, progress=Remembered())
    assert shards(cache) == {name: whole[name] for name in list(whole)[:1]}
    assert not list(cache.path.glob(".shard*"))
    assert shards(written(tmp_path, distill())) == whole


def test_a_gpu_without_memory_for_the_teacher_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: Any) -> None:
        raise torch.cuda.OutOfMemoryError("no")

    monkeypatch.setattr(teacher_cache, "last_hidden", out_of_memory)
    with pytest.raises(EnvironmentCannot, match="for the teacher on micro_batch_size 2 x sequence_length 16"):
        written(tmp_path, distill())


def test_a_disk_without_room_is_found_before_the_teacher_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(EnvironmentCannot, match=r"teacher cache needs up to .*65 bytes a token.*lower draws"):
        opened(tmp_path, distill(), some_windows())


@pytest.mark.parametrize(("fact", "what"), [("teacher", "teacher"), ("tokenizer", "tokenizer"), ("windows", "windows")])
def test_a_cache_of_another_teacher_tokenizer_or_text_is_refused(tmp_path: Path, fact: str, what: str) -> None:
    cache = written(tmp_path, distill())
    manifest = cache.path / "cache.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {fact: "another"}))
    with pytest.raises(InputError, match=f"is the cache of another {what}; remove it and run again"):
        opened(tmp_path, distill(), some_windows())


def test_another_teacher_temperature_or_setting_has_another_cache(tmp_path: Path) -> None:
    windows = some_windows()
    configs = [
        distill(),
        distill(temperature=2.0),
        distill(teacher_cache=TOP_K),
        distill(teacher_cache={"kind": "sampled"}),
    ]
    keys = [opened(tmp_path, config, windows).key for config in configs]
    keys.append(opened(tmp_path, distill(), windows[:6]).key)
    tiny_checkpoint(tmp_path / "dense", seed=5)
    keys.append(opened(tmp_path, distill(), windows).key)
    assert len(set(keys)) == len(keys)
    assert opened(tmp_path, distill(learning_rate=1e-4, ce_weight=0.3), windows).key == keys[-1]


def test_damaged_and_foreign_shards_are_named(tmp_path: Path) -> None:
    cache = written(tmp_path, distill())
    first = cache.shard(0).read_bytes()
    cache.shard(0).write_bytes(first[: len(first) // 2])
    with pytest.raises(InputError, match=r"shard-000000.safetensors is damaged .*remove it to have it written again"):
        cache.read(torch.tensor([0]), torch.device("cpu"))
    cache.shard(2).write_bytes(first)
    with pytest.raises(InputError, match="belongs to another teacher cache"):
        cache.read(torch.tensor([5]), torch.device("cpu"))


def test_more_tokens_than_the_vocabulary_has_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="k 385 is more than the model's 384 tokens"):
        opened(tmp_path, distill(teacher_cache={"kind": "top_k", "k": 385}), some_windows())


def masters(tmp_path: Path, config: Distill, windows: Windows, teacher: Any) -> dict[str, Tensor]:
    student = Student(tiny_model(seed=1, num_hidden_layers=2))
    train(student, teacher, windows, config, seed=0, scratch_dir=tmp_path, progress=Remembered())
    return student.masters


def test_all_of_the_vocabulary_teaches_what_the_teacher_itself_does(tmp_path: Path) -> None:
    """Up to the rounding of stored weights, over four steps."""
    options: dict[str, Any] = {"tokens": 4 * 4 * 16, "ce_weight": 0.3, "ce_balance": "proportional"}
    config = distill(teacher_cache={"kind": "top_k", "k": 384}, **options)
    cache, windows = written(tmp_path, config), some_windows()
    learned = masters(tmp_path, config, windows, cache)
    for name, master in masters(tmp_path, config, windows, load_model(tmp_path / "dense")).items():
        torch.testing.assert_close(master, learned[name], rtol=1e-2, atol=5e-4)


def stage_job(tmp_path: Path, config: Distill, *, student: str = "student", progress: Remembered | None = None) -> Job:
    if not (tmp_path / "dense").exists():
        tiny_checkpoint(tmp_path / "dense", seed=0, dtype=torch.bfloat16)
        tiny_checkpoint(tmp_path / "student", seed=1, dtype=torch.bfloat16, num_hidden_layers=3)
        tiny_checkpoint(tmp_path / "other", seed=2, dtype=torch.bfloat16, num_hidden_layers=2)
        tiny_text_file(tmp_path / "text.txt")
    return job_for(
        config,
        tmp_path / student,
        inputs={"source": artifact_at(tmp_path / student), "dense": artifact_at(tmp_path / "dense")},
        text=(TextSource(source=str(tmp_path / "text.txt")),),
        progress=progress,
    )


@pytest.mark.parametrize("kind", [SAMPLED, TOP_K])
def test_a_student_gets_closer_to_a_cached_teacher(tmp_path: Path, kind: dict[str, Any]) -> None:
    config = distill(tokens=60 * 8 * 16, batch_size=8, teacher_cache=kind)
    result = stage.run(stage_job(tmp_path, config))
    assert result.details["validation_kl_after"] < 0.8 * result.details["validation_kl_before"]
    facts = result.details["teacher_cache"]
    assert facts["bytes_per_token"] == facts["bytes"] / (result.details["windows"] * 16)


def test_another_student_reads_what_was_written_without_the_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[weakref.ref[Any]] = []
    load = stage.load_teacher

    def remembered(job: Job) -> Any:
        teacher = load(job)
        loaded.append(weakref.ref(teacher))
        return teacher

    def none_in_memory(done: int) -> None:
        if progress.updates[-1][1] == 8:  # a step of training, not a window of the teacher's
            assert all(teacher() is None for teacher in loaded)

    progress = Remembered(on_update=none_in_memory)
    monkeypatch.setattr(stage, "load_teacher", remembered)
    gc.disable()
    try:
        first = stage.run(stage_job(tmp_path, distill(), progress=progress))
    finally:
        gc.enable()
    assert len(loaded) == 3, "to write the cache, and to validate before and after"
    monkeypatch.setattr(stage, "write_cache", None)
    second = stage.run(stage_job(tmp_path, distill(), student="other"))
    assert second.details["teacher_cache"] == first.details["teacher_cache"]


@pytest.mark.parametrize("killed_at", [1, 10, 19])
def test_a_killed_run_ends_with_the_same_bits(tmp_path: Path, killed_at: int) -> None:
    """Killed in one of the teacher's 16 batches, or of the student's 8 steps."""
    stage.run(stage_job(tmp_path / "whole", distill()))
    shutil.rmtree(tmp_path / "home" / "teacher-cache")
    updates: list[int] = []

    def kill(done: int) -> None:
        updates.append(done)
        if len(updates) == killed_at:
            raise Killed

    with pytest.raises(Killed):
        stage.run(stage_job(tmp_path / "killed", distill(), progress=Remembered(on_update=kill)))
    stage.run(stage_job(tmp_path / "killed", distill()))
    a, b = (load_file(tmp_path / run / "student" / "out" / "model.safetensors") for run in ("whole", "killed"))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("loss", ["reverse_kl", "skewed_kl", "js"])
def test_only_forward_kl_goes_with_it(loss: str) -> None:
    with pytest.raises(ValueError, match=f"which loss {loss} cannot be computed from; use forward_kl"):
        distill(loss=loss)


def test_the_plan_shows_its_size(tmp_path: Path) -> None:
    distillation = {
        "kind": "distill", "tokens": 2048, "sequence_length": 64, "batch_size": 4, "teacher_cache": {"kind": "sampled"},
    }  # fmt: skip
    view = outlook(make_plan(load_recipe(str(tiny_recipe(tmp_path / "recipe", stages=[distillation])))), None)
    row = next(row for row in view.as_json()["steps"] if row["kind"] == "distill")
    assert row["teacher_cache_bytes_at_most"] == 2048 * (50 * 3 + 1 + 4)
