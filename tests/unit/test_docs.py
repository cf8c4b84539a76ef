"""Documentation is true: its commands exist and parse, and the cheap ones are run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
import yaml

from runs import stillroom
from stillroom.cli import cli
from stillroom.recipe import Recipe

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

RUN_HERE = ("recipes", "doctor", "plan", "engine list")
"""Commands that need no model and no run; the others are run by the tests of their own parts."""


def code_lines(page: Path) -> list[str]:
    """Lines of the page's indented or fenced code, comments and continuations taken off."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    indented = re.findall(r"^    +(\S.*)$", text, re.MULTILINE)
    lines = [line for block in fenced for line in block.splitlines()] + indented
    return [line.split(" #")[0].strip() for line in lines]


def commands(start: str) -> list[str]:
    """Every distinct command of the documentation that begins with `start`."""
    return sorted({line for page in PAGES for line in code_lines(page) if line.startswith(start)})


def parse(group: click.Group, arguments: list[str]) -> None:
    """Parse a command line as click would, without running it."""
    name, rest = arguments[0], arguments[1:]
    command = group.get_command(click.Context(group), name)
    assert command is not None, name
    if isinstance(command, click.Group):
        parse(command, rest)
        return
    for parameter in command.params:  # the page's paths need not exist here
        if isinstance(parameter.type, click.Path):
            parameter.type = click.Path(path_type=Path)
    command.make_context(name, rest)


@pytest.mark.parametrize("command", commands("stillroom "))
def test_every_documented_command_parses(command: str) -> None:
    arguments = [word for word in shlex.split(command)[1:] if word not in ("&",)]
    if arguments not in (["--help"], ["--version"]):
        parse(cli, arguments)


@pytest.mark.parametrize(
    "command", [c for c in commands("stillroom ") if c.removeprefix("stillroom ").startswith(RUN_HERE)]
)
def test_every_documented_command_that_needs_no_run_succeeds(command: str, tmp_path: Path) -> None:
    answer = stillroom(*shlex.split(command)[1:], home=tmp_path, cwd=ROOT)
    assert answer.returncode == 0, answer.stderr


def test_every_documented_make_target_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    wanted = {target for command in commands("make ") for target in command.split()[1:] if "=" not in target}
    assert {"demo", "test"} <= wanted
    assert wanted <= targets


def test_every_documented_recipe_is_a_recipe() -> None:
    blocks = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        Recipe.model_validate({"name": "documented", **yaml.safe_load(block)})


def test_ci_calls_the_test_command_of_the_readme() -> None:
    assert "make test" in (ROOT / "README.md").read_text()
    assert "make test" in (ROOT / ".ci" / "run").read_text()
