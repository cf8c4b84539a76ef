"""Text from wherever a recipe names it, as a stream of documents: files, hub datasets, what the teacher wrote, and the
language reference that every CPython carries (so that something human-written can be measured on with no data at all).

A document is a string, or the messages of a conversation, which become text by the model's own chat template later on.
Nothing here imports torch: the plan hashes and checks text with it. `check_text` reads one row only, so that a wrong
path or column is found before any long work; whatever is wrong deeper in a file is reported with its line.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from stillroom.artifact import file_sha256
from stillroom.errors import EnvironmentCannot, InputError
from stillroom.recipe import TextSource

TEACHER = "teacher"
PYTHON_DOCS = "python-docs"
HUB = "hub:"
ENDINGS = (".txt", ".jsonl", ".jsonl.gz", ".parquet", ".arrow")

ROWS_TOGETHER = 256
"""Rows of a table that are Python objects at one time."""

Document = str | list[dict[str, str]]
"""Plain text, or a conversation as `role` and `content` of each message."""


def fingerprint(source: TextSource) -> str:
    """What identifies the text: the sha256 of a file's bytes, or the name and revision of a hub dataset.

    What the teacher writes is identified by the artifact that holds it, so here it is only `teacher`.
    """
    if source.source == TEACHER:
        return TEACHER
    if source.source == PYTHON_DOCS:
        return hashlib.sha256("\0".join(_python_docs()).encode()).hexdigest()
    if source.source.startswith(HUB):
        return f"{source.source}@{source.revision or 'main'}:{source.split}"
    return file_sha256(_existing_file(source))


def check_text(source: TextSource) -> None:
    """Raise InputError, or EnvironmentCannot for a missing library, where the text cannot be read from its start."""
    if source.source == TEACHER:
        if source.starts is not None:
            check_text(source.starts)
        return
    if source.source.startswith(HUB):
        _hub_name(source)  # whether `datasets` is there is for preflight: a plan needs only the name
        return
    require_document(source)


def require_document(source: TextSource) -> None:
    """Read the first document. Raises InputError where there is none, EnvironmentCannot where a hub does not answer."""
    if next(read_documents(source), None) is None:
        raise InputError(f"{source.source} is empty: it holds no document with text")


def read_documents(source: TextSource, written: Path | None = None) -> Iterator[Document]:
    """The documents in order, none of them blank; `written` is the text.jsonl of a `teacher` source's artifact.

    Raises InputError with file and line for a row that is no document.
    """
    for document in _documents(source, written):
        if not isinstance(document, str) or document.strip():
            yield document


def _documents(source: TextSource, written: Path | None) -> Iterator[Document]:
    if source.source == TEACHER:
        if written is None:
            raise InputError(
                "text source `teacher` is what the unpruned model of a run writes; it cannot be read without one"
            )
        return _jsonl(written, "text")
    if source.source == PYTHON_DOCS:
        return iter(_python_docs())
    if source.source.startswith(HUB):
        return _hub(source)
    path = _existing_file(source)
    if path.name.endswith(".txt"):
        return _paragraphs(path)
    if path.name.endswith((".parquet", ".arrow")):
        return _arrow(path, source)
    return _jsonl(path, source.field)


def _existing_file(source: TextSource) -> Path:
    """The file that a source names. Raises InputError for an unknown ending, a missing or an empty file."""
    path = Path(source.source).expanduser()
    if not path.name.endswith(ENDINGS):
        raise InputError(
            f"text source {source.source!r} is none that is known; allowed: a file ending in {', '.join(ENDINGS)}, "
            f"{HUB}NAME or {HUB}NAME:CONFIG, {TEACHER}, {PYTHON_DOCS}"
        )
    if not path.is_file():
        raise InputError(
            f"text file {source.source!r} does not exist (looked in {Path.cwd()}); "
            f"give a file ending in {', '.join(ENDINGS)}"
        )
    if path.stat().st_size == 0:
        raise InputError(f"{source.source} is empty")
    return path


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their numbers. Raises InputError for bytes that are not UTF-8 or a gzip file that breaks off."""
    number = 0
    try:
        with _open_text(path) as file:
            for number, line in enumerate(file, start=1):
                yield number, line
    except UnicodeDecodeError as error:
        raise InputError(f"{path} after line {number}: not UTF-8 ({error.reason}); convert it first") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(
            f"{path} after line {number}: not a whole gzip file ({error}); write or copy it again"
        ) from error


def _open_text(path: Path) -> IO[str]:
    return gzip.open(path, "rt", encoding="utf-8") if path.name.endswith(".gz") else path.open(encoding="utf-8")


def _paragraphs(path: Path) -> Iterator[str]:
    """Paragraphs of a plain file, which blank lines separate."""
    paragraph: list[str] = []
    for _, line in _lines(path):
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield "".join(paragraph).strip("\n")
            paragraph = []
    if paragraph:
        yield "".join(paragraph).strip("\n")


def _jsonl(path: Path, field: str) -> Iterator[Document]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path} line {number}: not JSON ({error.msg} at column {error.colno})") from error
        if not isinstance(row, dict):
            raise InputError(f"{path} line {number}: a JSON object is needed, not {type(row).__name__}")
        yield _document(row, field, f"{path} line {number}")


def _arrow(path: Path, source: TextSource) -> Iterator[Document]:
    """Rows of a parquet file, or of an Arrow file or stream, some at a time."""
    _require("pyarrow", source)
    import pyarrow
    import pyarrow.parquet

    try:
        if path.name.endswith(".parquet"):
            file = pyarrow.parquet.ParquetFile(path)
            names = file.schema_arrow.names
            column = _column(names, source, path)
            batches = file.iter_batches(batch_size=ROWS_TOGETHER, columns=[column])
        else:
            names, found = _arrow_batches(pyarrow.memory_map(str(path)))
            column = _column(names, source, path)
            batches = (batch.select([column]) for batch in found)
        number = 0
        for batch in batches:
            for start in range(0, batch.num_rows, ROWS_TOGETHER):
                for row in batch.slice(start, ROWS_TOGETHER).to_pylist():
                    number += 1
                    yield _document(row, source.field, f"{path} row {number}")
    except (pyarrow.ArrowException, OSError) as error:
        kind = "parquet" if path.name.endswith(".parquet") else "Arrow"
        raise InputError(f"{path} is not a whole {kind} file: {error}") from error


def _arrow_batches(file: Any) -> tuple[list[str], Iterator[Any]]:
    """Column names and batches of what is in Arrow's file format or, as `datasets` writes it, in its stream format."""
    import pyarrow

    try:
        reader = pyarrow.ipc.open_file(file)
    except pyarrow.ArrowInvalid:
        file.seek(0)
        stream = pyarrow.ipc.open_stream(file)
        return stream.schema.names, iter(stream)
    return reader.schema.names, (reader.get_batch(i) for i in range(reader.num_record_batches))


def _column(names: list[str], source: TextSource, path: Path) -> str:
    """The one that holds the documents. Raises InputError where there is none."""
    column = next((name for name in (source.field, "messages") if name in names), None)
    if column is None:
        _document(dict.fromkeys(names), source.field, str(path))
    assert column is not None
    return column


def _hub(source: TextSource) -> Iterator[Document]:
    """Rows of a hub dataset, streamed. Raises EnvironmentCannot where the hub cannot be reached."""
    _require("datasets", source)
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    name, config = _hub_name(source)
    try:
        rows = datasets.load_dataset(name, config, split=source.split, revision=source.revision, streaming=True)
        for number, row in enumerate(rows, start=1):
            yield _document(row, source.field, f"{source.source} row {number}")
    except InputError:
        raise
    except (DatasetNotFoundError, ValueError) as error:
        raise InputError(f"{source.source} (split {source.split!r}) cannot be read: {error}") from error
    except OSError as error:
        raise EnvironmentCannot(
            f"{source.source} cannot be read from the hub: {error}; check the network, or give a local file"
        ) from error


def _hub_name(source: TextSource) -> tuple[str, str | None]:
    """Name and config of `hub:NAME[:CONFIG]`."""
    name, _, config = source.source.removeprefix(HUB).partition(":")
    if not name or ":" in config:
        raise InputError(f"text source {source.source!r} is not of the form {HUB}NAME or {HUB}NAME:CONFIG")
    return name, config or None


def _document(row: Mapping[str, Any], field: str, where: str) -> Document:
    """The document in a row: its `field`, else its `messages`. Raises InputError where it has neither."""
    value = row.get(field, row.get("messages"))
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        return [_message(message, where) for message in value]
    if field in row or "messages" in row:
        kind = "an empty list" if value == [] else type(value).__name__
        raise InputError(
            f"{where}: {field if field in row else 'messages'!r} is {kind}; text or a list of messages is needed"
        )
    raise InputError(
        f"{where} has neither {field!r} nor 'messages'; its fields: {', '.join(sorted(row)) or 'none'}. "
        "Set `field` of the text source to the one that holds the text"
    )


def _message(message: Any, where: str) -> dict[str, str]:
    role = message.get("role") if isinstance(message, dict) else None
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(role, str) or not isinstance(content, str):
        given = f"an object with {', '.join(sorted(message))}" if isinstance(message, dict) else type(message).__name__
        raise InputError(f"{where}: a message is {given}; it needs `role` and `content`, both text")
    return {"role": role, "content": content}


def _python_docs() -> list[str]:
    """The topics of `help()`, which are chapters of the language reference, by name.

    They come with the interpreter, so their text, and with it the fingerprint, follows its version.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise EnvironmentCannot(
            f"this Python has no pydoc_data, which text source {PYTHON_DOCS} reads; name a text file instead"
        ) from None
    return [topics[name] for name in sorted(topics)]


def _require(library: str, source: TextSource) -> None:
    if importlib.util.find_spec(library) is None:
        raise EnvironmentCannot(
            f"text source {source.source!r} needs the Python package {library}; install stillroom[compress]"
        )
