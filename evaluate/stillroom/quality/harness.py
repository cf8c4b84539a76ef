"""Check lm-eval tasks before any long work: is the name known, are the data files there, do they hold the right split.

Nothing here imports torch. lm-eval's own index of its 14,000 task files takes 7 s, so a task's file is first looked for
by its `task:` line, beginning with the folders that the name begins with (`arc_easy` is in `arc/`), which takes
milliseconds; the index decides about everything that is not found so: groups, tags, names that come by an include.
"""

from __future__ import annotations

import difflib
import importlib.util
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from stillroom.errors import EnvironmentCannot, InputError
from stillroom.recipe import Task

FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
"""What `datasets` calls a file by its ending; .gz may follow."""

SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
"""Fields of an lm-eval task that name a split of its data."""

HUB_TIMEOUT_S = 5.0

_QUOTES = str.maketrans("", "", "\"'")


@dataclass(frozen=True)
class TaskFile:
    """One task of lm-eval."""

    path: Path
    """Its official YAML."""
    fields: dict[str, Any]
    """The content, includes resolved, functions as text."""

    @property
    def measured_split(self) -> str:
        """The split that questions come from."""
        split: str = self.fields.get("test_split") or self.fields["validation_split"]
        return split

    @property
    def example_split(self) -> str | None:
        """The split that few-shot examples come from; None: they are part of the task, or there are none."""
        if (self.fields.get("fewshot_config") or {}).get("samples"):
            return None
        for field in ("fewshot_split", "training_split", "validation_split"):
            if self.fields.get(field):
                return str(self.fields[field])
        return self.measured_split


def check_task(task: Task) -> None:
    """Raise InputError, or EnvironmentCannot, where this task cannot be measured here."""
    found = find_task(task.name)
    if found is None:
        if task.data is not None:
            raise InputError(
                f"task {task.name!r} is a group of tasks; `data` goes with single ones, so name those instead"
            )
        _check_hub(task, ())
        return
    _check_fewshot(task, found)
    if task.data is None:
        _check_hub(task, (str(found.fields.get("dataset_path")),))
    else:
        _check_data(task, task.data, found)


def find_task(name: str) -> TaskFile | None:
    """The task of that name; None for a group or a tag. Raises InputError, with close matches, for an unknown name."""
    root = tasks_root()
    for path in _task_files(root, name):
        if _declares(path, name):
            return TaskFile(path, _read(path))
    index = _index(root)
    if name not in index:
        near = difflib.get_close_matches(name, index, n=5, cutoff=0.5)
        hint = f"close: {', '.join(near)}" if near else "`lm-eval ls tasks` lists what there is"
        raise InputError(f"task {name!r} is not one of lm-eval's {len(index)} tasks and groups; {hint}")
    path = index[name].yaml_path
    if path is None or "group" in (fields := _read(path)) or fields.get("task") != name:
        return None
    return TaskFile(path, fields)


def tasks_root() -> Path:
    """The folder of lm-eval's task files. Raises EnvironmentCannot where lm-eval is not installed."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise EnvironmentCannot("evaluate.tasks needs lm-eval: pip install 'stillroom[evaluate]'")
    return Path(spec.submodule_search_locations[0]) / "tasks"


def data_format(path: str) -> str:
    """`json`, `csv` or `parquet`, by the file's ending. Raises InputError for another."""
    ending = Path(path.removesuffix(".gz")).suffix
    if ending not in FORMATS:
        raise InputError(f"task data {path} ends in none of {', '.join(FORMATS)} (.gz may follow)")
    return FORMATS[ending]


def _check_data(task: Task, data: dict[str, str], found: TaskFile) -> None:
    if "class" in found.fields:
        raise InputError(f"task {task.name!r} reads its data in code of its own; local `data` cannot replace it")
    needed = {found.measured_split: "questions"}
    if (
        task.num_fewshot if task.num_fewshot is not None else found.fields.get("num_fewshot") or 0
    ) and found.example_split:
        needed.setdefault(found.example_split, "few-shot examples")
    for split, what in needed.items():
        if split not in data:
            given = ", ".join(data) or "nothing"
            raise InputError(f"task {task.name!r} takes its {what} from split {split!r}; `data` has {given}")
    allowed = {found.fields[field] for field in SPLITS if found.fields.get(field)}
    for split, path in data.items():
        if split not in allowed:
            raise InputError(f"task {task.name!r} has no split {split!r}; it has {', '.join(sorted(allowed))}")
        if not Path(path).is_file():
            raise InputError(f"task {task.name!r}: data file {path} does not exist")
        if Path(path).stat().st_size == 0:
            raise InputError(f"task {task.name!r}: data file {path} is empty")
    if len({data_format(path) for path in data.values()}) > 1:
        raise InputError(
            f"task {task.name!r}: its data files are of different formats; give all as one of {', '.join(FORMATS)}"
        )


def _check_fewshot(task: Task, found: TaskFile) -> None:
    """lm-eval ignores a number of examples where the task itself says 0."""
    if task.num_fewshot and found.fields.get("num_fewshot") == 0:
        raise InputError(
            f"task {task.name!r} is defined without few-shot examples; num_fewshot {task.num_fewshot} has no effect"
        )


def _check_hub(task: Task, datasets: tuple[str, ...]) -> None:
    """Without `data` the questions come from a dataset hub, or from its cache on this machine."""
    if datasets and all(_is_cached(dataset) for dataset in datasets):
        return
    if not _hub_answers():
        what = f" ({', '.join(datasets)})" if datasets else ""
        raise EnvironmentCannot(
            f"task {task.name!r} reads a hub dataset{what}, and the hub cannot be reached from here; "
            "give local files instead, such as `data: {test: ./arc_easy/test.jsonl}`, or leave the task out"
        )


def _is_cached(dataset: str) -> bool:
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    cache = Path(os.environ.get("HF_DATASETS_CACHE", home / "datasets"))
    return (cache / dataset.lower().replace("/", "___")).is_dir()


def _hub_answers() -> bool:
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        return False
    try:
        httpx.head(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=HUB_TIMEOUT_S)
    except httpx.HTTPError:
        return False
    return True


def _task_files(root: Path, name: str) -> Iterator[Path]:
    """Task files, those in the folders that the name begins with first."""
    near = [folder for folder in sorted(root.iterdir()) if folder.is_dir() and name.startswith(folder.name)]
    for folder in (*near, root):
        yield from sorted(folder.rglob("*.yaml"))


def _declares(path: Path, name: str) -> bool:
    with path.open(encoding="utf-8") as file:
        return any(line.translate(_QUOTES).split() == ["task:", name] for line in file if "task" in line)


def _read(path: Path) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml

    fields: dict[str, Any] = load_yaml(path, resolve_func=False)
    return fields


def _index(root: Path) -> dict[str, Any]:
    """lm-eval's own index, without its log of what it skips."""
    from lm_eval.tasks._index import TaskIndex

    logging.getLogger("lm_eval.tasks._index").setLevel(logging.ERROR)
    index: dict[str, Any] = TaskIndex().build([root])
    return index
