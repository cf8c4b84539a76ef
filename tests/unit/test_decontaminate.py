"""What training text is kept clear of, against sets of word tuples; and a stage that counts what it left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runs import tiny_recipe
from stage_jobs import Remembered, job_for
from stillroom.distill import decontaminate
from stillroom.distill.data import calibration_windows, contamination_of, decontamination_details, packed_windows
from stillroom.distill.decontaminate import COMMON, GRAM_WORDS, contamination, words
from stillroom.errors import InputError
from stillroom.evaluation_text import EvaluationText, evaluation_text, task_texts
from stillroom.plan import make_plan
from stillroom.recipe import TextSource, load_recipe
from tiny import tiny_tokenizer

SENTENCE = "The still was small, and the fire was low; so the rose water came slowly, drop by drop."
OTHER = "In the morning she weighed the herbs, wrote the number down, and weighed them all once again."


def grams(text: str) -> set[tuple[str, ...]]:
    """The slow reference: the n-grams themselves."""
    found = words(text)
    if len(found) < GRAM_WORDS:
        return {tuple(found)} - {()}
    return {tuple(found[i : i + GRAM_WORDS]) for i in range(len(found) - GRAM_WORDS + 1)}


some_text = st.lists(st.sampled_from(["a", "b", "C", "ß", "漢", "don't", "7,", "-"]), max_size=40).map(" ".join)


@settings(max_examples=200, deadline=None)
@given(evaluated=st.lists(some_text, max_size=30), trained=st.lists(some_text, max_size=10))
def test_a_document_is_left_out_where_sets_of_word_tuples_meet(evaluated: list[str], trained: list[str]) -> None:
    counts: dict[tuple[str, ...], int] = {}
    for different in {tuple(sorted(grams(text))) for text in evaluated}:
        for gram in different:
            counts[gram] = counts.get(gram, 0) + 1
    wanted = {gram for gram, count in counts.items() if count <= COMMON}
    found = contamination(evaluated)
    assert len(found.hashes) == len(wanted)
    assert [found.touches(text) for text in trained] == [bool(grams(text) & wanted) for text in trained]


def test_case_punctuation_and_breaks_do_not_hide_a_copy() -> None:
    found = contamination([SENTENCE])
    assert found.touches(f"He read:\n{SENTENCE.upper().replace(' ', chr(10)).replace(';', ' -- ')} And left.")
    assert not found.touches(" ".join(SENTENCE.split()[:12]))
    assert not found.touches(OTHER)
    assert not found.touches("")


def test_a_text_too_short_for_an_n_gram_matches_only_as_a_whole() -> None:
    found = contamination(["Which gas do plants take in?"])
    assert found.touches("which gas do plants take in")
    assert not found.touches("Which gas do plants take in? Carbon dioxide.")


def test_the_form_that_many_evaluation_texts_share_is_no_match() -> None:
    form = "You are a helpful assistant who answers the question below as briefly as you can:"
    found = contamination([f"{form} number {i} {OTHER} {i}" for i in range(COMMON + 1)] + [SENTENCE] * (COMMON + 1))
    assert not found.touches(form)
    assert found.touches(SENTENCE), "the same passage again and again is one text"


def test_a_system_prompt_is_no_match_and_the_rest_of_a_conversation_is() -> None:
    system, question = {"role": "system", "content": OTHER}, {"role": "user", "content": SENTENCE}
    assert not contamination([OTHER]).touches([system, {"role": "user", "content": "Well?"}])
    assert contamination([SENTENCE]).touches([system, question])


def test_more_n_grams_than_memory_may_hold_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decontaminate, "MAX_GRAMS", 10)
    found = contamination([SENTENCE, OTHER])
    assert not found.complete
    assert found.touches(SENTENCE)
    assert not found.touches(OTHER)


def rows(path: Path, *texts: str, **others: Any) -> Path:
    path.write_text("".join(json.dumps({"text": text, **others}) + "\n" for text in texts), encoding="utf-8")
    return path


def evaluated(*heldout: TextSource, files: tuple[Path, ...] = (), hub_tasks: tuple[str, ...] = ()) -> EvaluationText:
    return EvaluationText(heldout, files, hub_tasks)


def test_what_is_left_out_is_counted_once_by_source(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    clean = TextSource(source=str(rows(tmp_path / "clean.jsonl", *[f"{i} herbs in a basket" for i in range(50)])))
    dirty = TextSource(source=str(rows(tmp_path / "dirty.jsonl", f"So: {SENTENCE}", "a still", f"{SENTENCE} Yes.")))
    heldout = TextSource(source=str(rows(tmp_path / "heldout.jsonl", SENTENCE)))
    clear_of = contamination_of(evaluated(heldout), tokenizer)
    assert clear_of is not None
    windows = packed_windows([clean, dirty], {}, tokenizer, 8, 10_000, seed=0, clear_of=clear_of)
    assert "rose" not in tokenizer.decode(windows.ids.flatten())
    assert vars(clear_of.dropped["clean"]) == {"read_documents": 50, "documents": 0, "tokens": 0}
    tokens = sum(len(tokenizer(text)["input_ids"]) for text in (f"So: {SENTENCE}", f"{SENTENCE} Yes."))
    assert vars(clear_of.dropped["dirty"]) == {"read_documents": 3, "documents": 2, "tokens": tokens}

    job = job_for(None, tmp_path, inputs={}, evaluated=evaluated(heldout, hub_tasks=("mmlu",)))
    details = decontamination_details(clear_of, job)
    assert details["dirty"] == {"read_documents": 3, "documents": 2, "tokens": tokens}
    assert isinstance(job.progress, Remembered)
    assert job.progress.messages[0].startswith(f"decontamination left out 2 of 3 documents of dirty ({tokens} tokens)")
    assert "come from the hub: mmlu" in job.progress.messages[1]


def test_a_source_of_which_nothing_is_left_is_refused(tmp_path: Path) -> None:
    path = rows(tmp_path / "same.jsonl", SENTENCE, OTHER)
    source = TextSource(source=str(path))
    job = job_for(None, tmp_path, inputs={}, text=(source,), evaluated=evaluated(source))
    with pytest.raises(InputError, match=r"all 2 documents of .*same.jsonl share 13 words in a row"):
        calibration_windows(job, tiny_tokenizer(), 8, 2)


def test_only_the_measured_tokens_of_a_held_out_source_count(tmp_path: Path) -> None:
    path = rows(tmp_path / "same.jsonl", f"{SENTENCE} {SENTENCE}", OTHER)
    heldout = TextSource(source=str(path), tokens=64)
    clear_of = contamination_of(evaluated(heldout), tiny_tokenizer())
    assert clear_of is not None
    assert clear_of.touches(SENTENCE)
    assert not clear_of.touches(OTHER)


@pytest.mark.parametrize("name", ["test.jsonl", "test.csv", "test.parquet"])
def test_questions_of_a_task_are_read_with_all_that_is_nested_in_them(tmp_path: Path, name: str) -> None:
    datasets = pytest.importorskip("datasets")
    path = tmp_path / name
    table = datasets.Dataset.from_list([{"question": SENTENCE, "choices": {"text": [OTHER, "no"]}, "n": 1}])
    if name.endswith("csv"):
        table.flatten().to_csv(path)
    elif name.endswith("jsonl"):
        table.to_json(path)
    else:
        table.to_parquet(path)
    found = contamination(task_texts(path))
    assert found.touches(SENTENCE)
    assert found.touches(OTHER)


def test_a_plan_keeps_training_text_clear_of_what_is_measured(tmp_path: Path) -> None:
    question = rows(tmp_path / "test.jsonl", SENTENCE)
    train = rows(tmp_path / "train.jsonl", OTHER)
    tasks = [{"name": "arc_easy", "data": {"test": str(question), "train": str(train)}}, "mmlu"]
    path = tiny_recipe(tmp_path, evaluate={"tasks": tasks})
    keys = []
    for wanted in ("true", "false", "true"):
        recipe = load_recipe(str(path), [f"data.decontaminate={wanted}"])
        found = evaluation_text(recipe)
        assert found is None or (found.task_files, found.hub_tasks) == ((question,), ("mmlu",))
        plan = make_plan(recipe)
        assert plan.step("distill").evaluated == found
        assert plan.step("evaluate:dense").evaluated is None
        keys.append(plan.step("distill").key)
        if len(keys) == 2:
            rows(question, SENTENCE, OTHER)
    assert len(set(keys)) == 3, "the switch and the questions both decide what is trained on"
    question.unlink()
    with pytest.raises(InputError, match=r"data file .*test.jsonl does not exist"):
        make_plan(load_recipe(str(path), ["data.decontaminate=true"]))
