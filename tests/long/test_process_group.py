"""The process group: two processes draw batches and take steps in lockstep."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import torch

from llm_sidecar.models.files import DEMO_DIR
from training.demo_models import process_group, proposal_lessons
from training.demo_models.batches import batches
from training.demo_models.lessons import Lesson
from training.demo_models.muon import Muon
from training.demo_models.recipe import Member, join_group
from training.demo_models.schedule import Schedule

_SHAPES = ((24, 40), (40, 24), (16, 16))


def _gradients(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in _SHAPES]


def _steps(gradients: list[torch.Tensor]) -> torch.nn.Module:
    """A module of zeros after two steps of Muon along the gradients, shared with all processes."""
    model = torch.nn.ParameterList([torch.zeros(shape) for shape in _SHAPES])
    optimizer = Muon(model.parameters(), 0.02)
    for _ in range(2):
        for matrix, gradient in zip(model, gradients, strict=True):
            matrix.grad = gradient.clone()
        assert process_group.average_gradients(model, 1000 + process_group.rank()) == (
            2001 if process_group.world_size() == 2 else 1000
        )
        optimizer.step()
    return model


def _member(rank: int, rendezvous: Path, folder: Path) -> None:
    from transformers import AutoTokenizer

    join_group(1, Member(rank, 2, rendezvous))
    drawn: list[str] = []
    draw_lesson = proposal_lessons.curriculum(10 + rank)

    def source(progress: float) -> Lesson:
        drawn.append("lesson")
        return draw_lesson(progress)

    tokenizer = AutoTokenizer.from_pretrained(DEMO_DIR / "phi3")
    # Each process has its own lessons, and all draw pools at the same steps.
    schedule = Schedule(tokens=1_000_000, batch_tokens=256)
    widths, steps_with_drawing = [], []
    for step, batch in enumerate(batches(tokenizer, source, schedule, []), 1):
        widths.append(batch.ids.shape[1])
        if drawn:
            steps_with_drawing.append(step)
            drawn.clear()
        if step == 80:
            break
    torch.save(
        {
            "least": process_group.all_reduce_min(7 + rank),
            "weights": [weight.data for weight in _steps(_gradients(rank)).parameters()],
            "drawing": steps_with_drawing,
            "widths": widths,
        },
        folder / f"{rank}.pt",
    )


def test_processes_take_the_same_steps_along_the_mean_gradient_and_draw_pools_at_the_same_steps(
    tmp_path: Path,
) -> None:
    spawn = multiprocessing.get_context("spawn")
    members = [
        spawn.Process(target=_member, args=(rank, tmp_path / "rendezvous", tmp_path), daemon=True)
        for rank in range(2)
    ]
    for member in members:
        member.start()
    for member in members:
        member.join(timeout=120)
        assert member.exitcode == 0
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))

    assert first["least"] == second["least"] == 7
    mean = [(a + b) / 2 for a, b in zip(_gradients(0), _gradients(1), strict=True)]
    alone = [weight.data for weight in _steps(mean).parameters()]
    for one, other, right in zip(first["weights"], second["weights"], alone, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, right, atol=2e-3, rtol=0)

    assert first["drawing"] == second["drawing"]
    assert len(first["drawing"]) > 1
    assert first["widths"] != second["widths"]
    apart = [abs(a - b) for a, b in zip(first["widths"], second["widths"], strict=True)]
    shifted = [abs(a - b) for a, b in zip(first["widths"], second["widths"][1:], strict=False)]
    assert sum(apart) < sum(shifted) / 2
