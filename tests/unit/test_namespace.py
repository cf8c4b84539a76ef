"""The rules that keep three source roots one namespace."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE_ROOTS = ("compress", "serve", "evaluate")


def modules() -> list[Path]:
    """Every module, relative to its source root."""
    return [path.relative_to(ROOT / root) for root in SOURCE_ROOTS for path in (ROOT / root).rglob("*.py")]


def test_no_init_file_breaks_the_namespace() -> None:
    assert [path for path in modules() if path.name == "__init__.py"] == []


def test_no_module_stands_in_two_roots() -> None:
    found = modules()
    assert len(found) == len(set(found))
    assert len(found) > 20


def test_no_module_is_named_after_a_dependency() -> None:
    packages = {name.lower() for name in importlib.metadata.packages_distributions()}
    assert [path for path in modules() if path.stem.lower() in packages] == []


def test_every_module_opens_with_its_why() -> None:
    assert [
        path
        for path in modules()
        for root in SOURCE_ROOTS
        if (file := ROOT / root / path).exists() and not file.read_text().startswith('"""')
    ] == []
