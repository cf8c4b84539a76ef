"""The training loop: a bfloat16 student, float32 masters, AdamW, and a checkpoint from which the very same run goes on.

The model that computes is the checkpoint's own, in bfloat16 as it will be served. Its parameters are copies of float32
masters, which AdamW updates; each gradient is added to its master's as soon as backward has it, so sums over a step are
in float32 too. (Float32 parameters under autocast are as fast: 332 to 379 tok/s against 344 to 379, SmolLM2-135M on 2
cores with AVX512-BF16. But they put the residual stream in another precision than the served model's.) A float32
checkpoint computes in float32; a float16 one trains in bfloat16, because small gradients vanish in float16.

Which windows a step sees, and its learning rate, are functions of seed and step alone. So masters, both Adam moments
and the loss curve are all that a checkpoint needs, and on a CPU a killed run ends with the same bits as any other.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from stillroom.distill.losses import LossSettings, Positions, count_positions, distillation_loss, head_of, loss_toward
from stillroom.distill.packing import Windows, last_hidden
from stillroom.distill.teacher_cache import TeacherCache
from stillroom.errors import EnvironmentCannot, InputError
from stillroom.recipe import Distill
from stillroom.stage import Progress

CHECKPOINT = "training.safetensors"

BYTES_PER_PARAM = 12
"""Of a checkpoint: master and two moments, in float32."""


@dataclass(frozen=True)
class Point:
    """One optimizer step of the loss curve."""

    step: int
    """Counted from 1."""
    tokens: int
    """Trained on so far."""
    loss: float
    divergence: float
    """The recipe's, in nats per token at its temperature."""
    ce: float
    """Nats per token; 0 where ce_weight is 0."""
    learning_rate: float
    grad_norm: float
    """Before clipping."""
    tok_s: float


@dataclass
class Student:
    """A model, and the float32 masters that it is a copy of."""

    model: PreTrainedModel
    masters: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, parameter in self.model.named_parameters():  # tied parameters come once
            self.masters[name] = parameter.detach().float().clone()
            self.masters[name].grad = torch.zeros_like(self.masters[name])
        if self.model.dtype == torch.float16:
            self.model.to(torch.bfloat16)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(True)
            parameter.register_post_accumulate_grad_hook(self._into(self.masters[name]))

    @staticmethod
    def _into(master: Tensor) -> Callable[[Tensor], None]:
        def add(parameter: Tensor) -> None:
            assert master.grad is not None
            assert parameter.grad is not None
            master.grad += parameter.grad
            parameter.grad = None

        return add

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the masters into the model, rounded to its dtype."""
        for name, parameter in self.model.named_parameters():
            parameter.copy_(self.masters[name])


def learning_rate(step: int, config: Distill) -> float:
    """Of the step counted from 0: linear up over the warmup, then half a cosine down to min_learning_rate."""
    warmup = math.ceil(config.warmup_fraction * config.num_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(config.num_steps - 1 - warmup, 1)
    span = config.learning_rate - config.min_learning_rate
    return config.min_learning_rate + span * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def windows_of_step(step: int, num_windows: int, batch_size: int, seed: int) -> Tensor:
    """Indices of the windows that a step sees, (batch_size,): each once an epoch, in an order of the epoch's own."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    orders = {epoch: _order(epoch, num_windows, seed) for epoch in {p // num_windows for p in positions}}
    return torch.stack([orders[p // num_windows][p % num_windows] for p in positions])


def windows_of_rank(step_B: Tensor, rank: int, world_size: int) -> Tensor:
    """The part of a step's windows that one of `world_size` ranks takes, (B / world_size,): each is taken once.

    With `windows_of_step` it is a function of seed, step, rank and world size alone, so a run may go on with another
    number of ranks and sees the same windows in the same steps. Raises InputError where the batch cannot be shared out.
    """
    batch_size = len(step_B)
    if batch_size % world_size:
        allowed = ", ".join(str(n) for n in range(1, batch_size + 1) if batch_size % n == 0)
        raise InputError(
            f"batch_size {batch_size} cannot be shared out among {world_size} ranks; run on {allowed} or change it"
        )
    assert 0 <= rank < world_size
    return step_B.view(world_size, -1)[rank]


def _order(epoch: int, num_windows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed((seed << 20) + epoch)
    return torch.randperm(num_windows, generator=generator)


def train(
    student: Student,
    teacher: PreTrainedModel | TeacherCache,
    windows: Windows,
    config: Distill,
    *,
    seed: int,
    scratch_dir: Path,
    progress: Progress,
) -> list[Point]:
    """Train to config.num_steps, from the checkpoint in `scratch_dir` where there is one; the whole loss curve.

    Raises InputError when the loss stops being a number, EnvironmentCannot when memory or disk do not suffice.
    """
    optimizer = _adamw(student, config)
    path = scratch_dir / CHECKPOINT
    history = load_checkpoint(path, student, optimizer) if path.exists() else []
    if history:
        progress.log(f"going on after step {history[-1].step} of {config.num_steps}")
    student.publish()
    tokens_per_step = config.batch_size * config.sequence_length
    for step in range(len(history), config.num_steps):
        started = time.perf_counter()
        which = windows_of_step(step, len(windows), config.batch_size, seed)
        rate = learning_rate(step, config)
        scale = _ce_scale(student, teacher, windows, which, config, history)
        loss, divergence, ce = _accumulate(student, teacher, windows, which, config, ce_scale=scale)
        grad_norm = _update(student, optimizer, rate, config, step=step + 1, loss=loss)
        tok_s = tokens_per_step / (time.perf_counter() - started)
        history.append(Point(step + 1, (step + 1) * tokens_per_step, loss, divergence, ce, rate, grad_norm, tok_s))
        if (step + 1) % config.save_every_steps == 0 and step + 1 < config.num_steps:
            save_training(path, student, optimizer, history)
        progress.update(step + 1, config.num_steps, "step", loss=loss, tok_s=tok_s)
    return history


def _adamw(student: Student, config: Distill) -> torch.optim.AdamW:
    matrices = [m for m in student.masters.values() if m.ndim >= 2]
    others = [m for m in student.masters.values() if m.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.learning_rate, betas=(0.9, 0.95), fused=True)


def _ce_scale(
    student: Student,
    teacher: PreTrainedModel | TeacherCache,
    windows: Windows,
    which_B: Tensor,
    config: Distill,
    history: list[Point],
) -> float:
    """What brings cross-entropy to the divergence's size, with `ce_balance: proportional`.

    Minitron (arXiv 2407.14679, section 3) weighs losses by the ratio of their values, and ModelOpt's balancer does so
    with cross-entropy, anew in every forward pass. Here one ratio holds for a whole optimizer step, so that it does not
    depend on micro_batch_size: that of the step before. The first step's is measured on its own batch, at the cost of
    one more forward pass. So it follows from the history alone, and a run that goes on takes the same one.
    """
    if config.ce_balance == "static":
        return 1.0
    before = next((point for point in reversed(history) if point.ce > 0), None)
    if before is not None:
        divergence, ce = before.divergence, before.ce
    else:
        with torch.no_grad():
            _, divergence, ce = _accumulate(student, teacher, windows, which_B, config, ce_scale=1.0)
    # estimated from few draws (`teacher_cache`), a divergence can be below 0; turning cross-entropy round is not meant
    return config.temperature**2 * max(divergence, 0.0) / ce if ce > 0 else 1.0


def _accumulate(
    student: Student,
    teacher: PreTrainedModel | TeacherCache,
    windows: Windows,
    which_B: Tensor,
    config: Distill,
    *,
    ce_scale: float,
) -> tuple[float, float, float]:
    """Add the gradients of one optimizer step to the masters; the step's mean loss, divergence and cross-entropy.

    Without gradients where they are switched off.
    """
    settings = LossSettings(
        config.temperature, config.ce_weight, config.chunk_tokens, config.loss, config.mixture, ce_scale
    )
    step = windows[which_B]
    positions = count_positions(step.ids, step.counted)
    sums = torch.zeros(3, dtype=torch.float64)
    try:
        for some in torch.split(which_B, config.micro_batch_size):
            loss = _forward_backward(student.model, teacher, windows, some, settings, positions)
            sums += torch.stack(loss).double().cpu()
    except torch.cuda.OutOfMemoryError as error:
        raise EnvironmentCannot(
            f"GPU memory is not enough for micro_batch_size {config.micro_batch_size} x sequence_length "
            f"{config.sequence_length} with chunk_tokens {config.chunk_tokens}: lower micro_batch_size, then "
            f"chunk_tokens (neither changes what is learned). {error}"
        ) from error
    loss_value, divergence, ce = sums.tolist()
    return loss_value, divergence, ce


def _forward_backward(
    model: PreTrainedModel,
    teacher: PreTrainedModel | TeacherCache,
    windows: Windows,
    which_b: Tensor,
    settings: LossSettings,
    positions: Positions,
) -> tuple[Tensor, Tensor, Tensor]:
    batch = windows[which_b].to(model.device)
    if isinstance(teacher, TeacherCache):
        teaching, hidden = teacher.read(which_b, model.device), last_hidden(model, batch)
        loss = loss_toward(teaching, hidden, head_of(model), batch.ids, settings, positions, counted_BT=batch.counted)
    else:
        with torch.no_grad():
            teacher_hidden = last_hidden(teacher, batch)
        hidden = last_hidden(model, batch)
        loss = distillation_loss(
            hidden, head_of(model), teacher_hidden, head_of(teacher), batch.ids, settings, positions,
            counted_BT=batch.counted,
        )  # fmt: skip
    if loss.total.requires_grad:
        torch.autograd.backward(loss.total)
    return loss.total.detach(), loss.divergence, loss.ce


def _update(
    student: Student, optimizer: torch.optim.AdamW, rate: float, config: Distill, *, step: int, loss: float
) -> float:
    """Clip, step, copy into the model; the gradient's norm. Raises InputError where it is no number."""
    norm = float(torch.nn.utils.clip_grad_norm_(student.masters.values(), config.max_grad_norm))
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise InputError(
            f"distillation broke down at step {step} of {config.num_steps}: loss {loss}, gradient norm {norm}; "
            f"lower learning_rate (now {config.learning_rate}) or raise warmup_fraction (now {config.warmup_fraction})"
        )
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    for master in student.masters.values():
        assert master.grad is not None
        master.grad.zero_()
    student.publish()
    return norm


def save_training(path: Path, student: Student, optimizer: torch.optim.AdamW, history: list[Point]) -> None:
    """Write masters, moments and history in place of the checkpoint before, in one step; no pickle.

    Raises EnvironmentCannot when it cannot be written; the checkpoint before is whole then.
    """
    tensors = {f"master/{name}": master for name, master in student.masters.items()}
    for name, master in student.masters.items():
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"{moment}/{name}"] = optimizer.state[master][moment]
    beside = path.with_name(f".{path.name}.new")
    try:
        save_file(tensors, beside, metadata={"history": json.dumps([asdict(point) for point in history])})
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, SafetensorError) as error:
        beside.unlink(missing_ok=True)
        size = sum(t.nbytes for t in tensors.values()) / 1e9
        raise EnvironmentCannot(
            f"the training checkpoint ({size:.2f} GB) cannot be written to {path.parent}: {error}; make room and run "
            "again, it goes on from the one before"
        ) from error


def load_checkpoint(path: Path, student: Student, optimizer: torch.optim.AdamW) -> list[Point]:
    """Put masters and moments back; the history up to there. Raises InputError when it is not of this student."""
    try:
        with safe_open(path, framework="pt") as file:
            history = [Point(**point) for point in json.loads(file.metadata()["history"])]
            step = torch.tensor(float(len(history)))
            for name, master in student.masters.items():
                master.copy_(file.get_tensor(f"master/{name}"))
                moments = {m: file.get_tensor(f"{m}/{name}").to(master.device) for m in ("exp_avg", "exp_avg_sq")}
                optimizer.state[master] = {"step": step.clone().to(master.device), **moments}
    except (SafetensorError, RuntimeError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no checkpoint of this training ({error}); remove it to start again") from error
    return history
