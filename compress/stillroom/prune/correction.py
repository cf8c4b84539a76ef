"""What an engine adds to the roofline, fitted to speeds that were measured on it.

A decode step costs more than the roofline says: kernels fall short of peak, every layer is launched, every step is
scheduled and sampled. So for each measured batch

    step_ms = scale * roofline_ms + layer_ms * num_layers + fixed_ms

is fitted to the measured shapes by least squares of the relative error with no coefficient below zero: cheaper than
free is not believed, and a larger shape can never come out faster. One measured shape gives the scale alone; the
overheads need shapes of different depth and width. Between measured batches the correction is interpolated
geometrically in the batch; beyond them the nearest one holds.

A table is one engine on one machine. It carries the hardware's figures where those were measured too (a CPU's), so a
search on it does not depend on how busy the machine is today.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stillroom.errors import InputError
from stillroom.models.shape import ModelShape, shape_of
from stillroom.prune.cost import Costs, Hardware, Load, costs_of, decode_ms

NUM_TERMS = 3


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class MeasuredPoint(Frozen):
    """The speed of one shape under one load."""

    label: str
    config: dict[str, Any]
    """Its config.json."""
    batch: int = Field(ge=1)
    context: int = Field(ge=1)
    """Tokens in the KV cache of each sequence, averaged over the measured steps."""
    scheme: Literal["none", "fp8", "int8", "nvfp4"] = "none"
    kv_cache: Literal["none", "fp8"] = "none"
    tensor_parallel: int = Field(default=1, ge=1)
    step_ms: float = Field(gt=0)
    """Between two output tokens of a sequence; output tokens per second are 1000 x batch / step_ms."""
    stderr_ms: float | None = None
    n: int = Field(default=1, ge=1)
    """Measurements behind it."""

    @property
    def load(self) -> Load:
        return Load(self.batch, self.context, self.scheme, self.kv_cache, self.tensor_parallel)

    @property
    def shape(self) -> ModelShape:
        return shape_of(self.config, self.label)


class MeasuredTable(Frozen):
    """Points of one engine on one machine."""

    schema_version: Literal[1] = 1
    hardware: str
    """As `target.hardware` names it."""
    engine: str
    """With its version."""
    machine: str = ""
    """What it ran on, in words."""
    figures: Hardware | None = None
    """The hardware's own speed where it was measured; None: hardware.yaml's."""
    points: tuple[MeasuredPoint, ...] = Field(min_length=1)


@dataclass(frozen=True)
class Overheads:
    """The fit of one batch."""

    batch: int
    scale: float
    layer_ms: float
    fixed_ms: float

    def step_ms(self, roofline_ms: float, num_layers: int) -> float:
        return self.scale * roofline_ms + self.layer_ms * num_layers + self.fixed_ms


@dataclass(frozen=True)
class Correction:
    """Fits by batch, ascending; none at all leaves the roofline as it is."""

    fits: tuple[Overheads, ...] = ()

    def decode_ms(self, shape: ModelShape, load: Load, hardware: Hardware) -> float:
        """Milliseconds of one decode step, corrected."""
        roofline_ms = decode_ms(shape, load, hardware)
        if not self.fits:
            return roofline_ms
        below = [fit for fit in self.fits if fit.batch <= load.batch][-1:] or [self.fits[0]]
        above = [fit for fit in self.fits if fit.batch >= load.batch][:1] or [self.fits[-1]]
        low, high = below[0], above[0]
        if low.batch == high.batch:
            return low.step_ms(roofline_ms, shape.num_layers)
        share = math.log(load.batch / low.batch) / math.log(high.batch / low.batch)
        return math.exp(
            (1 - share) * math.log(low.step_ms(roofline_ms, shape.num_layers))
            + share * math.log(high.step_ms(roofline_ms, shape.num_layers))
        )

    def costs(self, shape: ModelShape, load: Load, hardware: Hardware | None) -> Costs:
        """The roofline's costs with the speeds of decoding corrected."""
        costs = costs_of(shape, load, hardware)
        if hardware is None or not self.fits:
            return costs
        step_ms = self.decode_ms(shape, load, hardware)
        return replace(costs, latency_ms=step_ms, throughput=1e3 * load.batch / step_ms)


def load_table(path: Path) -> MeasuredTable:
    """A table of measured speeds. Raises InputError where there is none at `path`."""
    try:
        return MeasuredTable.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"measured: {path} is no file; benchmarks/roofline.py writes one") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"measured: {path} is not JSON: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"measured: {path} is no table of speeds ({where}: {first['msg']})") from error


def fit_table(table: MeasuredTable, load: Load, hardware_name: str, hardware: Hardware) -> Correction:
    """The correction for a load's scheme, KV cache and GPUs, at every batch that was measured.

    Raises InputError where the table is of other hardware, or has no point of that kind.
    """
    if table.hardware != hardware_name:
        raise InputError(
            f"measured: the table is of {table.hardware}, and the target's hardware is {hardware_name}; "
            f"give a table of {hardware_name}, or none"
        )
    kind = (load.scheme, load.kv_cache, load.tensor_parallel)
    fitting = [p for p in table.points if (p.scheme, p.kv_cache, p.tensor_parallel) == kind]
    if not fitting:
        there = sorted({f"{p.scheme}, kv_cache {p.kv_cache}, {p.tensor_parallel} GPUs" for p in table.points})
        raise InputError(
            f"measured: no point of scheme {load.scheme}, kv_cache {load.kv_cache}, tensor_parallel "
            f"{load.tensor_parallel}; the table has {'; '.join(there)}. Measure that, or leave `measured` out"
        )
    return fit_points(fitting, hardware)


def fit_points(points: Sequence[MeasuredPoint], hardware: Hardware) -> Correction:
    """A fit for each batch among the points."""
    batches = sorted({point.batch for point in points})
    return Correction(tuple(_fit([p for p in points if p.batch == batch], hardware) for batch in batches))


def _fit(points: Sequence[MeasuredPoint], hardware: Hardware) -> Overheads:
    """Relative least squares with coefficients >= 0: the best of all subsets of terms, each solved exactly.

    With three terms there are seven subsets, so the search is exhaustive; of equal ones the smaller stays.
    """
    rows = [[decode_ms(p.shape, p.load, hardware) / p.step_ms, p.shape.num_layers / p.step_ms, 1 / p.step_ms]
            for p in points]  # fmt: skip
    most = 1 if len(points) == 1 else min(NUM_TERMS, len(points))
    best: tuple[float, Overheads] | None = None
    for size in range(1, most + 1):
        for terms in itertools.combinations(range(NUM_TERMS), size):
            if len(points) == 1 and terms != (0,):
                continue
            solved = _solve([[row[t] for t in terms] for row in rows])
            if solved is None or min(solved) < 0:
                continue
            coefficients = [0.0, 0.0, 0.0]
            for term, value in zip(terms, solved, strict=True):
                coefficients[term] = value
            error = sum((sum(c * x for c, x in zip(coefficients, row, strict=True)) - 1) ** 2 for row in rows)
            if best is None or error < best[0] - 1e-12:
                best = (error, Overheads(points[0].batch, coefficients[0], coefficients[1], coefficients[2]))
    assert best is not None  # one positive column alone always has a positive solution
    return best[1]


def _solve(rows: Sequence[Sequence[float]]) -> list[float] | None:
    """x that minimises sum (row . x - 1)^2, by the normal equations; None where they are singular.

    Columns are scaled to unit length first, so that `singular` means linearly dependent and not merely small.
    """
    size = len(rows[0])
    lengths = [math.sqrt(sum(row[j] ** 2 for row in rows)) for j in range(size)]
    unit = [[row[j] / lengths[j] for j in range(size)] for row in rows]
    system = [[sum(r[i] * r[j] for r in unit) for j in range(size)] + [sum(r[i] for r in unit)] for i in range(size)]
    for i in range(size):
        pivot = max(range(i, size), key=lambda k: abs(system[k][i]))
        if abs(system[pivot][i]) < 1e-9:
            return None
        system[i], system[pivot] = system[pivot], system[i]
        for k in range(size):
            if k != i:
                factor = system[k][i] / system[i][i]
                system[k] = [a - factor * b for a, b in zip(system[k], system[i], strict=True)]
    return [system[i][size] / system[i][i] / lengths[i] for i in range(size)]
