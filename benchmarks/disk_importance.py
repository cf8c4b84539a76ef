"""Memory and time of measuring importance layer by layer from disk, against the model in memory.

    python benchmarks/disk_importance.py [--layers 24] [--windows 4] [--tokens 64] [--folder DIR]

Makes a bfloat16 Llama checkpoint of random weights (3.2 GB with 24 layers), measures block influence and Minitron's
width scores in memory and from disk, each in a process of its own, and compares the scores bit for bit. Peak memory is
the largest resident set that the kernel saw of the process (`ru_maxrss`), its libraries included.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from child import run_child

HIDDEN, FFN, HEADS, KV_HEADS, VOCAB = 2048, 8192, 32, 8, 32000
WAYS = ("nothing", "from disk", "in memory")


def main() -> None:
    arguments = _arguments()
    if arguments.child:
        _child(arguments.child, Path(arguments.folder), arguments.windows, arguments.tokens)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the folder goes then, too
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="importance-") as name:
        folder = Path(name)
        _make_checkpoint(folder / "dense", arguments.layers)
        num_bytes = sum(file.stat().st_size for file in (folder / "dense").glob("*.safetensors"))
        print(f"checkpoint {num_bytes / 1e6:.0f} MB, {arguments.windows} windows of {arguments.tokens} tokens")
        answers = {}
        for way in WAYS:
            answers[way], peak_bytes = _run(way, folder, arguments.windows, arguments.tokens)
            print(f"{way:10} {answers[way]['seconds']:7.1f} s {peak_bytes / 1e6:8.0f} MB peak", flush=True)
        print("scores are the same bit for bit:", answers["from disk"]["scores"] == answers["in memory"]["scores"])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64, help="in each window")
    parser.add_argument("--folder", help="where there is room; default: the system's temporary folder")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def _make_checkpoint(path: Path, num_layers: int) -> None:
    """Random weights that are small enough to keep activations finite."""
    import torch
    from transformers import LlamaConfig

    from stillroom.export.writer import NewTensor, write_checkpoint
    from stillroom.models.shape import read_config, shape_of

    LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=num_layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        vocab_size=VOCAB,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(path)
    shape = shape_of(read_config(path), "made")
    tensors = {name: NewTensor("BF16", size) for name, size in shape.tensor_shapes().items()}
    numbers = (torch.randn(2**20) * 0.02).to(torch.bfloat16)

    def blocks(name: str) -> Iterator[torch.Tensor]:
        missing = tensors[name].num_bytes // 2
        while missing:
            yield numbers[:missing]
            missing -= len(numbers[:missing])

    write_checkpoint(path, tensors, blocks)


def _run(way: str, folder: Path, windows: int, tokens: int) -> tuple[dict[str, Any], int]:
    """The child's answer, and its peak resident bytes."""
    sizes = ["--windows", str(windows), "--tokens", str(tokens)]
    command = [__file__, "--child", way, "--folder", str(folder), *sizes]
    return run_child(command, way)


def _child(way: str, folder: Path, num_windows: int, num_tokens: int) -> None:
    """Measure in this process; prints seconds, loading included, and scores."""
    import torch

    from stillroom.models.load import load_model
    from stillroom.models.shape import read_config, shape_of
    from stillroom.prune.importance.from_disk import measure_from_disk
    from stillroom.prune.importance.measure import measure
    from stillroom.prune.importance.names import Wanted

    dense = folder / "dense"
    shape = shape_of(read_config(dense), "made")
    windows = torch.randint(VOCAB, (num_windows, num_tokens), generator=torch.Generator().manual_seed(0))
    wanted: frozenset[Wanted] = frozenset({"layers", "ffn", "heads", "hidden"})
    began = time.perf_counter()
    scores = None
    if way == "from disk":
        scores = measure_from_disk(dense, shape, windows, batch_size=2, wanted=wanted, scratch_dir=folder)
    elif way == "in memory":
        scores = measure(load_model(dense), shape, windows, batch_size=2, wanted=wanted)
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "scores": [] if scores is None else _numbers(vars(scores))}))


def _numbers(tables: dict[str, Any]) -> dict[str, Any]:
    """Tensors, by name or one level deeper, as lists."""
    return {
        name: _numbers(table) if isinstance(table, dict) else table.tolist()
        for name, table in tables.items()
        if isinstance(table, dict) or hasattr(table, "tolist")
    }


if __name__ == "__main__":
    main()
