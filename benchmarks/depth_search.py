"""Evaluations a second of the depth search against the naive loop, at equal results.

    python benchmarks/depth_search.py MODEL [--windows 4] [--sequence-length 512] [--rounds 2]

Both score the same candidates, a round of greedy search, by KL to the dense model on the same positions. The naive loop
runs the whole cut model with its head, and takes two softmaxes; the dense model's logits it too has from the start.
Text is random tokens: what a candidate costs does not depend on it. Reports both rates, their ratio, the largest
difference between the scores, whether the choice is the same, and the rate when a quarter of the positions is scored.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor

from stillroom.distill.losses import Head, head_of
from stillroom.models.blocks import Blocks
from stillroom.models.load import load_model
from stillroom.models.shape import read_config, shape_of
from stillroom.prune.depth_search import DepthScorer, Keep, without


@torch.inference_mode()
def naive_kl(blocks: Blocks, head: Head, batches: list[Tensor], dense: list[Tensor], keep: Keep) -> float:
    """Mean KL over all positions but each window's last, from a whole pass."""
    total = count = 0.0
    for ids, dense_logits in zip(batches, dense, strict=True):
        hidden = blocks.normed(blocks.run(blocks.embed(ids), keep))
        for row, expected in zip(hidden[:, :-1], dense_logits, strict=True):
            p = expected.float().log_softmax(-1)
            q = head.logits(row).float().log_softmax(-1)
            total += (p.exp() * (p - q)).sum().item()
            count += len(row)
    return total / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    shape = shape_of(read_config(given.model), str(given.model))
    model = load_model(given.model).requires_grad_(False)
    blocks, head = Blocks(model, shape.family), head_of(model)
    head = Head(head.weight.detach(), head.softcap)
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(shape.vocab_size, (given.windows, given.sequence_length), generator=generator)
    batches = list(torch.split(windows, 4))
    everything = tuple(range(shape.num_layers))
    candidates = [without(everything, layer) for layer in everything]
    with torch.inference_mode():
        dense = [head.logits(blocks.normed(blocks.run(blocks.embed(ids), everything))[:, :-1]) for ids in batches]
    rates: dict[str, list[float]] = {"naive": [], "search": [], "search, a quarter of the positions": []}
    scores: dict[str, list[float]] = {}
    for _ in range(given.rounds):
        for name, stride in (("naive", 0), ("search", 1), ("search, a quarter of the positions", 4)):
            started = time.perf_counter()
            if name == "naive":
                scores[name] = [naive_kl(blocks, head, batches, dense, keep) for keep in candidates]
            else:
                scorer = DepthScorer(blocks, head, windows, batch_size=4, stride=stride)
                scores[name] = [scorer.score(keep).kl for keep in candidates]
            rates[name].append(len(candidates) / (time.perf_counter() - started))
    best = {name: max(values) for name, values in rates.items()}
    apart = max(abs(a - b) for a, b in zip(scores["naive"], scores["search"], strict=True))
    facts = {
        "evaluations_a_second": rates,
        "ratio": best["search"] / best["naive"],
        "ratio_by_round": [s / n for s, n in zip(rates["search"], rates["naive"], strict=True)],
        "largest_difference_nats": apart,
        "same_choice": min(everything, key=lambda i: scores["naive"][i])
        == min(everything, key=lambda i: scores["search"][i]),
        "candidates": len(candidates),
        "tokens": windows.numel(),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
