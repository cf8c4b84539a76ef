"""What a recipe measures on, for keeping its training text clear of it: held-out text, and local questions of tasks.

Nothing here imports torch: the plan hashes it into the keys of the steps that read training text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillroom.artifact import file_sha256
from stillroom.errors import InputError
from stillroom.recipe import Recipe, TextSource
from stillroom.text import TEACHER, fingerprint


@dataclass(frozen=True)
class EvaluationText:
    """What a recipe measures on, so that the text it trains on can be kept clear of it."""

    heldout: tuple[TextSource, ...]
    """Without what the teacher writes. That is no test which could leak; and the teacher's own training text would go:
    139 of the demo's 256 documents, not one for more than its chat template and the phrases beside it."""
    task_files: tuple[Path, ...]
    """Local data of tasks, without the splits that are for training (few-shot examples)."""
    hub_tasks: tuple[str, ...]
    """Tasks whose questions come from the hub; they are not looked at."""

    def fingerprints(self) -> list[Any]:
        """What identifies it, for the keys of the steps that are kept clear of it."""
        heldout = [
            [source.model_dump(mode="json", exclude={"name", "weight"}), fingerprint(source)] for source in self.heldout
        ]
        return [*heldout, *(file_sha256(path) for path in self.task_files)]


def evaluation_text(recipe: Recipe) -> EvaluationText | None:
    """None where the recipe does not want its training text decontaminated. Raises InputError for a missing file."""
    if not recipe.data.decontaminate:
        return None
    tasks = recipe.evaluate.tasks if recipe.evaluate else ()
    files = [Path(path) for task in tasks for split, path in (task.data or {}).items() if "train" not in split]
    for path in files:
        if not path.is_file():
            raise InputError(f"evaluate.tasks: data file {path} does not exist")
    heldout = tuple(source for source in recipe.data.heldout if source.source != TEACHER)
    return EvaluationText(heldout, tuple(files), tuple(task.name for task in tasks if task.data is None))


def task_texts(path: Path) -> Iterator[str]:
    """Every text in the rows of a task's data file (question, choices, passage), each by itself."""
    import datasets

    from stillroom.quality.harness import data_format

    try:
        rows = datasets.load_dataset(data_format(str(path)), data_files=str(path), split="train", streaming=True)
        for row in rows:
            yield from _strings(row)
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
        raise InputError(f"task data {path} cannot be read: {error}") from error


def _strings(value: Any) -> Iterator[str]:
    """The strings in nested data."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _strings(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
