"""A GGUF file whose tokenizer transformers gets wrong is refused before anything is dequantized."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf import GGUFWriter

from stillroom.errors import InputError
from stillroom.models.importer import convert_gguf
from stillroom.recipe import ModelSource

PIECES = ["<pad>", "<eos>", "<bos>", "<unk>", "▁", "s", "t", "i", "l", "ll", "st", "still"]


def write_gemma(path: Path) -> None:
    """A Gemma 3 file with sizes and a vocabulary, and no tensor."""
    writer = GGUFWriter(path, "gemma3")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_key_length(8)
    writer.add_value_length(8)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_sliding_window(32)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(PIECES)
    writer.add_token_scores([-float(rank) for rank in range(len(PIECES))])
    writer.add_token_types([3, 3, 3, 3] + [1] * (len(PIECES) - 4))
    for add, token in (("pad", 0), ("eos", 1), ("bos", 2), ("unk", 3)):
        getattr(writer, f"add_{add}_token_id")(token)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gemma_s_tokenizer_that_transformers_breaks_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "gemma.gguf"
    write_gemma(path)
    with pytest.raises(
        InputError, match=r"^transformers converts the tokenizer in .*gemma\.gguf wrongly: .* give the model's safetens"
    ):
        convert_gguf(path, tmp_path / "out", ModelSource(source=str(path)))
    assert not (tmp_path / "out").exists()
