"""Muon: momentum whose update is orthogonalised by Newton-Schulz iteration (Jordan et al., 2024).

``torch.optim.Muon`` takes matrices only; a Mixture-of-Experts layer stores its experts as one ``[E, out, in]`` tensor,
of which every expert is a matrix of its own. Matrices of one shape are orthogonalised in one batch.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# Quintic coefficients of the published method: steep at zero, so that five steps bring singular values of any size
# into about [0.7, 1.2]; exact orthogonality buys nothing.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Replace the singular values of each matrix by values near 1.

    Parameters
    ----------
    matrices : Tensor
        ``[..., rows, columns]``, float.
    steps : int
        Newton-Schulz iterations.

    Returns
    -------
    Tensor
        Same shape and dtype.
    """
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay for ``[out, in]`` and ``[E, out, in]`` parameters.

    Parameters
    ----------
    params : iterable of Parameter
        Matrices, or stacks of matrices updated one by one.
    lr : float
        Step size; updates of tall matrices are scaled by ``sqrt(out / in)``, so that their effect does not depend on
        shape.
    momentum : float
        Decay of the gradient average.
    weight_decay : float
        Decoupled decay, multiplied by ``lr``.
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim not in (2, 3):
                    raise ValueError(f"Muon updates matrices or stacks of them, got shape {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient. ``closure`` is not supported."""
        if closure is not None:
            raise ValueError("Muon evaluates no closure")
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update = self._look_ahead(parameter, parameter.grad, group["momentum"])
                    by_shape[parameter.shape[-2:]].append((parameter, update))
            for shape, pairs in by_shape.items():
                updates = orthogonalize(torch.cat([update.reshape(-1, *shape) for _, update in pairs]))
                self._apply(pairs, updates, group)

    def _look_ahead(self, parameter: Tensor, gradient: Tensor, momentum: float) -> Tensor:
        """Fold the gradient into the running average and return the Nesterov look-ahead."""
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        average: Tensor = state["momentum"].lerp_(gradient, 1 - momentum)
        return torch.lerp(gradient, average, momentum)

    @staticmethod
    def _apply(pairs: list[tuple[Tensor, Tensor]], updates: Tensor, group: dict[str, Any]) -> None:
        """Add the orthogonalised updates of equally shaped matrices."""
        rows, columns = updates.shape[-2:]
        scale = group["lr"] * max(1.0, rows / columns) ** 0.5
        sizes = [update.numel() // (rows * columns) for _, update in pairs]
        for (parameter, _), update in zip(pairs, updates.split(sizes), strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.sub_(update.view_as(parameter), alpha=scale)
