"""Rounding to int4, compared with the shipped weights."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch

from llm_sidecar.models.files import DEMO_DIR
from training.demo_models.autograd_functions import int4_rounded


def test_weights_are_rounded_as_the_runtime_rounds_them() -> None:
    model = ir.load(DEMO_DIR / "phi3" / "model.onnx")
    names = [name[:-3] for name in model.graph.initializers if name.endswith("_Q4")]
    assert len(names) > 10
    for name in names:
        packed, steps = (
            np.asarray(model.graph.initializers[name + end].const_value)
            for end in ("_Q4", "_scales")
        )
        whole = np.stack([packed & 15, packed >> 4], -1).reshape(*steps.shape, 32) - 8.0
        held = torch.tensor(whole * steps[..., None], dtype=torch.float32).flatten(1)
        # The extreme value of each block stays, because it defines the scale.
        torch.testing.assert_close(int4_rounded(held), held, atol=1e-6, rtol=0)
        apart = torch.rand(held.shape, generator=torch.Generator().manual_seed(1)) - 0.5
        near = held + 0.4 * apart * torch.tensor(steps).abs().repeat_interleave(32, 1)
        extreme = torch.tensor(whole).flatten(1) == -8
        assert extreme.any()
        torch.testing.assert_close(
            int4_rounded(torch.where(extreme, held, near)), held, atol=1e-6, rtol=0
        )
