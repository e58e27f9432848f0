"""Quantization of a matrix in blocks."""

from __future__ import annotations

import numpy as np
import pytest

from llm_sidecar.models.conversion.blocks import Floats, Quantized, quantize
from llm_sidecar.models.conversion.options import Method


def restored(quantized: Quantized, bits: int, columns: int) -> Floats:
    """The matrix that a runtime computes with."""
    codes, scales, zeros = quantized
    rows, blocks = scales.shape
    points = np.full((rows, blocks), 1 << (bits - 1)) if zeros is None else unpacked(zeros, bits)
    values = unpacked(codes, bits).reshape(rows, blocks, -1).astype(np.float32)
    matrix = (values - points[:, :blocks, None]) * scales[:, :, None]
    return np.asarray(matrix.reshape(rows, -1)[:, :columns], np.float32)


def unpacked(codes: np.ndarray, bits: int) -> np.ndarray:
    if bits == 8:
        return codes
    return np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1)


def test_the_first_weight_is_in_the_low_half_of_a_byte() -> None:
    matrix = np.array([[-8, 7, 0, 1]], np.float32)
    codes, scales, zeros = quantize(matrix, 4, 4, "round")
    assert codes.tolist() == [[[0xF0, 0x98]]]
    assert scales.tolist() == [[1.0]]
    assert zeros is None


def test_the_largest_weight_keeps_its_sign() -> None:
    codes, scales, _ = quantize(np.array([[8, -7, 0, 0]], np.float32), 4, 4, "round")
    assert scales.tolist() == [[-1.0]]
    assert codes.tolist() == [[[0xF0, 0x88]]]


def test_zero_points_are_packed_by_row() -> None:
    # Three blocks in a row: the last byte holds one zero point, and half of the range beside it.
    matrix = np.array([[0, 15, 0, -15, 5, -10], [0, 0, 0, 0, 0, 0]], np.float32)
    codes, scales, zeros = quantize(matrix, 4, 2, "search")
    assert zeros is not None
    assert zeros.tolist() == [[0xF0, 0x8A], [0x00, 0x80]]
    assert scales[0].tolist() == [1.0, 1.0, 1.0]
    assert restored(Quantized(codes, scales, zeros), 4, 6).tolist() == matrix.tolist()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("method", ["round", "search"])
@pytest.mark.parametrize("columns", [64, 72])
def test_the_error_is_at_most_half_a_step(bits: int, method: Method, columns: int) -> None:
    matrix = np.random.default_rng(0).uniform(-1, 1, (50, columns)).astype(np.float32)
    # A view of a transposed matrix, as the weights of the graph are.
    found = quantize(np.ascontiguousarray(matrix.T).T, bits, 32, method)
    assert found.codes.shape == (50, -(-columns // 32), 4 * bits)
    error = np.abs(restored(found, bits, columns) - matrix).max()
    assert error <= 2.0 / ((1 << bits) - 1)


def test_a_search_is_closer_than_rounding() -> None:
    matrix = np.random.default_rng(0).normal(size=(50, 64)).astype(np.float32)
    rounded, searched = (
        np.square(restored(quantize(matrix, 4, 32, method), 4, 64) - matrix).mean()
        for method in ("round", "search")
    )
    assert searched < 0.9 * rounded


def test_a_block_of_zeros_stays_zero() -> None:
    matrix = np.zeros((2, 32), np.float32)
    for method in ("round", "search"):
        found = restored(quantize(matrix, 4, 32, method), 4, 32)
        assert found.tolist() == matrix.tolist()
