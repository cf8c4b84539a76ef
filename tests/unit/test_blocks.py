"""Running a decoder layer by layer gives what the model gives."""

from __future__ import annotations

import pytest
import torch

from stillroom.models.blocks import Blocks
from stillroom.models.family import families
from tiny import ALL_FAMILIES, VOCAB_SIZE, tiny_model

DECODERS = [name for name in ALL_FAMILIES if families()[name].task == "causal_lm"]


def ids(batch: int = 2, tokens: int = 48) -> torch.Tensor:
    return torch.randint(0, VOCAB_SIZE, (batch, tokens), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", DECODERS)
@torch.inference_mode()
def test_all_layers_one_by_one_are_the_model_bit_for_bit(name: str) -> None:
    model = tiny_model(name)
    blocks = Blocks(model, families()[name])
    hidden = blocks.normed(blocks.run(blocks.embed(ids()), range(len(blocks.layers))))
    assert torch.equal(hidden, model.base_model(input_ids=ids(), use_cache=False).last_hidden_state)


@torch.inference_mode()
def test_layers_that_are_left_out_are_like_layers_that_are_not_there() -> None:
    model = tiny_model("gemma3_text")  # whose layers take different masks and rotary embeddings
    blocks = Blocks(model, families()["gemma3_text"])
    hidden = blocks.normed(blocks.run(blocks.embed(ids()), [0, 3]))
    layers = model.base_model.layers
    model.base_model.layers = torch.nn.ModuleList([layers[0], layers[3]])
    model.config.num_hidden_layers = 2
    model.config.layer_types = [model.config.layer_types[0], model.config.layer_types[3]]
    assert torch.equal(hidden, model.base_model(input_ids=ids(), use_cache=False).last_hidden_state)


@torch.inference_mode()
def test_batches_of_two_sizes_do_not_get_each_others_masks() -> None:
    model = tiny_model("llama")
    blocks = Blocks(model, families()["llama"])
    long, short = blocks.embed(ids(2, 48)), blocks.embed(ids(1, 16))
    for states, given in ((long, ids(2, 48)), (short, ids(1, 16))):
        hidden = blocks.normed(blocks.run(states, range(4)))
        assert torch.equal(hidden, model.base_model(input_ids=given, use_cache=False).last_hidden_state)


@torch.inference_mode()
def test_a_model_that_was_taken_apart_still_runs_as_a_whole() -> None:
    model = tiny_model("llama")
    before = model(ids()).logits
    Blocks(model, families()["llama"]).embed(ids())
    assert torch.equal(model(ids()).logits, before)
