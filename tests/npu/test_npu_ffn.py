# SPDX-License-Identifier: Apache-2.0
"""torch_npu.npu_ffn, which calls aclnnFFNV2, against torch.ops.ffn.ffn, which calls V3, on the same tensors.

Wherever V2 can do a call the two agree bit for bit, and ffn_ops.npu_ffn with them: only the import changes.
Numbers against the reference are test_op.py's affair.
"""

from typing import Any

import pytest
import torch
import torch_npu
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Call, calls, to_numpy

import ffn_ops
from ffn_ops.contract import MODES

op = torch.ops.ffn.ffn
# torch_npu has no int4 weights (contract section h).
V2_MODES = [mode.name for mode in MODES if "fused" in mode.routes.split() and mode.weight != "int4"]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and to_numpy(a).tobytes() == to_numpy(b).tobytes()


def as_npu_ffn(call: Call, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The call's arguments in npu_ffn's terms: host lists of tokens, and no inner_precise of its own."""
    arguments: dict[str, Any] = {name: t for name, t in tensors.items() if name != "expert_tokens"}
    if "expert_tokens" in tensors:
        name = "expert_tokens_index" if call.tokens_index_flag else "expert_tokens"
        arguments[name] = tensors["expert_tokens"].tolist()
    options = call.options()
    return arguments | {
        "activation": call.activation,
        "inner_precise": call.plan().inner_precise,
        "output_dtype": options["output_dtype"],
    }


@pytest.mark.parametrize("mode", V2_MODES)
@settings(max_examples=40)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_v2_and_v3_agree_bit_for_bit(mode: str, data: st.DataObject, seed: int):
    call = data.draw(calls(modes=(mode,), layouts=True))
    tensors = call.tensors(call.arrays(seed))
    for name in ("deq_scale1", "deq_scale2"):  # torch_npu takes the 64 bits as int64
        if name in tensors and tensors[name].dtype == torch.uint64:
            tensors[name] = tensors[name].view(torch.int64)
    y = op(**tensors, activation=call.activation, **call.options())
    arguments = as_npu_ffn(call, tensors)
    assert same_bits(ffn_ops.npu_ffn(**arguments), y)
    assert same_bits(torch_npu.npu_ffn(**arguments), y)


def test_256_experts_most_of_them_empty():
    generator = torch.Generator().manual_seed(3)
    E, K, N = 256, 16, 24
    tokens = torch.zeros(E, dtype=torch.int64)
    tokens[torch.randperm(E, generator=generator)[:30]] = torch.randint(1, 4, (30,), generator=generator)
    x = torch.randn(int(tokens.sum()), K, generator=generator).half()
    w1 = torch.randn(E, K, N, generator=generator).half() / 4
    w2 = torch.randn(E, N, K, generator=generator).half() / 5
    w1[tokens == 0] = torch.nan  # an empty expert's weights are not read
    expected = op(x, w1, w2, "relu", tokens).float()
    x, w1, w2 = x.npu(), w1.npu(), w2.npu()
    y = op(x, w1, w2, "relu", tokens.npu())
    torch.testing.assert_close(y.cpu().float(), expected, rtol=2**-9, atol=2**-9)
    assert same_bits(torch_npu.npu_ffn(x, w1, w2, "relu", expert_tokens=tokens.tolist()), y)
    with pytest.raises(ffn_ops.ContractError, match="there are E = 257 experts"):
        counts = [len(x)] + [0] * 256
        ffn_ops.ffn(x, w1[:1].expand(257, -1, -1), w2[:1].expand(257, -1, -1), "relu", counts)


def test_the_second_device_computes_where_its_tensors_are():
    x, w1, w2 = (torch.randn(*shape).half() for shape in ((6, 8), (8, 16), (16, 8)))
    first, second = (op(x.to(d), w1.to(d), w2.to(d), "gelu") for d in ("npu:0", "npu:1"))
    assert (second.device, torch.npu.current_device()) == (torch.device("npu:1"), 0)
    assert same_bits(first, second)


@pytest.mark.parametrize("counts", [[4, 3], [4, 5], [9, -1]])
def test_a_list_of_tokens_is_checked_on_the_host(counts: list[int]):
    x, w1, w2 = (torch.ones(*shape, dtype=torch.half).npu() for shape in ((8, 4), (2, 4, 6), (2, 6, 4)))
    for call in (ffn_ops.ffn, ffn_ops.npu_ffn):
        with pytest.raises(ffn_ops.ContractError, match="expert_tokens"):
            call(x, w1, w2, "relu", expert_tokens=counts)


def test_explain_answers_for_the_device_of_x():
    x, w1, w2 = (torch.ones(*shape).npu() for shape in ((8, 4), (4, 6), (6, 4)))
    assert ffn_ops.explain(x, w1, w2, "relu").target == "ascend910b"
