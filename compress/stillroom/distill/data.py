"""From documents to windows of tokens: chat rows through the model's template, a blend of sources by weight, packing.

Training and calibration see windows of one length without padding (packing.py). Distillation reads each document in
them by itself. Calibration for pruning and quantization looks across the borders: it takes means over tokens, for which
what a document is preceded by matters little.

The order is a pure function of the seed: documents pass through a shuffle buffer (files are often sorted by origin),
and the source that is furthest behind its share of tokens comes next. Held-out text is neither shuffled nor blended.

Shapes: N windows, T tokens in each.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from stillroom.artifact import Artifact
from stillroom.distill.decontaminate import GRAM_WORDS, MAX_GRAMS, Contamination, Dropped, contamination, plain
from stillroom.distill.packing import Packer, Windows, as_windows, borders
from stillroom.errors import InputError
from stillroom.evaluation_text import EvaluationText, task_texts
from stillroom.recipe import TextSource
from stillroom.stage import Job
from stillroom.text import TEACHER, Document, read_documents

TEXT_FILE = "text.jsonl"
"""Where the artifact of a `teacher` source holds its documents."""

SHUFFLE_DOCUMENTS = 10_000
SHUFFLE_CHARACTERS = 64_000_000
"""The shuffle buffer holds at most this much."""

TOKENIZE_TOGETHER = 64
"""Documents handed to a fast tokenizer at once, which spreads them over the cores."""

HELDOUT_BORDER = "\n\n"
"""Between held-out documents; text, not a special token, so that every token covers bytes. WikiText-2 is usually
measured like this (GPTQ, arXiv 2210.17323, and those after it)."""


@dataclass(frozen=True)
class HeldoutText:
    """Text to measure on."""

    label: str
    ids: Tensor
    """(tokens,) int64, without special tokens that are not in the text."""
    num_bytes: int
    """UTF-8 bytes of exactly the text that `ids` covers."""
    bos: int | None
    """What a window must be started with to be read as the model expects; None: nothing."""


def documents(source: TextSource, inputs: Mapping[str, Artifact]) -> Iterator[Document]:
    """The documents of a source; what the teacher wrote is taken from the input `text:LABEL`."""
    written = inputs[f"text:{source.label}"].path / TEXT_FILE if source.source == TEACHER else None
    return read_documents(source, written)


def contamination_of(evaluated: EvaluationText | None, tokenizer: PreTrainedTokenizerBase) -> Contamination | None:
    """What training text is kept clear of; None where the recipe wants nothing."""
    return None if evaluated is None else contamination(_evaluated_texts(evaluated, tokenizer))


def _evaluated_texts(evaluated: EvaluationText, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    for source in evaluated.heldout:
        left = source.tokens
        for document in read_documents(source):
            yield plain(document)
            if left is not None and (left := left - _num_tokens(document, tokenizer, source.source)) <= 0:
                break
    for path in evaluated.task_files:
        yield from task_texts(path)


def clear_documents(job: Job, tokenizer: PreTrainedTokenizerBase) -> Iterator[Document]:
    """All documents of the job's text, source after source, without those that decontamination leaves out."""
    clear_of = contamination_of(job.evaluated, tokenizer)
    for source in job.text:
        found = documents(source, job.inputs)
        yield from found if clear_of is None else _clean(found, source, tokenizer, clear_of, None)
    decontamination_details(clear_of, job)


def decontamination_details(clear_of: Contamination | None, job: Job) -> dict[str, dict[str, int]]:
    """What was left out of each source, for a stage's details; it is said in the log as well."""
    if clear_of is None or job.evaluated is None:
        return {}
    for label, counts in clear_of.dropped.items():
        if counts.documents:
            job.progress.log(
                f"decontamination left out {counts.documents:,} of {counts.read_documents:,} documents of {label} "
                f"({counts.tokens:,} tokens), which share {GRAM_WORDS} words in a row with the evaluation text"
            )
    if not clear_of.complete:
        job.progress.log(
            f"warning: decontamination saw no more than {MAX_GRAMS:,} n-grams of the evaluation text; give `tokens` of "
            "the held-out sources"
        )
    if job.evaluated.hub_tasks:
        tasks = ", ".join(job.evaluated.hub_tasks)
        job.progress.log(f"decontamination does not see the questions of tasks that come from the hub: {tasks}")
    return {label: asdict(counts) for label, counts in clear_of.dropped.items()}


def as_text(document: Document, tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    """Plain text as it is; a conversation as the chat template writes it, special tokens spelled out."""
    if isinstance(document, str):
        return document
    if tokenizer.chat_template is None:
        raise InputError(f"{where} holds conversations (`messages`), but the model's tokenizer has no chat template")
    text: str = tokenizer.apply_chat_template(document, tokenize=False)
    return text


def calibration_windows(job: Job, tokenizer: PreTrainedTokenizerBase, sequence_length: int, num_windows: int) -> Tensor:
    """At most `num_windows` windows of the job's blend, (N, T) int64, to be read across the borders of documents.

    Raises InputError when the text does not fill one.
    """
    clear_of = contamination_of(job.evaluated, tokenizer)
    windows = packed_windows(
        job.text, job.inputs, tokenizer, sequence_length, num_windows, seed=job.seed, clear_of=clear_of
    )
    decontamination_details(clear_of, job)
    return windows.ids.long()


def packed_windows(
    sources: Sequence[TextSource],
    inputs: Mapping[str, Artifact],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    num_windows: int,
    *,
    seed: int,
    clear_of: Contamination | None = None,
    passes: dict[str, int] | None = None,
) -> Windows:
    """At most `num_windows` windows of the blend: fewer when every source was read once before.

    What is left out because of `clear_of` is counted there; `passes` is told how often each source was begun.
    Raises InputError when the text does not fill one.
    """
    cut: list[tuple[Tensor, Tensor]] = []
    packer = Packer(borders(tokenizer), sequence_length)
    for ids in blend(sources, inputs, tokenizer, seed=seed, clear_of=clear_of, passes=passes):
        packer.add(ids)
        cut += packer.cut()
        if len(cut) >= num_windows:
            break
    if not cut:
        labels = ", ".join(source.label for source in sources)
        raise InputError(
            f"text ({labels}) has {len(packer.ids)} tokens, a window needs {sequence_length}; "
            "lower sequence_length or give more text"
        )
    return as_windows(cut[:num_windows])


@dataclass
class _Stream:
    """One source in a blend."""

    source: TextSource
    ids: Iterator[list[int]]
    tokens: int = 0
    passes: int = 0


def blend(
    sources: Sequence[TextSource],
    inputs: Mapping[str, Artifact],
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    clear_of: Contamination | None = None,
    passes: dict[str, int] | None = None,
) -> Iterator[list[int]]:
    """Documents as token ids, the sources' tokens in proportion to their weights.

    A source that ends is read again, in another order, until every source was read once.
    """

    def one_pass(source: TextSource, number: int) -> Iterator[list[int]]:
        if passes is not None:
            passes[source.label] = number + 1
        shuffled = shuffle(documents(source, inputs), random.Random(f"{seed}/{source.label}/{number}"))
        if clear_of is not None:
            shuffled = _clean(shuffled, source, tokenizer, clear_of, Dropped() if number else None)
        return _capped(tokenize(shuffled, tokenizer, source.source), _cap(source))

    streams = [_Stream(source, one_pass(source, 0)) for source in sources]
    while True:
        stream = min(streams, key=lambda s: s.tokens / s.source.weight)
        ids = next(stream.ids, None)
        if ids is not None:
            stream.tokens += len(ids)
            yield ids
            continue
        if stream.tokens == 0:
            if clear_of is not None and (dropped := clear_of.dropped[stream.source.label].documents):
                raise InputError(
                    f"all {dropped} documents of {stream.source.source} share {GRAM_WORDS} words in a row with the "
                    "evaluation text; give other text, or set data.decontaminate to false"
                )
            raise InputError(f"{stream.source.source} is empty: it holds no document with text")
        stream.passes += 1
        if all(s.passes for s in streams):
            return
        stream.ids = one_pass(stream.source, stream.passes)


def _clean(
    items: Iterable[Document],
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    clear_of: Contamination,
    counts: Dropped | None,
) -> Iterator[Document]:
    """The documents that are clear; the others are counted, in `clear_of` unless `counts` is another place."""
    counts = clear_of.dropped.setdefault(source.label, Dropped()) if counts is None else counts
    for document in items:
        counts.read_documents += 1
        if clear_of.touches(document):
            counts.documents += 1
            counts.tokens += _num_tokens(document, tokenizer, source.source)
        else:
            yield document


def _num_tokens(document: Document, tokenizer: PreTrainedTokenizerBase, where: str) -> int:
    return sum(len(ids) for ids in tokenize([document], tokenizer, where))


def shuffle(items: Iterable[Document], generator: random.Random) -> Iterator[Document]:
    """The items in a random order, through a buffer of bounded size."""
    buffer: list[Document] = []
    sizes: list[int] = []
    held = 0

    def draw() -> Document:
        nonlocal held
        i = generator.randrange(len(buffer))
        buffer[i], buffer[-1] = buffer[-1], buffer[i]
        sizes[i], sizes[-1] = sizes[-1], sizes[i]
        held -= sizes.pop()
        return buffer.pop()

    for item in items:
        buffer.append(item)
        sizes.append(_characters(item))
        held += sizes[-1]
        while len(buffer) > SHUFFLE_DOCUMENTS or held > SHUFFLE_CHARACTERS:
            yield draw()
    while buffer:
        yield draw()


def _characters(document: Document) -> int:
    return len(document) if isinstance(document, str) else sum(len(message["content"]) for message in document)


def tokenize(items: Iterable[Document], tokenizer: PreTrainedTokenizerBase, where: str) -> Iterator[list[int]]:
    """Each document's token ids, special tokens that are spelled out in it included, none added; none is empty."""
    group: list[str] = []
    for item in items:
        group.append(as_text(item, tokenizer, where))
        if len(group) == TOKENIZE_TOGETHER:
            yield from _tokenize_group(group, tokenizer)
            group = []
    yield from _tokenize_group(group, tokenizer)


def _tokenize_group(group: list[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    if group:  # verbose: a document longer than the model's context is fine here
        yield from (ids for ids in tokenizer(group, add_special_tokens=False, verbose=False)["input_ids"] if ids)


def _cap(source: TextSource) -> int | None:
    """The most tokens to read. For the teacher's text `tokens` was how much to write, so all of it is read."""
    return None if source.source == TEACHER else source.tokens


def _capped(items: Iterator[list[int]], most: int | None) -> Iterator[list[int]]:
    """Token documents up to `most` tokens, the last one cut."""
    for ids in items:
        if most is None:
            yield ids
            continue
        yield ids[:most]
        most -= len(ids)
        if most <= 0:
            return


def heldout_text(
    source: TextSource, inputs: Mapping[str, Artifact], tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> HeldoutText:
    """The first tokens of a source, in its order, at most `max_tokens` and the source's own `tokens`.

    Raises InputError when there is none.
    """
    cap = _cap(source)
    left = max_tokens if cap is None else min(max_tokens, cap)
    ids: list[int] = []
    num_bytes = 0
    for document in documents(source, inputs):
        some, covered = _first_tokens(as_text(document, tokenizer, source.source) + HELDOUT_BORDER, tokenizer, left)
        ids += some
        num_bytes += covered
        left -= len(some)
        if left <= 0:
            break
    if not ids:
        raise InputError(f"{source.source} is empty: it holds no document with text")
    return HeldoutText(source.label, torch.tensor(ids), num_bytes, borders(tokenizer).bos)


def _first_tokens(text: str, tokenizer: PreTrainedTokenizerBase, most: int) -> tuple[list[int], int]:
    """At most `most` token ids from the start of the text, and the UTF-8 bytes that they cover."""
    encoded = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=tokenizer.is_fast)
    ids: list[int] = encoded["input_ids"]
    if len(ids) > most:
        ids = ids[:most]
        if tokenizer.is_fast:
            text = text[: encoded["offset_mapping"][most - 1][1]]
        else:
            text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return ids, len(text.encode())
