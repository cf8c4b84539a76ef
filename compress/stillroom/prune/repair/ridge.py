"""Least squares from streamed sums: what a linear module should be, given what it sees and what it should say.

All solutions come from two sums over tokens, the inputs' Gram matrix A^T A and the products A^T Y, gathered batch by
batch in float64, so that memory does not grow with the text. With W the module's weight:

ridge  W' = argmin |Y - A W'^T|^2 + s |W' - W|^2, drawn toward the weight that is there and not toward zero, so that
       directions which the text does not show stay as they are (GRAIL and SlimGPT, arXiv 2412.18110, section 3, solve
       such systems after width cuts).
fold   W' = T W, with T = argmin |Y - A W^T T^T|^2 + s |T - 1|^2: the linear map of ReplaceMe (arXiv 2505.02819,
       section 3.1) that stands for a block of cut layers, folded into the linear module before the block.

s is a strength times the mean of the Gram matrix's diagonal, so it does not depend on tokens or scale.

    n tokens, K inputs, D outputs
"""

from __future__ import annotations

import torch
from torch import Tensor


class LeastSquares:
    """Sums over tokens; weights count some tokens more."""

    def __init__(self, num_inputs: int, num_outputs: int, device: torch.device) -> None:
        self.gram_KK = torch.zeros(num_inputs, num_inputs, dtype=torch.float64, device=device)
        self.products_KD = torch.zeros(num_inputs, num_outputs, dtype=torch.float64, device=device)
        self.num_tokens = 0

    def add(self, inputs_nK: Tensor, targets_nD: Tensor, weights_n: Tensor) -> None:
        """Some tokens; products are in float32, their sums in float64."""
        scale_n1 = weights_n.float().sqrt().unsqueeze(-1)
        inputs, targets = inputs_nK.float() * scale_n1, targets_nD.float() * scale_n1
        self.gram_KK += inputs.T @ inputs
        self.products_KD += inputs.T @ targets
        self.num_tokens += len(inputs)


def ridge(sums: LeastSquares, prior_DK: Tensor, strength: float) -> Tensor:
    """The weight (D, K) in float64 that fits best, drawn toward `prior_DK`."""
    return _solve(sums.gram_KK, sums.products_KD, prior_DK.double(), strength)


def fold(sums: LeastSquares, weight_DK: Tensor, strength: float) -> Tensor:
    """The weight (D, K) in float64 that is the present one followed by the best linear map of its outputs."""
    weight = weight_DK.double()
    said_DD = weight @ sums.gram_KK @ weight.T
    one_DD = torch.eye(len(weight), dtype=torch.float64, device=weight.device)
    return _solve(said_DD, weight @ sums.products_KD, one_DD, strength) @ weight


def _solve(gram_KK: Tensor, products_KD: Tensor, prior_DK: Tensor, strength: float) -> Tensor:
    penalty = strength * gram_KK.diagonal().mean()
    damped = gram_KK + penalty * torch.eye(len(gram_KK), dtype=torch.float64, device=gram_KK.device)
    lower = torch.linalg.cholesky(damped)
    solution: Tensor = torch.cholesky_solve(products_KD + penalty * prior_DK.T, lower).T
    return solution
