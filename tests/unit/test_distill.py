"""The distill stage on tiny real models: it learns, it goes on after a kill with the same bits, it refuses early."""

from __future__ import annotations

import copy
import itertools
import json
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from stage_jobs import Killed, Remembered, artifact_at, job_for, kill_at
from stillroom.distill import stage
from stillroom.distill.closeness import closeness
from stillroom.distill.packing import Windows
from stillroom.distill.train import (
    CHECKPOINT,
    Point,
    Student,
    learning_rate,
    load_checkpoint,
    save_training,
    train,
    windows_of_rank,
    windows_of_step,
)
from stillroom.errors import EnvironmentCannot, InputError
from stillroom.recipe import Distill, TextSource
from stillroom.stage import Job
from tiny import tiny_checkpoint, tiny_model, tiny_text_file


def distill(**overrides: Any) -> Distill:
    fields: dict[str, Any] = {
        "tokens": 8 * 4 * 16, "sequence_length": 16, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-3,
        "min_learning_rate": 1e-4, "chunk_tokens": 10, "save_every_steps": 3, "weight_decay": 0.01,
    }  # fmt: skip
    return Distill(**(fields | overrides))


def distill_job(tmp_path: Path, config: Distill, *, progress: Remembered | None = None, **student: Any) -> Job:
    """A 4-layer teacher and a student of 3 layers, on tiny English."""
    if not (tmp_path / "dense").exists():
        tiny_checkpoint(tmp_path / "dense", seed=0, dtype=torch.bfloat16)
        fields: dict[str, Any] = {"seed": 1, "dtype": torch.bfloat16, "num_hidden_layers": 3}
        tiny_checkpoint(tmp_path / "student", **(fields | student))
        tiny_text_file(tmp_path / "text.txt")
    return job_for(
        config,
        tmp_path,
        inputs={"source": artifact_at(tmp_path / "student"), "dense": artifact_at(tmp_path / "dense")},
        text=(TextSource(source=str(tmp_path / "text.txt")),),
        progress=progress,
    )


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def test_a_student_gets_closer_to_its_teacher(tmp_path: Path) -> None:
    progress = Remembered()
    result = stage.run(distill_job(tmp_path, distill(tokens=60 * 8 * 16, batch_size=8), progress=progress))
    assert result.tokens == 60 * 8 * 16
    assert result.details["steps"] == 60
    assert result.details["validation_kl_after"] < 0.8 * result.details["validation_kl_before"]
    assert result.details["validation_agreement_after"] > result.details["validation_agreement_before"]
    assert result.details["last_loss"] < result.details["first_loss"]
    assert progress.updates[-1][:2] == (60, 60)
    (warning,) = result.details["warnings"]
    assert warning.startswith("100% of the training text is from text")
    assert f"warning: {warning}" in progress.messages
    curve = json.loads((tmp_path / "out" / "loss.json").read_text())
    assert [point["step"] for point in curve] == list(range(1, 61))
    assert curve[-1]["tokens"] == 60 * 8 * 16


def test_the_result_is_a_checkpoint_of_the_students_form(tmp_path: Path) -> None:
    stage.run(distill_job(tmp_path, distill()))
    out, source = weights(tmp_path / "out"), weights(tmp_path / "student")
    assert {name: (t.shape, t.dtype) for name, t in out.items()} == {
        name: (t.shape, t.dtype) for name, t in source.items()
    }
    assert "lm_head.weight" not in out, "tied embeddings stay tied"
    assert any(not torch.equal(out[name], source[name]) for name in out)
    assert (tmp_path / "out" / "tokenizer.json").exists()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert config["num_hidden_layers"] == 3
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generate(torch.tensor([[0, 10, 11]]), max_new_tokens=3).shape == (1, 6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes_come_out_as_they_came(tmp_path: Path, dtype: torch.dtype) -> None:
    stage.run(distill_job(tmp_path, distill(), dtype=dtype))
    assert {t.dtype for t in weights(tmp_path / "out").values()} == {dtype}


BALANCED: dict[str, Any] = {"loss": "js", "temperature": 2.0, "ce_weight": 0.5, "ce_balance": "proportional"}


@pytest.mark.parametrize(("killed_after", "options"), [(2, {}), (3, {}), (7, {}), (2, BALANCED), (4, BALANCED)])
def test_a_killed_run_ends_with_the_same_bits(tmp_path: Path, killed_after: int, options: dict[str, Any]) -> None:
    stage.run(distill_job(tmp_path / "whole", distill(**options)))

    with pytest.raises(Killed):
        stage.run(distill_job(tmp_path / "killed", distill(**options), progress=kill_at(killed_after)))
    again = Remembered()
    result = stage.run(distill_job(tmp_path / "killed", distill(**options), progress=again))

    assert again.updates[0][0] == killed_after - killed_after % 3 + 1, "goes on after the last checkpoint"
    assert result.details["steps"] == 8
    whole, resumed = weights(tmp_path / "whole" / "out"), weights(tmp_path / "killed" / "out")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_micro_batches_and_chunks_do_not_change_what_is_learned(tmp_path: Path) -> None:
    windows = torch.randint(0, 384, (16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    teacher, learned = tiny_model(seed=0), []
    for micro_batch_size, chunk_tokens in ((4, 1000), (1, 7)):
        config = distill(micro_batch_size=micro_batch_size, chunk_tokens=chunk_tokens, ce_weight=0.3, tokens=4 * 4 * 16)
        student = Student(tiny_model(seed=1, num_hidden_layers=2))
        train(student, teacher, Windows(windows), config, seed=0, scratch_dir=tmp_path, progress=Remembered())
        learned.append(student.masters)
    for name, master in learned[0].items():
        torch.testing.assert_close(master, learned[1][name], rtol=1e-4, atol=1e-5)


def train_tiny(tmp_path: Path, config: Distill, **options: Any) -> tuple[list[Point], Student]:
    """A student of 2 layers on 16 random windows."""
    windows = torch.randint(0, 384, (16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    student = Student(tiny_model(seed=1, num_hidden_layers=2))
    teacher, progress = tiny_model(seed=0), Remembered()
    return train(
        student, teacher, Windows(windows), config, seed=0, scratch_dir=tmp_path, progress=progress, **options
    ), student


@pytest.mark.parametrize("loss", ["reverse_kl", "skewed_kl", "js"])
def test_every_loss_brings_the_student_closer(tmp_path: Path, loss: str) -> None:
    history, _ = train_tiny(tmp_path, distill(tokens=30 * 4 * 16, loss=loss))
    assert history[-1].divergence < 0.8 * history[0].divergence


def test_balanced_cross_entropy_has_its_share_of_the_loss(tmp_path: Path) -> None:
    """Of the first step's loss exactly; of a later one's by the ratio a step before it."""
    weights = {"temperature": 2.0, "ce_weight": 0.25}
    history, _ = train_tiny(tmp_path, distill(**weights, ce_balance="proportional", tokens=4 * 4 * 16))
    first, *_ = history
    assert first.loss == pytest.approx(4 * first.divergence, rel=1e-5)
    for before, point in itertools.pairwise(history):
        ratio = 4 * before.divergence / before.ce
        assert point.loss == pytest.approx(0.75 * 4 * point.divergence + 0.25 * ratio * point.ce, rel=1e-5)


def test_balancing_does_not_depend_on_micro_batches(tmp_path: Path) -> None:
    masters = []
    for micro_batch_size in (4, 1):
        config = distill(**BALANCED, micro_batch_size=micro_batch_size, tokens=4 * 4 * 16)
        masters.append(train_tiny(tmp_path, config)[1].masters)
    for name, master in masters[0].items():
        torch.testing.assert_close(master, masters[1][name], rtol=1e-4, atol=1e-5)


def test_positions_that_do_not_count_teach_nothing(tmp_path: Path) -> None:
    """The prediction of one token in a row counts, so what comes after that token is not seen at all."""
    windows = torch.randint(0, 384, (8, 16), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    counted = torch.zeros(8, 16, dtype=torch.bool)
    counted[:, 5] = True
    changed = windows.clone()
    changed[:, 7:] = 1
    learned = []
    for some in (windows, changed):
        student = Student(tiny_model(seed=1, num_hidden_layers=2))
        seen, config = Windows(some, counted=counted), distill(tokens=2 * 4 * 16, ce_weight=0.5)
        train(student, tiny_model(seed=0), seen, config, seed=0, scratch_dir=tmp_path, progress=Remembered())
        learned.append(student.masters)
    for name, master in learned[0].items():
        torch.testing.assert_close(master, learned[1][name], rtol=1e-5, atol=1e-7)


def test_packed_documents_are_learned_as_if_each_were_alone(tmp_path: Path) -> None:
    """The step's loss is the mean over the documents' own tokens, and so is closeness."""
    windows = torch.randint(0, 384, (4, 16), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    positions = torch.tensor([[*range(5), *range(11)]], dtype=torch.int32).repeat(4, 1)
    packed, config = Windows(windows, positions), distill(tokens=4 * 16, micro_batch_size=2)
    teacher, model = tiny_model(seed=0), tiny_model(seed=1, num_hidden_layers=2)
    with torch.no_grad():
        parts = [
            [m(part.long()).logits.log_softmax(-1) for m in (teacher, model)]
            for part in (windows[:, :5], windows[:, 5:])
        ]
    kl = sum(float((log_p.exp() * (log_p - log_q)).sum()) for log_p, log_q in parts) / windows.numel()
    assert closeness(model, teacher, packed, config).kl == pytest.approx(kl, rel=1e-4)
    assert closeness(model, teacher, Windows(windows), config).kl != pytest.approx(kl, rel=1e-2)
    history = train(Student(model), teacher, packed, config, seed=0, scratch_dir=tmp_path, progress=Remembered())
    assert history[0].divergence == pytest.approx(kl, rel=1e-4)


def test_one_step_is_torchs_own_adamw_on_the_naive_loss(tmp_path: Path) -> None:
    """The whole step against the textbook: whole logits, torch's KL, autograd, clip, AdamW."""
    windows = torch.randint(0, 384, (4, 16), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    config = distill(tokens=4 * 16, warmup_fraction=0.0, temperature=2.0)
    teacher, model = tiny_model(seed=0), tiny_model(seed=1, num_hidden_layers=2)
    naive = copy.deepcopy(model)
    student = Student(model)
    history = train(student, teacher, Windows(windows), config, seed=0, scratch_dir=tmp_path, progress=Remembered())

    ids = windows.long()
    with torch.no_grad():
        log_p = (teacher(ids).logits / 2.0).log_softmax(-1)
    log_q = (naive(ids).logits / 2.0).log_softmax(-1)
    loss = 4.0 * torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum") / ids.numel()
    torch.autograd.backward(loss)
    norm = torch.nn.utils.clip_grad_norm_(naive.parameters(), config.max_grad_norm)
    groups = [
        {"params": [p for p in naive.parameters() if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in naive.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95)).step()

    assert history[0].loss == pytest.approx(float(loss.detach()), rel=1e-5)
    assert history[0].grad_norm == pytest.approx(float(norm), rel=1e-4)
    for name, parameter in naive.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=1e-4, atol=1e-5)


def test_the_rate_warms_up_and_falls_along_a_cosine() -> None:
    config = distill(tokens=100 * 4 * 16, warmup_fraction=0.1)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[9] == pytest.approx(1e-3)
    assert rates[99] == pytest.approx(1e-4)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert learning_rate(0, distill(tokens=4 * 16, warmup_fraction=0.0)) == pytest.approx(1e-3)


def test_every_window_is_seen_once_an_epoch() -> None:
    seen = torch.cat([windows_of_step(step, 10, 4, seed=3) for step in range(5)])
    assert sorted(seen[:10].tolist()) == list(range(10))
    assert sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.integers(1, 24), st.integers(0, 9), st.integers(0, 9))
def test_any_number_of_ranks_sees_the_same_windows_in_a_step(
    num_windows: int, batch_size: int, step: int, seed: int
) -> None:
    """And a step's windows are the same whichever steps were asked for before it."""
    stream = torch.cat([windows_of_step(s, num_windows, batch_size, seed) for s in range(step + 1)])
    chosen = windows_of_step(step, num_windows, batch_size, seed)
    assert stream[-batch_size:].tolist() == chosen.tolist()
    for world_size in range(1, batch_size + 2):
        if batch_size % world_size:
            with pytest.raises(InputError, match=f"batch_size {batch_size} cannot be shared out among {world_size} ra"):
                windows_of_rank(chosen, 0, world_size)
            continue
        parts = [windows_of_rank(chosen, rank, world_size) for rank in range(world_size)]
        assert {len(part) for part in parts} == {batch_size // world_size}
        assert torch.cat(parts).tolist() == chosen.tolist()


@pytest.mark.parametrize("masked", [False, True])
def test_closeness_is_the_models_own(masked: bool) -> None:
    teacher, model = tiny_model(seed=0), tiny_model(seed=1)
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(0, 384, (3, 16), generator=generator, dtype=torch.int32)
    counted = torch.rand(3, 16, generator=generator) < 0.5 if masked else None
    with torch.no_grad():
        log_p, log_q = (m(windows.long()).logits.double().log_softmax(-1) for m in (teacher, model))
    at = torch.ones(3, 16, dtype=torch.bool) if counted is None else counted
    found = closeness(model, teacher, Windows(windows, counted=counted), distill())
    assert found.kl == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1)[at].mean()), rel=1e-5)
    assert found.agreement == pytest.approx(float((log_p.argmax(-1) == log_q.argmax(-1))[at].float().mean()))


def test_a_model_agrees_with_itself() -> None:
    windows = torch.randint(0, 384, (3, 16), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    found = closeness(tiny_model(seed=0), tiny_model(seed=0), Windows(windows), distill())
    assert found.kl == pytest.approx(0.0, abs=1e-6)
    assert found.agreement == 1.0


def trained(model: PreTrainedModel) -> tuple[Student, torch.optim.AdamW]:
    """A student with one step behind it."""
    student = Student(model)
    optimizer = torch.optim.AdamW(list(student.masters.values()), lr=1e-3)
    optimizer.step()
    return student, optimizer


def test_a_full_disk_while_saving_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    student, optimizer = trained(tiny_model())
    path = tmp_path / CHECKPOINT
    save_training(path, student, optimizer, [])
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then writing fails with EFBIG, as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(EnvironmentCannot, match="make room and run again"):
            save_training(path, student, optimizer, [])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [CHECKPOINT]


def test_a_checkpoint_of_another_student_is_refused(tmp_path: Path) -> None:
    save_training(tmp_path / CHECKPOINT, *trained(tiny_model(num_hidden_layers=2)), [])
    with pytest.raises(InputError, match="is no checkpoint of this training"):
        load_checkpoint(tmp_path / CHECKPOINT, *trained(tiny_model(num_hidden_layers=3)))


def test_a_loss_that_is_no_number_is_named_with_what_to_do(tmp_path: Path) -> None:
    model = tiny_model(seed=1)
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[0] = float("nan")
    with pytest.raises(InputError, match=r"broke down at step 1 .*lower learning_rate"):
        train(
            Student(model), tiny_model(), Windows(torch.ones(8, 16, dtype=torch.int32)), distill(), seed=0,
            scratch_dir=tmp_path, progress=Remembered(),
        )  # fmt: skip


def test_a_teacher_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    job = distill_job(tmp_path, distill(), vocab_size=400)
    with pytest.raises(InputError, match="the student has 400 tokens, the teacher 384"):
        stage.run(job)


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    job = distill_job(tmp_path, distill())
    path = tmp_path / "student" / "tokenizer.json"
    path.write_text(path.read_text().replace("<|user|>", "<|human|>"))
    with pytest.raises(InputError, match=r"the tokenizers of student .* differ"):
        stage.run(job)


def test_a_sequence_beyond_the_models_positions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="sequence_length 4096 is beyond the model's 2048 positions"):
        stage.run(distill_job(tmp_path, distill(sequence_length=4096, tokens=4 * 4096)))


def test_text_shorter_than_a_sequence_is_refused(tmp_path: Path) -> None:
    job = distill_job(tmp_path, distill(sequence_length=1024, tokens=4 * 1024))
    (tmp_path / "text.txt").write_text("too short")
    with pytest.raises(InputError, match="a window needs 1024"):
        stage.run(job)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_disk_without_room_for_checkpoints_is_found_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = distill_job(tmp_path, distill())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(EnvironmentCannot, match="distillation checkpoints need"):
        stage.run(job)
