"""Documents to windows: borders, blends, shuffling, held-out text and the bytes that it covers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from stage_jobs import artifact_at, job_for
from stillroom.distill import data
from stillroom.distill.data import blend, calibration_windows, heldout_text, packed_windows, shuffle
from stillroom.distill.packing import Borders, Packer, as_windows, borders
from stillroom.errors import InputError
from stillroom.recipe import TextSource
from tiny import tiny_tokenizer

BOS, EOS = 0, 1


def tokenizer_with_bos() -> PreTrainedTokenizerFast:
    """One that starts every text with bos, as Llama 3's and Gemma's do."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", BOS)]
    )
    return tokenizer


def rows(path: Path, *texts: Any) -> TextSource:
    keyed = [{"text": t} if isinstance(t, str) else {"messages": t} for t in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in keyed), encoding="utf-8")
    return TextSource(source=str(path))


def unpacked(windows: torch.Tensor) -> list[int]:
    ids: list[int] = windows.flatten().tolist()
    return ids


def test_documents_lie_end_to_end_with_eos_between(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    source = rows(tmp_path / "a.jsonl", "rose water", "herbs")
    windows = packed_windows([source], {}, tokenizer, 4, 1000, seed=0).ids
    first, second = (tokenizer(text)["input_ids"] for text in ("rose water", "herbs"))
    laid_out = ([*first, EOS, *second], [*second, EOS, *first])
    length = len(laid_out[0]) // 4 * 4
    assert unpacked(windows) in [ids[:length] for ids in laid_out]
    assert windows.dtype == torch.int32


def test_a_tokenizer_that_adds_bos_gets_it_at_every_document_and_window(tmp_path: Path) -> None:
    tokenizer = tokenizer_with_bos()
    assert borders(tokenizer) == Borders(bos=BOS, eos=EOS)
    source = rows(tmp_path / "a.jsonl", *["The still was small and the fire was low."] * 6)
    windows = packed_windows([source], {}, tokenizer, 16, 1000, seed=0).ids
    assert (windows[:, 0] == BOS).all()
    inside = unpacked(windows[:, 1:])
    body = tokenizer("The still was small and the fire was low.", add_special_tokens=False)["input_ids"]
    assert [BOS, *body[:3]] in [inside[i : i + 4] for i in range(len(inside))]
    kept = [token for token in unpacked(windows) if token not in (BOS, EOS)]
    assert kept == (body * 6)[: len(kept)], "nothing of the text is lost between windows"


documents_of_ids = st.lists(st.lists(st.integers(3, 9), min_size=1, max_size=12), min_size=1, max_size=8)


@settings(max_examples=200, deadline=None)
@given(documents_of_ids, st.integers(2, 9), st.sampled_from([None, BOS]), st.sampled_from([None, EOS]))
def test_positions_count_from_the_start_of_each_document_and_window(
    texts: list[list[int]], length: int, bos: int | None, eos: int | None
) -> None:
    """Against the stream of (document, token) written out; end tokens belong to the document before."""
    packer = Packer(Borders(bos, eos), length)
    stream: list[tuple[int, int]] = []
    for number, text in enumerate(texts):
        packer.add(text)
        if stream and eos is not None:
            stream.append((number - 1, eos))
        stream += [(number, token) for token in ([] if bos is None else [bos]) + text]
    cut = packer.cut()
    assert len(packer.ids) == len(packer.starts) < length
    if not cut:
        return
    windows = as_windows(cut)
    assert windows.positions is not None
    assert windows.ids.shape == windows.positions.shape == (len(windows), length)
    for ids, positions in zip(windows.ids.tolist(), windows.positions.tolist(), strict=True):
        if bos is not None and stream[0][1] != bos:
            stream.insert(0, (stream[0][0], bos))
        here, stream = stream[:length], stream[length:]
        assert ids == [token for _, token in here]
        owners = [document for document, _ in here]
        assert positions == [i - owners.index(document) for i, document in enumerate(owners)]


def test_an_end_token_inside_a_document_is_no_border() -> None:
    packer = Packer(Borders(None, EOS), 6)
    packer.add([5, EOS, 5])
    packer.add([6, 6])
    positions = as_windows(packer.cut()).positions
    assert positions is not None
    assert positions.tolist() == [[0, 1, 2, 3, 0, 1]]


def test_conversations_go_through_the_chat_template_without_doubled_borders(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    chat = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "Slowly."}]
    source = rows(tmp_path / "a.jsonl", chat)
    (ids,) = blend([source], {}, tokenizer, seed=0)
    assert tokenizer.decode(ids) == "<|user|>How?<|end|><|assistant|>Slowly.<|end|>"
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="has no chat template"):
        list(blend([source], {}, tokenizer, seed=0))


def test_a_border_that_a_document_brings_is_not_doubled(tmp_path: Path) -> None:
    source = rows(tmp_path / "a.jsonl", "one<|eos|>", "two<|eos|>", "ten<|eos|>")
    ids = unpacked(packed_windows([source], {}, tiny_tokenizer(), 2, 1000, seed=0).ids)
    assert [EOS, EOS] not in [ids[i : i + 2] for i in range(len(ids))]


def test_a_blend_keeps_to_its_weights(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    sources = [
        rows(tmp_path / "many.jsonl", *["a a a a a a"] * 300).model_copy(update={"weight": 3.0}),
        rows(tmp_path / "few.jsonl", *["b"] * 30),
    ]
    a, b = (tokenizer(text)["input_ids"][0] for text in ("a", "b"))
    taken = {a: 0, b: 0}
    for ids in blend(sources, {}, tokenizer, seed=0):
        taken[a if ids[0] == a else b] += len(ids)
    assert taken[a] == 300 * len(tokenizer("a a a a a a")["input_ids"]), "each source is read once at least"
    assert taken[b] == pytest.approx(taken[a] / 3, rel=0.02), "the short one again and again"


def test_windows_are_a_function_of_the_seed(tmp_path: Path) -> None:
    source = rows(tmp_path / "a.jsonl", *[f"number {i}" for i in range(50)])
    one, same, other = (packed_windows([source], {}, tiny_tokenizer(), 8, 20, seed=s).ids for s in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_source_gives_no_more_tokens_than_it_may(tmp_path: Path) -> None:
    source = rows(tmp_path / "a.jsonl", *["The still was small."] * 50).model_copy(update={"tokens": 64})
    assert sum(len(ids) for ids in blend([source], {}, tiny_tokenizer(), seed=0)) == 64


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(max_size=5), max_size=30), st.integers(1, 8), st.integers(0, 100))
def test_shuffling_loses_and_adds_nothing(items: list[str], buffer: int, seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "SHUFFLE_DOCUMENTS", buffer)
        patch.setattr(data, "SHUFFLE_CHARACTERS", 12)
        assert sorted(map(str, shuffle(items, random.Random(seed)))) == sorted(items)


def test_calibration_reads_what_the_teacher_wrote(tmp_path: Path) -> None:
    rows(tmp_path / "text.jsonl", *["The still was small and the fire was low."] * 9)
    source = TextSource(source="teacher", tokens=64)
    job = job_for(None, tmp_path, inputs={"text:teacher": artifact_at(tmp_path, "text", "teacher")}, text=(source,))
    windows = calibration_windows(job, tiny_tokenizer(), 16, 3)
    assert windows.shape == (3, 16)
    assert windows.dtype == torch.int64
    assert len(calibration_windows(job, tiny_tokenizer(), 16, 10_000)) < 100, "fewer, where there is no more"


def test_text_that_fills_no_window_is_refused_with_numbers(tmp_path: Path) -> None:
    source = rows(tmp_path / "short.jsonl", "rose water")
    tokens = len(tiny_tokenizer()("rose water")["input_ids"])
    with pytest.raises(
        InputError, match=rf"text \(short\) has {tokens} tokens, a window needs 512; lower sequence_len"
    ):
        packed_windows([source], {}, tiny_tokenizer(), 512, 1, seed=0)


def test_a_source_without_text_in_a_blend_is_refused(tmp_path: Path) -> None:
    sources = [rows(tmp_path / "a.jsonl", "rose water"), rows(tmp_path / "b.jsonl", " ")]
    with pytest.raises(InputError, match=r"b.jsonl is empty"):
        packed_windows(sources, {}, tiny_tokenizer(), 2, 10_000, seed=0)


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.text("aé漢🏏 \n.", min_size=1, max_size=12).filter(str.strip), min_size=1, max_size=4),
    most=st.integers(1, 60),
)
def test_heldout_bytes_are_those_of_the_decoded_ids(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], most: int
) -> None:
    tokenizer = tiny_tokenizer()
    source = rows(tmp_path_factory.mktemp("text") / "a.jsonl", *texts)
    held = heldout_text(source, {}, tokenizer, most)
    whole = "".join(text + "\n\n" for text in texts)
    ids = held.ids.tolist()
    assert len(ids) == min(most, sum(len(tokenizer(text + "\n\n")["input_ids"]) for text in texts))
    covered = whole.encode()[: held.num_bytes].decode()  # a cut inside a character counts the whole character
    decoded = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert covered == decoded or covered[:-1] == decoded.rstrip("�")


def test_heldout_text_keeps_its_order_and_its_cap(tmp_path: Path) -> None:
    tokenizer = tokenizer_with_bos()
    source = rows(tmp_path / "a.jsonl", *[f"number {i}" for i in range(50)]).model_copy(update={"tokens": 70})
    held = heldout_text(source, {}, tokenizer, 1000)
    assert held.label == "a"
    assert len(held.ids) == 70
    assert held.ids.dtype == torch.int64
    assert held.bos == BOS
    assert BOS not in held.ids, "what a window starts with is left to who cuts windows"
    assert tokenizer.decode(held.ids).startswith("number 0\n\nnumber 1\n\n")


def test_heldout_text_without_a_document_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no document with text"):
        heldout_text(rows(tmp_path / "a.jsonl", " "), {}, tiny_tokenizer(), 10)
