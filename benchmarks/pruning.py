"""Which pruning choices lose least before any training: excess loss over the dense model on text that nobody looked at.

Every variant of a comparison is cut from the same checkpoint and measured on the same windows in the same run.
Selection and repair see calibration text only. Figures are on other documents: WikiText-2 validation, and of each other
source the last fifth of a shuffled list, of whose first four fifths the calibration text comes. Calibration text has
nothing like WikiText-2 unless `--encyclopedia` adds some of its training text. Excess loss is the mean
difference in nats per token to the dense model on the same tokens; its standard error is over windows.

    python benchmarks/pruning.py depth MODEL --text FOLDER --out FILE --layers 3 6 9
    python benchmarks/pruning.py width MODEL --text FOLDER --out FILE --cuts intermediate_size=1024 hidden_size=512
    python benchmarks/pruning.py target MODEL --text FOLDER --out FILE --share 0.75
    python benchmarks/pruning.py table MODEL --text FOLDER --out FILE      prints what is in FILE as Markdown

FOLDER holds text/*.jsonl.gz and eval/wikitext2/validation.jsonl. FILE is written anew after every variant; variants
that are in it are not measured again.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gzip
import json
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from stillroom.artifact import environment, write_atomically
from stillroom.distill.packing import borders
from stillroom.models.load import load_model, load_tokenizer
from stillroom.prune.choice import what_to_score, width_cut
from stillroom.prune.cut import Cut
from stillroom.prune.depth_search import Keep, best_of, contiguous, greedy, leave_one_out
from stillroom.prune.importance.measure import measure, measure_each
from stillroom.prune.importance.methods import keep_layers
from stillroom.prune.importance.names import DepthMethod, WidthMethod
from stillroom.prune.pruner import Made, Pruner, release_memory
from stillroom.prune.search import search_shape
from stillroom.prune.surgery import source_shape
from stillroom.prune.targets import target_shape
from stillroom.prune.width import strongest
from stillroom.recipe import Calibration, Prune, Repair, SearchBudget, Target

SOURCES = ("novels", "textbooks", "techdocs", "code_python", "instruct")
ENCYCLOPEDIA = "wikitext2_train_valid"
"""A source that `--encyclopedia` adds: few long rows, of which only those from the training text are taken."""
MEASURED = ("textbooks", "code_python", "instruct")
DOCUMENT_CHARACTERS = 6000
"""Of each document at most so much is read, for variety."""
DEPTH_METHODS: tuple[DepthMethod, ...] = ("block_influence", "angular", "magnitude", "taylor", "random", "reversed")
WIDTH_METHODS: tuple[WidthMethod, ...] = (
    "minitron",
    "mean_abs",
    "l2",
    "contribution",
    "magnitude",
    "taylor",
    "random",
    "reversed",
)


@dataclass(frozen=True)
class Texts:
    """Windows of token ids, (N, T)."""

    calibration: Tensor
    measured: dict[str, Tensor]


def read_texts(folder: Path, tokenizer: PreTrainedTokenizerBase, arguments: argparse.Namespace) -> Texts:
    """Calibration and measured windows; documents are in one or the other, never in both."""
    length, calibration, measured = arguments.sequence_length, [], {}
    sources = (*SOURCES, ENCYCLOPEDIA) if arguments.encyclopedia else SOURCES
    each = -(-arguments.calibration_windows // len(sources))
    for name in sources:
        with gzip.open(folder / "text" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        if name == ENCYCLOPEDIA:
            rows = [piece for row in rows if "train" in row["source"] for piece in _pieces(row)]
        random.Random(0).shuffle(rows)
        border = len(rows) * 4 // 5
        calibration.append(_windows(rows[:border], tokenizer, length, each))
        if name in MEASURED:
            measured[name] = _windows(rows[border:], tokenizer, length, arguments.measured_windows)
    pages = (folder / "eval" / "wikitext2" / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    measured["wikitext2"] = _windows([json.loads(p) for p in pages], tokenizer, length, arguments.measured_windows)
    mixed = torch.cat(calibration)
    order = torch.randperm(len(mixed), generator=torch.Generator().manual_seed(0))
    return Texts(mixed[order][: arguments.calibration_windows], measured)


def _windows(rows: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, length: int, count: int) -> Tensor:
    """At most `count` windows, each started as the tokenizer starts a text."""
    first = [] if (bos := borders(tokenizer).bos) is None else [bos]
    length -= len(first)
    ids: list[int] = []
    for row in rows:
        ids += tokenizer(_text(row, tokenizer), add_special_tokens=False, verbose=False)["input_ids"]
        ids.append(tokenizer.eos_token_id)
        if len(ids) >= count * length:
            break
    whole = range(0, min(len(ids) // length, count) * length, length)
    return torch.tensor([first + ids[start : start + length] for start in whole])


def _pieces(row: dict[str, Any]) -> list[dict[str, Any]]:
    """A long row as several."""
    starts = range(0, len(row["text"]), DOCUMENT_CHARACTERS)
    return [{"text": row["text"][start : start + DOCUMENT_CHARACTERS]} for start in starts]


def _text(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    if "messages" in row and tokenizer.chat_template:
        text: str = tokenizer.apply_chat_template(row["messages"], tokenize=False)
    elif "messages" in row:
        text = "\n\n".join(message["content"] for message in row["messages"])
    else:
        text = row.get("text") or row["page"]
    return text[:DOCUMENT_CHARACTERS]


@torch.inference_mode()
def window_losses(model: nn.Module, windows_NT: Tensor) -> list[float]:
    """Mean next-token loss of each window, in nats."""
    losses = []
    for window_T in windows_NT:
        logits = model(input_ids=window_T[None].to(next(model.parameters()).device), use_cache=False).logits
        losses.append(nn.functional.cross_entropy(logits[0, :-1].float(), window_T[1:].to(logits.device)).item())
    return losses


def measure_losses(model_dir: Path, texts: Texts) -> dict[str, list[float]]:
    """Losses of each window of each measured text."""
    model = load_model(model_dir)
    losses = {name: window_losses(model, windows) for name, windows in texts.measured.items()}
    del model
    release_memory()
    return losses


def excess(losses: dict[str, list[float]], dense: dict[str, list[float]]) -> dict[str, Any]:
    """Mean excess loss by text and over texts, with the standard error over windows."""
    by_text = {name: [a - b for a, b in zip(losses[name], dense[name], strict=True)] for name in dense}
    means = {name: statistics.fmean(values) for name, values in by_text.items()}
    variances = [statistics.variance(values) / len(values) for values in by_text.values()]
    return {
        "excess": statistics.fmean(means.values()),
        "stderr": sum(variances) ** 0.5 / len(variances),
        "by_text": {name: round(value, 4) for name, value in means.items()},
    }


class Progress:
    """Lines only."""

    def update(self, done: int, total: int, unit: str, **facts: float | str) -> None:
        pass

    def log(self, message: str) -> None:
        print(f"    {message}", flush=True)


class Comparison:
    """Variants of one model, measured and kept in a file."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.source_dir = arguments, arguments.model
        self.shape = source_shape(self.source_dir)
        self.texts = read_texts(arguments.text, load_tokenizer(self.source_dir), arguments)
        self.scratch = Path(tempfile.mkdtemp(prefix="pruning-", dir=arguments.scratch))
        self.rows: dict[str, Any] = {}
        if arguments.out.exists():
            self.rows = json.loads(arguments.out.read_text(encoding="utf-8"))["variants"]
        if "dense" not in self.rows:
            self._keep("dense", {"losses": measure_losses(self.source_dir, self.texts)})

    def pruner(self, sizes: dict[str, int] | None = None) -> Pruner:
        """As the stage makes one, with this comparison's budgets."""
        given = self.arguments
        config = Prune(
            **(sizes or {"num_layers": self.shape.num_layers}),
            calibration=Calibration(
                samples=len(self.texts.calibration), sequence_length=given.sequence_length, batch_size=4
            ),
            search=SearchBudget(
                tokens=given.search_tokens,
                generations=given.generations,
                offspring=given.offspring,
                finalists=given.finalists,
            ),
            repair=Repair(tokens=given.repair_tokens, heldout_tokens=given.heldout_tokens),
        )
        return Pruner(config, self.shape, self.source_dir, self.texts.calibration, self.scratch, 0, Progress())

    @property
    def scoring_NT(self) -> Tensor:
        """What importance metrics are measured on."""
        return self.texts.calibration[: self.arguments.scoring_windows]

    def measure_cut(self, name: str, make: Callable[[Path], Made]) -> None:
        """Make a variant, measure it, keep it."""
        if name in self.rows:
            return
        started = time.monotonic()
        out = self.scratch / "variant"
        shutil.rmtree(out, ignore_errors=True)
        made = make(out)
        seconds = time.monotonic() - started
        row: dict[str, Any] = {
            "layers_cut": [i for i in range(self.shape.num_layers) if i not in made.cut.layers],
            "params": made.shape.num_params,
            "kl_cut": made.kl_cut,
            "kl": made.kl,
            "repairs_kept": sum(attempt.kept for attempt in made.attempts),
            "seconds": round(seconds, 1),
            "losses": measure_losses(out, self.texts),
        }
        self._keep(name, row | excess(row["losses"], self.rows["dense"]["losses"]))

    def _keep(self, name: str, row: dict[str, Any]) -> None:
        self.rows[name] = row
        shown = f"{row['excess']:.4f} ± {row['stderr']:.4f} {row['by_text']}" if "excess" in row else ""
        print(f"{name}: {shown} {row.get('layers_cut', '')} {row.get('seconds', '')}", flush=True)
        given = {k: str(v) for k, v in vars(self.arguments).items()}
        document = {"arguments": given, "environment": environment(), "variants": self.rows}
        write_atomically(self.arguments.out, json.dumps(document, indent=1) + "\n")


def without_repair(pruner: Pruner) -> Pruner:
    """The same, but what it makes is bare."""
    return dataclasses.replace(pruner, config=pruner.config.model_copy(update={"repair": Repair(kinds=())}))


def depth(comparison: Comparison) -> None:
    """Single metrics, controls and searches, bare; block influence's and the search's choice, repaired."""
    shape = comparison.shape
    pruner = comparison.pruner()
    bare = without_repair(pruner)
    scores = measure(
        pruner.dense, shape, comparison.scoring_NT, batch_size=4, wanted=frozenset({"layers"}), depth=DEPTH_METHODS
    )
    for count in comparison.arguments.layers:
        kept = shape.num_layers - count
        target = target_shape(Prune(num_layers=kept), shape)
        choices: dict[str, Keep] = {method: keep_layers(scores, method, kept) for method in DEPTH_METHODS}
        alone = leave_one_out(pruner.scorer)
        choices["leave_one_out_kl"] = strongest([agreement.kl for agreement in alone], kept)
        choices["leave_one_out_loss"] = strongest([agreement.loss for agreement in alone], kept)
        choices["greedy"] = greedy(pruner.scorer, kept)
        choices["contiguous"] = best_of(pruner.scorer, contiguous(shape.num_layers, count))
        choices["search"] = pruner.layer_choices(target)[0]
        for name, layers in choices.items():
            comparison.measure_cut(f"{count} {name}", functools.partial(bare.make, Cut(layers)))
        comparison.measure_cut(f"{count} search + repair", functools.partial(pruner.best, target))
    for count in comparison.arguments.layers:
        repaired = Cut(keep_layers(scores, "block_influence", shape.num_layers - count))
        comparison.measure_cut(f"{count} block_influence + repair", functools.partial(pruner.make, repaired))


def width(comparison: Comparison) -> None:
    """Every width metric bare, and the choices of some repaired."""
    shape = comparison.shape
    for given in comparison.arguments.cuts:
        sizes = {name: int(value) for name, value in (part.split("=") for part in given.split(","))}
        target = target_shape(Prune(**sizes), shape)
        pruner = comparison.pruner(sizes)
        wanted = what_to_score(shape, target)
        scores = measure_each(
            pruner.dense, shape, comparison.scoring_NT, batch_size=4, wanted=wanted, width=WIDTH_METHODS
        )
        layers = tuple(range(shape.num_layers))
        for method in WIDTH_METHODS:
            bare = dataclasses.replace(without_repair(pruner), scores={wanted: scores[method]})
            cut = width_cut(shape, target, layers, scores[method])
            comparison.measure_cut(f"{given} {method}", functools.partial(bare.make, cut))
        for method in comparison.arguments.repaired:
            repaired = dataclasses.replace(pruner, scores={wanted: scores[method]})
            comparison.measure_cut(f"{given} {method} + repair", functools.partial(repaired.best, target))


def target(comparison: Comparison) -> None:
    """The winner of a search for a share of the parameters, beside the best pure-depth and pure-width candidates."""
    given = comparison.arguments
    wanted = Target(
        params=int(given.share * comparison.shape.num_params),
        candidates=given.candidates,
        rerank=given.rerank,
        rerank_tokens=given.rerank_tokens,
    )
    pruner = comparison.pruner()
    pruner.config = pruner.config.model_copy(update={"target": wanted})
    winner = comparison.scratch / "winner"
    made, frontier = search_shape(pruner, wanted, str(comparison.source_dir), winner)
    print(frontier.model_dump_json(indent=1), flush=True)
    comparison.measure_cut(f"winner {json.dumps(frontier.winner.sizes)}", lambda out: _moved(made, winner, out))
    for scored in frontier.candidates:
        if scored.winner or scored.kl != min(c.kl for c in frontier.candidates if c.cut == scored.cut):
            continue
        shape = target_shape(Prune(**scored.sizes), comparison.shape)
        name = f"best {scored.cut} {json.dumps(scored.sizes)}"
        comparison.measure_cut(name, functools.partial(pruner.best, shape))


def _moved(made: Made, source: Path, out: Path) -> Made:
    shutil.move(source, out)
    return made


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("depth", "width", "target", "table"))
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, default=None)
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 6, 9])
    parser.add_argument(
        "--cuts",
        nargs="+",
        default=["intermediate_size=1024", "hidden_size=512", "intermediate_size=1024,hidden_size=512"],
    )
    parser.add_argument("--repaired", nargs="+", choices=WIDTH_METHODS, default=["minitron", "l2"])
    parser.add_argument("--share", type=float, default=0.75)
    parser.add_argument("--candidates", type=int, default=6)
    parser.add_argument("--rerank", type=int, default=3)
    parser.add_argument("--rerank-tokens", type=int, default=16384)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--calibration-windows", type=int, default=136)
    parser.add_argument("--encyclopedia", action="store_true", help="calibrate on WikiText-2's training text too")
    parser.add_argument("--scoring-windows", type=int, default=32)
    parser.add_argument("--measured-windows", type=int, default=4)
    parser.add_argument("--search-tokens", type=int, default=4096)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--offspring", type=int, default=12)
    parser.add_argument("--finalists", type=int, default=2)
    parser.add_argument("--repair-tokens", type=int, default=49152)
    parser.add_argument("--heldout-tokens", type=int, default=4096)
    return parser.parse_args()


def print_table(path: Path) -> None:
    """All variants as a Markdown table; losses and KL in nats per token."""
    rows = {k: v for k, v in json.loads(path.read_text(encoding="utf-8"))["variants"].items() if k != "dense"}
    texts = list(next(iter(rows.values()))["by_text"])
    print(f"| variant | excess loss | {' | '.join(texts)} | KL cut | KL repaired | parameters | layers cut |")
    print("|---|---|" + "---|" * (len(texts) + 4))
    for name, row in rows.items():
        kls = [f"{row[key]:.3f}" if row[key] is not None else "" for key in ("kl_cut", "kl")]
        cells = [name, f"{row['excess']:.3f} ± {row['stderr']:.3f}", *(f"{row['by_text'][t]:.3f}" for t in texts), *kls,
                 f"{row['params'] / 1e6:.1f} M", " ".join(map(str, row["layers_cut"]))]  # fmt: skip
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    given = parse()
    if given.what == "table":
        print_table(given.out)
        raise SystemExit
    {"depth": depth, "width": width, "target": target}[given.what](Comparison(given))
