"""Tiny real models: real architectures of every family with real tokenizers, two to four layers, built in a second."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast

from stillroom.models.family import families
from stillroom.models.load import AUTO_CLASSES

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
"""Decoders that every stage takes."""
ALL_FAMILIES = (
    *FAMILIES, "gemma2", "phi3", "olmo2", "starcoder2", "smollm3", "qwen3_moe", "gpt2", "bert", "roberta", "t5",
)  # fmt: skip
"""Everything that can be cut."""

VOCAB_SIZE = 384

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

SENTENCES = (
    "The still was small and the fire was low, so the rose water came slowly, drop by drop.",
    "A recipe goes in, and a smaller model comes out with the measurements that justify it.",
    "Nothing is ever half written: a run that was killed goes on where it stopped.",
    "In the morning she weighed the herbs, wrote the number down, and weighed them again.",
)


def tiny_text(num_documents: int = 200) -> list[str]:
    """Documents of varied, repetitive English: enough for a tiny model to learn something from."""
    return [
        " ".join(SENTENCES[(i * 7 + j * (1 + i % 3)) % len(SENTENCES)] for j in range(3 + i % 5))
        for i in range(num_documents)
    ]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 384 tokens with bos, eos, pad and a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|bos|>", "<|eos|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(tiny_text(50), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|pad|>",
        chat_template=CHAT_TEMPLATE,
    )


def tiny_config(family: str, **overrides: Any) -> Any:
    """hidden 64, FFN 128, 4 heads in 2 KV groups of 16, 4 layers (T5: 2 and 3), each family with its own
    peculiarities."""
    fields: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 2048,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    if family == "llama":
        fields["tie_word_embeddings"] = True
    if family in ("gemma2", "gemma3_text"):
        layer_types = ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(64)]
        fields |= {"sliding_window": 32, "query_pre_attn_scalar": 16}
        fields["layer_types"] = layer_types[: overrides.get("num_hidden_layers", 4)]
    if family == "qwen3_moe":
        fields |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    if family == "smollm3":
        fields["no_rope_layer_interval"] = 2
    if family in ("gpt2", "bert", "roberta", "t5"):
        fields = _own_names(fields, OWN_NAMES.get(family, {}))
    return AutoConfig.for_model(family, **(fields | overrides))


OWN_NAMES: dict[str, dict[str, str]] = {
    "gpt2": {
        "hidden_size": "n_embd",
        "intermediate_size": "n_inner",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    },
    "t5": {
        "hidden_size": "d_model",
        "intermediate_size": "d_ff",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "head_dim": "d_kv",
    },
}


def _own_names(fields: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """The fields as older configs call them; those have as many key-value heads as heads, T5 two stacks."""
    renamed = {names.get(field, field): value for field, value in fields.items() if field != "num_key_value_heads"}
    if "d_kv" not in renamed:
        return {field: value for field, value in renamed.items() if field != "head_dim"}
    return renamed | {"num_layers": 2, "num_decoder_layers": 3, "decoder_start_token_id": 2}


def tiny_model(
    family: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedModel:
    """A randomly initialised model, large enough weights that its parts matter, norms and biases away from trivial."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AUTO_CLASSES[families()[family].task].from_config(tiny_config(family, **overrides))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.mul_(3.0)
    return model.to(dtype).eval()


def tiny_checkpoint(
    path: Path, family: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> Path:
    """A checkpoint directory of `tiny_model` with its tokenizer."""
    tiny_model(family, seed=seed, dtype=dtype, **overrides).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def edited_checkpoint(path: Path, family: str, edit: Callable[[Any], None], **overrides: Any) -> Path:
    """A tiny checkpoint whose weights `edit` changed in place."""
    model = tiny_model(family, **overrides)
    with torch.no_grad():
        edit(model)
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def tiny_text_file(path: Path, num_documents: int = 200) -> Path:
    """The documents as a .txt, one paragraph each."""
    path.write_text("\n\n".join(tiny_text(num_documents)), encoding="utf-8")
    return path
