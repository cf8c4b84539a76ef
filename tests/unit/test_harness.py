from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from jobs import Kept
from stillroom.errors import EnvironmentCannot, InputError
from stillroom.quality import harness
from stillroom.quality.harness import check_task, find_task
from stillroom.quality.scoring import ReportingLM, run_task, task_measurements
from stillroom.recipe import Task
from tiny import tiny_model, tiny_tokenizer

QUESTIONS = [
    ("What is weighed in the morning?", ["the herbs", "the fire", "a number", "a run"], "A"),
    ("How does the rose water come?", ["at once", "slowly, drop by drop", "never", "from a recipe"], "B"),
    ("What goes in?", ["the still", "nothing", "a recipe", "the morning"], "C"),
    ("What comes out?", ["a fire", "herbs", "rose water", "a smaller model"], "D"),
    ("Where does a killed run go on?", ["where it stopped", "at the start", "nowhere", "in the still"], "A"),
    ("What is low?", ["the model", "the fire", "the number", "a drop"], "B"),
]  # fmt: skip


@pytest.fixture
def arc(tmp_path: Path) -> Path:
    """Questions in the form of ARC's files."""
    path = tmp_path / "questions.jsonl"
    rows = [
        {
            "id": str(i),
            "question": question,
            "choices": {"text": choices, "label": ["A", "B", "C", "D"]},
            "answerKey": answer,
        }
        for i, (question, choices, answer) in enumerate(QUESTIONS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)


@pytest.fixture(scope="module")
def lm() -> ReportingLM:
    return ReportingLM(tiny_model(), tiny_tokenizer(), batch_size=3)


def slow_scores(lm: ReportingLM) -> dict[str, float]:
    """Each answer scored by itself: log-probabilities of its tokens after the question, by token and by character."""
    right = {"acc": 0, "acc_norm": 0}
    for question, choices, answer in QUESTIONS:
        scores = []
        for choice in choices:
            context = lm.tokenizer(f"Question: {question}\nAnswer:", add_special_tokens=False)["input_ids"]
            whole = lm.tokenizer(f"Question: {question}\nAnswer: {choice}", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logprobs = lm.model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
            scores.append(sum(float(logprobs[i - 1, whole[i]]) for i in range(len(context), len(whole))))
        by_length = [score / len(choice) for score, choice in zip(scores, choices, strict=True)]
        right["acc"] += scores.index(max(scores)) == "ABCD".index(answer)
        right["acc_norm"] += by_length.index(max(by_length)) == "ABCD".index(answer)
    return {metric: count / len(QUESTIONS) for metric, count in right.items()}


@pytest.mark.usefixtures("no_hub")
def test_local_questions_are_scored_as_one_answer_at_a_time_would_be(lm: ReportingLM, arc: Path) -> None:
    progress = Kept()
    measured = run_task(lm, Task(name="arc_easy", data={"test": str(arc)}), seed=0, progress=progress)
    by_name = {m.name: m for m in measured}
    expected = slow_scores(lm)
    assert set(by_name) == {"quality.arc_easy.acc", "quality.arc_easy.acc_norm"}
    for metric, value in expected.items():
        m = by_name[f"quality.arc_easy.{metric}"]
        assert m.value == pytest.approx(value)
        assert (m.n, m.unit, m.higher_is_better) == (6, "fraction", True)
        assert m.stderr == pytest.approx(math.sqrt(value * (1 - value) / 5))
    assert "arc_easy: 6 questions" in progress.lines
    assert progress.updates[-1][2] == "sequences"


@pytest.mark.usefixtures("no_hub")
def test_a_limit_draws_the_same_questions_for_every_model(lm: ReportingLM, arc: Path) -> None:
    task = Task(name="arc_easy", data={"test": str(arc)}, limit=3)
    first = run_task(lm, task, seed=5, progress=Kept())
    again = run_task(lm, task, seed=5, progress=Kept())
    assert first == again
    assert {m.n for m in first} == {3}


@pytest.mark.usefixtures("no_hub")
def test_data_that_does_not_fit_the_task_is_bad_input(lm: ReportingLM, tmp_path: Path) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text("this is no json\n")
    with pytest.raises(InputError, match="'arc_easy' cannot be read from its `data` files"):
        run_task(lm, Task(name="arc_easy", data={"test": str(path)}), seed=0, progress=Kept())


@pytest.mark.parametrize(("name", "split"), [("arc_easy", "test"), ("hellaswag", "validation"), ("piqa", "validation")])
def test_a_task_is_found_with_the_split_that_it_measures(name: str, split: str) -> None:
    found = find_task(name)
    assert found is not None
    assert found.measured_split == split


def test_an_unknown_task_is_refused_with_close_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "_index", lambda root: {"arc_easy": None, "arc_challenge": None, "gsm8k": None})
    with pytest.raises(InputError, match=r"'arc_esy' is not one of lm-eval's 3 tasks and groups; close: arc_easy"):
        check_task(Task(name="arc_esy"))


@pytest.mark.slow
def test_the_whole_index_knows_groups_and_what_is_close() -> None:
    assert find_task("mmlu") is None
    assert find_task("ai2_arc") is None
    with pytest.raises(InputError, match="close: arc_easy"):
        check_task(Task(name="arc_esy"))


def test_a_group_is_found_but_takes_no_data(arc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "_task_files", lambda root, name: iter(()))
    monkeypatch.setattr(harness, "_index", lambda root: {"mmlu": type("Entry", (), {"yaml_path": None})()})
    assert find_task("mmlu") is None
    with pytest.raises(InputError, match="'mmlu' is a group of tasks"):
        check_task(Task(name="mmlu", data={"test": str(arc)}))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"data": {"test": "./nowhere.jsonl"}}, r"nowhere\.jsonl does not exist"),
        ({"data": {"validation": "ARC"}}, r"takes its questions from split 'test'; `data` has validation"),
        ({"data": {"test": "ARC", "dev": "ARC"}}, r"has no split 'dev'; it has test, train, validation"),
        ({"data": {"test": "ARC"}, "num_fewshot": 5}, r"few-shot examples from split 'train'"),
        ({"data": {"test": "EMPTY"}}, r"is empty"),
        ({"data": {"test": "TEXT"}}, r"ends in none of \.jsonl"),
    ],
)
def test_data_files_are_checked_before_any_long_work(
    more: dict[str, Any], message: str, arc: Path, tmp_path: Path
) -> None:
    files = {"ARC": arc, "EMPTY": tmp_path / "empty.jsonl", "TEXT": tmp_path / "text.txt"}
    files["EMPTY"].write_text("")
    files["TEXT"].write_text("words")
    more["data"] = {split: str(files.get(path, path)) for split, path in more["data"].items()}
    with pytest.raises(InputError, match=message):
        check_task(Task(name="arc_easy", **more))


def test_examples_that_a_task_would_ignore_are_refused() -> None:
    found = harness.TaskFile(Path("x.yaml"), {"task": "x", "num_fewshot": 0, "test_split": "test"})
    with pytest.raises(InputError, match="num_fewshot 5 has no effect"):
        harness._check_fewshot(Task(name="x", num_fewshot=5), found)


@pytest.mark.usefixtures("no_hub")
def test_without_data_and_without_a_hub_the_user_is_told_to_give_files() -> None:
    with pytest.raises(EnvironmentCannot, match=r"allenai/ai2_arc.*give local files instead"):
        check_task(Task(name="arc_easy"))


@pytest.mark.usefixtures("no_hub")
def test_a_dataset_in_the_cache_needs_no_hub(tmp_path: Path) -> None:
    (tmp_path / "empty" / "datasets" / "allenai___ai2_arc").mkdir(parents=True)
    check_task(Task(name="arc_easy"))


def test_a_hub_that_does_not_answer_counts_as_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(url: str, timeout: float) -> None:
        raise httpx.ConnectError("no route")

    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(httpx, "head", refuse)
    with pytest.raises(EnvironmentCannot, match="the hub cannot be reached"):
        check_task(Task(name="arc_easy"))


def test_results_of_filters_groups_and_tags_are_named() -> None:
    results = {
        "results": {"gsm8k": {"alias": "gsm8k", "sample_len": 8, "exact_match,strict-match": 0.25,
                              "exact_match_stderr,strict-match": 0.16, "exact_match,flexible-extract": 0.5,
                              "exact_match_stderr,flexible-extract": "N/A"}},
        "n-samples": {"gsm8k": {"original": 100, "effective": 8}},
        "higher_is_better": {"gsm8k": {"exact_match": True}},
    }  # fmt: skip
    strict, flexible = task_measurements("gsm8k", results)
    assert (strict.name, strict.stderr, strict.n) == ("quality.gsm8k.exact_match@strict-match", 0.16, 8)
    assert (flexible.name, flexible.stderr) == ("quality.gsm8k.exact_match@flexible-extract", None)
    assert task_measurements("a_tag", results) == (strict, flexible)


def test_checking_tasks_needs_no_torch(arc: Path) -> None:
    code = (
        "import sys; from stillroom.quality.harness import check_task; from stillroom.recipe import Task;"
        f"check_task(Task(name='arc_easy', data={{'test': {str(arc)!r}}})); sys.exit('torch' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}, check=False).returncode
        == 0
    )
