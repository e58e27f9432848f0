"""The ways to quantize a model that a conversion tries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Method = Literal["round", "search"]


@dataclass(frozen=True, slots=True)
class Option:
    """How the weights are quantized, in blocks along the inputs of each projection.

    Attributes:
        bits: of the projections in the layers, 4 or 8.
        block_size: weights that share a scale.
        method: `round` takes the scale from the largest weight of a block, `search` the scale and
            zero point with the smallest error.
        edge_bits: of the embedding and the head.
        wide_layers: whether the projections that suffer most have 8 bits, as in llama.cpp's mixed
            types: those of the values and the MLP's last one, in the first and last eighth of the
            layers and in every third between.
    """

    bits: int
    block_size: int
    method: Method = "round"
    edge_bits: int = 8
    wide_layers: bool = False

    @property
    def name(self) -> str:
        """What the table calls it."""
        parts = [f"int{self.bits}", f"blocks of {self.block_size}"]
        if self.method == "search":
            parts.append("best scales")
        if self.edge_bits != self.bits:
            parts.append(f"int{self.edge_bits} embedding and head")
        if self.wide_layers:
            parts.append("some layers int8")
        return ", ".join(parts)


INT4: Final = (
    Option(4, 32, edge_bits=4),
    Option(4, 32, "search"),
    Option(4, 16, "search"),
    Option(4, 16, "search", wide_layers=True),
)
"""From the smallest to the largest; the first is what onnxruntime-genai's builder does."""
INT8: Final = (Option(8, 32),)
