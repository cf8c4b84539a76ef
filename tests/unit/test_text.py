"""Text from files, hub and CPython: what is read, and how what cannot be read is named."""

from __future__ import annotations

import gzip
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stillroom.errors import EnvironmentCannot, InputError
from stillroom.recipe import TextSource
from stillroom.refusals import _check_hub_text
from stillroom.text import check_text, fingerprint, read_documents

CHAT = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "Slowly."}]


def jsonl(path: Path, *rows: Any) -> TextSource:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return TextSource(source=str(path))


def read(source: TextSource, written: Path | None = None) -> list[Any]:
    return list(read_documents(source, written))


def test_a_txt_file_is_its_paragraphs(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n\nFirst line\nsecond line\n\n \n\tIndented\n", encoding="utf-8")
    assert read(TextSource(source=str(path))) == ["First line\nsecond line", "\tIndented"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_jsonl_rows_are_text_or_conversations(tmp_path: Path, name: str) -> None:
    source = jsonl(tmp_path / name, {"text": "één"}, {"text": "  "}, {"messages": CHAT, "id": 3})
    assert read(source) == ["één", CHAT]


def test_a_given_field_is_read_even_beside_messages(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", {"body": "this", "messages": CHAT})
    assert read(source.model_copy(update={"field": "body"})) == ["this"]


def test_parquet_is_read_by_column(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["one", "two"], "n": [1, 2]}), tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"messages": [CHAT]}), tmp_path / "b.parquet")
    assert read(TextSource(source=str(tmp_path / "a.parquet"))) == ["one", "two"]
    assert read(TextSource(source=str(tmp_path / "b.parquet"))) == [CHAT]
    with pytest.raises(InputError, match="has neither 'body' nor 'messages'; its fields: n, text"):
        check_text(TextSource(source=str(tmp_path / "a.parquet"), field="body"))
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    with pytest.raises(InputError, match="is not a whole parquet file"):
        check_text(TextSource(source=str(tmp_path / "a.parquet")))


@pytest.mark.parametrize("form", ["file", "stream"])
def test_arrow_files_and_streams_are_read_batch_by_batch(tmp_path: Path, form: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    path = tmp_path / "a.arrow"

    def write(table: Any, size: int) -> TextSource:
        new = pyarrow.ipc.new_file if form == "file" else pyarrow.ipc.new_stream
        with new(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=size)
        return TextSource(source=str(path))

    texts = [f"number {i}" for i in range(700)]
    assert read(write(pyarrow.table({"n": list(range(700)), "text": texts}), 300)) == texts
    assert read(write(pyarrow.table({"messages": [CHAT]}), 1)) == [CHAT]
    source = write(pyarrow.table({"body": ["one"]}), 1)
    with pytest.raises(InputError, match="has neither 'text' nor 'messages'; its fields: body"):
        check_text(source)
    assert read(source.model_copy(update={"field": "body"})) == ["one"]
    assert source.label == "a"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="is not a whole Arrow file"):
        check_text(source)
    with pytest.raises(InputError, match=r"a.arrow is empty: it holds no document"):
        check_text(write(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), 1))


def test_an_arrow_stream_that_breaks_off_is_named(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"text": [f"number {i}" for i in range(700)]})
    with pyarrow.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=300)
    whole = (tmp_path / "a.arrow").read_bytes()
    (tmp_path / "a.arrow").write_bytes(whole[: len(whole) * 2 // 3])
    source = TextSource(source=str(tmp_path / "a.arrow"))
    check_text(source)
    with pytest.raises(InputError, match="is not a whole Arrow file"):
        read(source)


def test_what_the_teacher_wrote_is_read_from_its_artifact(tmp_path: Path) -> None:
    jsonl(tmp_path / "text.jsonl", {"text": "<|user|>Hi", "source": "teacher"})
    source = TextSource(source="teacher", tokens=100)
    check_text(source)
    assert fingerprint(source) == "teacher"
    assert read(source, tmp_path / "text.jsonl") == ["<|user|>Hi"]
    with pytest.raises(InputError, match="cannot be read without one"):
        read(source)


def test_python_docs_are_there_without_any_data() -> None:
    documents = read(TextSource(source="python-docs"))
    assert len(documents) > 50
    assert sum(map(len, documents)) > 200_000
    assert documents == read(TextSource(source="python-docs"))
    assert len(fingerprint(TextSource(source="python-docs"))) == 64


def test_the_fingerprint_of_a_file_follows_its_bytes(tmp_path: Path) -> None:
    first = fingerprint(jsonl(tmp_path / "a.jsonl", {"text": "one"}))
    assert first == fingerprint(jsonl(tmp_path / "b.jsonl", {"text": "one"}))
    assert first != fingerprint(jsonl(tmp_path / "c.jsonl", {"text": "two"}))


def test_the_fingerprint_of_a_hub_dataset_needs_no_network() -> None:
    source = TextSource(source="hub:org/name:part", revision="abc", split="test")
    assert fingerprint(source) == "hub:org/name:part@abc:test"
    assert fingerprint(source) != fingerprint(source.model_copy(update={"revision": None}))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"x", r"known; allowed: a file ending in .txt, .jsonl, .jsonl.gz, .parquet, .arrow"),
        ("a.txt", None, r"does not exist .* give a file ending in .txt"),
        ("a.txt", b"", r"a.txt is empty"),
        ("a.txt", b"\n \n\n", r"holds no document with text"),
        ("a.txt", b"caf\xe9", r"after line 0: not UTF-8"),
        ("a.jsonl", b'{"text": "one"', r"a.jsonl line 1: not JSON"),
        ("a.jsonl", b'\n["one"]\n', r"a.jsonl line 2: a JSON object is needed, not list"),
        ("a.jsonl", b'{"body": "one", "id": 1}\n', r"line 1 has neither 'text' nor 'messages'; its fields: body, id"),
        ("a.jsonl", b'{"text": null}\n', r"line 1: 'text' is NoneType; text or a list of messages is needed"),
        ("a.jsonl", b'{"messages": []}\n', r"'messages' is an empty list"),
        (
            "a.jsonl",
            b'{"messages": [{"from": "user", "value": "x"}]}\n',
            r"an object with from, value; it needs `role`",
        ),
        ("a.jsonl.gz", b"not gzip", r"not a whole gzip file"),
        ("a.parquet", b"not parquet", r"is not a whole parquet file"),
        ("a.arrow", b"not arrow at all", r"is not a whole Arrow file"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    source = TextSource(source=str(tmp_path / name))
    with pytest.raises(InputError, match=message):
        check_text(source)


def test_a_bad_row_deep_in_a_file_is_named_by_its_line(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", *[{"text": "fine"}] * 41, {"txt": "wrong"})
    check_text(source)
    with pytest.raises(InputError, match="line 42 has neither"):
        read(source)


def test_a_gzip_file_that_breaks_off_is_named(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl.gz", *[{"text": "fine"}] * 41)
    path = Path(source.source)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"after line \d+: not a whole gzip file"):
        read(source)


@pytest.mark.parametrize("name", ["hub:", "hub:a:b:c"])
def test_a_hub_name_of_another_form_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"not of the form hub:NAME or hub:NAME:CONFIG"):
        check_text(TextSource(source=name))


def test_a_hub_that_is_out_of_reach_is_no_fault_of_the_recipe(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    code = (
        "from stillroom.recipe import TextSource; from stillroom.text import read_documents; "
        "next(read_documents(TextSource(source='hub:org/name')))"
    )
    path = ":".join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        check=False,
    )
    assert EnvironmentCannot.__name__ in done.stderr.splitlines()[-1]
    assert "give a local file" in done.stderr


def test_hub_rows_are_streamed_and_checked_before_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: dict[str, Any] = {}
    taken = []

    def rows_of(name: str, config: str | None, **options: Any) -> Any:
        asked.update(options, name=name, config=config)

        def generate() -> Iterator[dict[str, Any]]:
            for i in range(1000):
                taken.append(i)
                yield {"body": f"number {i}"} if i % 2 else {"messages": CHAT}

        return generate() if name != "org/empty" else iter(())

    monkeypatch.setattr(datasets, "load_dataset", rows_of)
    source = TextSource(source="hub:org/name:part", field="body", split="test", revision="abc")
    assert list(itertools.islice(read_documents(source), 2)) == [CHAT, "number 1"]
    assert asked == {"name": "org/name", "config": "part", "split": "test", "revision": "abc", "streaming": True}
    assert len(taken) == 2, "no more is fetched than is read"
    step = SimpleNamespace(text=(source.model_copy(update={"field": "text"}),))
    _check_hub_text([step])  # type: ignore[list-item]
    with pytest.raises(InputError, match="row 2 has neither 'text' nor 'messages'; its fields: body"):
        read(step.text[0])
    with pytest.raises(InputError, match="hub:org/empty is empty"):
        _check_hub_text([SimpleNamespace(text=(TextSource(source="hub:org/empty"),))])  # type: ignore[list-item]


def test_reading_text_imports_no_torch() -> None:
    code = (
        "import sys; from stillroom.recipe import TextSource; from stillroom.text import check_text, fingerprint; "
        "check_text(TextSource(source='python-docs')); fingerprint(TextSource(source='python-docs')); "
        "assert not {'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
