"""Muon in the type that the processor multiplies fastest, its work divided among the processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

import torch
import torch.distributed

from training.demo_models import process_group
from training.demo_models.forward import fast_dtype

_COEFFICIENTS: Final = (3.4445, -4.7750, 2.0315)
_STEPS: Final = 5


class Muon(torch.optim.Optimizer):
    """SGD with momentum whose updates are orthogonalised, for matrices (Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon/).

    `torch.optim.Muon` takes the same steps. But it always computes in bfloat16, thirty times as
    slow as float32 on a processor without bfloat16, and does all the work in every process.

    Args:
        matrices: parameters with the same gradients in all processes of the group, if there is one.
        lr: learning rate.
        weight_decay: decoupled.
        momentum: Nesterov's.
    """

    def __init__(
        self,
        matrices: Iterable[torch.nn.Parameter],
        lr: float,
        *,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
    ) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Takes one step; `closure` is ignored."""
        for group in self.param_groups:
            matrices = [matrix for matrix in group["params"] if matrix.grad is not None]
            for matrix, update in zip(matrices, self._updates(matrices, group), strict=True):
                rows, columns = matrix.shape
                matrix.mul_(1.0 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)

    def _updates(
        self, matrices: list[torch.Tensor], group: dict[str, Any]
    ) -> Iterable[torch.Tensor]:
        """The updates of all matrices; each of n processes computes every n-th of them."""
        rank, size = process_group.rank(), process_group.world_size()
        updates = []
        for index, matrix in enumerate(matrices):
            if index % size != rank:
                updates.append(torch.zeros_like(matrix, dtype=fast_dtype()))
                continue
            assert matrix.grad is not None
            buffer = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
            buffer.lerp_(matrix.grad, 1.0 - group["momentum"])
            updates.append(orthogonal(matrix.grad.lerp(buffer, group["momentum"])))
        if size == 1:
            return updates
        flat = torch.cat([update.flatten() for update in updates])
        torch.distributed.all_reduce(flat)
        pieces = torch.split(flat, [matrix.numel() for matrix in matrices])
        return [part.view_as(matrix) for part, matrix in zip(pieces, matrices, strict=True)]


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Approximates U V^T of the singular value decomposition by Newton-Schulz iterations; the
    result is in `fast_dtype`."""
    wide = matrix.shape[0] <= matrix.shape[1]
    # Products with a transposed view take a third more time.
    found = (matrix if wide else matrix.T).to(fast_dtype()).contiguous()
    found = found / found.norm().clamp(min=1e-7)
    first, second, third = _COEFFICIENTS
    for _ in range(_STEPS):
        gram = found @ found.T
        gram = torch.addmm(gram, gram, gram, beta=second, alpha=third)
        found = torch.addmm(found, gram, found, beta=first)
    return found if wide else found.T
