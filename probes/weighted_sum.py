"""The learnt mixture of layers that every probe reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from superb_probe.errors import RequestError
from superb_probe.probes import kernels


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
        if self.layer_norm:
            states = nn.functional.layer_norm(states.to(self.weights.dtype), states.shape[-1:])
        if states.requires_grad or self.weights.dtype != torch.float32:
            mixed: Tensor = torch.tensordot(self.mixture(), states.to(self.weights.dtype), dims=1)
        else:
            mixed = _FrozenMix.apply(self.mixture(), states)  # type: ignore[no-untyped-call]
        return mixed


class _FrozenMix(torch.autograd.Function):
    """The mixture of states that need no gradient: one pass over them forward, one backward."""

    @staticmethod
    def forward(context: Any, mixture: Tensor, states: Tensor) -> Tensor:
        context.save_for_backward(states)
        return mix(mixture[None], states)[0]

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (states,) = context.saved_tensors
        return mixture_gradient(gradient[None], states)[0], None


class Mixer:
    """The mixtures of N trials: each the softmax of its weights, or a single layer.

    Attributes:
        weights: (N, L) before the softmax; rows of trials that read a single layer are not used.
        any_learnt: whether there is a mixture to learn.
        learnt: (N, 1) trials that have one.
        single: (N, L) ones where a trial reads a single layer.
    """

    def __init__(self, weights: Tensor, layers: Sequence[int | None]) -> None:
        """`layers` says by trial which one is read, None for the weighted sum."""
        self.weights = weights
        self._layers = tuple(layers)
        chosen = torch.tensor([layer or 0 for layer in layers], dtype=torch.long, device=weights.device)
        self.single = nn.functional.one_hot(chosen, weights.shape[1]).to(weights.dtype)
        self.learnt = torch.tensor([[layer is None] for layer in layers], device=weights.device)
        self.any_learnt = None in self._layers and weights.shape[1] > 1  # the softmax of one weight is one

    def part(self, trials: Sequence[int]) -> Mixer:
        """The mixtures of some of the trials."""
        return Mixer(self.weights[list(trials)], [self._layers[trial] for trial in trials])

    def mixture(self) -> Tensor:
        """(N, L) the weight of each layer.

        >>> Mixer(torch.zeros(2, 2), (None, 1)).mixture().tolist()
        [[0.5, 0.5], [0.0, 1.0]]
        """
        return torch.where(self.learnt, self.weights.detach().softmax(1), self.single)

    def gradient(self, mixture: Tensor, gradient: Tensor) -> Tensor:
        """(N, L) gradient of `weights` from that of the mixture; zero for single layers."""
        weighted = mixture * gradient
        through = weighted - mixture * weighted.sum(1, keepdim=True)
        return torch.where(self.learnt, through, 0.0)


def mix(mixture: Tensor, states: Tensor) -> Tensor:
    """(N, ...) the mixtures of N trials over the same states, in one pass over them.

    Args:
        mixture: (N, L).
        states: (L, ...).

    >>> mix(torch.tensor([[0.5, 0.5], [0.0, 1.0]]), torch.tensor([[2.0], [4.0]])).tolist()
    [[3.0], [4.0]]
    """
    layers = states.flatten(1)
    fused = layers.is_cuda and layers.is_contiguous() and kernels.available()
    mixed = kernels.mix(mixture, layers) if fused else mixture @ layers.to(mixture.dtype)
    return mixed.view(-1, *states.shape[1:])


def mixture_gradient(gradient: Tensor, states: Tensor) -> Tensor:
    """(N, L) the gradient of the mixtures: inner products of the mixed states' gradient with every layer, in one pass.

    Args:
        gradient: (N, ...) of what `mix` gave.
        states: (L, ...).
    """
    layers, slopes = states.flatten(1), gradient.flatten(1)
    fused = layers.is_cuda and layers.is_contiguous() and kernels.available()
    return kernels.mixture_gradient(slopes, layers) if fused else slopes @ layers.to(slopes.dtype).T
