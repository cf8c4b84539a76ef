"""Time and peak memory of each distillation loss in chunks, against the same on whole logits with torch's autograd.

    python benchmarks/losses.py [--losses forward_kl js] [--tokens 2048] [--ce-weight 0.3] [--rounds 5] [--device cuda]

Forward and backward pass from the last hidden states through both heads, at SmolLM2-135M's sizes: 49,152 tokens, hidden
576, bfloat16, random. The two ways take turns, each run in a process of its own, which warms up once and is timed once;
the median over the rounds is printed with the least and the most. Peak memory is what the kernel saw of the process
(`ru_maxrss`), less that of one that only makes the inputs; on CUDA it is torch's allocator's.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, get_args

from child import run_child

from stillroom.recipe import TEACHER_SHARE, Divergence

if TYPE_CHECKING:
    from torch import Tensor

    from stillroom.distill.losses import LossSettings

LOSSES: tuple[Divergence, ...] = get_args(Divergence)
WAYS = ("whole", "chunks")
SIZES = ("vocab", "hidden", "tokens", "chunk-tokens", "temperature", "ce-weight", "device")


def main() -> None:
    arguments = _arguments()
    if arguments.child:
        _child(arguments)
        return
    idle = _run(arguments, "inputs", arguments.losses[0])["peak_bytes"]
    print("loss        way        ms (least - most)  time   peak MB  memory  total")
    for loss in arguments.losses:
        found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(arguments.rounds):
            for way in WAYS:
                found[way].append(_run(arguments, way, loss))
        ms = {way: [1e3 * answer["seconds"] for answer in found[way]] for way in WAYS}
        peak = {way: statistics.median(answer["peak_bytes"] for answer in found[way]) - idle for way in WAYS}
        for way in WAYS:
            time_ratio = statistics.median(ms[way]) / statistics.median(ms["whole"])
            print(
                f"{loss:11} {way:6} {statistics.median(ms[way]):9.1f} ({min(ms[way]):.1f} - {max(ms[way]):.1f}) "
                f"{time_ratio:5.2f}x {peak[way] / 1e6:8.1f} {peak[way] / max(peak['whole'], 1):6.2f}x "
                f"{found[way][0]['total']:.6f}",
                flush=True,
            )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=LOSSES)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--chunk-tokens", type=int, default=1024)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--ce-weight", type=float, default=0.0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", choices=(*WAYS, "inputs"), help=argparse.SUPPRESS)
    return parser.parse_args()


def _run(arguments: argparse.Namespace, way: str, loss: str) -> dict[str, float]:
    """What one process found: seconds, total loss, peak bytes."""
    sizes = [word for size in SIZES for word in (f"--{size}", str(getattr(arguments, size.replace("-", "_"))))]
    command = [__file__, "--child", way, "--losses", loss, *sizes]
    found, peak_bytes = run_child(command, f"{way} of {loss}")
    return {"peak_bytes": peak_bytes} | found


def _child(arguments: argparse.Namespace) -> None:
    """Measure one way in this process."""
    import torch

    from stillroom.distill.losses import Head, LossSettings, count_positions, distillation_loss

    loss: Divergence = arguments.losses[0]
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator)).to(arguments.device, torch.bfloat16)

    hidden = normal(1, arguments.tokens, arguments.hidden).requires_grad_()
    weight = normal(arguments.vocab, arguments.hidden, scale=0.05).requires_grad_()
    teacher_hidden = (hidden + normal(1, arguments.tokens, arguments.hidden, scale=0.5)).detach()
    ids = torch.randint(arguments.vocab, (1, arguments.tokens), generator=generator).to(arguments.device)
    settings = LossSettings(
        arguments.temperature, arguments.ce_weight, arguments.chunk_tokens, loss, TEACHER_SHARE.get(loss, 0.0)
    )
    head, teacher = Head(weight), Head(weight.detach())

    def chunks() -> Tensor:
        return distillation_loss(hidden, head, teacher_hidden, teacher, ids, settings, count_positions(ids)).total

    def whole() -> Tensor:
        return _whole(hidden[0] @ weight.T, teacher_hidden[0] @ weight.detach().T, ids[0], settings)

    found = {} if arguments.child == "inputs" else _measured(chunks if arguments.child == "chunks" else whole)
    if arguments.device != "cpu":
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
    print(json.dumps(found))


def _measured(step: Callable[[], Tensor]) -> dict[str, float]:
    """Seconds of the second of two forward and backward passes."""
    import torch

    for _ in range(2):
        began = time.perf_counter()
        total = step()
        torch.autograd.backward(total)
        value = float(total.detach())
        if total.is_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    return {"seconds": seconds, "total": value}


def _whole(logits: Tensor, teacher_logits: Tensor, ids: Tensor, settings: LossSettings) -> Tensor:
    """The loss as it is usually written, (tokens, vocabulary) in float32."""
    import torch
    from torch.nn import functional

    tau, share = settings.temperature, settings.teacher_share
    log_q, log_p = (x.float().div(tau).log_softmax(dim=-1) for x in (logits, teacher_logits))

    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        return functional.kl_div(log_b, log_a, reduction="sum", log_target=True) / len(ids)

    if settings.divergence in TEACHER_SHARE:
        log_m = torch.logaddexp(log_p + math.log(share), log_q + math.log(1 - share))
    divergence = {
        "forward_kl": lambda: kl(log_p, log_q),
        "reverse_kl": lambda: kl(log_q, log_p),
        "skewed_kl": lambda: kl(log_p, log_m),
        "js": lambda: share * kl(log_p, log_m) + (1 - share) * kl(log_q, log_m),
    }[settings.divergence]()
    total = (1 - settings.ce_weight) * tau**2 * divergence
    if settings.ce_weight:
        total = total + settings.ce_weight * functional.cross_entropy(logits[:-1].float(), ids[1:])
    return total


if __name__ == "__main__":
    main()
