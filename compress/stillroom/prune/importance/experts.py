"""Which experts matter, and which channels inside them.

Experts: REAP, arXiv 2510.13999: the mean, over the tokens routed to an expert, of gate value times the L2 norm of what
the expert gives; an expert that no token reaches scores zero. Channels of an expert: activation magnitudes
over the tokens routed to it, read where its down projection takes them. Minitron's L2 over windows is left out: a
window that sends one token to an expert would count as much as one that sends hundreds, so `minitron` means `mean_abs`
here, and `contribution` is that times the L2 norm of the down projection's weights for the channel.

transformers 5 holds a layer's experts in one module with fused weights and chooses among kernels for it, so there is
no module inside to watch. What the module was called with is put through its weights once more, expert by expert, and
the sum is compared with what the module gave: experts of a kind not known here are refused, not scored wrong. That
computes the experts twice.

    # N tokens, n those of one expert, K experts a token, E experts, C channels of an expert, D hidden
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.errors import InputError
from stillroom.models.shape import ModelShape
from stillroom.prune.importance.names import Wanted, WidthMethod
from stillroom.prune.importance.observers import Observers, Results, output_of
from stillroom.prune.importance.points import Points
from stillroom.prune.importance.scores import WidthScores

METRIC = "experts"
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""How far the sum of experts may be from the module's, in shares of its largest value: kernels round differently."""


class Experts:
    """Of one layer; the result is (E, 1 + 3 C): the expert's score, and its channels' mean_abs, l2 and contribution."""

    def __init__(self, num_experts: int, num_channels: int) -> None:
        self.num_tokens_E = torch.zeros(num_experts, dtype=torch.float64)
        self.norms_E = torch.zeros(num_experts, dtype=torch.float64)
        self.absolutes_EC = torch.zeros(num_experts, num_channels, dtype=torch.float64)
        self.squares_EC = torch.zeros(num_experts, num_channels, dtype=torch.float64)
        self.weight_norms_EC: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        states_ND, chosen_NK, gates_NK = (tensor.detach() for tensor in (*args, *kwargs.values()))
        if self.weight_norms_EC is None:
            self.weight_norms_EC = torch.stack([w.float().norm(dim=0) for w in _down(module)]).double().cpu()
            self._move_to(states_ND.device)
        total_ND = torch.zeros_like(states_ND, dtype=torch.float32)
        for expert, choices, tokens in _routed(chosen_NK, len(self.num_tokens_E)):
            inner_nC, given_nD = _through(module, expert, states_ND[tokens])
            weighted_nD = given_nD.float() * gates_NK.flatten()[choices, None].float()
            total_ND.index_add_(0, tokens, weighted_nD)
            self.num_tokens_E[expert] += len(tokens)
            self.norms_E[expert] += weighted_nD.norm(dim=-1).sum(dtype=torch.float64)
            self.absolutes_EC[expert] += inner_nC.float().abs().sum(0, dtype=torch.float64)
            self.squares_EC[expert] += inner_nC.float().square().sum(0, dtype=torch.float64)
        self._check_sum(total_ND, output_of(output))

    def result(self) -> Tensor:
        assert self.weight_norms_EC is not None
        tokens_E1 = self.num_tokens_E.clamp_min(1)[:, None]
        mean_abs_EC = self.absolutes_EC / tokens_E1
        l2_EC = (self.squares_EC / tokens_E1).sqrt()
        score_E1 = self.norms_E[:, None] / tokens_E1
        contribution_EC = mean_abs_EC.cpu() * self.weight_norms_EC
        return torch.cat([score_E1.cpu(), mean_abs_EC.cpu(), l2_EC.cpu(), contribution_EC], dim=1)

    def _move_to(self, device: torch.device) -> None:
        """Add up where the model is, so that nothing waits for it at every expert."""
        for name in ("num_tokens_E", "norms_E", "absolutes_EC", "squares_EC"):
            setattr(self, name, getattr(self, name).to(device))

    @staticmethod
    def _check_sum(total_ND: Tensor, given_ND: Tensor) -> None:
        if not given_ND.isfinite().all():
            return  # the scores are not finite either, which is refused with the module's name
        error = (total_ND - given_ND.float()).abs().max().item()
        largest = given_ND.abs().max().item()
        if error > TOLERANCE[given_ND.dtype] * max(largest, 1e-6):
            raise InputError(
                f"the experts of this model do not add up to what their module gives (off by {error:.3g} of "
                f"{largest:.3g}): they are of a kind that cannot be scored; keep num_experts and moe_intermediate_size"
            )


def _routed(chosen_NK: Tensor, num_experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For each expert that tokens reach: it, which of all the choices are of it, and the tokens that made them."""
    choices = chosen_NK.flatten()
    counts = torch.bincount(choices, minlength=num_experts).tolist()
    for expert, own in enumerate(torch.split(choices.argsort(stable=True), counts)):
        if len(own):
            yield expert, own, own // chosen_NK.shape[1]


def _through(module: nn.Module, expert: int, states_nD: Tensor) -> tuple[Tensor, Tensor]:
    """The channels of one expert and what it gives, (n, C) and (n, D)."""
    experts: Any = module
    gate_nC, up_nC = nn.functional.linear(states_nD, experts.gate_up_proj[expert].detach()).chunk(2, dim=-1)
    inner_nC = experts.act_fn(gate_nC) * up_nC
    return inner_nC, nn.functional.linear(inner_nC, _down(module)[expert])


def _down(module: nn.Module) -> Tensor:
    """Weights of the down projections, (E, D, C)."""
    experts: Any = module
    weights: Tensor = experts.down_proj
    return weights.detach()


def observers(shape: ModelShape, points: Points, wanted: frozenset[Wanted]) -> Observers:
    """Observers of the layers' experts, where they or their channels are wanted."""
    if not wanted & {"experts", "expert_ffn"}:
        return {}
    return {
        (METRIC, "experts", module): Experts(shape.num_experts, shape.moe_intermediate_size)
        for module in points.experts
    }


PART: dict[WidthMethod, int] = {"minitron": 0, "mean_abs": 0, "l2": 1, "contribution": 2}
"""Which channels of the result are a method's."""


def tables(method: WidthMethod, results: Results, wanted: frozenset[Wanted]) -> WidthScores:
    """Scores of experts, the same by every method, and of their channels."""
    found = [result for (metric, _, _), result in results.items() if metric == METRIC]
    if not found:
        return WidthScores()
    stacked_LEC = torch.stack(found)
    channels = stacked_LEC[..., 1:].chunk(3, dim=-1)[PART[method]]
    return WidthScores(experts=stacked_LEC[..., 0], expert_ffn=channels).only(wanted)
