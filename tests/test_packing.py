# SPDX-License-Identifier: Apache-2.0
"""ffn_ops/packing.py: int4 bytes, 64-bit deq_scale, GLU halves."""

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ffn_ops.packing import pack_deq_scale, pack_int4, swap_glu_halves, unpack_deq_scale, unpack_int4


def test_the_first_int4_is_the_low_nibble_and_int32_holds_the_same_bytes():
    values = torch.tensor([[1, -1, 7, -8, 0, 2, -3, 5]], dtype=torch.int8)
    packed = pack_int4(values)
    assert packed.tolist() == [[0xF1, 0x87, 0x20, 0x5D]]
    words = pack_int4(values, torch.int32)
    assert words.tolist() == [[0x5D2087F1]]
    assert torch.equal(words.view(torch.uint8), packed)


@given(st.data(), st.sampled_from([torch.uint8, torch.int32]))
def test_int4_survives_the_round_trip(data, dtype):
    shape = (*data.draw(st.lists(st.integers(0, 3), max_size=3)), 8 * data.draw(st.integers(0, 3)))
    values = torch.randint(-8, 8, shape, dtype=torch.int8)
    assert torch.equal(unpack_int4(pack_int4(values, dtype)), values)


def test_int4_of_transposed_tensors():
    values = torch.arange(-8, 8, dtype=torch.int8).reshape(8, 2).t()
    packed = pack_int4(values, torch.int32)
    assert torch.equal(unpack_int4(packed), values)
    assert torch.equal(
        unpack_int4(packed.expand(3, 2, 1).transpose(0, 1)), values.expand(3, 2, 8).transpose(0, 1)
    )


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: pack_int4(torch.zeros(2, 3, dtype=torch.int8)), "divisible by 2"),
        (lambda: pack_int4(torch.zeros(2, 4, dtype=torch.int8), torch.int32), "divisible by 8"),
        (lambda: pack_int4(torch.tensor(1, dtype=torch.int8)), "has shape ()"),
        (lambda: pack_int4(torch.tensor([0, 8], dtype=torch.int8)), "spans [0, 8], but int4 holds [-8, 7]"),
        (lambda: pack_int4(torch.tensor([-9, 0], dtype=torch.int8)), "spans [-9, 0], but int4 holds [-8, 7]"),
        (lambda: pack_int4(torch.zeros(2)), "values is torch.float32"),
        (lambda: pack_int4(torch.zeros(2, dtype=torch.int8), torch.int8), "dtype is torch.int8"),
        (lambda: unpack_int4(torch.zeros(2, dtype=torch.int8)), "packed is torch.int8"),
        (lambda: pack_deq_scale(torch.zeros(2, dtype=torch.float64)), "scale is torch.float64"),
        (lambda: unpack_deq_scale(torch.zeros(2)), "packed is torch.float32"),
        (lambda: swap_glu_halves(torch.zeros(2, 3)), "has size 3 along dimension -1"),
    ],
)
def test_what_cannot_be_packed_is_refused(call, sentence):
    with pytest.raises(ValueError) as error:
        call()
    assert sentence in str(error.value)


@given(st.floats(width=32, allow_nan=False))
def test_a_packed_deq_scale_keeps_19_bits_of_the_pattern(value):
    packed = pack_deq_scale(torch.tensor([value]))
    (pattern,) = struct.unpack("<I", struct.pack("<f", value))
    assert packed.dtype == torch.int64
    assert packed.item() == (pattern & 0xFFFFE000) + (1 << 46)
    (kept,) = struct.unpack("<f", struct.pack("<I", pattern & 0xFFFFE000))
    assert unpack_deq_scale(packed).item() == kept
    assert unpack_deq_scale(packed.view(torch.uint64)).item() == kept


def test_the_other_bits_of_a_deq_scale_do_not_count():
    packed = pack_deq_scale(torch.tensor([-0.37]))
    assert torch.equal(unpack_deq_scale(packed | 0x7FFFFF00001FFF), unpack_deq_scale(packed))


def test_swapping_glu_halves_twice_changes_nothing():
    weight = torch.arange(12).reshape(2, 6)
    assert swap_glu_halves(weight).tolist() == [[3, 4, 5, 0, 1, 2], [9, 10, 11, 6, 7, 8]]
    assert swap_glu_halves(weight, dim=0).tolist() == [weight[1].tolist(), weight[0].tolist()]
    assert torch.equal(swap_glu_halves(swap_glu_halves(weight)), weight)


def test_packed_int4_halves_swap_as_the_values_do():
    values = torch.randint(-8, 8, (3, 8), dtype=torch.int8)
    assert torch.equal(unpack_int4(swap_glu_halves(pack_int4(values))), swap_glu_halves(values))
