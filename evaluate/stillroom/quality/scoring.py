"""Run lm-eval tasks on a model that is already open, from local data files where the recipe gives them.

A task with local data is a YAML in a temporary folder that includes the official one and replaces only the data, so
prompt, metric and few-shot format stay lm-eval's own. Two choices differ from lm-eval's command line:

- `limit` draws questions with the recipe's seed, where `--limit` takes the first ones: HellaSwag's file, for one, is
  sorted by source, and its first questions are not like the rest. Every variant gets the same questions.
- Log-probabilities are float32. In bfloat16 a continuation's -200 nats are known to 1 nat only, and answers tie.
"""

from __future__ import annotations

import logging
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets.exceptions import DatasetNotFoundError
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stillroom.artifact import Measurement
from stillroom.errors import EnvironmentCannot, InputError
from stillroom.quality.harness import SPLITS, TaskFile, check_task, data_format, find_task
from stillroom.recipe import Task
from stillroom.stage import Progress

UNITS = {"perplexity": "ppl", "word_perplexity": "ppl", "byte_perplexity": "ppl", "bits_per_byte": "bits/byte"}
"""Of lm-eval's metrics; every other one is a fraction or a score of its own."""


class ReportingLM(HFLM):  # type: ignore[misc]  # lm-eval is not typed
    """lm-eval's model, which says how many sequences it has scored instead of drawing its own bars."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> None:
        logging.getLogger("lm_eval").setLevel(
            logging.ERROR
        )  # it warns of every option that an open model leaves unused
        super().__init__(
            pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size, softmax_dtype=torch.float32
        )
        self.on_sequences: Callable[[int], None] = lambda done: None
        self._sequences = 0

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        logits: torch.Tensor = super()._model_call(inps, *args, **kwargs)
        self._sequences += inps.shape[0]
        self.on_sequences(self._sequences)
        return logits

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
        self._sequences = 0
        return super().loglikelihood(requests, disable_tqdm=True)

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
        return super().generate_until(requests, disable_tqdm=True)


def run_task(lm: ReportingLM, task: Task, *, seed: int, progress: Progress) -> tuple[Measurement, ...]:
    """`quality.TASK.METRIC` for each metric of the task, with lm-eval's standard error.

    Raises InputError or EnvironmentCannot where the task is unknown or its data cannot be had.
    """
    check_task(task)
    with tempfile.TemporaryDirectory(prefix="stillroom-task-") as folder:
        loaded = _load(task, Path(folder))
        questions = {name: _draw(len(leaf.eval_docs), task.limit, seed) for name, leaf in loaded["tasks"].items()}
        total = sum(map(len, questions.values()))
        progress.log(f"{task.name}: {total} questions")
        lm.on_sequences = lambda done: progress.update(done, max(done, total), "sequences", task=task.name)
        for leaf in loaded["tasks"].values():
            shots = task.num_fewshot if task.num_fewshot is not None else leaf.get_config("num_fewshot")
            leaf.set_config(key="num_fewshot", value=shots or 0)
            leaf.set_fewshot_seed(seed=seed)
        results: Any = evaluate(lm=lm, task_dict=loaded, samples=questions, log_samples=False)
    return task_measurements(task.name, results)


def task_measurements(name: str, results: dict[str, Any]) -> tuple[Measurement, ...]:
    """What lm-eval found for the task, or for each of a tag's tasks; a filter is named as `metric@filter`."""
    wanted = [name] if name in results["results"] else sorted(results["results"])
    found = []
    for each in wanted:
        values = results["results"][each]
        counts = results["n-samples"].get(each, {}).get("effective")
        for key, value in values.items():
            metric, _, chosen = key.partition(",")
            if not chosen or metric.endswith("_stderr"):
                continue
            stderr = values.get(f"{metric}_stderr,{chosen}")
            found.append(
                Measurement(
                    name=f"quality.{each}.{metric}" + ("" if chosen == "none" else f"@{chosen}"),
                    value=float(value),
                    unit=UNITS.get(metric, "fraction" if 0 <= float(value) <= 1 else "score"),
                    n=counts if counts is not None else values.get("sample_len"),
                    stderr=float(stderr) if isinstance(stderr, int | float) else None,
                    higher_is_better=results["higher_is_better"].get(each, {}).get(metric),
                )
            )
    return tuple(found)


def _load(task: Task, folder: Path) -> Any:
    """lm-eval's task objects, by leaf and by group; single tasks without its index, which takes 7 s."""
    found = find_task(task.name)
    if found is not None:
        (folder / "task.yaml").write_text(yaml.safe_dump(_task_yaml(task, found, folder)), encoding="utf-8")
    try:
        manager = TaskManager(include_path=folder, include_defaults=found is None)
        return manager.load([task.name])
    except (ConnectionError, DatasetNotFoundError) as error:
        raise EnvironmentCannot(
            f"task {task.name!r}: its dataset cannot be had ({error}); give local files instead with `data`"
        ) from error
    except Exception as error:
        if task.data is None:
            raise
        raise InputError(
            f"task {task.name!r} cannot be read from its `data` files: {' '.join(str(error).split())}"
        ) from error


def _task_yaml(task: Task, found: TaskFile, folder: Path) -> dict[str, Any]:
    """The official task, with its data replaced where the recipe says so; splits that are not given do not exist."""
    fields: dict[str, Any] = {"include": str(found.path), "task": task.name}
    if task.data is None:
        return fields
    for split in SPLITS:
        if found.fields.get(split) and found.fields[split] not in task.data:
            fields[split] = None
    files = {split: str(Path(path).resolve()) for split, path in task.data.items()}
    return fields | {
        "dataset_path": data_format(next(iter(files.values()))),
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},
    }


def _draw(available: int, limit: int | None, seed: int) -> list[int]:
    """Which questions: all, or `limit` of them by the seed, in order."""
    if limit is None or limit >= available:
        return list(range(available))
    return sorted(random.Random(seed).sample(range(available), limit))
