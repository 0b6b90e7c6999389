# SPDX-License-Identifier: Apache-2.0
"""Gradients of ffn.ffn, ffn.moe and the grouped products on emulated NPU tensors, and the grouped products
themselves: as test_gradients.py has it for the CPU, and held to the same bounds.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gradients import (
    GOOD,
    GOOD_OUTER,
    OF_OUTER,
    SENTENCES,
    assert_as_good_as_torch,
    block,
    each_activation,
    ids_of,
    plain_ffn,
    plain_grouped_mm,
    plain_grouped_outer,
    plain_moe,
    second_derivatives,
)
from torch import Tensor

from ffn_ops import emulator

each_dtype = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
op, moe = torch.ops.ffn.ffn, torch.ops.ffn.moe
grouped_mm, grouped_outer = torch.ops.ffn.grouped_mm, torch.ops.ffn.grouped_outer


def on_npu(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The call with its tensors on the NPU and its result here; gradients come back the same way."""

    def there(**tensors: Tensor | None) -> Tensor:
        return call(
            **{name: tensor if tensor is None else tensor.npu() for name, tensor in tensors.items()}
        ).cpu()

    return there


@each_dtype
@each_activation
@pytest.mark.parametrize("activate_left", [False, True])
def test_moe(activation: str, dtype: torch.dtype, activate_left: bool):
    torch.manual_seed(1)
    leaves, ids = block(dtype, activation), ids_of(19, 4)
    options = {"activation": activation, "activate_left": activate_left}
    assert_as_good_as_torch(
        on_npu(lambda **t: moe(topk_ids=ids.npu(), **t, **options)),
        lambda **t: plain_moe(topk_ids=ids, **t, **options),
        leaves,
    )


DENSE = [
    (name, dtype)
    for name in ("fastgelu", "gelu", "relu", "silu")
    for dtype in (torch.float16, torch.bfloat16)
]


@pytest.mark.parametrize(("activation", "dtype"), [*DENSE, ("swiglu", torch.float16)])  # the NPU has no other
def test_dense(activation: str, dtype: torch.dtype):
    torch.manual_seed(2)
    leaves = block(dtype, activation)
    del leaves["topk_weights"]
    for name in ("weight1", "weight2", "bias1", "bias2"):
        leaf = leaves[name]
        assert leaf is not None
        leaves[name] = leaf.detach()[0].requires_grad_()
    assert_as_good_as_torch(
        on_npu(lambda **t: op(**t, activation=activation)),
        lambda **t: plain_ffn(**t, activation=activation),
        leaves,
    )


@each_dtype
@pytest.mark.parametrize("tokens_index_flag", [False, True])
def test_by_expert(dtype: torch.dtype, tokens_index_flag: bool):
    torch.manual_seed(3)
    leaves, tokens = block(dtype, "gelu"), torch.tensor([7, 0, 10, 2])
    del leaves["topk_weights"]
    ids = torch.arange(4).repeat_interleave(tokens)[:, None]
    passed = (tokens.cumsum(0) if tokens_index_flag else tokens).npu()
    assert_as_good_as_torch(
        on_npu(
            lambda **t: op(**t, activation="gelu", expert_tokens=passed, tokens_index_flag=tokens_index_flag)
        ),
        lambda **t: plain_moe(
            topk_ids=ids, topk_weights=torch.ones(19, 1, dtype=t["x"].dtype), **t, activation="gelu"
        ),
        leaves,
    )


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_a_step_of_training_reads_nothing_from_the_device(activation: str):
    leaves = {name: t if t is None else t.detach().npu().requires_grad_()
              for name, t in block(torch.float16, activation).items()}  # fmt: skip
    ids = ids_of(19, 4).npu()
    given = [t for t in leaves.values() if t is not None]

    def step() -> tuple[Tensor, ...]:
        y = moe(topk_ids=ids, **leaves, activation=activation)
        return torch.autograd.grad(y, given, torch.ones_like(y))

    step()
    torch.npu.synchronize()
    before = emulator.counters()
    step()
    during = emulator.counters()
    for name in ("synchronizations", "device_to_host_copies", "host_to_device_copies"):
        assert during[name] == before[name], name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@settings(max_examples=30)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_grouped_products(dtype: torch.dtype, data: st.DataObject, seed: int):
    torch.manual_seed(seed)
    E, K, N = data.draw(st.integers(0, 4)), data.draw(st.integers(1, 70)), data.draw(st.integers(0, 70))
    counts = torch.tensor(data.draw(st.lists(st.integers(0, 40), min_size=E, max_size=E)), dtype=torch.int64)
    M = int(counts.sum()) + data.draw(st.integers(0, 3))
    x, grad, weight = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype), torch.randn(E, K, N).to(dtype)
    layout = data.draw(st.sampled_from(("rows", "columns", "gaps")))
    passed = weight.npu()
    if layout == "columns":
        passed = weight.mT.contiguous().npu().mT
    elif layout == "gaps":
        passed = torch.stack([weight, weight], -1).npu()[..., 0]
    bias = None
    if data.draw(st.booleans()):
        bias = torch.randn(E, N).to(dtype).to(data.draw(st.sampled_from((dtype, torch.float32))))
    unit = torch.finfo(dtype).eps / 2

    def check(got: Tensor, exact: Tensor, size: Tensor, terms: int) -> None:
        assert got.dtype == dtype and got.shape == exact.shape
        # float32 sums in any order, and one rounding.
        bound = (terms + 5) * 2.0**-24 * size + unit * exact.abs() + torch.finfo(dtype).smallest_normal
        assert bool(((got.cpu().double() - exact).abs() <= bound).all())

    wide = None if bias is None else bias.double()
    y = grouped_mm(x.npu(), passed, counts.npu(), None if bias is None else bias.npu())
    size = plain_grouped_mm(
        x.double().abs(), weight.double().abs(), counts, None if wide is None else wide.abs()
    )
    check(y, plain_grouped_mm(x.double(), weight.double(), counts, wide), size, K)
    if E:
        outer = grouped_outer(x.npu(), grad.npu(), counts.npu())
        size = plain_grouped_outer(x.double().abs(), grad.double().abs(), counts)
        check(outer, plain_grouped_outer(x.double(), grad.double(), counts), size, M)


def test_second_derivatives_of_the_grouped_product():
    ours = second_derivatives(lambda x, weight, counts: grouped_mm(x.npu(), weight.npu(), counts.npu()).cpu())
    torch.testing.assert_close(ours, second_derivatives(plain_grouped_mm))


OF_THE_NPU: dict[str, dict[str, Any]] = {
    "weight is a row of uint8, as prepacked weights are, but": {"weight": torch.zeros(64, dtype=torch.uint8)},
    "there are 1025 experts, but npu_grouped_matmul takes at most 1024": {
        "weight": torch.zeros(1025, 4, 3), "expert_tokens": torch.zeros(1025).long()},
}  # fmt: skip


@pytest.mark.parametrize("sentence", [*SENTENCES, *OF_THE_NPU, *OF_OUTER])
def test_bad_input_is_named(sentence: str):
    outer = sentence in OF_OUTER
    given = GOOD_OUTER | OF_OUTER[sentence] if outer else GOOD | (SENTENCES | OF_THE_NPU)[sentence]
    tensors = {name: value.npu() if isinstance(value, Tensor) else value for name, value in given.items()}
    with pytest.raises(RuntimeError) as refused:
        (grouped_outer if outer else grouped_mm)(**tensors)
    assert str(refused.value).startswith(sentence)


def test_opcheck():
    x, counts = torch.randn(9, 8).npu(), torch.tensor([3, 0, 5]).npu()
    weight, bias = torch.randn(3, 8, 6).npu(), torch.randn(3, 6).npu()
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic", "test_autograd_registration")
    for name, arguments in (("grouped_mm", (x, weight, counts, bias)), ("grouped_outer", (x, x, counts))):
        overload = getattr(torch.ops.ffn, name).default
        torch.library.opcheck(overload, arguments, test_utils=checks)
