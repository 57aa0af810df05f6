"""The learnt mixture of layers that every probe reads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from superb_probe.errors import RequestError


class WeightedSum(nn.Module):
    """Softmax-weighted sum over layers, weights start equal, optional affine-free layer norm of every frame first.

    The featurizer of SUPERB (arXiv:2105.01051) as s3prl runs it: one scalar a layer, trained with the head's learning rate.

    Attributes:
        weights: (L,) zeros at the start; the mixture is their softmax.
        layer_norm: whether each frame of each layer is normalised (eps 1e-5, no affine) before the sum.

    >>> WeightedSum(3)(torch.ones(3, 2, 5, 4)).shape
    torch.Size([2, 5, 4])
    """

    def __init__(self, num_layers: int, layer_norm: bool = False) -> None:
        """`num_layers` is L of the upstream."""
        super().__init__()
        if num_layers < 1:
            raise RequestError(f"WeightedSum: num_layers is {num_layers}, it must be at least 1")
        self.layer_norm = layer_norm
        self.weights = nn.Parameter(torch.zeros(num_layers))

    def mixture(self) -> Tensor:
        """(L,) the weight of each layer: positive, summing to one.

        >>> WeightedSum(2).mixture().tolist()
        [0.5, 0.5]
        """
        return self.weights.softmax(dim=0)

    def forward(self, states: Tensor) -> Tensor:
        """The mixture of the layers, in the weights' own precision.

        Args:
            states: (L, ..., D): (L, B, T, D), one utterance's (L, T, D), or its means (L, D).

        Returns:
            (..., D). Frames that are zero in every layer stay zero.
        """
        if states.ndim < 2 or states.shape[0] != self.weights.shape[0]:
            raise RequestError(
                f"WeightedSum: states have shape {tuple(states.shape)}, expected (L, ..., D) with L = {self.weights.shape[0]}"
            )
        states = states.to(self.weights.dtype)
        if self.layer_norm:
            states = nn.functional.layer_norm(states, states.shape[-1:])
        mixed: Tensor = torch.tensordot(self.mixture(), states, dims=1)
        return mixed
