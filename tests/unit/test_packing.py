"""A packed window read with positions is each of its documents read alone, in every family that is distilled."""

from __future__ import annotations

import pytest
import torch

from stillroom.distill.packing import Windows, last_hidden
from tiny import ALL_FAMILIES, tiny_model

DECODERS = [family for family in ALL_FAMILIES if family not in ("bert", "roberta", "t5")]

LENGTHS = (40, 1, 1, 50, 7, 29)
"""Documents of one token, and some beyond Gemma's sliding window of 32."""


def documents() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 384, (length,), generator=generator) for length in LENGTHS]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", DECODERS)
def test_a_packed_window_is_its_documents_read_alone(family: str, attention: str) -> None:
    model = tiny_model(family)
    model.set_attn_implementation(attention)
    packed = torch.cat(documents())
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    with torch.no_grad():
        batch = torch.stack([packed, packed.flip(0)])
        plain = torch.arange(len(packed))
        apart = last_hidden(model, Windows(batch, torch.stack([positions, plain])))
        alone = torch.cat([last_hidden(model, Windows(document[None]))[0] for document in documents()])
        across = last_hidden(model, Windows(batch))
        logits, logits_alone = (model.get_output_embeddings()(hidden) for hidden in (apart[0], alone))
    torch.testing.assert_close(apart[0], alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits, logits_alone, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(apart[1], across[1], rtol=1e-4, atol=1e-4)  # a window of one document
    assert (across[0] - alone).abs().max() > 1.0, "without positions documents see those before them"


def test_a_token_has_no_gradient_through_another_document() -> None:
    model = tiny_model("gemma3_text")
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    embedded = model.get_input_embeddings()(torch.cat(documents())[None]).detach().requires_grad_()
    hidden = model.base_model(inputs_embeds=embedded, position_ids=positions, use_cache=False).last_hidden_state
    torch.autograd.backward(hidden[0, 42 + 49].sum())
    assert embedded.grad is not None
    reached = embedded.grad[0].abs().sum(dim=1) > 0
    assert not reached[:42].any()
    assert reached[42 : 42 + 50].all()
    assert not reached[42 + 50 :].any()
