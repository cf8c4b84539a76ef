"""The Megatron backend: commands that the published script takes, a process that leaves nothing, checked results."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from jobs import Kept, artifact_at, job_of
from minitron import cut_as_minitron
from stillroom.errors import EnvironmentCannot, InputError
from stillroom.export import verify
from stillroom.machine import Gpu, Machine
from stillroom.models.shape import ModelShape, read_config, shape_of
from stillroom.models.tensors import read_tensor
from stillroom.models.weights import tensor_entries, weight_files
from stillroom.prune import megatron, pruner, stage
from stillroom.prune.cut import Cut
from stillroom.prune.explain import explain
from stillroom.prune.surgery import cut_checkpoint, source_shape
from stillroom.recipe import Prune, Verify
from stillroom.stage import Job, StageResult
from tiny import tiny_checkpoint, tiny_config, tiny_text_file

QWEN3_8B: dict[str, Any] = {
    "model_type": "qwen3", "num_hidden_layers": 36, "hidden_size": 4096, "intermediate_size": 12288,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    "tie_word_embeddings": False, "max_position_embeddings": 40960,
}  # fmt: skip


def qwen3_8b(**fields: Any) -> ModelShape:
    return shape_of(QWEN3_8B | fields, "qwen3")


def prune(**fields: Any) -> Prune:
    return Prune.model_validate({"backend": "megatron"} | fields)


def options(argv: list[str]) -> dict[str, list[str]]:
    """The script's options with their words."""
    found: dict[str, list[str]] = {}
    for word in argv[4:]:
        if word.startswith("--"):
            found[word.removeprefix("--")] = []
        else:
            found[list(found)[-1]].append(word)
    return found


def test_sizes_become_the_scripts_manual_mode() -> None:
    config = prune(num_layers=32, hidden_size=3584, intermediate_size=9216, calibration={"samples": 512})
    argv = megatron.command(config, qwen3_8b(), Path("/in"), Path("/out"), 2)
    assert argv[:4] == ["torchrun", "--nproc_per_node", "2", "prune_minitron.py"]
    said = options(argv)
    sizes = json.loads(said.pop("prune_export_config")[0])
    assert sizes == {"num_layers": 32, "hidden_size": 3584, "ffn_hidden_size": 9216}
    assert said == {
        "hf_model_name_or_path": ["/in"],
        "output_hf_path": ["/out"],
        "pp_size": ["2"],
        "calib_num_samples": ["512"],
        "calib_batch_size": ["4"],
        "seq_length": ["2048"],
    }


def test_targets_become_the_scripts_own_search() -> None:
    target = {"params": 6_000_000_000, "memory_gb": 15, "context": 2048, "batch": 8, "multiple_of": 256, "max_cut": 0.3}
    argv = megatron.command(
        prune(target=target), qwen3_8b(), Path("/in"), Path("/out"), 2, scores_dir=Path("/scores"),
        calibration_file=Path("/text.jsonl"), script=Path("/opt/x.py"),
    )  # fmt: skip
    said = options(argv)
    assert argv[3] == "/opt/x.py"
    assert said["prune_target_params"] == ["6000000000"]
    assert said["prune_target_memory_mb"] == ["14305"]  # of 2^20 bytes, as ModelOpt counts
    assert said["inference_batch_size"] == ["8"]
    assert said["ss_channel_divisor"] == ["256"]
    assert said["max_depth_pruning"] == said["max_width_pruning"] == ["0.3"]
    assert said["hparams_to_skip"] == ["num_attention_heads"]
    assert said["prune_intermediate_ckpt"] == ["/scores"]
    assert said["calib_dataset_name"] == ["/text.jsonl"]
    assert "prune_export_config" not in said


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({}, ["num_attention_heads"]),
        ({"model_type": "qwen2"}, ["num_attention_heads", "hidden_size"]),  # engines derive head_dim
        ({"model_type": "llama"}, ["num_attention_heads"]),
        ({"model_type": "llama", "num_attention_heads": 24}, ["num_attention_heads", "hidden_size"]),
    ],
)
def test_the_scripts_search_leaves_alone_what_engines_could_not_load(fields: dict[str, Any], kept: list[str]) -> None:
    config = prune(target={"params": 6_000_000_000})
    argv = megatron.command(config, qwen3_8b(**fields), Path("/in"), Path("/out"), 2)
    assert options(argv)["hparams_to_skip"] == kept


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"drop_layers": [3]}, "chooses the layers itself; give num_layers"),
        ({"num_layers": 30, "depth_importance": "block_influence"}, "leave depth_importance out"),
        ({"num_layers": 30, "width_importance": "taylor"}, "leave width_importance out"),
        ({"num_layers": 30, "search": {"tokens": 4096}}, "leave `search` out"),
        ({"num_key_value_heads": 4}, "does not cut KV groups"),
        ({"hidden_size": 4000}, "multiples of 64, which 4000 is not; use 3968 or 4032"),
        ({"num_layers": 36}, "nothing to cut"),
        ({"target": {"latency_ms": 5, "hardware": "H100"}}, "not for latency_ms"),
        ({"target": {"memory_gb": 9, "scheme": "fp8"}}, "in 16 bits on one GPU"),
        ({"target": {"memory_gb": 9}}, "target.context 4096 and calibration.sequence_length 2048 alike"),
    ],
)
def test_what_the_script_cannot_be_told_is_bad_input(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        megatron.command(prune(**fields), qwen3_8b(), Path("/in"), Path("/out"), 2)


def test_families_without_a_bridge_are_refused_and_the_others_named() -> None:
    shape = shape_of(tiny_config("gpt2").to_dict(), "tiny")
    with pytest.raises(InputError, match=r"no gpt2 models; it has gemma2, .*qwen3_moe; use backend: stillroom"):
        megatron.command(prune(num_layers=2), shape, Path("/in"), Path("/out"), 1)


def test_layers_are_not_cut_where_the_script_would_lose_which_stay() -> None:
    shape = qwen3_8b(model_type="qwen2", max_window_layers=20)
    with pytest.raises(InputError, match="has max_window_layers: the script does not say which layers stay"):
        megatron.command(prune(num_layers=30), shape, Path("/in"), Path("/out"), 1)
    megatron.command(prune(intermediate_size=9216), shape, Path("/in"), Path("/out"), 1)
    megatron.command(prune(num_layers=30), qwen3_8b(model_type="qwen2", max_window_layers=36), Path("a"), Path("b"), 1)


def test_more_gpus_than_layers_are_refused() -> None:
    with pytest.raises(InputError, match="40 GPUs for 36 layers"):
        megatron.command(prune(num_layers=30), qwen3_8b(), Path("/in"), Path("/out"), 40)


@given(num_layers=st.integers(1, 130), num_gpus=st.integers(1, 64))
def test_every_stage_has_layers_and_those_between_as_many_each(num_layers: int, num_gpus: int) -> None:
    if num_gpus > num_layers:
        return
    stages = megatron._uneven_stages(num_layers, num_gpus)
    if not stages:
        assert num_layers % num_gpus == 0
        return
    first, last = stages.values()
    between = num_layers - first - last
    assert min(first, last) >= 1
    assert between % max(1, num_gpus - 2) == 0
    assert between >= num_gpus - 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["--hf_model_name_or_path", "m", "--output_hf_path", "o", "--prune_target_params", "six"],
        ["--hf_model_name_or_path", "m", "--output_hf_path", "o", "--prune_target_param", "6e9"],
        ["--hf_model_name_or_path", "m", "--output_hf_path", "o"],
        ["--hf_model_name_or_path", "m", "--output_hf_path", "o", "--prune_target_params", "6e9",
         "--prune_export_config", "{}"],
        ["--hf_model_name_or_path", "m", "--prune_target_params", "6e9"],
        ["--output_hf_path", "o", "--prune_target_params", "6e9"],
        ["--hf_model_name_or_path", "m", "--output_hf_path", "o", "--prune_target_params", "6e9",
         "--hparams_to_skip", "num_query_groups"],
    ],
)  # fmt: skip
def test_arguments_that_the_published_script_does_not_take_are_found(arguments: list[str]) -> None:
    with pytest.raises(ValueError, match=r"would not take this|exactly one of"):
        megatron.check_arguments(arguments)


def test_the_published_sizes_are_those_of_the_installed_modelopt() -> None:
    """Its module imports Megatron, so its text is read."""
    source = Path(sys.prefix)
    found = list(source.glob("lib/python*/site-packages/modelopt/torch/prune/plugins/mcore_minitron.py"))
    if not found:
        pytest.skip("ModelOpt is not installed in this environment")
    text = found[0].read_text()
    block = text[text.index("SUPPORTED_HPARAMS = {") : text.index("}", text.index("SUPPORTED_HPARAMS = {"))]
    assert {line.strip().strip('",') for line in block.splitlines() if line.strip().startswith('"')} == set(
        megatron.published()["sizes"]
    )


def test_calibration_text_is_written_as_the_script_reads_it(tmp_path: Path) -> None:
    path = megatron.write_calibration(["one", "zwei\n„drei“"], tmp_path / "text.jsonl")
    assert [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()] == [
        "one",
        "zwei\n„drei“",
    ]


def test_a_machine_without_the_image_is_told_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    with pytest.raises(
        EnvironmentCannot, match=r"needs megatron-bridge, which is not installed here; run .* NeMo image"
    ):
        megatron.require_image()
    (tmp_path / "megatron" / "bridge").mkdir(parents=True)
    (tmp_path / "megatron" / "bridge" / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    request.addfinalizer(lambda: sys.modules.pop("megatron", None))  # looking for megatron.bridge imports its parent
    monkeypatch.setattr(megatron, "nvidia_gpus", tuple)
    with pytest.raises(EnvironmentCannot, match="needs a CUDA GPU, and nvidia-smi shows none"):
        megatron.require_image()
    monkeypatch.setenv("MODELOPT_DIR", str(tmp_path))
    with pytest.raises(EnvironmentCannot, match=r"set MODELOPT_DIR to it"):
        megatron.find_script()
    script = tmp_path / megatron.published()["script"]
    script.parent.mkdir(parents=True)
    script.touch()
    assert megatron.find_script() == script


TORCHRUN = """\
#!{python}
import subprocess, sys
assert sys.argv[1] == "--nproc_per_node"
raise SystemExit(subprocess.run([{python!r}, *sys.argv[3:]]).returncode)
"""
"""Stands in for torch's launcher, whose workers would be the NeMo image's."""

SCRIPT = """\
import argparse, json, shutil, sys, time
from pathlib import Path

parser = argparse.ArgumentParser()
{options}
given = parser.parse_args()
print("Pruning to", given.prune_export_config, flush=True)
if {gives!r} == "nothing, slowly":
    time.sleep(600)
elif {gives!r} == "an error":
    sys.exit("CUDA Error: out of memory")
elif {gives!r} == "a cut":
    sys.path[:] = {path!r}
    from minitron import cut_as_minitron
    sizes = json.loads(given.prune_export_config)
    cut_as_minitron(Path(given.hf_model_name_or_path), sizes, Path(given.output_hf_path))
else:
    shutil.copytree({gives!r}, given.output_hf_path, dirs_exist_ok=True)
"""
"""Stands in for the prune script: takes what the published one takes, and cuts, copies what a test made, sleeps or
fails."""


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Puts a torchrun on the PATH, and a GPU into the machine; returns what writes a prune script."""
    folder = tmp_path / "image"
    folder.mkdir()
    (folder / "torchrun").write_text(TORCHRUN.format(python=sys.executable))
    (folder / "torchrun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("MODELOPT_DIR", str(folder))
    monkeypatch.setattr(megatron, "require_image", lambda: None)
    monkeypatch.setattr(stage, "this_machine", lambda: Machine(2, 2**33, (Gpu("H200", 2**37, "570"),)))

    def script(gives: str, lacks: str = "") -> Path:
        names = [name for name in megatron.published()["options"] if name != lacks]
        options = "\n".join(f'parser.add_argument("--{name}")' for name in names)
        path = folder / str(megatron.published()["script"])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(SCRIPT.format(options=options, gives=gives, path=sys.path))
        return path

    return script


def exported(path: Path, dense: Path, cut: Cut) -> Path:
    """What the script would leave: weights in bfloat16, its own config, weights of its dummy model."""
    shape = source_shape(dense)
    cut_checkpoint(dense, shape, cut, path, max_shard_bytes=100_000)
    config = read_config(path) | {"dtype": "float32", "torch_dtype": "float32"}
    for field in shape.family.layer_clamps:
        if field in config:
            config[field] = shape.config[field]  # the script does not know of it
    (path / "config.json").write_text(json.dumps(config))
    shutil.copyfile(weight_files(path)[0], path / "model.safetensors")
    return path


@pytest.mark.parametrize("family", ["gemma3_text", "llama", "qwen2"])
def test_a_run_gives_a_checkpoint_that_transformers_opens(
    family: str, image: Callable[..., Path], tmp_path: Path
) -> None:
    dense = tiny_checkpoint(tmp_path / "dense", family, dtype=torch.bfloat16)
    shape, config = source_shape(dense), prune(num_layers=3, intermediate_size=64)
    kept = tuple(range(64))
    cut = Cut((0, 1, 3), ffn=dict.fromkeys((0, 1, 3), kept))
    script = image(str(exported(tmp_path / "exported", dense, cut)))
    said: list[str] = []
    argv = megatron.command(config, shape, dense, tmp_path / "out", 1, script=script)
    megatron.run_backend(argv, tmp_path / "out", tmp_path / "log" / "megatron.log", log=said.append)
    assert said == ['Pruning to {"num_layers": 3, "ffn_hidden_size": 64}']
    result = megatron.result_shape(config, shape, tmp_path / "out")
    assert (result.num_layers, result.intermediate_size, result.hidden_size) == (3, 64, 64)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    written = read_config(tmp_path / "out")
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"
    if "max_window_layers" in written:
        assert written["max_window_layers"] == 3
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == torch.bfloat16


def job_for(tmp_path: Path, dense: Path, **fields: Any) -> Job:
    calibration = {"samples": 12, "sequence_length": 48, "batch_size": 4}
    config = prune(calibration=calibration, **fields)
    tmp_path.mkdir(exist_ok=True)
    return job_of(config, {"source": artifact_at(dense)}, tiny_text_file(tmp_path / "text.txt"), tmp_path / "stage")


def verified(dense: Path, model_dir: Path, folder: Path) -> StageResult:
    """Verification on text that the stage did not see."""
    inputs = {"source": artifact_at(model_dir, "prune"), "reference": artifact_at(dense)}
    folder.mkdir()
    text = tiny_text_file(folder / "heldout.txt", 30)
    return verify.run(job_of(Verify(tokens=320, sequence_length=64), inputs, text, folder / "verify"))


def kl_of(result: StageResult) -> float:
    return next(measured.value for measured in result.measurements if measured.name == "verify.kl")


CUTS: dict[str, tuple[dict[str, int], set[str]]] = {
    "qwen3": ({"num_layers": 3, "intermediate_size": 64, "hidden_size": 64}, {"reconstruct", "fold", "readout"}),
    "llama": ({"num_layers": 3, "num_attention_heads": 2}, {"reconstruct", "fold"}),
    "mistral": ({"num_layers": 2}, {"refit", "fold"}),
    "gemma3_text": ({"hidden_size": 64}, {"readout"}),
    "qwen3_moe": ({"num_layers": 3}, {"refit"}),
}


@pytest.mark.parametrize("family", CUTS)
def test_what_the_script_cut_is_repaired_verified_and_told(
    family: str, image: Callable[..., Path], tmp_path: Path
) -> None:
    """The script keeps channels by chance, in an order by chance."""
    dense = tiny_checkpoint(tmp_path / "dense", family, dtype=torch.bfloat16, hidden_size=128)
    sizes, kinds = CUTS[family]
    image("a cut")
    job = job_for(tmp_path, dense, **sizes)
    result = stage.run(job)
    bare = tmp_path / "bare"
    config_sizes = {megatron.SIZES[size]: number for size, number in sizes.items()}
    cut_as_minitron(dense, config_sizes, bare)
    details = result.details
    assert sorted(details["kept_layers"] + details["dropped_layers"]) == [0, 1, 2, 3]
    assert len(details["kept_layers"]) == sizes.get("num_layers", 4)
    assert details["kl"] < details["kl_cut"]
    assert {attempt["kind"] for attempt in details["repairs"]} <= kinds
    checked = verified(dense, job.out_dir, tmp_path / "checked")
    assert checked.details["passed"]
    assert kl_of(checked) < kl_of(verified(dense, bare, tmp_path / "compared"))
    assert (details["calibration_samples"], result.tokens) == (12, 576)
    assert isinstance(job.progress, Kept)
    assert "; KL to the unpruned model" in job.progress.lines[-1]
    assert json.loads(json.dumps(details)) == details
    told = explain(artifact_at(job.out_dir, "prune", **details))
    assert told.dropped == tuple(details["dropped_layers"])


def test_without_repair_no_text_is_read_and_the_result_is_as_the_script_left_it(
    image: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruner, "load_model", None)
    monkeypatch.setattr(stage, "calibration_windows", None)
    dense = tiny_checkpoint(tmp_path / "dense")
    image("a cut")
    job = job_for(tmp_path, dense, num_layers=3, repair=[])
    details = stage.run(job).details
    cut_as_minitron(dense, {"num_layers": 3}, tmp_path / "bare")
    assert (details["kl"], details["repairs"], len(details["kept_layers"])) == (None, [], 3)
    after, before = (tensor_entries(path) for path in (job.out_dir, tmp_path / "bare"))
    assert all(torch.equal(read_tensor(entry), read_tensor(before[name])) for name, entry in after.items())


def test_a_result_with_other_numbers_is_kept_unrepaired_unless_a_repair_was_named(
    image: Callable[..., Path], tmp_path: Path
) -> None:
    dense = tiny_checkpoint(tmp_path / "dense")
    other = tiny_checkpoint(tmp_path / "other", seed=1, num_hidden_layers=3)
    image(str(other))
    job = job_for(tmp_path, dense, num_layers=3)
    details = stage.run(job).details
    assert "other numbers" in details["not_recovered"]
    assert "kept_layers" not in details
    assert details["sizes_after"]["num_layers"] == 3
    assert isinstance(job.progress, Kept)
    assert job.progress.lines[-1].startswith("not repaired: what stayed cannot be told from the result: the embedding")
    named = job_for(tmp_path / "named", dense, num_layers=3, repair=["fold"])
    with pytest.raises(EnvironmentCannot, match=r"repair fold cannot be done: .* give repair: \[\] to do without"):
        stage.run(named)


def test_a_model_beyond_memory_is_cut_and_not_repaired_unless_a_repair_was_named(
    image: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruner, "too_large", lambda path: True)
    dense = tiny_checkpoint(tmp_path / "dense")
    image("a cut")
    job = job_for(tmp_path, dense, num_layers=3)
    details = stage.run(job).details
    assert (details["kl"], len(details["kept_layers"])) == (None, 3)
    assert isinstance(job.progress, Kept)
    assert "not repaired: the model does not fit in memory" in job.progress.lines
    named = job_for(tmp_path / "named", dense, num_layers=3, repair=["fold"])
    with pytest.raises(EnvironmentCannot, match="repair fold cannot be done: the model does not fit in memory"):
        stage.run(named)
    assert list(named.out_dir.iterdir()) == []


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("llama", {"num_layers": 3, "repair": ["readout"]}, "readout: no hidden channel is cut"),
        ("llama", {"intermediate_size": 64, "repair": ["fold"]}, "no layer is cut"),
        ("gemma3_text", {"num_layers": 3, "repair": ["fold"]}, "a norm stands between"),
    ],
)
def test_a_repair_that_the_cut_does_not_allow_is_refused_before_the_script_runs(
    family: str, fields: dict[str, Any], message: str, image: Callable[..., Path], tmp_path: Path
) -> None:
    image("an error")
    job = job_for(tmp_path, tiny_checkpoint(tmp_path / "dense", family), **fields)
    with pytest.raises(InputError, match=message):
        stage.run(job)


def test_a_result_of_another_shape_is_refused(tmp_path: Path) -> None:
    dense = tiny_checkpoint(tmp_path / "dense")
    shape = source_shape(dense)
    out = exported(tmp_path / "out", dense, Cut((0, 1, 3)))
    with pytest.raises(EnvironmentCannot, match="wrote a model of num_layers 3, not 2"):
        megatron.result_shape(prune(num_layers=2), shape, out)
    params = megatron.result_shape(prune(num_layers=3), shape, out).num_params
    megatron.result_shape(prune(target={"params": params}), shape, out)
    with pytest.raises(EnvironmentCannot, match=f"wrote {params} parameters, more than the target's {params - 1}"):
        megatron.result_shape(prune(target={"params": params - 1}), shape, out)
    (out / "config.json").write_text(json.dumps(read_config(out) | {"intermediate_size": 64}))
    with pytest.raises(EnvironmentCannot, match="is no checkpoint of its own config"):
        megatron.result_shape(prune(num_layers=3), shape, out)


def test_a_script_of_another_release_is_found_before_it_runs(image: Callable[..., Path], tmp_path: Path) -> None:
    script = image("an error", lacks="calib_batch_size")
    argv = megatron.command(prune(num_layers=30), qwen3_8b(), tmp_path, tmp_path / "out", 2, script=script)
    with pytest.raises(EnvironmentCannot, match=r"does not take --calib_batch_size: it is of another release"):
        megatron.run_backend(argv, tmp_path / "out", tmp_path / "log")
    assert not (tmp_path / "out").exists()


def test_a_script_that_fails_is_quoted(image: Callable[..., Path], tmp_path: Path) -> None:
    argv = megatron.command(prune(num_layers=30), qwen3_8b(), tmp_path, tmp_path / "out", 2, script=image("an error"))
    with pytest.raises(EnvironmentCannot, match=r"(?s)failed with exit code 1; .*out of memory"):
        megatron.run_backend(argv, tmp_path / "out", tmp_path / "log")


def test_an_interrupted_run_leaves_no_process(image: Callable[..., Path], tmp_path: Path) -> None:
    """Ctrl-C comes while the launcher waits for its worker."""
    argv = megatron.command(
        prune(num_layers=30), qwen3_8b(), tmp_path, tmp_path / "out", 2, script=image("nothing, slowly")
    )
    others = set(psutil.Process().children(recursive=True))  # of tests before this one
    family: list[psutil.Process] = []

    def interrupt(line: str) -> None:
        family.extend(set(psutil.Process().children(recursive=True)) - others)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        megatron.run_backend(argv, tmp_path / "out", tmp_path / "log", log=interrupt)
    assert len(family) >= 2
    _, alive = psutil.wait_procs(family, timeout=60)
    assert [member for member in alive if member.status() != psutil.STATUS_ZOMBIE] == []
