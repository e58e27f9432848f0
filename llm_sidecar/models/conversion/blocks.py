"""Quantization of a matrix in blocks, in the layout of onnxruntime's MatMulNBits.

A block of B weights in a row shares a scale and a zero point:

    weight = (code - zero point) * scale

https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from llm_sidecar.models.conversion.options import Method

Apply = Callable[[Callable[[int], None], Iterable[int]], Iterable[None]]
Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]

_SLICE: Final = 1 << 15
"""Weights that are quantized at a time, so that the intermediate arrays fit into a cache."""
_ROWS: Final = 16
"""Minimum number of rows that are quantized at a time: columns of a transposed matrix lie apart."""
_SHRINKS: Final = (0.0, 0.03, 0.06, 0.1, 0.14)
"""Parts by which `search` narrows the range of a block: its outliers are clipped."""
_TINY: Final = np.float32(1e-30)


class Quantized(NamedTuple):
    """A quantized matrix.

    Attributes:
        codes: (rows, blocks, bytes of a block), two codes a byte at 4 bits, the first in its low
            half.
        scales: (rows, blocks).
        zeros: zero points, packed as the codes are, (rows, bytes); None if all are 8 or 128.
    """

    codes: Codes
    scales: Floats
    zeros: Codes | None


def quantize(
    matrix: Floats, bits: int, block_size: int, method: Method, apply: Apply = map
) -> Quantized:
    """Quantizes each row of a matrix, (rows, columns); the last block is filled with zeros.

    Args:
        apply: `map`, or that of an executor, which shares the rows between its threads.
    """
    rows, columns = matrix.shape
    blocks = -(-columns // block_size)
    codes = np.empty((rows, blocks, block_size * bits // 8), np.uint8)
    scales = np.empty((rows, blocks), np.float32)
    zeros = np.empty((rows, -(-blocks * bits // 8)), np.uint8)
    quantize_blocks = _search if method == "search" else _round
    step = max(_ROWS, _SLICE // columns)

    def quantize_rows(start: int) -> None:
        part = slice(start, start + step)
        # The matrix may be the view of a transposed one.
        values = np.pad(matrix[part], ((0, 0), (0, blocks * block_size - columns)))
        found = quantize_blocks(values.reshape(-1, block_size), bits)
        codes[part] = _packed(found[0], bits).reshape(-1, *codes.shape[1:])
        scales[part] = found[1].reshape(-1, blocks)
        zeros[part] = _packed(found[2].reshape(-1, blocks), bits)

    for _ in apply(quantize_rows, range(0, rows, step)):
        pass
    return Quantized(codes, scales, None if method == "round" else zeros)


def _round(blocks: Floats, bits: int) -> tuple[Codes, Floats, Codes]:
    """The scale maps the largest weight to the end of the range, on the side that has one more."""
    half = 1 << (bits - 1)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)[:, 0]
    scales = largest / np.float32(-half)
    inverse = np.divide(1.0, scales, out=np.zeros_like(scales), where=scales != 0)
    codes = np.clip(np.rint(blocks * inverse[:, None]) + half, 0, 2 * half - 1)
    return codes.astype(np.uint8), scales, np.full(len(blocks), half, np.uint8)


def _search(blocks: Floats, bits: int) -> tuple[Codes, Floats, Codes]:
    """The best of several ranges and zero points, each with its least-squares scale.

    Large weights count more, as in llama.cpp's `make_qkx2_quants`.
    """
    top = np.float32((1 << bits) - 1)
    importance = np.abs(blocks) + np.sqrt(np.square(blocks).mean(axis=1, keepdims=True))
    low = np.minimum(blocks.min(axis=1, keepdims=True), 0.0)
    high = np.maximum(blocks.max(axis=1, keepdims=True), 0.0)
    least = np.full(len(blocks), np.inf, np.float32)
    best_codes = np.zeros(blocks.shape, np.uint8)
    best_scales = np.zeros(len(blocks), np.float32)
    best_zeros = np.zeros(len(blocks), np.uint8)
    for shrink in _SHRINKS:
        scales = np.maximum((high - low) * np.float32((1.0 - shrink) / top), _TINY)
        scaled, exact = blocks / scales, -low / scales
        for zeros in (np.floor(exact), np.ceil(exact)):
            zeros = np.clip(zeros, 0.0, top)
            codes = np.clip(np.rint(scaled + zeros), 0.0, top)
            centred = codes - zeros
            weighted = importance * centred
            fitted = (weighted * blocks).sum(axis=1) / np.maximum(
                (weighted * centred).sum(axis=1), _TINY
            )
            error = (importance * np.square(centred * fitted[:, None] - blocks)).sum(axis=1)
            better = error < least
            least[better] = error[better]
            best_codes[better] = codes[better]
            best_scales[better] = fitted[better]
            best_zeros[better] = zeros[better, 0]
    return best_codes, best_scales, best_zeros


def _packed(codes: Codes, bits: int) -> Codes:
    """At 4 bits, two codes a byte along the last axis; an 8 fills the last byte."""
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = np.pad(codes, ((0, 0), (0, 1)), constant_values=8)
    return np.bitwise_or(codes[..., ::2], np.left_shift(codes[..., 1::2], 4), dtype=np.uint8)
