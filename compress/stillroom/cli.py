"""The command line: thin. Parsing comes first, heavy imports after it, inside the commands."""

from __future__ import annotations

import errno
import json
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import click

from stillroom.errors import (
    EXIT_BAD_INPUT,
    EXIT_ENVIRONMENT,
    EXIT_GATE_FAILED,
    EXIT_INTERNAL,
    EXIT_INTERRUPTED,
    EnvironmentCannot,
    InputError,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stillroom.prune.explain import Explanation
    from stillroom.recipe import Recipe

EXIT_CODES = """
\b
Exit codes:
  0    done, and every gate passed
  1    internal failure
  2    bad input: usage, recipe, model, data
  3    a gate failed or its metric is missing, or a checkpoint failed its verification
  4    this machine cannot: no GPU, memory, disk or engine
  130  interrupted; the same command goes on from there
"""

DEFAULT_CONTEXT = 4096
"""Tokens that `serve` starts an engine with, where the model has as many positions."""

PATH = click.argument("path", type=click.Path(path_type=Path, exists=True))
SET = click.option(
    "--set", "overrides", multiple=True, metavar="A.B=VALUE", help="Override a field, e.g. stages.0.num_layers=24."
)
JSON = click.option("--json", "as_json", is_flag=True, help="Machine-readable output on standard output.")
ENGINE = click.option(
    "--engine",
    type=click.Choice(["auto", "vllm", "transformers", "tensorrt-llm"]),
    default="auto",
    show_default=True,
    help="auto: vLLM where it is installed and takes the checkpoint, else transformers.",
)


@click.group(epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="stillroom")
def cli() -> None:
    """Make a language model smaller, and prove that the result is worth serving.

    A recipe goes in; a checkpoint that stock engines serve comes out, with the measurements that justify it.

    \b
      stillroom recipes                             what ships
      stillroom doctor                              what this machine can run
      stillroom plan smollm2-135m-cpu               what a run would do; nothing is run
      stillroom prune smollm2-135m-cpu --explain    only the cut: what goes, and what that costs
      stillroom run smollm2-135m-cpu --out runs/demo
      stillroom serve runs/demo                     an OpenAI-compatible endpoint
      stillroom report runs/demo                    the verdict again
    """


@cli.command()
@click.argument("recipe")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="Run directory: new, or one of an earlier run to go on with.",
)
@SET
@click.option("--force", multiple=True, metavar="STEP", help="Run this step again, and all that read it.")
@JSON
def run(recipe: str, out: Path, overrides: tuple[str, ...], force: tuple[str, ...], as_json: bool) -> None:
    """Run RECIPE (a shipped name or a YAML file) to its verdict.

    Steps that are sealed in --out are not run again; a run that was killed goes on where it stopped. Exits with 3
    when a gate
    fails.
    """
    from stillroom.console import make_reporter
    from stillroom.pipeline import check_run_dir, run_plan
    from stillroom.plan import make_plan
    from stillroom.preflight import require_runnable
    from stillroom.recipe import load_recipe

    plan = make_plan(load_recipe(recipe, overrides))
    check_run_dir(out)
    require_runnable(plan, out)
    reporter = make_reporter(as_json)
    reporter.events_file = out / "events.jsonl"
    result = run_plan(plan, out, reporter, force=force)
    show_verdict(result.verdict_dir, as_json, note=None if result.ran else "nothing to do: every step is sealed")
    click.echo(f"\nmodel   {out / 'model'}\nreport  {out / 'report.html'}\nserve   stillroom serve {out}", err=True)
    exit_by_verdict(result.verdict_dir)


@cli.command()
@click.argument("recipe")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Run directory, which a later `run` of the same recipe goes on with.  [default: runs/NAME-OF-RECIPE]",
)
@SET
@click.option("--explain", is_flag=True, help="Show what went of every layer and size, and what it cost.")
@JSON
def prune(recipe: str, out: Path | None, overrides: tuple[str, ...], explain: bool, as_json: bool) -> None:
    """Run RECIPE only up to its first prune stage; nothing is verified, evaluated or served.

    With --explain RECIPE may also be a run directory or the artifact of a prune stage, and nothing is run.

    \b
      stillroom prune smollm2-135m-cpu --out runs/demo --explain
      stillroom prune runs/demo --explain
    """
    from stillroom.artifact import MANIFEST
    from stillroom.inspection import explain_path
    from stillroom.pipeline import RUN_FILE

    path = Path(recipe)
    if (path / RUN_FILE).is_file() or (path / MANIFEST).is_file():
        if out is not None or overrides:
            raise InputError(f"{path} is finished, and --out and --set change nothing in it; give its recipe instead")
        if not explain:
            raise InputError(f"{path} is no recipe; give --explain to see what was cut there")
        show_explanations(explain_path(path), as_json)
        return
    pruned = _prune(recipe, out, overrides, as_json)
    if explain:
        show_explanations(explain_path(pruned), as_json)
    click.echo(f"pruned  {pruned}", err=True)


def _prune(recipe: str, out: Path | None, overrides: tuple[str, ...], as_json: bool) -> Path:
    """Bring the first prune stage of a recipe to its artifact, and say where that is."""
    from stillroom.console import make_reporter
    from stillroom.pipeline import check_run_dir, run_plan
    from stillroom.plan import make_plan
    from stillroom.preflight import require_runnable
    from stillroom.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    stage = next((name for name, config in loaded.named_stages() if config.kind == "prune"), None)
    if stage is None:
        stages = ", ".join(name for name, _ in loaded.named_stages())
        raise InputError(f"recipe {loaded.name!r} has no prune stage; its stages: {stages}")
    plan = make_plan(loaded)
    run_dir = out or Path("runs") / loaded.name
    check_run_dir(run_dir)
    require_runnable(plan.up_to(stage), run_dir)
    reporter = make_reporter(as_json)
    reporter.events_file = run_dir / "events.jsonl"
    return run_plan(plan, run_dir, reporter, until=stage).artifacts[stage].path


@cli.command()
@click.argument("recipe")
@click.option("--out", type=click.Path(path_type=Path), help="A run directory: shows which steps are sealed there.")
@SET
@JSON
def plan(recipe: str, out: Path | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show what RECIPE would run: steps, what is cached, sizes before and after, memory and disk. Runs nothing."""
    from stillroom.plan import make_plan
    from stillroom.preflight import outlook
    from stillroom.recipe import load_recipe

    view = outlook(make_plan(load_recipe(recipe, overrides)), out)
    if as_json:
        click.echo(json.dumps(view.as_json(), indent=2))
    else:
        from rich.console import Console

        Console().print(view.render())


@cli.command()
@JSON
def recipes(as_json: bool) -> None:
    """List the recipes that ship with stillroom."""
    from stillroom.recipe import load_recipe, shipped_recipes

    found: list[Recipe] = [load_recipe(name) for name in shipped_recipes()]
    if as_json:
        click.echo(json.dumps([recipe.model_dump(mode="json") for recipe in found], indent=2))
        return
    for recipe in found:
        stages = " -> ".join(name for name, _ in recipe.named_stages())
        click.echo(f"{recipe.name}\n    {recipe.description}\n    {recipe.model.source}: {stages}\n")


@cli.command()
@JSON
def doctor(as_json: bool) -> None:
    """Say what this machine can run, and what is missing for the rest."""
    from stillroom.doctor import examine

    findings = examine()
    if as_json:
        click.echo(json.dumps([finding.as_json() for finding in findings], indent=2))
        return
    for finding in findings:
        click.echo(f"{'ok  ' if finding.ok else 'no  '} {finding.subject:<22} {finding.fact}")
        if finding.remedy:
            click.echo(f"     {'':<22} -> {finding.remedy}")


@cli.command()
@PATH
@JSON
def inspect(path: Path, as_json: bool) -> None:
    """Show what a run, an artifact or a checkpoint directory holds: shape, size, scheme, provenance."""
    from stillroom.inspection import inspect_path, render_inspection

    facts = inspect_path(path)
    click.echo(json.dumps(facts, indent=2) if as_json else render_inspection(facts))


@cli.command()
@PATH
@JSON
def verify(path: Path, as_json: bool) -> None:
    """Open a checkpoint from disk and check that it is whole: tensors, scales, tokenizer, hashes, a generation.

    Exits with 3 when a check fails.
    """
    from stillroom.console import quiet_libraries
    from stillroom.export.verify import verify_directory
    from stillroom.pipeline import locate_model

    quiet_libraries()
    model_dir, artifact = locate_model(path)
    report = verify_directory(artifact.path if artifact and not artifact.manifest.location else model_dir)
    if as_json:
        click.echo(json.dumps(report.as_json(), indent=2))
    else:
        click.echo(report.render())
    sys.exit(0 if report.passed else EXIT_GATE_FAILED)


@cli.command()
@PATH
@click.option(
    "--text",
    "texts",
    multiple=True,
    metavar="SOURCE",
    help="Held-out text, as in a recipe; repeatable. [default: python-docs]",
)
@click.option(
    "--task",
    "tasks",
    multiple=True,
    metavar="NAME[=FILE]",
    help="An lm-eval task, with a local test file where there is no hub.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Questions of each task.")
@click.option("--tokens", type=click.IntRange(min=64), default=65536, show_default=True, help="Tokens of each text.")
@click.option("--sequence-length", type=click.IntRange(min=8), default=2048, show_default=True)
@JSON
def evaluate(
    path: Path,
    texts: tuple[str, ...],
    tasks: tuple[str, ...],
    limit: int | None,
    tokens: int,
    sequence_length: int,
    as_json: bool,
) -> None:
    """Measure the quality of a run's model or of any checkpoint directory: perplexity, bits per byte, lm-eval tasks."""
    from stillroom.console import make_reporter, quiet_libraries
    from stillroom.pipeline import locate_model
    from stillroom.quality.harness import check_task
    from stillroom.quality.stage import evaluate_directory
    from stillroom.recipe import Evaluate, TextSource
    from stillroom.text import check_text

    sources = tuple(TextSource(source=text) for text in texts or ("python-docs",))
    wanted = tuple(_task(task, limit) for task in tasks)
    for source in sources:
        check_text(source)
    for task in wanted:
        check_task(task)
    config = Evaluate(perplexity_tokens=tokens, sequence_length=sequence_length, tasks=wanted)
    model_dir, _ = locate_model(path)
    quiet_libraries()
    progress = make_reporter(as_json).progress("evaluate")
    show_measurements(evaluate_directory(model_dir, config, sources, progress), as_json)


def _task(given: str, limit: int | None) -> Any:
    """NAME or NAME=FILE; the file stands for the split that the task is measured on."""
    from stillroom.quality.harness import find_task
    from stillroom.recipe import Task

    name, _, file = given.partition("=")
    known = find_task(name) if file else None
    split = known.measured_split if known else "test"
    return Task(name=name, data={split: file} if file else None, limit=limit)


@cli.command()
@PATH
@ENGINE
@click.option(
    "--concurrency", default="1,4,16", show_default=True, metavar="N,N", help="Requests in flight, level by level."
)
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=512, show_default=True)
@click.option("--output-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@JSON
def bench(path: Path, engine: str, concurrency: str, prompt_tokens: int, output_tokens: int, as_json: bool) -> None:
    """Serve a run's model or any checkpoint directory and measure throughput, latency and memory."""
    from pydantic import ValidationError

    from stillroom.console import make_reporter
    from stillroom.pipeline import locate_model
    from stillroom.recipe import Bench
    from stillroom.speed.stage import bench_directory

    try:
        levels = [int(level) for level in concurrency.split(",")]
        config = Bench.model_validate(
            {
                "engine": engine,
                "concurrency": levels,
                "prompt_tokens": prompt_tokens,
                "output_tokens": output_tokens,
            }
        )
    except (ValueError, ValidationError) as error:
        raise InputError(f"bench options: {' '.join(str(error).split())}") from error
    model_dir, _ = locate_model(path)
    show_measurements(bench_directory(model_dir, config, make_reporter(as_json).progress("bench")), as_json)


@cli.command()
@PATH
@ENGINE
@click.option("--host", default="127.0.0.1", show_default=True, help="Loopback unless you say otherwise.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 chooses a free one.")
@click.option(
    "--max-model-len",
    type=click.IntRange(min=16),
    help="Context in tokens.  [default: 4096, or the model's own if less]",
)
@click.option(
    "--tensor-parallel", type=click.IntRange(min=1), default=1, show_default=True, help="GPUs to share the model over."
)
@click.option("--dry-run", is_flag=True, help="Print the engine's command and stop.")
def serve(
    path: Path, engine: str, host: str, port: int, max_model_len: int | None, tensor_parallel: int, dry_run: bool
) -> None:
    """Serve a run's model or any checkpoint directory behind an OpenAI-compatible endpoint, until Ctrl-C."""
    from stillroom.engines.process import print_command, serve_foreground
    from stillroom.models.shape import read_config
    from stillroom.pipeline import locate_model

    model_dir, artifact = locate_model(path)
    name = artifact.name if artifact else model_dir.resolve().name
    config = {
        "host": host,
        "port": port,
        "max_model_len": max_model_len
        or min(DEFAULT_CONTEXT, read_config(model_dir).get("max_position_embeddings", DEFAULT_CONTEXT)),
        "tensor_parallel": tensor_parallel,
        "served_model_name": name,
    }
    if dry_run:
        print_command(model_dir, engine, config)
    else:
        sys.exit(serve_foreground(model_dir, engine, config))


@cli.command()
@PATH
@click.option(
    "--html",
    type=click.Path(path_type=Path, file_okay=False),
    help="Also write the page and its plots into this folder.",
)
@JSON
def report(path: Path, html: Path | None, as_json: bool) -> None:
    """Print the verdict of a run again. Exits with 3 when a gate failed.

    The run's own page stays as it was sealed; --html makes it anew from verdict.json.
    """
    from stillroom.verdict.report import write_report
    from stillroom.verdict.verdict import load_verdict

    verdict_dir = (path / "verdict.json").resolve().parent if path.is_dir() else path.resolve().parent
    if not (verdict_dir / "verdict.json").is_file():
        raise InputError(f"{path} holds no verdict.json; finish the run with `stillroom run`")
    if html is not None:
        html.mkdir(parents=True, exist_ok=True)
        click.echo(f"report  {write_report(load_verdict(verdict_dir), html)}", err=True)
    show_verdict(verdict_dir, as_json)
    exit_by_verdict(verdict_dir)


@cli.group()
def engine() -> None:
    """Serving engines, each in a virtualenv of its own."""


@engine.command("install")
@click.argument("name", type=click.Choice(["vllm"]))
def engine_install(name: str) -> None:
    """Make a virtualenv for an engine under $STILLROOM_HOME (default ~/.cache/stillroom), its CPU or its CUDA build."""
    from stillroom.engines.install import install_engine

    installed = install_engine(name)
    click.echo(f"{name} {installed.version} ({installed.device}) in {installed.python}")


@engine.command("list")
@JSON
def engine_list(as_json: bool) -> None:
    """Engines on this machine."""
    from stillroom.doctor import examine_engines

    findings = examine_engines()
    if as_json:
        click.echo(json.dumps([finding.as_json() for finding in findings], indent=2))
        return
    for finding in findings:
        click.echo(f"{'ok  ' if finding.ok else 'no  '} {finding.subject:<14} {finding.fact}")


def show_verdict(verdict_dir: Path, as_json: bool, note: str | None = None) -> None:
    """The table on a terminal, or verdict.json as it is."""
    text = (verdict_dir / "verdict.json").read_text(encoding="utf-8")
    if as_json:
        click.echo(json.dumps({"event": "verdict", "verdict": json.loads(text)}))
        return
    from rich.console import Console

    from stillroom.verdict.table import render_terminal
    from stillroom.verdict.verdict import Verdict

    if note:
        click.echo(note, err=True)
    Console(width=None if sys.stdout.isatty() else 120).print(render_terminal(Verdict.model_validate_json(text)))


def exit_by_verdict(verdict_dir: Path) -> NoReturn:
    """0 when the verdict passed, 3 when it did not."""
    passed = json.loads((verdict_dir / "verdict.json").read_text(encoding="utf-8"))["passed"]
    sys.exit(0 if passed is True else EXIT_GATE_FAILED)


def show_explanations(explanations: Sequence[Explanation], as_json: bool) -> None:
    """A table each, or a JSON line each."""
    if as_json:
        for explained in explanations:
            click.echo(json.dumps({"event": "explanation", "explanation": json.loads(explained.model_dump_json())}))
        return
    from rich.console import Console

    from stillroom.prune.explain_table import render_explanation

    console = Console(width=None if sys.stdout.isatty() else 120)
    for explained in explanations:
        console.print(render_explanation(explained))


def show_measurements(measurements: Any, as_json: bool) -> None:
    """One line each, or JSON."""
    if as_json:
        click.echo(json.dumps([m.model_dump(mode="json") for m in measurements], indent=2))
        return
    for m in measurements:
        spread = f" ± {m.stderr:.3g}" if m.stderr is not None else ""
        count = f"  (n={m.n})" if m.n is not None else ""
        click.echo(f"{m.name:<44} {m.value:>14.6g}{spread} {m.unit}{count}")


def main() -> NoReturn:
    """Entry point: run the command, and turn what went wrong into one line and an exit code."""
    signal.signal(signal.SIGTERM, _interrupt)
    sys.exit(_run_cli())


def _run_cli() -> int:
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Abort:
        return _fail("interrupted; the same command goes on from there", EXIT_INTERRUPTED)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on from there", EXIT_INTERRUPTED)
    except click.ClickException as error:
        error.show()
        return EXIT_BAD_INPUT
    except InputError as error:
        return _fail(str(error), EXIT_BAD_INPUT)
    except EnvironmentCannot as error:
        return _fail(str(error), EXIT_ENVIRONMENT)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _fail(
                f"the disk is full ({error.filename or 'while writing'}); free space and run the same command again",
                EXIT_ENVIRONMENT,
            )
        raise
    except ImportError as error:
        if error.name and error.name.partition(".")[0] in (
            "torch",
            "transformers",
            "modelopt",
            "datasets",
            "lm_eval",
            "guidellm",
        ):
            return _fail(
                f"{error.name} is not installed; run: pip install 'stillroom[all]' (see README, Install)",
                EXIT_ENVIRONMENT,
            )
        raise
    except Exception as error:
        return _known_failure(error)
    return 0


def _known_failure(error: Exception) -> int:
    """Failures whose classes would cost an import at start."""
    from stillroom.pipeline import VerifyFailed

    if isinstance(error, VerifyFailed):
        return _fail(str(error), EXIT_GATE_FAILED)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return _fail(
            f"out of memory: {error}; lower micro_batch_size, chunk_tokens or batch_size in the recipe",
            EXIT_ENVIRONMENT,
        )
    import traceback

    traceback.print_exception(error)
    return _fail(f"internal failure: {type(error).__name__}: {error}", EXIT_INTERNAL)


def _fail(message: str, code: int) -> int:
    click.echo(f"stillroom: {message}", err=True)
    return code


def _interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
