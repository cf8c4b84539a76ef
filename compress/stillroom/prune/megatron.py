"""`backend: megatron`: ModelOpt's own pruner, mcore_minitron, through Megatron-Bridge's prune script as a process.

The script runs in NVIDIA's NeMo image on CUDA GPUs, one pipeline stage on each: `torchrun --nproc_per_node N
prune_minitron.py --pp_size N ...`, a Hugging Face checkpoint in and one out. Its options are in megatron.yaml, as
published; every command is checked against that list when it is composed, and against the script that is really there
before it is run. Sizes become its `--prune_export_config`; a target of parameters or memory becomes its own search,
which ranks shapes by MMLU. What the script cannot be told (which layers go, fewer KV groups, speed) is an error here.
It does not repair, nor say what it kept; recover.py finds that out, and the stage repairs the result as its own.

It writes config.json from Megatron's numbers and leaves some fields of families as they were; `result_shape` puts those
right and checks that what came out is a plain checkpoint of the shape that was asked for. Nothing here imports torch.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import importlib.util
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from stillroom.artifact import write_atomically
from stillroom.engines.process import last_lines, spawn, stop
from stillroom.errors import EnvironmentCannot, InputError
from stillroom.machine import nvidia_gpus
from stillroom.models.shape import ModelShape, read_config, shape_of
from stillroom.models.weights import check_weights, tensor_entries, weight_files
from stillroom.prune.targets import target_shape
from stillroom.recipe import Prune, Target

OPTIONS_FILE = Path(__file__).with_name("megatron.yaml")
SCRIPT_HOMES = (Path("/opt/Model-Optimizer"), Path("/opt/Megatron-Bridge/3rdparty/Model-Optimizer"))
"""Where the script's own instructions have ModelOpt's sources in the NeMo image; `$MODELOPT_DIR` comes first."""
IMAGE_HINT = "run stillroom in NVIDIA's NeMo image (nvcr.io/nvidia/nemo) on a machine with CUDA GPUs"
SIZES = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_experts": "num_moe_experts",
    "moe_intermediate_size": "moe_ffn_hidden_size",
}
"""Sizes of a ModelShape, and what the script calls them."""
SEARCH_DIVISOR = 256
"""Its search makes hidden_size a multiple of this where it is told no other."""
MIB = 2**20
POLL_S = 0.5


@functools.cache
def published() -> dict[str, Any]:
    """The content of megatron.yaml."""
    content: dict[str, Any] = yaml.safe_load(OPTIONS_FILE.read_text(encoding="utf-8"))
    return content


def command(
    config: Prune,
    shape: ModelShape,
    source_dir: Path,
    out_dir: Path,
    num_gpus: int,
    *,
    script: Path | None = None,
    scores_dir: Path | None = None,
    calibration_file: Path | None = None,
) -> list[str]:
    """The command that prunes `source_dir` (of `shape`) into `out_dir` on `num_gpus` GPUs.

    `script` is the prune script where it is known (`find_script`), else its name. `scores_dir` keeps the scores of a
    run that was killed. `calibration_file` is a .jsonl whose rows have `text` (`write_calibration`); without one the
    script fetches its default data set. Raises InputError for what the script cannot be told.
    """
    _check_config(config, shape)
    arguments: dict[str, Any] = {
        "hf_model_name_or_path": source_dir,
        "output_hf_path": out_dir,
        "pp_size": num_gpus,
        **_uneven_stages(shape.num_layers, num_gpus),
        "calib_dataset_name": calibration_file,
        "calib_num_samples": config.calibration.samples,
        "calib_batch_size": config.calibration.batch_size,
        "seq_length": config.calibration.sequence_length,
        "prune_intermediate_ckpt": scores_dir,
        **(_search_arguments(config, config.target, shape) if config.target else _size_arguments(config, shape)),
    }
    spelled = [word for name, value in arguments.items() if value is not None for word in _spelled(name, value)]
    check_arguments(spelled)
    return ["torchrun", "--nproc_per_node", str(num_gpus), str(script or Path(published()["script"]).name), *spelled]


def check_arguments(arguments: Sequence[str]) -> None:
    """Raise ValueError where the published script would not take these arguments."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    kinds: dict[str, Any] = {"str": str, "int": int, "float": float}
    for name, facts in published()["options"].items():
        if facts["type"] == "flag":
            parser.add_argument(f"--{name}", action="store_true")
        else:
            parser.add_argument(
                f"--{name}",
                type=kinds[facts["type"]],
                required=facts.get("required", False),
                choices=facts.get("choices"),
                nargs="*" if facts.get("many") else None,
            )
    given = {name for name, value in vars(parser.parse_args(arguments)).items() if value}
    for sides in published()["one_of"]:
        options = [{side} if isinstance(side, str) else set(side) for side in sides]
        if sum(bool(option & given) for option in options) != 1:
            raise ValueError(f"exactly one of {sides} must be given")


def write_calibration(texts: Iterable[str], path: Path) -> Path:
    """A .jsonl of `text` rows, as `calib_dataset_name` takes it."""
    with path.open("w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return path


def require_image() -> None:
    """Raise EnvironmentCannot with the reason where the script could not run: no Megatron-Bridge, no CUDA GPU."""
    if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.bridge") is None:
        raise EnvironmentCannot(f"backend: megatron needs megatron-bridge, which is not installed here; {IMAGE_HINT}")
    if not nvidia_gpus():
        raise EnvironmentCannot(f"backend: megatron needs a CUDA GPU, and nvidia-smi shows none; {IMAGE_HINT}")
    if shutil.which("torchrun") is None:
        raise EnvironmentCannot(f"backend: megatron needs torchrun on the PATH; {IMAGE_HINT}")


def find_script() -> Path:
    """The prune script of this image. Raises EnvironmentCannot where there is none."""
    given = os.environ.get("MODELOPT_DIR")
    homes = [Path(given).expanduser()] if given else SCRIPT_HOMES
    scripts = [home / str(published()["script"]) for home in homes]
    found = next((script for script in scripts if script.is_file()), None)
    if found is None:
        raise EnvironmentCannot(
            f"backend: megatron needs ModelOpt's {scripts[0].name}, and there is no {' or '.join(map(str, scripts))}; "
            "clone https://github.com/NVIDIA/Model-Optimizer and set MODELOPT_DIR to it"
        )
    return found


def run_backend(
    argv: Sequence[str], out_dir: Path, log_path: Path, *, log: Callable[[str], None] = lambda line: None
) -> None:
    """Run a composed command to its end; its output goes to `log_path`, and line by line to `log`.

    However this is left, by Ctrl-C too, no process of it stays. Raises EnvironmentCannot where the script that is there
    lacks an option of the command, or where it fails.
    """
    script = Path(argv[3])
    absent = {word for word in argv if word.startswith("--")} - {"--nproc_per_node"} - _options_of(script)
    if absent:
        raise EnvironmentCannot(
            f"{script} does not take {', '.join(sorted(absent))}: it is of another release than nvidia-modelopt 0.47; "
            "check that release out in MODELOPT_DIR"
        )
    out_dir.mkdir(parents=True, exist_ok=True)
    process = spawn(list(argv), {}, log_path=log_path, cwd=script.parent)
    try:
        with log_path.open(encoding="utf-8", errors="replace") as output:
            while process.poll() is None:
                _pass_on(output, log)
                time.sleep(POLL_S)
            _pass_on(output, log)
    finally:
        stop(process)
    if process.returncode != 0:
        raise EnvironmentCannot(
            f"{script.name} failed with exit code {process.returncode}; all it said is in {log_path}, the end of it:\n"
            f"{last_lines(log_path)}"
        )


def result_shape(config: Prune, shape: ModelShape, out_dir: Path) -> ModelShape:
    """Put the result's config.json right and check the result: a plain checkpoint of the shape that was asked for.

    Weights that the index does not name go: the script first saves a model of random weights. Raises EnvironmentCannot
    where sizes, tensors or the target are not what they should be.
    """
    written = shape_of(read_config(out_dir), str(out_dir))
    final = _with_family_fields(shape, written, _dtype(out_dir))
    write_atomically(out_dir / "config.json", json.dumps(final.config, indent=2) + "\n")
    named = set(weight_files(out_dir))
    for path in out_dir.glob("*.safetensors"):
        if path not in named:
            path.unlink()
    try:
        check_weights(out_dir, final)
    except InputError as error:
        raise EnvironmentCannot(f"what the prune script wrote is no checkpoint of its own config: {error}") from error
    if config.target is None:
        wanted = target_shape(config, shape)
        for size in (*SIZES, "num_key_value_heads", "head_dim", "vocab_size"):
            if getattr(final, size) != getattr(wanted, size):
                raise EnvironmentCannot(
                    f"the prune script wrote a model of {size} {getattr(final, size)}, not {getattr(wanted, size)}"
                )
    elif config.target.params is not None and final.num_params > config.target.params:
        raise EnvironmentCannot(
            f"the prune script wrote {final.num_params} parameters, more than the target's {config.target.params}"
        )
    return final


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"the published prune script would not take this: {message}")


def _spelled(name: str, value: Any) -> list[str]:
    values = value if isinstance(value, tuple) else (value,)
    return [f"--{name}", *map(str, values)]


def _check_config(config: Prune, shape: ModelShape) -> None:
    """Raise InputError for what this backend cannot do, whatever the sizes."""
    family = shape.family.model_type
    if family not in published()["families"]:
        raise InputError(
            f"backend: megatron knows no {family} models; it has {', '.join(published()['families'])}; use backend: "
            "stillroom"
        )
    own = {"depth_importance": "auto", "width_importance": "minitron"}
    for field, allowed in own.items():
        if field in config.model_fields_set and getattr(config, field) != allowed:
            raise InputError(f"backend: megatron ranks by Minitron's own scores; leave {field} out, or say {allowed}")
    if "search" in config.model_fields_set:
        raise InputError("backend: megatron does not search for the layers to keep; leave `search` out")
    if config.drop_layers is not None:
        raise InputError("backend: megatron chooses the layers itself; give num_layers instead of drop_layers")
    fields = [field for field in shape.family.per_layer_lists if field != "layer_types" and shape.config.get(field)]
    fields += [f for f in shape.family.layer_clamps if (shape.config.get(f) or shape.num_layers) < shape.num_layers]
    if fields and (config.target is not None or config.num_layers is not None):
        raise InputError(
            f"backend: megatron cuts no layers of a model whose config.json has {fields[0]}: the script does not say "
            "which layers stay; cut widths only, or use backend: stillroom"
        )


def _size_arguments(config: Prune, shape: ModelShape) -> dict[str, Any]:
    """Pruning to sizes that are known."""
    wanted = target_shape(config, shape)
    if wanted.num_key_value_heads != shape.num_key_value_heads:
        raise InputError(
            f"backend: megatron does not cut KV groups; leave num_key_value_heads {config.num_key_value_heads} out"
        )
    if wanted.family is not shape.family:
        raise InputError(
            f"hidden_size {wanted.hidden_size} with num_attention_heads {wanted.num_attention_heads}: transformers "
            f"opens {shape.family.model_type} only where the heads divide hidden_size; use other sizes, or backend: "
            "stillroom"
        )
    changed = {
        name: getattr(wanted, size) for size, name in SIZES.items() if getattr(wanted, size) != getattr(shape, size)
    }
    if not changed:
        raise InputError("nothing to cut: all sizes are the model's own")
    for name, divisor in published()["divisors"].items():
        if changed.get(name, 0) % divisor:
            raise InputError(
                f"backend: megatron cuts {name} to multiples of {divisor}, which {changed[name]} is not; use "
                f"{changed[name] // divisor * divisor or divisor} or {(changed[name] // divisor + 1) * divisor}"
            )
    return {"prune_export_config": json.dumps(changed)}


def _search_arguments(config: Prune, target: Target, shape: ModelShape) -> dict[str, Any]:
    """The script's own search for a shape that keeps to the target."""
    if speeds := [name for name in ("latency_ms", "throughput") if name in target.given()]:
        raise InputError(f"backend: megatron searches for params and memory_gb, not for {speeds[0]}; give one of those")
    arguments: dict[str, Any] = {"prune_target_params": target.params}
    if target.memory_gb is not None:
        if (target.scheme, target.kv_cache, target.tensor_parallel) != ("none", "none", 1):
            raise InputError(
                "backend: megatron counts memory_gb in 16 bits on one GPU; leave scheme, kv_cache and "
                "tensor_parallel out"
            )
        if target.context != config.calibration.sequence_length:
            raise InputError(
                f"backend: megatron has one length for KV cache and calibration; give target.context {target.context} "
                f"and calibration.sequence_length {config.calibration.sequence_length} alike"
            )
        arguments["prune_target_memory_mb"] = math.floor(target.memory_gb * 1e9 / MIB)
        arguments["inference_batch_size"] = target.batch
    return arguments | {
        "max_width_pruning": target.max_cut,
        "max_depth_pruning": target.max_cut,
        "hparams_to_skip": _kept_in_search(target, shape),
        "ss_channel_divisor": target.multiple_of,
        "top_k": target.candidates,
    }


def _kept_in_search(target: Target, shape: ModelShape) -> tuple[str, ...]:
    """What its search leaves alone: heads, as in the script's own examples, since few engines take every number; and
    hidden_size where engines or transformers derive something from it and the heads."""
    divisor = target.multiple_of or SEARCH_DIVISOR
    indivisible = shape.family.heads_divide_hidden and divisor % shape.num_attention_heads
    return ("num_attention_heads", "hidden_size")[: 2 if indivisible or not shape.family.head_dim_free else 1]


def _uneven_stages(num_layers: int, num_gpus: int) -> dict[str, int]:
    """Layers of the first and the last stage where the GPUs do not divide them; those between get as many each."""
    if num_gpus > num_layers:
        raise InputError(f"{num_gpus} GPUs for {num_layers} layers: each runs at least one; use fewer")
    if num_layers % num_gpus == 0:
        return {}
    inner = num_gpus - 2
    between = min(math.ceil(num_layers / num_gpus), (num_layers - 2) // inner) if inner else 0
    outer = num_layers - between * inner
    return {
        "num_layers_in_first_pipeline_stage": outer // 2,
        "num_layers_in_last_pipeline_stage": outer - outer // 2,
    }


def _options_of(script: Path) -> set[str]:
    """What a script says to argparse's add_argument, read without running it."""
    try:
        tree = ast.parse(script.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise EnvironmentCannot(f"{script} cannot be read: {error}") from error
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute))
    words = (call.args[0] for call in calls if call.func.attr == "add_argument" and call.args)  # type: ignore[attr-defined]
    return {word.value for word in words if isinstance(word, ast.Constant) and isinstance(word.value, str)}


def _pass_on(output: Iterable[str], log: Callable[[str], None]) -> None:
    for line in output:
        if line.strip():
            log(line.rstrip())


def _dtype(model_dir: Path) -> str:
    """What the weights are stored in."""
    names = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
    found = {entry.dtype for entry in tensor_entries(model_dir).values()}
    if len(found) != 1 or not found <= names.keys():
        raise EnvironmentCannot(f"the prune script wrote weights of {', '.join(sorted(found))}, not of one plain type")
    return names[found.pop()]


def _with_family_fields(shape: ModelShape, written: ModelShape, dtype: str) -> ModelShape:
    """What the script wrote, with fields of the source's config that it drops, and those put right that it leaves."""
    config = {**shape.config, **written.config, "dtype": dtype, "torch_dtype": dtype}
    for field in shape.family.layer_clamps:
        if config.get(field) is not None:
            config[field] = min(config[field], written.num_layers)
    if written.num_layers == shape.num_layers:
        config |= {field: shape.config[field] for field in shape.family.per_layer_lists if field in shape.config}
    lengths = {f: len(config[f]) for f in shape.family.per_layer_lists if config.get(f) is not None}
    if wrong := [field for field, length in lengths.items() if length != written.num_layers]:
        raise EnvironmentCannot(
            f"the prune script wrote {lengths[wrong[0]]} entries of {wrong[0]} for {written.num_layers} layers"
        )
    return dataclasses.replace(written, config=config)
