"""A tokenizer is found in whatever file its family keeps it."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import sentencepiece

from stillroom.errors import InputError
from stillroom.models.load import load_tokenizer
from stillroom.models.source import checked_config, model_file_hashes
from tiny import tiny_checkpoint, tiny_model, tiny_text


def test_a_word_piece_vocabulary_alone_is_a_tokenizer(tmp_path: Path) -> None:
    tiny_model("bert").save_pretrained(tmp_path)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "still", "##s"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    assert load_tokenizer(tmp_path)("the stills")["input_ids"] == [2, 5, 6, 7, 3]
    assert checked_config(tmp_path)["model_type"] == "bert"
    assert "vocab.txt" in model_file_hashes(tmp_path)


def test_a_sentence_piece_model_under_t5_s_name_is_a_tokenizer(tmp_path: Path) -> None:
    tiny_model("t5").save_pretrained(tmp_path)
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(tiny_text(50)), model_writer=written, vocab_size=64, pad_id=0, eos_id=1, unk_id=2,
        bos_id=-1, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "spiece.model").write_bytes(written.getvalue())
    tokenizer = load_tokenizer(tmp_path)
    assert (
        tokenizer.decode(tokenizer("the still was small").input_ids, skip_special_tokens=True) == "the still was small"
    )
    assert "spiece.model" in model_file_hashes(tmp_path)


def test_a_checkpoint_without_any_is_refused(tmp_path: Path) -> None:
    tiny_model("t5").save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"has no tokenizer \(tokenizer.json, .*spiece.model"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_one_is_refused(file: str, tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path)
    (tmp_path / file).write_text('{"version": ')
    with pytest.raises(InputError, match=r"tokenizer files in .* cannot be read .*fetch them again"):
        load_tokenizer(tmp_path)
