"""Documentation is true: its commands exist and parse, and the cheap ones are run."""

from __future__ import annotations

import dataclasses
import gzip
import json
import re
import shlex
from pathlib import Path

import click
import pytest
import yaml

from runs import stillroom
from stillroom.cli import cli
from stillroom.distill.breadth import MOST_OF_ONE, MOST_PASSES, narrow_by_recipe
from stillroom.distill.decontaminate import COMMON, GRAM_WORDS
from stillroom.distill.teacher import DOCUMENT_TOKENS
from stillroom.models.shape import shape_of
from stillroom.prune.repair.kinds import forbidden
from stillroom.recipe import Distill, Recipe, TextSource
from stillroom.text import ENDINGS, HUB, PYTHON_DOCS, ROWS_TOGETHER, TEACHER
from tiny import tiny_checkpoint, tiny_config, tiny_text, tiny_text_file

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

PRUNING = ROOT / "docs" / "pruning.md"
DATA = ROOT / "docs" / "data.md"
FAMILY_TYPES = {
    "Llama": "llama", "Mistral": "mistral", "Qwen2": "qwen2", "Qwen3": "qwen3", "Phi-3": "phi3", "SmolLM3": "smollm3",
    "StarCoder2": "starcoder2", "GPT-2": "gpt2", "Qwen3-MoE": "qwen3_moe", "Gemma 2": "gemma2",
    "Gemma 3": "gemma3_text", "OLMo 2": "olmo2", "BERT": "bert", "RoBERTa": "roberta", "T5": "t5",
}  # fmt: skip

RUN_HERE = ("recipes", "doctor", "plan", "engine list")
"""Commands that need no model and no run; the others are run by the tests of their own parts."""


def code_lines(page: Path) -> list[str]:
    """Lines of the page's indented or fenced code, comments and continuations taken off."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    indented = re.findall(r"^    +(\S.*)$", text, re.MULTILINE)
    lines = [line for block in fenced for line in block.splitlines()] + indented
    return [line.split(" #")[0].strip() for line in lines]


def yaml_blocks(page: Path) -> list[str]:
    return re.findall(r"^```yaml\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


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
    "command",
    [c for c in commands("stillroom ") if c.removeprefix("stillroom ").startswith(RUN_HERE) and "my.yaml" not in c],
)
def test_every_documented_command_that_needs_no_run_succeeds(command: str, tmp_path: Path) -> None:
    answer = stillroom(*shlex.split(command)[1:], home=tmp_path, cwd=ROOT)
    assert answer.returncode == 0, answer.stderr


def test_the_commands_of_the_pruning_page_do_what_it_says(tmp_path: Path) -> None:
    """Its recipe on a model of as many layers, with budgets that a test can pay."""
    tiny_checkpoint(tmp_path / "my-model", num_hidden_layers=28, intermediate_size=64)
    with gzip.open(tmp_path / "text.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in tiny_text(200))
    tiny_text_file(tmp_path / "heldout.txt", 60)
    recipe = yaml.safe_load(yaml_blocks(PRUNING)[0])
    recipe["stages"][0] |= {
        "calibration": {"samples": 8, "sequence_length": 64},
        "search": {"tokens": 64, "generations": 1, "offspring": 2, "finalists": 1},
        "repair": {"tokens": 128, "heldout_tokens": 64},
    }
    recipe["data"]["decontaminate"] = False  # the tiny texts are of the same few sentences
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    ours = [line for line in code_lines(PRUNING) if line.startswith("stillroom ") and re.search("my.yaml|mine", line)]
    answers = [stillroom(*shlex.split(line)[1:], home=tmp_path / "home", cwd=tmp_path) for line in ours]
    assert [answer.returncode for answer in answers] == [0] * 3, [answer.stderr for answer in answers]
    planned, pruned, again = (answer.stdout for answer in answers)
    assert "layers: by search" in planned
    assert "4 of 28 layers went" in pruned
    assert len(json.loads(again)["explanation"]["layers"]) == 28


def test_every_documented_make_target_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    wanted = {target for command in commands("make ") for target in command.split()[1:] if "=" not in target}
    assert {"demo", "test"} <= wanted
    assert wanted <= targets


def test_every_documented_recipe_is_a_recipe() -> None:
    for page in (ROOT / "README.md", PRUNING, DATA):
        assert yaml_blocks(page)
        for block in yaml_blocks(page):
            Recipe.model_validate({"name": "documented", "model": "./my-model", **yaml.safe_load(block)})


def test_the_text_page_names_every_source_and_the_numbers_of_the_code() -> None:
    said = " ".join(DATA.read_text(encoding="utf-8").split())
    (block,) = yaml_blocks(DATA)
    documented = Recipe.model_validate({"name": "documented", **yaml.safe_load(block)})
    (stage,) = documented.stages
    assert isinstance(stage, Distill)
    assert narrow_by_recipe(documented.data.train, stage) == []
    wanted = [f"`{name}`" for name in (*ENDINGS[:-1], TEACHER, PYTHON_DOCS)] + [f"`{ENDINGS[-1]}` (file", f"`{HUB}NAME"]
    wanted += [f"share {GRAM_WORDS} words", f"fewer than {GRAM_WORDS} words", f"{ROWS_TOGETHER} rows at a time"]
    wanted += [f"more than {MOST_OF_ONE:.0%}", f"end at {DOCUMENT_TOKENS} tokens"]
    wanted += [f"`first_tokens` ({TextSource.model_fields['first_tokens'].default})"]
    assert [words for words in wanted if words not in said] == []
    assert (COMMON, MOST_PASSES) == (10, 4), "the page says ten and four"


def test_the_pruning_page_says_of_each_family_which_repairs_it_allows() -> None:
    rows = [line.split("|")[1:-1] for line in PRUNING.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    kinds = ("fold", "reconstruct", "refit", "readout")
    allowed = {
        name.strip(): {kind: word.strip() == "yes" for kind, word in zip(kinds, words[:4], strict=True)}
        for names, *words in rows
        if len(words) == 5 and words[0].strip() in ("yes", "no")
        for name in names.split(",")
    }
    assert set(allowed) == set(FAMILY_TYPES)
    for name, model_type in FAMILY_TYPES.items():
        shape = shape_of(tiny_config(model_type).to_dict(), model_type)
        depth = dataclasses.replace(shape, num_layers=1, hidden_size=32)
        width = dataclasses.replace(depth, num_attention_heads=2, num_key_value_heads=1)
        found = {kind: any(forbidden(kind, shape, cut) is None for cut in (depth, width)) for kind in kinds}
        assert found == allowed[name], name


def test_ci_calls_the_test_command_of_the_readme() -> None:
    assert "make test" in (ROOT / "README.md").read_text()
    assert "make test" in (ROOT / ".ci" / "run").read_text()
