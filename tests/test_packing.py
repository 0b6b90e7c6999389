# SPDX-License-Identifier: Apache-2.0
"""ffn_ops/packing.py: int4 bytes, 64-bit deq_scale, GLU halves, and weights prepacked for the CPU.

What the kernels make of packed weights is in test_kernels.py and test_op.py.
"""

import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ffn_ops
from ffn_ops import _native
from ffn_ops.packing import (
    pack_deq_scale,
    pack_int4,
    packed_spec,
    prepack,
    swap_glu_halves,
    unpack,
    unpack_deq_scale,
    unpack_int4,
)


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


def any_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Every bit pattern may come, NaN of all kinds included."""
    generator = torch.Generator().manual_seed(seed)
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]
    low, high = torch.iinfo(integers).min, torch.iinfo(integers).max
    return torch.randint(low, high + 1, shape, generator=generator, dtype=integers).view(dtype)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.dtype.itemsize]
    return a.dtype == b.dtype and torch.equal(a.view(integers), b.view(integers))


PLAIN = (torch.float32, torch.float16, torch.bfloat16, torch.int8)


@given(
    dtype=st.sampled_from((*PLAIN, torch.uint8, torch.int32)),
    E=st.none() | st.integers(1, 3),
    K=st.integers(0, 150),
    N=st.integers(0, 70),
    layout=st.sampled_from(("dense", "transposed", "sliced")),
    seed=st.integers(0, 2**32),
)
def test_unpack_gives_back_what_was_packed(dtype, E, K, N, layout, seed):
    weight = any_bits((K, N) if E is None else (E, K, N), dtype, seed)
    if layout == "transposed":
        weight = weight.mT.contiguous().mT
    elif layout == "sliced":
        weight = torch.stack((weight, weight), -1)[..., 0]
    packed = prepack(weight)
    int4 = unpack_int4(weight) if dtype in (torch.uint8, torch.int32) else None
    expected = weight if int4 is None else pack_int4(int4)
    assert same(unpack(packed), expected)
    per_item = {torch.uint8: 2, torch.int32: 8}.get(dtype, 1)
    name = "int4" if per_item > 1 else str(dtype).removeprefix("torch.")
    assert packed_spec(packed) == (name, (*weight.shape[:-1], N * per_item))
    if E is not None:
        assert same(prepack([weight[e] for e in range(E)]), packed)


@pytest.mark.parametrize("isa", [name for name, supported in _native.isas() if supported])
@pytest.mark.parametrize(
    ("dtype", "names"),
    [
        (np.float32, ["float32"]),
        (np.uint16, ["float16", "bfloat16"]),
        (np.int8, ["int8"]),
        (np.uint8, ["int4"]),
    ],
)
@pytest.mark.parametrize("shape", [(67, 45), (2, 130, 33), (64, 64)])
def test_every_instruction_set_packs_the_same_bytes(isa, dtype, names, shape):
    size = np.dtype(dtype).itemsize
    bits = np.random.default_rng(1).integers(0, 256, (*shape[:-1], shape[-1] * size), dtype=np.uint8)
    array = bits.view(dtype)
    for name in names:
        packed = _native.prepack((array, name), isa)
        torch_dtype = torch.uint8 if name == "int4" else getattr(torch, name)
        assert packed == prepack(torch.from_numpy(bits).view(torch_dtype)).numpy().tobytes()
        if name != "int4":  # which has no transposed layout
            transposed = array.swapaxes(-1, -2).copy().swapaxes(-1, -2)
            assert _native.prepack((transposed, name), isa) == packed


def test_a_packed_weight_is_an_ordinary_tensor(tmp_path):
    torch.manual_seed(0)
    x, w1, w2 = torch.randn(3, 64), torch.randn(64, 96), torch.randn(96, 64)
    y = torch.ops.ffn.ffn(x, w1, w2, "relu")
    torch.save([prepack(w1), prepack(w2)], tmp_path / "packed.pt")
    odd = torch.empty(prepack(w1).numel() + 1, dtype=torch.uint8)[1:]  # no alignment at all
    odd.copy_(prepack(w1))
    for p1, p2 in (
        torch.load(tmp_path / "packed.pt", weights_only=True),
        torch.load(tmp_path / "packed.pt", weights_only=True, mmap=True),
        [prepack(w1).clone().share_memory_(), prepack(w2).clone()],
        [odd, prepack(w2)],
    ):
        assert torch.equal(torch.ops.ffn.ffn(x, p1, p2, "relu"), y)
        assert torch.equal(torch.ops.ffn.ffn(x, p1, w2, "relu"), y)  # one of both is enough


def test_packed_weights_are_checked_as_what_they_were_packed_from():
    x, w1, w2 = torch.randn(3, 64), torch.randn(64, 96), torch.randn(96, 64)
    with pytest.raises(ValueError, match=r"x has shape \[3, 32\], but it must be \[..., K1\] = \[3, 64\]"):
        ffn_ops.ffn(x[:, :32].contiguous(), prepack(w1), prepack(w2), "relu")
    explanation = ffn_ops.explain(x, prepack(w1), prepack(w2.bfloat16()), "relu")
    assert not explanation.ok and "bfloat16" in explanation.violations[0].text
    assert ffn_ops.explain(x, prepack(w1), prepack(w2), "relu").mode == "float32"


def changed(block: torch.Tensor, at: int, value: int) -> torch.Tensor:
    block = block.clone()
    block[at] = value
    return block


def resized(tensor: torch.Tensor, size: int) -> torch.Tensor:
    tensor.untyped_storage().resize_(size)
    return tensor


def test_nothing_is_packed_from_or_into_memory_that_is_not_there():
    with pytest.raises(ValueError, match="weight reaches to byte 16384, but its storage holds 8"):
        prepack(resized(torch.randn(64, 64), 8))
    block = resized(prepack(torch.randn(2, 64, 64)), 64)
    with pytest.raises(RuntimeError, match="block reaches to byte"):
        torch.ops.ffn.pack_expert(block, torch.randn(64, 64), 1)


def test_a_header_with_half_a_byte_in_a_row_is_refused():
    block = prepack(pack_int4(torch.randint(-8, 8, (40, 64), dtype=torch.int8)))
    (at,) = (i for i in range(0, 64, 8) if block[i : i + 8].view(torch.int64).item() == 64)  # N
    with pytest.raises(ValueError, match="its header promises -1"):
        unpack(changed(block, at, 63))


def test_halves_of_a_packed_weight_are_not_swapped():
    with pytest.raises(ffn_ops.ContractError, match="tensor is a row of uint8, as prepacked weights are"):
        swap_glu_halves(prepack(torch.randn(8, 6)))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda p: p[:-1], "its header promises"),
        (lambda p: p[:40], "does not begin as a prepacked weight"),
        (lambda p: p[:0], "does not begin as a prepacked weight"),
        (lambda p: changed(p, 0, 0), "does not begin as a prepacked weight"),
        (lambda p: changed(p, 8, 99), "of version 99, but this ffn_ops reads version 2"),
        (lambda p: changed(p, 12, 7), "of version 2"),
        (lambda p: changed(p, 30, 255), "its header promises"),
        (lambda p: resized(p, 64), "reaches to byte"),
        (lambda p: torch.stack((p, p), 1)[:, 0], "with gaps, but a prepacked weight is dense"),
    ],
)
def test_a_damaged_packed_weight_is_refused(damage, sentence):
    x, w1, w2 = torch.randn(3, 64), torch.randn(64, 96), torch.randn(96, 64)
    packed = damage(prepack(w1))
    for call in (
        lambda: ffn_ops.ffn(x, packed, w2, "relu"),
        lambda: torch.ops.ffn.ffn(x, packed, w2, "relu"),
        lambda: unpack(packed),
    ):
        with pytest.raises((ValueError, RuntimeError)) as error:
            call()
        assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("weight", "sentence"),
    [
        (torch.zeros(3), "weight has shape (3,), but it must be [K, N] or [E, K, N]"),
        (torch.zeros(0, 3, 4), "with an expert or more"),
        ([], "with an expert or more"),
        (torch.zeros(3, 4, dtype=torch.float64), "weight has a dtype that no mode has"),
        (torch.zeros(3, 4, device="meta"), "weight is on meta, but only the CPU"),
        ([torch.zeros(4)], "weight of an expert is of rank 1, but it must be [K, N]"),
        ([torch.zeros(3, 4), torch.zeros(3, 5)], "weight of expert 1 differs from the first one"),
        ([torch.zeros(3, 4), torch.zeros(3, 4).half()], "weight of expert 1 differs from the first one"),
    ],
)
def test_what_cannot_be_prepacked_is_refused(weight, sentence):
    with pytest.raises(ValueError) as error:
        prepack(weight)
    assert sentence in str(error.value)
