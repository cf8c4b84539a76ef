"""What the teacher says of the training windows, run once and kept on disk: some tokens and their weights a position.

    sampled   `draws` tokens drawn with replacement (Random Sampling KD, arXiv 2503.16870) from p^power, where its
              cumulative sums pass uniform numbers; each different one is kept with its count, which over `draws` is
              an unbiased estimate of p. With a power other than 1 the weight is count * p / p^power over their sum.
    top_k     the K largest of p, and the mass of all others.

p is the teacher's softmax at the recipe's temperature; `sparse_losses` says what is learned from it. A cache is a
directory under stillroom's home, named by the hash of all that determines it: the teacher's files, the tokenizer, the
windows, temperature and settings. So every student on the same text, and every later run, reads the same one, wherever
it was written; another teacher or text gets another. Nothing is removed: delete what is no longer wanted.

Bytes a position: for each pair the id (2 up to 65,536 tokens, else 4) and the weight (1 for counts, else 2: 65535ths,
since it is the absolute error that the gradient q - w sees); 1 for the number of pairs (4 above 255); 4 for the
entropy; 4 for the mass outside K. With a vocabulary of 150,000, sampled takes 65 where 12 different tokens were drawn
and top_k of 64 takes 393; logits would take 300,000 in bfloat16. The number of pairs varies, because what is drawn more
than once is stored once: 50 draws of a sure teacher are one pair.

Shards hold whole windows, are written beside and renamed, and an interrupted pass goes on at the first that is missing.
The draws of a window are a function of seed and window alone, and each shard is run in the same batches whenever it is
written, so on a CPU the shards are the same bits.

Shapes: N windows, T tokens, R positions that count, P pairs, n of a chunk, K draws or k, V vocabulary.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stillroom.artifact import write_atomically
from stillroom.distill.losses import head_of, pieces, to_math
from stillroom.distill.packing import Windows, last_hidden
from stillroom.distill.sparse_losses import SparseTeaching
from stillroom.errors import EnvironmentCannot, InputError
from stillroom.home import home
from stillroom.models.source import directory_fingerprint
from stillroom.recipe import Distill, SampledTeacher, TopKTeacher, teacher_cache_token_bytes
from stillroom.stage import Progress

MANIFEST = "cache.json"
FORMAT = 1

SHARD_BYTES = 64 << 20
"""At most, unless one window is larger: what a killed pass loses."""

FIXED_POINT = 65535


@dataclass(frozen=True)
class Pairs:
    """Of R positions, one after another."""

    lengths_R: Tensor
    """How many pairs each has."""
    ids_P: Tensor
    weights_P: Tensor
    """Counts, or 65535ths."""
    entropy_R: Tensor
    """In nats, float32: of p, or of the K + 1 outcomes of top_k."""
    outside_R: Tensor | None = None
    """Mass of all but the K, float32."""

    def tensors(self) -> dict[str, Tensor]:
        named = {"lengths": self.lengths_R, "ids": self.ids_P, "weights": self.weights_P, "entropy": self.entropy_R}
        return named if self.outside_R is None else named | {"outside": self.outside_R}


@dataclass(frozen=True)
class TeacherCache:
    """A cache on disk, finished or not."""

    path: Path
    settings: SampledTeacher | TopKTeacher
    num_windows: int
    windows_per_shard: int
    token_bytes: int
    """At most."""

    @property
    def key(self) -> str:
        return self.path.name

    def shard(self, number: int) -> Path:
        return self.path / f"shard-{number:06d}.safetensors"

    def missing(self) -> list[int]:
        """Numbers of the shards that are not there yet."""
        num_shards = -(-self.num_windows // self.windows_per_shard)
        return [number for number in range(num_shards) if not self.shard(number).exists()]

    def windows_of(self, number: int) -> range:
        start = number * self.windows_per_shard
        return range(start, min(start + self.windows_per_shard, self.num_windows))

    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.path.glob("shard-*.safetensors"))

    def read(self, which_B: Tensor, device: torch.device) -> SparseTeaching:
        """Of these windows' positions that count, in their order. Raises InputError where a shard is damaged."""
        parts = [self._window(int(index)) for index in which_B]
        whole = {name: torch.cat([part[name] for part in parts]).to(device) for name in parts[0]}
        return as_teaching(whole, self.settings)

    def _window(self, index: int) -> dict[str, Tensor]:
        number, at = divmod(index, self.windows_per_shard)
        path = self.shard(number)
        try:
            with safe_open(path, framework="pt") as file:
                if file.metadata() != self._metadata(number):
                    raise InputError(f"{path} belongs to another teacher cache; remove it to have it written again")
                rows, pairs = (file.get_slice(name)[at : at + 2].tolist() for name in ("rows", "pairs"))
                names = [name for name in file.keys() if name not in ("rows", "pairs")]  # noqa: SIM118 (no mapping)
                spans = {name: pairs if name in ("ids", "weights") else rows for name in names}
                return {name: file.get_slice(name)[start:end] for name, (start, end) in spans.items()}
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} is damaged ({error}); remove it to have it written again") from error

    def save(self, number: int, tensors: dict[str, Tensor]) -> None:
        """Raises EnvironmentCannot when it cannot be written; the shards before are whole then."""
        path = self.shard(number)
        beside = path.with_name(f".{path.name}.new")
        try:
            save_file(tensors, beside, metadata=self._metadata(number))
            with beside.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(beside, path)
        except (OSError, SafetensorError) as error:
            beside.unlink(missing_ok=True)
            raise EnvironmentCannot(
                f"the teacher cache cannot be written to {self.path}: {error}; make room and run again, it goes on "
                f"after the {number} shards that are there"
            ) from error

    def _metadata(self, number: int) -> dict[str, str]:
        return {"shard": f"{self.key}/{number}"}  # one entry: safetensors writes several in any order


def as_teaching(whole: dict[str, Tensor], settings: SampledTeacher | TopKTeacher) -> SparseTeaching:
    """Rows of equal length, and weights as what they stand for."""
    lengths_N1 = whole["lengths"].long().unsqueeze(1)
    device = lengths_N1.device
    there_NK = torch.arange(int(lengths_N1.max()) if len(lengths_N1) else 0, device=device) < lengths_N1
    ids_NK = torch.zeros(there_NK.shape, dtype=torch.int64, device=device)
    weights_NK = torch.zeros(there_NK.shape, device=device)
    ids_NK[there_NK] = whole["ids"].long()
    weights_NK[there_NK] = whole["weights"].float() / denominator(settings)
    return SparseTeaching(ids_NK, weights_NK, whole["entropy"], whole.get("outside"))


def denominator(settings: SampledTeacher | TopKTeacher) -> int:
    """What stored weights are over."""
    return settings.draws if settings.kind == "sampled" and settings.proposal_power == 1 else FIXED_POINT


def open_cache(
    config: Distill,
    windows: Windows,
    teacher_dir: Path,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    *,
    seed: int,
) -> TeacherCache:
    """The cache of this teacher's answers to these windows, as far as it is written.

    Raises InputError for more tokens than there are and for a directory that holds another cache, EnvironmentCannot
    when the disk has no room for what is missing.
    """
    settings = config.teacher_cache
    assert settings is not None
    if settings.kind == "top_k" and settings.k > vocab_size:
        raise InputError(f"teacher_cache k {settings.k} is more than the model's {vocab_size} tokens; lower it")
    token_bytes = teacher_cache_token_bytes(settings, vocab_size)
    num_windows, sequence_length = windows.ids.shape
    facts: dict[str, Any] = {
        "format": FORMAT,
        "teacher": directory_fingerprint(teacher_dir),
        "tokenizer": hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest(),
        "windows": _fingerprint(windows),
        "temperature": config.temperature,
        "settings": settings.model_dump(mode="json") | ({"seed": seed} if settings.kind == "sampled" else {}),
        "num_windows": num_windows,
        "windows_per_shard": max(1, SHARD_BYTES // (sequence_length * token_bytes)),
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    cache = TeacherCache(home() / "teacher-cache" / key, settings, num_windows, facts["windows_per_shard"], token_bytes)
    _claim(cache.path, facts)
    needed = sum(len(cache.windows_of(number)) for number in cache.missing()) * sequence_length * token_bytes
    free = shutil.disk_usage(cache.path).free
    if free < needed:
        raise EnvironmentCannot(
            f"the teacher cache needs up to {needed / 1e9:.1f} GB in {cache.path} ({token_bytes} bytes a token), "
            f"{free / 1e9:.1f} GB are free; make room, set STILLROOM_HOME elsewhere, or lower "
            f"{'draws' if settings.kind == 'sampled' else 'k'}"
        )
    return cache


def _claim(path: Path, facts: dict[str, Any]) -> None:
    """Write the manifest, or check that it is this cache's. Raises InputError or EnvironmentCannot."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not (path / MANIFEST).exists():
            write_atomically(path / MANIFEST, json.dumps(facts, indent=2, sort_keys=True) + "\n")
        found = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except OSError as error:
        raise EnvironmentCannot(
            f"the teacher cache cannot be kept in {path}: {error}; set STILLROOM_HOME elsewhere"
        ) from error
    except json.JSONDecodeError as error:
        raise InputError(f"{path / MANIFEST} is damaged ({error}); remove {path} and run again") from error
    if other := [name for name, fact in facts.items() if not isinstance(found, dict) or found.get(name) != fact]:
        raise InputError(f"{path} is the cache of another {' and '.join(other)}; remove it and run again")


def _fingerprint(windows: Windows) -> str:
    """Of ids, positions and what counts."""
    digest = hashlib.sha256(str(tuple(windows.ids.shape)).encode())
    for part in (windows.ids, windows.positions, windows.counted):
        digest.update(b"none" if part is None else part.contiguous().numpy().tobytes())
    return digest.hexdigest()


def write_cache(
    cache: TeacherCache,
    teacher: PreTrainedModel,
    windows: Windows,
    config: Distill,
    *,
    seed: int,
    progress: Progress,
) -> None:
    """Run the teacher over the windows of the missing shards."""
    with _alone(cache.path, progress):
        missing = cache.missing()
        if missing and missing[0]:
            progress.log(f"the teacher goes on after window {cache.windows_of(missing[0]).start} of {len(windows)}")
        for number in missing:
            shard = cache.windows_of(number)
            batches = [shard[i : i + config.micro_batch_size] for i in range(0, len(shard), config.micro_batch_size)]
            found: list[Pairs] = []
            for batch in batches:
                started = time.perf_counter()
                try:
                    found += _said(teacher, windows, batch, config, seed)
                except torch.cuda.OutOfMemoryError as error:
                    raise EnvironmentCannot(
                        f"GPU memory is not enough for the teacher on micro_batch_size {config.micro_batch_size} x "
                        f"sequence_length {config.sequence_length} with chunk_tokens {config.chunk_tokens}: lower "
                        f"micro_batch_size, then chunk_tokens, and run again. {error}"
                    ) from error
                tok_s = len(batch) * config.sequence_length / (time.perf_counter() - started)
                progress.update(batch.stop, len(windows), "window", tok_s=tok_s)
            cache.save(number, _shard(found, counted_of(windows[shard.start : shard.stop])))


@contextmanager
def _alone(path: Path, progress: Progress) -> Iterator[None]:
    """Only one process writes; another waits, and finds the shards there."""
    with (path / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.log(f"another run is writing {path}; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def counted_of(windows: Windows) -> Tensor:
    """The positions that count, (N, T) bool."""
    return torch.ones_like(windows.ids, dtype=torch.bool) if windows.counted is None else windows.counted


def _shard(found: list[Pairs], counted_NT: Tensor) -> dict[str, Tensor]:
    """All pairs in a row, and where each window's rows and pairs start, with the end of the last."""
    parts = [pairs.tensors() for pairs in found]
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def starts(lengths: Tensor) -> Tensor:
        return torch.cat([torch.zeros(1, dtype=torch.int64), lengths.long().cumsum(0)])

    rows = starts(counted_NT.sum(dim=1))
    return whole | {"rows": rows, "pairs": starts(whole["lengths"])[rows]}


@torch.no_grad()
def _said(teacher: PreTrainedModel, windows: Windows, batch: range, config: Distill, seed: int) -> list[Pairs]:
    """What the teacher says at the positions of these windows that count."""
    settings, head = config.teacher_cache, head_of(teacher)
    assert settings is not None
    some = windows[batch.start : batch.stop]
    counted_BT = counted_of(some)
    hidden_RD = last_hidden(teacher, some.to(teacher.device))[counted_BT.to(teacher.device)]
    draws = uniforms(batch, config.sequence_length, settings.draws, seed) if settings.kind == "sampled" else None
    uniforms_RK = None if draws is None else draws[counted_BT].to(teacher.device)
    found = []
    for start in range(0, max(len(hidden_RD), 1), config.chunk_tokens):
        raw_nV = hidden_RD[start : start + config.chunk_tokens] @ head.weight.T
        for rows in pieces(raw_nV) if len(raw_nV) else [slice(0, 0)]:
            logits_nV = head.capped(to_math(raw_nV[rows])).div_(config.temperature)
            if settings.kind == "top_k":
                found.append(top_pairs(logits_nV, settings.k))
            else:
                assert uniforms_RK is not None
                mine = uniforms_RK[start + rows.start : start + rows.start + len(logits_nV)]
                found.append(drawn_pairs(logits_nV, mine, settings.proposal_power))
    return found


def uniforms(batch: range, num_positions: int, draws: int, seed: int) -> Tensor:
    """In [0, 1), (B, T, K) float64: of each window from a generator of its own (torch's takes 32 bits of a seed)."""
    shape = (num_positions, draws)
    return torch.stack([torch.from_numpy(np.random.default_rng([seed, index]).random(shape)) for index in batch])


def drawn_pairs(logits_nV: Tensor, uniforms_nK: Tensor, power: float = 1.0) -> Pairs:
    """The tokens at which the proposal's cumulative sums pass the uniform numbers, on the CPU."""
    log_p = torch.log_softmax(logits_nV, dim=-1)
    log_proposal = log_p if power == 1 else torch.log_softmax(log_p * power, dim=-1)
    cumulative_nV = log_proposal.double().exp().cumsum(dim=-1)
    thresholds_nK = uniforms_nK * cumulative_nV[:, -1:]
    drawn_nK = torch.searchsorted(cumulative_nV, thresholds_nK, right=True).clamp_(max=logits_nV.shape[1] - 1)
    sorted_nK = drawn_nK.sort(dim=-1).values
    first_nK = torch.ones_like(sorted_nK, dtype=torch.bool)
    first_nK[:, 1:] = sorted_nK[:, 1:] != sorted_nK[:, :-1]
    lengths, ids = first_nK.sum(dim=-1), sorted_nK[first_nK]
    at = first_nK.flatten().nonzero().squeeze(1)
    weights = torch.diff(at, append=at.new_tensor([first_nK.numel()]))
    if power != 1:
        row = torch.repeat_interleave(torch.arange(len(lengths), device=at.device), lengths)
        ratio = weights * (log_p[row, ids] - log_proposal[row, ids]).exp()
        sums = torch.zeros(len(lengths), dtype=ratio.dtype, device=at.device).index_add_(0, row, ratio)
        weights = (ratio / sums[row] * FIXED_POINT).round_()
    entropy = -(log_p.exp() * log_p).sum(dim=-1)
    return _stored(
        lengths, ids, weights, entropy, None, logits_nV.shape[1], most=uniforms_nK.shape[1], is_count=power == 1
    )


def top_pairs(logits_nV: Tensor, k: int) -> Pairs:
    """The k likeliest tokens, on the CPU."""
    p = torch.softmax(logits_nV, dim=-1)
    weights_nK, ids_nK = p.topk(k, dim=-1)
    outside = p.scatter_(1, ids_nK, 0.0).sum(dim=-1)
    entropy = torch.special.entr(weights_nK).sum(dim=-1) + torch.special.entr(outside)
    lengths = torch.full((len(p),), k)
    weights = (weights_nK * FIXED_POINT).round_()
    return _stored(
        lengths, ids_nK.flatten(), weights.flatten(), entropy, outside, logits_nV.shape[1], most=k, is_count=False
    )


def _stored(
    lengths: Tensor, ids: Tensor, weights: Tensor, entropy: Tensor, outside: Tensor | None, vocab_size: int,
    *, most: int, is_count: bool,
) -> Pairs:  # fmt: skip
    """In the types that they are kept in, which `recipe.teacher_cache_token_bytes` counts."""
    return Pairs(
        lengths.to("cpu", torch.uint8 if most <= 255 else torch.int32),
        ids.to("cpu", torch.uint16 if vocab_size <= 1 << 16 else torch.int32),
        weights.to("cpu", torch.uint8 if is_count else torch.uint16),
        entropy.to("cpu", torch.float32),
        None if outside is None else outside.to("cpu", torch.float32),
    )
