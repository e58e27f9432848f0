"""The optimiser, compared with that of torch."""

from __future__ import annotations

import torch

from training.demo_models.muon import Muon, orthogonal


def test_muons_steps_are_orthogonal() -> None:
    for shape in ((48, 96), (96, 48), (64, 64)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        values = torch.linalg.svdvals(orthogonal(matrix).float())
        assert values.min() > 0.3
        assert values.max() < 1.4


def test_muon_takes_the_steps_of_torchs_own() -> None:
    matrices = [
        torch.nn.Parameter(torch.randn(24, 40, generator=torch.Generator().manual_seed(1)))
        for _ in range(2)
    ]
    optimizers = (
        Muon(matrices[:1], 0.02),
        torch.optim.Muon(matrices[1:], 0.02, weight_decay=0.01, momentum=0.95),
    )
    for step in range(3):
        for matrix, optimizer in zip(matrices, optimizers, strict=True):
            matrix.grad = torch.randn(24, 40, generator=torch.Generator().manual_seed(step))
            optimizer.step()
    torch.testing.assert_close(matrices[0], matrices[1], atol=2e-3, rtol=0)
