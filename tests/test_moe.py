# SPDX-License-Identifier: Apache-2.0
"""torch.ops.ffn.moe against the reference on random legal calls, and what must hold whatever the numbers are.

As test_op.py for ffn.ffn. The kernels of every instruction set come in through native.py.
"""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native import BOUNDARY, KERNELS, each_isa, native_ffn
from strategies import Call, calls, to_numpy
from tolerance import assert_moe_close

import reference
from ffn_ops import _native
from ffn_ops.contract import MODES

pytestmark = pytest.mark.cpu_only
SEEDS = st.integers(0, 2**32 - 1)
moe = torch.ops.ffn.moe
each_mode = pytest.mark.parametrize("mode", [mode.name for mode in MODES])


def run(call: Call, arrays: dict[str, np.ndarray]) -> np.ndarray:
    return to_numpy(moe(**call.tensors(arrays), activation=call.activation, **call.options()))


def rows(array: np.ndarray) -> np.ndarray:
    return array.reshape(int(np.prod(array.shape[:-1])), array.shape[-1])


@each_mode
@settings(max_examples=60)
@given(data=st.data(), seed=SEEDS)
def test_a_legal_call_agrees_with_the_reference(mode: str, data: st.DataObject, seed: int):
    call = data.draw(calls(modes=(mode,), moe=True, layouts=True))
    arrays = call.arrays(seed)
    options = call.reference_options()
    y = run(call, arrays)
    kernel = KERNELS[_native.selected_isa()]
    assert_moe_close(y, kernel=kernel, **arrays, activation=call.activation, **options)
    if mode.startswith("w8a8") and call.activation.lower() == "relu":
        expected = reference.moe(**arrays, activation=call.activation, **options)
        assert np.array_equal(y, expected, equal_nan=True)


@each_mode
@each_isa
@settings(max_examples=15)
@given(data=st.data(), seed=SEEDS, threads=st.integers(1, 8))
def test_every_instruction_set_agrees(isa: str, mode: str, data: st.DataObject, seed: int, threads: int):
    call = data.draw(calls(modes=(mode,), moe=True, largest=80))
    arrays = call.arrays(seed)
    arrays["topk_ids"] = arrays["topk_ids"].astype(np.int64)
    arrays["topk_weights"] = arrays["topk_weights"].astype(np.float32)
    options: dict[str, Any] = {
        "activation": call.activation,
        "inner_precise": call.inner_precise,
        "activate_left": call.activate_left,
    }
    if "output_dtype" in call.specs:
        options["output_dtype"] = call.reference_options()["output_dtype"]
    y = native_ffn(**arrays, **options, isa=isa, threads=threads)
    assert_moe_close(y, kernel=KERNELS[isa], **arrays, **options)


@each_mode
@settings(max_examples=25)
@given(data=st.data(), seed=SEEDS)
def test_tokens_may_be_permuted_and_experts_relabelled(mode: str, data: st.DataObject, seed: int):
    call = data.draw(calls(modes=(mode,), moe=True))
    arrays = call.arrays(seed)
    y = rows(run(call, arrays))

    order = np.random.default_rng(seed).permutation(len(y))
    per_token = {name: rows(arrays[name])[order] for name in ("x", "topk_ids", "topk_weights")}
    assert run(call, {**arrays, **per_token}).tobytes() == y[order].tobytes()

    E = len(arrays["weight1"])
    labels = np.random.default_rng(seed).permutation(E)
    renamed = {
        name: array[labels] for name, array in arrays.items() if name not in ("x", "topk_ids", "topk_weights")
    }
    ids = arrays["topk_ids"]
    new_label = np.append(np.argsort(labels), [E, E + 1]).astype(ids.dtype)
    renamed |= {**arrays, **renamed, "topk_ids": new_label[ids]}
    assert run(call, renamed).tobytes() == y.tobytes()


@each_mode
@settings(max_examples=15)
@given(data=st.data(), seed=SEEDS)
def test_it_is_a_loop_over_tokens(mode: str, data: st.DataObject, seed: int):
    """Each token by itself, bit for bit; in some modes a token by itself may take another multiplication."""
    call = data.draw(calls(modes=(mode,), moe=True))
    arrays = call.arrays(seed)
    y = rows(run(call, arrays))
    for t in range(len(y)):
        one = {name: rows(arrays[name])[t : t + 1] for name in ("x", "topk_ids", "topk_weights")}
        alone = run(call, {**arrays, **one})
        if mode in BOUNDARY[_native.selected_isa()]:
            options = {"activation": call.activation, **call.reference_options()}
            assert_moe_close(alone, kernel=KERNELS[_native.selected_isa()], **{**arrays, **one}, **options)
        else:
            assert alone.tobytes() == y[t].tobytes()


@settings(max_examples=25)
@given(data=st.data(), seed=SEEDS)
def test_the_fake_kernel_gives_the_same_shape(data: st.DataObject, seed: int):
    call = data.draw(calls(moe=True))
    tensors = call.tensors(call.arrays(seed))
    y = moe(**tensors, activation=call.activation, **call.options())
    hollow = {name: tensor.to("meta") for name, tensor in tensors.items()}
    fake = moe(**hollow, activation=call.activation, **call.options())
    assert (fake.shape, fake.dtype, fake.is_contiguous()) == (y.shape, y.dtype, True)


def block(M: int = 6, E: int = 4, top_k: int = 2) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    x, weights = torch.randn(M, 8), torch.rand(M, top_k)
    ids = torch.randint(0, E, (M, top_k))
    return x, ids, weights, torch.randn(E, 8, 16), torch.randn(E, 16, 8)


@pytest.mark.parametrize("share", ["one expert", "every expert once", "none"])
def test_any_skew(share: str):
    x, ids, weights, w1, w2 = block(M=300)
    if share == "one expert":
        ids = torch.full_like(ids, 2)
    elif share == "none":
        ids = torch.full_like(ids, 4)
    else:
        ids, x, weights = torch.arange(4)[:, None], x[:4], weights[:4, :1]
    y = moe(x, ids, weights, w1, w2, "gelu")
    assert_moe_close(*(t.numpy() for t in (y, x, ids, weights, w1, w2)), "gelu")
    assert share != "none" or not y.any()


def test_many_chunks_give_the_bits_of_one():
    """Two tokens' results do not fit the buffer of 256 MiB together."""
    top_k, H = 2**12, 2**14
    x = torch.randn(2, H).bfloat16()
    w1, w2 = torch.randn(3, H, 2).bfloat16(), torch.randn(3, 2, H).bfloat16()
    ids, weights = torch.randint(0, 4, (2, top_k)), torch.rand(2, top_k)
    y = moe(x, ids, weights, w1, w2, "relu")
    ones = [moe(x[t : t + 1], ids[t : t + 1], weights[t : t + 1], w1, w2, "relu") for t in (0, 1)]
    assert torch.equal(y, torch.cat(ones))


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_threads_change_no_bit(threads: int):
    x, ids, weights, w1, w2 = block(M=200)
    before = torch.get_num_threads()
    y = moe(x, ids, weights, w1, w2, "silu")
    try:
        torch.set_num_threads(threads)
        assert torch.equal(moe(x, ids, weights, w1, w2, "silu"), y)
    finally:
        torch.set_num_threads(before)


@each_mode
@settings(max_examples=3)
@given(data=st.data(), seed=SEEDS)
def test_opcheck(mode: str, data: st.DataObject, seed: int):
    call = data.draw(calls(modes=(mode,), moe=True))
    torch.library.opcheck(
        moe.default, (), {**call.tensors(call.arrays(seed)), "activation": call.activation, **call.options()}
    )


def test_it_compiles_in_one_graph():
    x, ids, weights, w1, w2 = block()
    compiled = torch.compile(lambda *call: moe(*call, w1, w2, "gelu") + 1, fullgraph=True)
    for M in (6, 3, 5):
        call = x[:M], ids[:M], weights[:M]
        assert torch.equal(compiled(*call), moe(*call, w1, w2, "gelu") + 1)


BAD = {
    "topk_ids holds -1, but experts are numbered from 0": {"topk_ids": torch.full((6, 2), -1)},
    "topk_ids is float32, but": {"topk_ids": torch.zeros(6, 2)},
    "topk_ids has shape [5, 2], but it must be [..., top_k] = [6, 2]": {"topk_ids": torch.zeros(5, 2).long()},
    "topk_weights has shape [6, 3], but": {"topk_weights": torch.zeros(6, 3)},
    "weight1 has shape [8, 16], but it must be [E, K1, N1]": {"weight1": torch.zeros(8, 16)},
    "weight2 has shape [3, 16, 8], but it must be [E, K2, N2] = [4, 16, 8]": {
        "weight2": torch.zeros(3, 16, 8)
    },
    "topk_weights is on meta and x on cpu, but": {"topk_weights": torch.zeros(6, 2, device="meta")},
}


@pytest.mark.parametrize("sentence", BAD)
def test_bad_input_is_named(sentence: str):
    names = ("x", "topk_ids", "topk_weights", "weight1", "weight2")
    arguments = dict(zip(names, block(), strict=True)) | BAD[sentence]
    with pytest.raises(RuntimeError) as refused:
        moe(**arguments, activation="gelu")
    assert str(refused.value).startswith(sentence)


def test_no_tokens_no_experts_and_no_slots():
    x, ids, weights, w1, w2 = block()
    assert moe(x[:0], ids[:0], weights[:0], w1, w2, "gelu").shape == (0, 8)
    assert not moe(x, ids, weights, w1[:0], w2[:0], "gelu").any()
    assert not moe(x, ids[:, :0], weights[:, :0], w1, w2, "gelu").any()
