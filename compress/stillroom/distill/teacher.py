"""The text stage: the unpruned model writes the training text itself, so that a run needs no data set.

A model with a chat template writes whole conversations, after Magpie (arXiv 2406.08464): it is given what its template
puts before a user's message, writes that message, is given what opens the answer, and writes the answer. From a bare
bos token such a model writes little of use (SmolLM2-135M-Instruct: mostly broken prose), because it never learned what
precedes the first message. A base model starts from bos. Or the recipe gives it starts: prompts to answer (a base model
continues them), or documents whose first tokens it continues. Special tokens are kept in the text, spelled out, so that
tokenizing it gives the structure back.

Documents are written in batches, each from a generator of its own (seed and number of the batch), and a finished batch
is a file in the scratch directory: a killed run goes on with the next one and ends with the same text.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stillroom.artifact import write_atomically
from stillroom.distill.data import TEXT_FILE, as_text
from stillroom.distill.decode import write
from stillroom.distill.packing import borders
from stillroom.errors import InputError
from stillroom.models.load import load_model, load_tokenizer
from stillroom.models.shape import read_config, shape_of
from stillroom.recipe import TextSource
from stillroom.stage import Job, StageResult
from stillroom.text import Document, read_documents

DOCUMENT_TOKENS = 512
"""A document ends here at the latest."""

BATCH_SIZE = 128
"""Documents written at once, where their KV cache fits."""

CACHE_BYTES = 4 << 30
"""Memory for that cache."""

SHINGLE = 24
"""Characters of the pieces by which repetition is measured."""

MIN_DISTINCT = 0.6
"""Fewer distinct pieces than this are warned about: the text repeats itself."""

USER_MESSAGE = "USER-MESSAGE"
"""Marks the place of the message in the rendered template."""


@dataclass(frozen=True)
class Opening:
    """What the model is given, and where it stops."""

    prefix: tuple[int, ...]
    """Before the first written token; not empty."""
    answer: tuple[int, ...]
    """Between the user's message and the answer; empty for a base model."""
    ends: frozenset[int]
    """Tokens that end a message or a document."""


@dataclass
class Draft:
    """A document that is being written (a `decode.Row`)."""

    opening: Opening
    ids: list[int] = field(init=False)
    forced: list[int] = field(init=False)
    """Tokens to come that the template knows, the next one last."""
    answering: bool = False
    done: bool = False

    def __post_init__(self) -> None:
        self.ids = [self.opening.prefix[0]]
        self.forced = list(reversed(self.opening.prefix[1:]))

    @property
    def waiting(self) -> bool:
        return bool(self.forced)

    def take(self, sampled: int) -> None:
        if self.forced:
            self.ids.append(self.forced.pop())
        elif sampled not in self.opening.ends:
            self.ids.append(sampled)
        elif self.opening.answer and not self.answering:
            self.answering = True
            self.ids.append(self.opening.answer[0])
            self.forced = list(reversed(self.opening.answer[1:]))
        else:
            self.ids.append(sampled)
            self.done = True


@dataclass(frozen=True)
class Written:
    """A finished document."""

    text: str
    tokens: int


def run(job: Job) -> StageResult:
    """Write at least `job.config.tokens` tokens of text with `job.source`."""
    source: TextSource = job.config
    model_dir = job.source.model_dir
    assert source.tokens is not None  # the recipe sees to it
    shape = shape_of(read_config(model_dir), str(model_dir))
    model, tokenizer = load_model(model_dir), load_tokenizer(model_dir)
    batch_size = max(1, min(BATCH_SIZE, CACHE_BYTES // (DOCUMENT_TOKENS * shape.kv_bytes_per_token())))
    batches = [_read(path) for path in sorted(job.scratch_dir.glob("batch-*.jsonl"))]
    finished = [document for batch in batches for document in batch]
    openings = itertools.islice(openings_of(model, tokenizer, job), len(finished), None)
    started, before = time.perf_counter(), _count(finished)
    number = len(batches)
    while _count(finished) < source.tokens:
        size = min(batch_size, _documents_needed(source.tokens, finished))
        batch = _write_batch(
            model, tokenizer, [Draft(next(openings)) for _ in range(size)], job, number, _count(finished)
        )
        write_atomically(job.scratch_dir / f"batch-{number:06d}.jsonl", _rows(batch))
        finished += batch
        number += 1
    write_atomically(job.out_dir / TEXT_FILE, _rows(finished))
    share = distinct_share([document.text for document in finished])
    if share < MIN_DISTINCT:
        job.progress.log(
            f"warning: the teacher repeats itself: {share:.0%} of its text's {SHINGLE}-character pieces are distinct "
            f"(below {MIN_DISTINCT:.0%}); raise temperature (now {source.temperature}) or give text of your own"
        )
    return StageResult(
        tokens=_count(finished),
        details={
            "documents": len(finished),
            "distinct_share": share,
            "tok_s": (_count(finished) - before) / (time.perf_counter() - started),
        },
    )


def openings_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, job: Job) -> Iterator[Opening]:
    """What one document after the other begins with, without end; the given starts in order, again and again.

    Raises InputError where none of them can be used.
    """
    source: TextSource = job.config
    if source.starts is None:
        yield from itertools.repeat(opening_of(model, tokenizer))
    ends, bos = _ends(model, tokenizer), borders(tokenizer).bos
    assert source.starts is not None
    for number in itertools.count():
        used = passed_over = 0
        for document in read_documents(source.starts):
            if source.prompts is not None:
                text = _prompt(document, tokenizer, source.prompts.source)
                ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            else:
                text = as_text(document, tokenizer, source.starts.source)
                ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][: source.first_tokens]
            prefix = ids if bos is None or ids[:1] == [bos] else [bos, *ids]
            if 0 < len(prefix) <= DOCUMENT_TOKENS // 2:
                used += 1
                yield Opening(prefix=tuple(prefix), answer=(), ends=ends)
            else:
                passed_over += 1
        if used == 0:
            raise InputError(f"{source.starts.source} has no prompt of at most {DOCUMENT_TOKENS // 2} tokens")
        if number == 0 and passed_over:
            job.progress.log(f"passed over {passed_over} prompts of more than {DOCUMENT_TOKENS // 2} tokens")


def _prompt(document: Document, tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    """What is to be answered, as the chat template puts it; as it is, where there is none."""
    if isinstance(document, str):
        if tokenizer.chat_template is None:
            return document
        document = [{"role": "user", "content": document}]
    if tokenizer.chat_template is None:
        return as_text(document, tokenizer, where)  # says what is wrong
    while document and document[-1]["role"] != "user":
        document = document[:-1]
    if not document:
        raise InputError(f"{where} has a conversation without a user's message; there is nothing to answer")
    text: str = tokenizer.apply_chat_template(document, tokenize=False, add_generation_prompt=True)
    return text


def opening_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Opening:
    """What this model's documents begin with. Raises InputError when its tokenizer does not say."""
    stops = _ends(model, tokenizer)
    if tokenizer.chat_template is None:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        return Opening(prefix=(start if start is not None else min(stops),), answer=(), ends=stops)
    messages = [{"role": "user", "content": USER_MESSAGE}]
    rendered: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    head, _, tail = rendered.partition(USER_MESSAGE)
    prefix, answer = (tuple(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in (head, tail))
    if not prefix or head == rendered:
        raise InputError(
            "the chat template puts nothing before a user's message, so the model cannot be led to write one; "
            "give a text file instead of `teacher`"
        )
    return Opening(prefix, answer, stops)


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end a message or a document. Raises InputError where there is none."""
    configured = model.generation_config.eos_token_id if model.generation_config else None
    ends = configured if configured is not None else tokenizer.eos_token_id
    if ends is None:
        raise InputError("the model has no end-of-text token (eos_token_id), so it cannot write text; give a text file")
    return frozenset([ends] if isinstance(ends, int) else ends)


def distinct_share(texts: Sequence[str]) -> float:
    """Of all pieces of SHINGLE characters, the share that are distinct; what all texts begin with is left out.

    1 where nothing is said twice, near 0 where the same is said again and again. Looks at 1,000 texts at most.
    """
    begin = len(os.path.commonprefix(list(texts))) if len(texts) > 1 else 0  # noqa: RUF071 (of strings, no paths)
    pieces: set[str] = set()
    total = 0
    for text in texts[:1000]:
        for i in range(begin, len(text) - SHINGLE + 1):
            pieces.add(text[i : i + SHINGLE])
            total += 1
    return len(pieces) / total if total else 0.0


def _write_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    drafts: list[Draft],
    job: Job,
    number: int,
    before: int,
) -> list[Written]:
    """Let the model finish these drafts, as batch `number`; `before` tokens were written in the ones before."""
    source: TextSource = job.config
    started = time.perf_counter()

    def report() -> None:
        now = sum(len(draft.ids) for draft in drafts)
        facts = {"documents": float(len(drafts)), "tok_s": now / (time.perf_counter() - started)}
        job.progress.update(min(before + now, source.tokens or 0), source.tokens or 0, "token", **facts)

    write(
        model,
        drafts,
        max_tokens=DOCUMENT_TOKENS,
        temperature=source.temperature,
        generator=torch.Generator().manual_seed((job.seed << 20) + number),
        on_step=report,
    )
    return [
        Written(tokenizer.decode(draft.ids, clean_up_tokenization_spaces=False), len(draft.ids)) for draft in drafts
    ]


def _documents_needed(tokens: int, finished: Sequence[Written]) -> int:
    """How many more documents will probably make it, judged by the finished ones; a tenth more, to be done in one."""
    mean = _count(finished) / len(finished) if finished else DOCUMENT_TOKENS / 2
    return math.ceil(1.1 * (tokens - _count(finished)) / mean)


def _count(documents: Sequence[Written]) -> int:
    return sum(document.tokens for document in documents)


def _rows(documents: Sequence[Written]) -> str:
    rows = ({"text": document.text, "source": "teacher", "tokens": document.tokens} for document in documents)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _read(path: Path) -> list[Written]:
    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line)
    return [Written(row["text"], row["tokens"]) for row in rows]
