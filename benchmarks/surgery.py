"""Memory and time of cutting a sharded checkpoint, against a plain copy of what is kept.

    python benchmarks/surgery.py [--cuts depth width both] [--caches cold warm] [--layers 14] [--repeats 3]

Makes a bfloat16 Llama checkpoint of Llama-3.1-8B's width and 14 layers (8.2 GB) with random weights, cuts it by depth,
by width and by both, and deletes it. Cut and copy each run in a process of their own, in turns, with no other write
pending. `cold`: what is read was dropped from the page cache, and what is written is flushed to the disk within the
time; `warm`: neither. Peak memory is the largest
resident set that the kernel saw of the process (`ru_maxrss`), its libraries included. Needs about 23 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from child import run_child

GB = 1e9
HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 4096, 14336, 32, 8, 128, 128256
CUTS, CACHES = ("depth", "width", "both"), ("cold", "warm")


def main() -> None:
    arguments = _arguments()
    if arguments.child:
        _child(arguments.child, Path(arguments.source), Path(arguments.out), arguments.cold)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the folder goes then, too
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="surgery-") as name:
        folder = Path(name)
        make_checkpoint(folder / "dense", arguments.layers)
        print(f"source {_num_bytes(folder / 'dense') / GB:.2f} GB in {len(_weights(folder / 'dense'))} files")
        print("cut    cache  kept GB   cut s  copy s  ratio  peak MB  after imports MB")
        idle = _run("idle", folder / "dense", folder / "none", cold=False)[1]
        for cut in arguments.cuts:
            for cache in arguments.caches:
                _compare(cut, folder, cache == "cold", arguments.repeats, idle)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuts", nargs="+", choices=CUTS, default=CUTS)
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=CACHES)
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", help="where there is room; default: the system's temporary folder")
    for internal in ("--child", "--source", "--out"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    parser.add_argument("--cold", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def make_checkpoint(path: Path, num_layers: int) -> None:
    """A Llama checkpoint of random weights, untied, in shards of 5 GB."""
    import torch
    from transformers import LlamaConfig

    from stillroom.export.writer import NewTensor, write_checkpoint
    from stillroom.models.shape import read_config, shape_of

    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=num_layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        vocab_size=VOCAB,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(path)
    tensors = {n: NewTensor("BF16", size) for n, size in shape_of(read_config(path), "made").tensor_shapes().items()}
    numbers = (torch.randn(2**23) * 0.02).to(torch.bfloat16)

    def blocks(name: str) -> Iterator[torch.Tensor]:
        missing = tensors[name].num_bytes // 2
        while missing:
            yield numbers[:missing]
            missing -= len(numbers[:missing])

    write_checkpoint(path, tensors, blocks)
    for file in _weights(path):
        _flush(file)


def _compare(cut: str, folder: Path, cold: bool, repeats: int, idle_bytes: int) -> None:
    """Cut and copy in turns; one line of medians."""
    cut_s, copy_s, peaks = [], [], []
    _run(cut, folder / "dense", folder / "kept", cold=False)
    for _ in range(repeats):
        seconds, peak = _run(cut, folder / "dense", folder / "out", cold)
        cut_s.append(seconds)
        peaks.append(peak)
        shutil.rmtree(folder / "out")
        copy_s.append(_run("copy", folder / "kept", folder / "out", cold)[0])
        shutil.rmtree(folder / "out")
    kept = _num_bytes(folder / "kept")
    shutil.rmtree(folder / "kept")
    ratio = statistics.median(cut_s) / statistics.median(copy_s)
    print(
        f"{cut:6} {'cold' if cold else 'warm':5} {kept / GB:8.2f} {statistics.median(cut_s):7.1f} "
        f"{statistics.median(copy_s):7.1f} {ratio:6.2f} {max(peaks) / 1e6:8.0f} {idle_bytes / 1e6:17.0f}"
        f"   all: {_rounded(cut_s)} against {_rounded(copy_s)}",
        flush=True,
    )


def _run(what: str, source: Path, out: Path, cold: bool) -> tuple[float, int]:
    """Seconds of the work, without imports, and the process's peak resident bytes."""
    os.sync()
    if cold:
        for file in _weights(source):
            _forget(file)
    command = [__file__, "--child", what, "--source", str(source), "--out", str(out)]
    answer, peak_bytes = run_child([*command, "--cold"] if cold else command, what)
    return float(answer["seconds"]), peak_bytes


def _child(what: str, source: Path, out: Path, cold: bool) -> None:
    """One piece of work in this process; prints its seconds."""
    from stillroom.prune.cut import Cut
    from stillroom.prune.surgery import cut_checkpoint, source_shape

    shape = None if what == "copy" else source_shape(source)
    began = time.perf_counter()
    if what == "copy":
        out.mkdir()
        for file in _weights(source):
            shutil.copyfile(file, out / file.name)
    elif shape is not None and what != "idle":
        import torch

        layers = tuple(range(shape.num_layers - (0 if what == "width" else shape.num_layers // 4)))
        cut, shares = Cut(layers), None
        if what != "depth":
            ffn = dict.fromkeys(layers, _spread(FFN, 10752))
            cut = Cut(layers, hidden=_spread(HIDDEN, 3584), ffn=ffn)
            norms = (n.format(layer=i) for n in shape.family.hidden_norms for i in range(shape.num_layers))
            shares = {name: torch.full((HIDDEN,), 1 / HIDDEN) for name in norms}
        cut_checkpoint(source, shape, cut, out, norm_shares=shares)
    if cold and out.exists():
        for file in _weights(out):
            _flush(file)
    print(json.dumps({"seconds": time.perf_counter() - began}))


def _spread(count: int, kept: int) -> tuple[int, ...]:
    """`kept` of `count` indices, in no regular pattern, as importance would leave them."""
    return tuple(sorted(sorted(range(count), key=lambda i: i * 2654435761 % 2**32)[:kept]))


def _weights(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors"))


def _num_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in _weights(path))


def _rounded(values: list[float]) -> list[float]:
    return [round(value, 1) for value in values]


def _flush(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def _forget(file: Path) -> None:
    """Drop a file from the page cache."""
    with file.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
