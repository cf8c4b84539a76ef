"""The text stage on tiny real models: what is sampled, how documents open and end, and that a kill changes nothing."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from runs import tiny_recipe
from stage_jobs import Killed, Remembered, artifact_at, job_for, kill_at
from stillroom.distill import teacher
from stillroom.distill.decode import sample, write
from stillroom.distill.teacher import Draft, Opening, distinct_share, opening_of, openings_of
from stillroom.errors import InputError
from stillroom.plan import make_plan
from stillroom.recipe import TextSource, load_recipe
from stillroom.stage import Job
from tiny import FAMILIES, tiny_checkpoint, tiny_model, tiny_tokenizer

NEVER = frozenset({-1})


def drafts_of(number: int, ends: frozenset[int] = NEVER, prefix: tuple[int, ...] = (0,)) -> list[Draft]:
    return [Draft(Opening(prefix, (), ends)) for _ in range(number)]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_nearly_without_chance_is_the_models_first_choice(family: str) -> None:
    """48 tokens, beyond Gemma's sliding window of 32; one at a time by our attention, at once by transformers' own."""
    rows = drafts_of(2, prefix=(0, 40, 41))
    write(tiny_model(family), rows, max_tokens=48, temperature=1e-5, generator=torch.Generator(), on_step=lambda: None)
    assert rows[0].ids == rows[1].ids
    ids = torch.tensor([rows[0].ids])
    with torch.no_grad():
        logits = tiny_model(family)(ids).logits[0, 2:-1]
    chosen = logits.gather(1, ids[0, 3:, None]).squeeze(1)
    torch.testing.assert_close(chosen, logits.max(dim=1).values, rtol=0.0, atol=2e-3)


def test_rows_that_end_early_do_not_disturb_the_others() -> None:
    """The same draws with and without ends agree up to the first end of any row."""
    model, ends = tiny_model(), frozenset(range(100, 140))
    runs = []
    for some_ends in (NEVER, ends):
        rows = drafts_of(8, some_ends)
        generator = torch.Generator().manual_seed(0)
        write(model, rows, max_tokens=40, temperature=1.0, generator=generator, on_step=lambda: None)
        runs.append([row.ids for row in rows])
    first_end = min(i for ids in runs[0] for i, token in enumerate(ids) if token in ends)
    assert [ids[: first_end + 1] for ids in runs[0]] == [ids[: first_end + 1] for ids in runs[1]]
    assert all(len(ids) == 40 or ids[-1] in ends for ids in runs[1])
    assert not any(token in ends for ids in runs[1] for token in ids[:-1])


def test_rows_left_after_dropping_others_still_read_their_own_past() -> None:
    """One row goes on alone after the others ended; greedy, so it must go on as if it had been alone."""
    model = tiny_model(seed=3)
    alone = drafts_of(1, prefix=(0, 50))
    write(model, alone, max_tokens=30, temperature=1e-4, generator=torch.Generator(), on_step=lambda: None)
    others = [Draft(Opening((0, 60 + i), (), frozenset(range(384)))) for i in range(5)]
    together = [*others[:3], *drafts_of(1, prefix=(0, 50)), *others[3:]]
    write(model, together, max_tokens=30, temperature=1e-4, generator=torch.Generator(), on_step=lambda: None)
    assert [len(row.ids) for row in others] == [3] * 5
    assert together[3].ids == alone[0].ids


def test_tokens_are_drawn_with_their_probabilities() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, float("-inf"), -1.0])
    drawn = sample(logits.repeat(40_000, 1), 2.0, torch.Generator().manual_seed(0))
    share = torch.bincount(drawn, minlength=5) / 40_000
    torch.testing.assert_close(share, torch.softmax(logits / 2.0, 0), atol=0.01, rtol=0.0)
    assert share[3] == 0


def test_a_chat_model_is_led_through_message_and_answer() -> None:
    tokenizer = tiny_tokenizer()
    opening = opening_of(tiny_model(), tokenizer)
    assert tokenizer.decode(opening.prefix) == "<|user|>"
    assert tokenizer.decode(opening.answer) == "<|end|><|assistant|>"
    draft = Draft(opening)
    for token in (50, 51, 1, -7, 52, 1):  # -7: whatever was sampled while the template's token was due
        draft.take(token)
    end, assistant = opening.answer
    assert draft.ids == [*opening.prefix, 50, 51, end, assistant, 52, 1]
    assert draft.done


def test_a_base_model_starts_from_bos_and_ends_at_the_first_eos() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    opening = opening_of(tiny_model(), tokenizer)
    assert opening == Opening(prefix=(0,), answer=(), ends=frozenset({1}))


def test_a_model_without_an_end_token_is_refused() -> None:
    tokenizer, model = tiny_tokenizer(), tiny_model()
    tokenizer.eos_token = None
    model.generation_config.eos_token_id = None
    with pytest.raises(InputError, match="no end-of-text token"):
        opening_of(model, tokenizer)


def text_job(tmp_path: Path, tokens: int = 3000, progress: Remembered | None = None, **changes: Any) -> Job:
    if not (tmp_path / "dense").exists():
        tiny_checkpoint(tmp_path / "dense", dtype=torch.bfloat16)
    config = TextSource(source="teacher", tokens=tokens, **changes)
    return job_for(config, tmp_path, inputs={"source": artifact_at(tmp_path / "dense")}, progress=progress)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short documents and small batches, so that there are several."""
    monkeypatch.setattr(teacher, "DOCUMENT_TOKENS", 64)
    monkeypatch.setattr(teacher, "BATCH_SIZE", 16)


@pytest.mark.usefixtures("small")
def test_the_text_is_written_with_its_special_tokens(tmp_path: Path) -> None:
    progress = Remembered()
    result = teacher.run(text_job(tmp_path, progress=progress))
    rows = [json.loads(line) for line in (tmp_path / "out" / "text.jsonl").read_text().splitlines()]
    assert result.tokens is not None
    assert result.tokens >= 3000
    assert result.tokens == sum(row["tokens"] for row in rows)
    assert all(row["source"] == "teacher" for row in rows)
    assert all(row["text"].startswith("<|user|>") for row in rows)
    assert progress.updates[-1][1] == 3000
    assert len(list((tmp_path / "scratch").glob("batch-*.jsonl"))) >= 3


@pytest.mark.usefixtures("small")
def test_a_killed_run_ends_with_the_same_text(tmp_path: Path) -> None:
    teacher.run(text_job(tmp_path / "whole"))
    with pytest.raises(Killed):
        teacher.run(text_job(tmp_path / "killed", progress=kill_at(1700)))
    kept = list((tmp_path / "killed" / "scratch").glob("batch-*.jsonl"))
    assert kept, "the first batch was finished"
    stamps = [path.stat().st_mtime_ns for path in kept]
    teacher.run(text_job(tmp_path / "killed"))
    assert [path.stat().st_mtime_ns for path in kept] == stamps, "and was not written again"
    whole, resumed = (tmp_path / name / "out" / "text.jsonl" for name in ("whole", "killed"))
    assert whole.read_bytes() == resumed.read_bytes()


@pytest.mark.usefixtures("small")
def test_text_that_repeats_itself_is_warned_about(tmp_path: Path) -> None:
    progress = Remembered()
    result = teacher.run(text_job(tmp_path, tokens=1000, progress=progress, temperature=1e-3))
    assert result.details["distinct_share"] < 0.6
    assert any(message.startswith("warning: the teacher repeats itself") for message in progress.messages)


def test_the_distinct_share_tells_repetition_from_prose() -> None:
    prose = "In the morning she weighed the herbs, wrote the number down, and then she went out to look for more."
    assert distinct_share([prose]) == 1.0
    assert distinct_share([prose * 20]) < 0.1
    assert distinct_share([prose + "Yes, of course it is.", prose + "No, certainly it is not."]) == 1.0
    assert distinct_share([]) == 0.0


def documents_file(path: Path, *documents: Any) -> str:
    keyed = [{"text": d} if isinstance(d, str) else {"messages": d} for d in documents]
    path.write_text("".join(json.dumps(row) + "\n" for row in keyed), encoding="utf-8")
    return str(path)


def prefixes(job: Job, number: int, *, chat: bool = True) -> list[str]:
    """What the first documents begin with, spelled out."""
    tokenizer = tiny_tokenizer()
    if not chat:
        tokenizer.chat_template = None
    found = itertools.islice(openings_of(tiny_model(), tokenizer, job), number)
    return [tokenizer.decode(opening.prefix) for opening in found]


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How?"},
    {"role": "assistant", "content": "Slowly."},
]


def test_prompts_are_answered_in_order_and_again_from_the_first(tmp_path: Path) -> None:
    progress = Remembered()
    prompts = documents_file(tmp_path / "prompts.jsonl", "Why?", "word " * 400, CHAT)
    job = text_job(tmp_path, progress=progress, prompts=prompts)
    first, second = "<|user|>Why?<|end|><|assistant|>", "<|system|>Be brief.<|end|><|user|>How?<|end|><|assistant|>"
    assert prefixes(job, 5) == [first, second, first, second, first]
    assert progress.messages == ["passed over 1 prompts of more than 256 tokens"]
    assert prefixes(text_job(tmp_path, prompts=documents_file(tmp_path / "p.jsonl", "Why?")), 1, chat=False) == ["Why?"]


def test_the_first_tokens_of_documents_are_continued(tmp_path: Path) -> None:
    text = "The still was small and the fire was low."
    job = text_job(tmp_path, continues=documents_file(tmp_path / "a.jsonl", text, CHAT), first_tokens=4)
    tokenizer = tiny_tokenizer()
    cut = [tokenizer.decode(tokenizer(t)["input_ids"][:4]) for t in (text, "<|system|>Be brief.<|end|>")]
    assert prefixes(job, 3) == [*cut, cut[0]]


@pytest.mark.parametrize(
    ("documents", "message"),
    [(["word " * 400], "has no prompt of at most 256 tokens"), ([CHAT[2:]], "without a user's message")],
)
def test_prompts_that_cannot_be_answered_are_refused(tmp_path: Path, documents: list[Any], message: str) -> None:
    job = text_job(tmp_path, prompts=documents_file(tmp_path / "prompts.jsonl", *documents))
    with pytest.raises(InputError, match=message):
        prefixes(job, 1)


@pytest.mark.usefixtures("small")
def test_a_killed_run_goes_on_with_the_next_prompts(tmp_path: Path) -> None:
    prompts = documents_file(tmp_path / "prompts.jsonl", *[f"number {i}?" for i in range(30)])
    teacher.run(text_job(tmp_path / "whole", prompts=prompts))
    with pytest.raises(Killed):
        teacher.run(text_job(tmp_path / "killed", progress=kill_at(1700), prompts=prompts))
    teacher.run(text_job(tmp_path / "killed", prompts=prompts))
    whole, resumed = ((tmp_path / name / "out" / "text.jsonl").read_text() for name in ("whole", "killed"))
    assert whole == resumed
    asked = [json.loads(line)["text"].partition("<|end|>")[0] for line in whole.splitlines()]
    assert asked == [f"<|user|>number {i % 30}?" for i in range(len(asked))]


def test_what_the_teacher_starts_from_decides_about_its_text(tmp_path: Path) -> None:
    path = documents_file(tmp_path / "prompts.jsonl", "Why?")
    teacher_text = {"source": "teacher", "tokens": 256, "prompts": path}
    recipe = tiny_recipe(tmp_path, data={"train": [teacher_text]})
    before = make_plan(load_recipe(str(recipe))).step("text:train.teacher")
    assert [source.source for source in before.text] == [path]
    documents_file(tmp_path / "prompts.jsonl", "Why not?")
    assert make_plan(load_recipe(str(recipe))).step("text:train.teacher").key != before.key
    (tmp_path / "prompts.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match="has neither 'text' nor 'messages'"):
        make_plan(load_recipe(str(recipe)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "a.txt", "prompts": "b.txt"}, "go with text source `teacher`"),
        ({"prompts": "a.txt", "continues": "b.txt"}, "not both"),
        ({"prompts": {"source": "teacher", "tokens": 64}}, "cannot be `teacher`"),
    ],
)
def test_starts_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextSource.model_validate({"source": "teacher", "tokens": 64} | changes)
