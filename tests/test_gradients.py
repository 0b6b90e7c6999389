# SPDX-License-Identifier: Apache-2.0
"""Gradients of ffn.ffn, ffn.moe and the grouped products, and the grouped products themselves.

In float64 the formulas of ffn_ops/gradient.py are checked by torch.autograd.gradcheck, with the products in
plain PyTorch. The operators in float32, bfloat16 and float16 are compared with autograd through plain PyTorch
in float64, and with the same in their own dtype.
"""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ffn_ops
from ffn_ops import gradient
from ffn_ops.activation import activate
from ffn_ops.contract import ACTIVATIONS, GLU

pytestmark = pytest.mark.cpu_only
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEEDS = st.integers(0, 2**32 - 1)
each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


def plain_grouped_mm(x: Tensor, weight: Tensor, tokens: Tensor, bias: Tensor | None = None) -> Tensor:
    parts, begin = [], 0
    for e, count in enumerate(tokens.tolist()):
        y = x[begin : begin + count] @ weight[e]
        parts.append(y if bias is None else y + bias[e].to(y.dtype))
        begin += count
    return torch.cat([*parts, x.new_zeros(len(x) - begin, weight.shape[-1])])


def plain_grouped_outer(x: Tensor, grad: Tensor, tokens: Tensor) -> Tensor:
    ends = tokens.cumsum(0).tolist()
    return torch.stack(
        [x[end - n : end].T @ grad[end - n : end] for end, n in zip(ends, tokens.tolist(), strict=True)]
    )


def plain_moe(
    x: Tensor, topk_ids: Tensor, topk_weights: Tensor, weight1: Tensor, weight2: Tensor,
    bias1: Tensor | None, bias2: Tensor | None, activation: str, activate_left: bool = False,
) -> Tensor:  # fmt: skip
    y = torch.zeros_like(x)
    for e in range(len(weight1)):
        token, slot = torch.where(topk_ids == e)
        h = x[token] @ weight1[e]
        h = h if bias1 is None else h + bias1[e].to(h.dtype)
        out = activate(h, activation, activate_left) @ weight2[e]
        out = out if bias2 is None else out + bias2[e].to(out.dtype)
        y = y.index_add(0, token, out * topk_weights[token, slot, None].to(out.dtype))
    return y


def plain_ffn(
    x: Tensor, weight1: Tensor, weight2: Tensor, bias1: Tensor | None, bias2: Tensor | None, activation: str
) -> Tensor:
    h = x @ weight1
    h = h if bias1 is None else h + bias1.to(h.dtype)
    y = activate(h, activation) @ weight2
    return y if bias2 is None else y + bias2.to(y.dtype)


def block(
    dtype: torch.dtype,
    activation: str,
    *,
    M: int = 19,
    H: int = 24,
    K2: int = 16,
    E: int = 4,
    bias: bool = True,
) -> dict[str, Tensor | None]:
    """Leaves, of sizes that keep float16 in range, with biases in the mode's dtype."""
    N1 = 2 * K2 if activation in GLU else K2
    wide = torch.float32 if dtype == torch.bfloat16 else dtype

    def leaf(*sizes: int, of: torch.dtype = dtype) -> Tensor:
        return (torch.randn(*sizes) / 2).to(of).requires_grad_()

    return {
        "x": leaf(M, H), "topk_weights": torch.rand(M, 2).requires_grad_(), "weight1": leaf(E, H, N1),
        "weight2": leaf(E, K2, H), "bias1": leaf(E, N1, of=wide) if bias else None,
        "bias2": leaf(E, H, of=wide) if bias else None,
    }  # fmt: skip


def ids_of(M: int, E: int, sentinels: bool = True) -> Tensor:
    return torch.stack([torch.randperm(E + sentinels)[:2] for _ in range(M)])


def gradients(call: Callable[..., Tensor], leaves: dict[str, Tensor | None], up: Tensor) -> dict[str, Tensor]:
    given = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    found = torch.autograd.grad(call(**leaves), list(given.values()), up)
    return dict(zip(given, found, strict=True))


def assert_as_good_as_torch(
    ours: Callable[..., Tensor], plain: Callable[..., Tensor], leaves: dict[str, Tensor | None]
) -> None:
    """Of each gradient the largest error, against float64, is at most what autograd through plain PyTorch in
    the same dtype has, and a few units of the largest gradient on top: both round each product to the dtype,
    at other places."""
    x = leaves["x"]
    assert x is not None
    up = torch.randn_like(x)
    exact = {
        name: None if leaf is None else leaf.detach().double().requires_grad_()
        for name, leaf in leaves.items()
    }
    wanted = gradients(plain, exact, up.double())
    theirs = gradients(plain, leaves, up)
    for name, grad in gradients(ours, leaves, up).items():
        leaf = leaves[name]
        assert leaf is not None and grad.shape == leaf.shape and grad.dtype == leaf.dtype
        scale = wanted[name].abs().max()
        error, plain_error = ((g.double() - wanted[name]).abs().max() for g in (grad, theirs[name]))
        # h, a, da, dh and the result: five roundings to the dtype on the way, each of one unit.
        assert error <= plain_error + 5 * torch.finfo(x.dtype).eps / 2 * scale, (name, error, plain_error)


@each_dtype
@each_activation
@pytest.mark.parametrize("activate_left", [False, True])
def test_moe(activation: str, dtype: torch.dtype, activate_left: bool):
    torch.manual_seed(1)
    leaves, ids = block(dtype, activation), ids_of(19, 4)
    assert_as_good_as_torch(
        lambda **t: torch.ops.ffn.moe(topk_ids=ids, **t, activation=activation, activate_left=activate_left),
        lambda **t: plain_moe(topk_ids=ids, **t, activation=activation, activate_left=activate_left),
        leaves,
    )


@each_dtype
@each_activation
@pytest.mark.parametrize("bias", [False, True])
def test_dense(activation: str, dtype: torch.dtype, bias: bool):
    torch.manual_seed(2)
    leaves = block(dtype, activation, bias=bias)
    del leaves["topk_weights"]
    for name in ("weight1", "weight2", "bias1", "bias2"):
        leaf = leaves[name]
        leaves[name] = None if leaf is None else leaf.detach()[0].requires_grad_()
    assert_as_good_as_torch(
        lambda **t: torch.ops.ffn.ffn(**t, activation=activation),
        lambda **t: plain_ffn(**t, activation=activation),
        leaves,
    )


@each_dtype
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("tokens_index_flag", [False, True])
def test_by_expert(activation: str, dtype: torch.dtype, tokens_index_flag: bool):
    torch.manual_seed(3)
    leaves, tokens = block(dtype, activation), torch.tensor([7, 0, 10, 2])
    del leaves["topk_weights"]
    ids = torch.arange(4).repeat_interleave(tokens)[:, None]
    passed = tokens.cumsum(0) if tokens_index_flag else tokens
    assert_as_good_as_torch(
        lambda **t: torch.ops.ffn.ffn(
            **t, activation=activation, expert_tokens=passed, tokens_index_flag=tokens_index_flag
        ),
        lambda **t: plain_moe(
            topk_ids=ids, topk_weights=torch.ones(19, 1, dtype=t["x"].dtype), **t, activation=activation
        ),
        leaves,
    )


@each_activation
@pytest.mark.parametrize("activate_left", [False, True])
def test_the_formulas_in_float64(activation: str, activate_left: bool, monkeypatch: pytest.MonkeyPatch):
    """gradcheck compares with finite differences. The kernels have no float64, so plain products stand in,
    and nothing may be rounded to float32 on the way."""
    monkeypatch.setattr(gradient, "grouped_mm", plain_grouped_mm)
    monkeypatch.setattr(gradient, "grouped_outer", plain_grouped_outer)
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    torch.manual_seed(4)
    leaves = block(torch.float64, activation, M=5, H=3, K2=2, E=3)
    leaves["topk_weights"] = torch.rand(5, 2, dtype=torch.float64).requires_grad_()
    ids = ids_of(5, 3)

    class Formula(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            ctx.save_for_backward(*tensors)
            return plain_moe(tensors[0], ids, *tensors[1:], activation, activate_left)

        @staticmethod
        def backward(ctx, grad):
            x, weights, weight1, weight2, bias1, bias2 = ctx.saved_tensors
            of = gradient.Block(weight1, weight2, bias1, bias2, activation, activate_left)
            dx, dweights, rest = gradient.moe_gradients(grad, x, ids, weights, of)
            return dx, dweights, rest.weight1, rest.weight2, rest.bias1, rest.bias2

    assert torch.autograd.gradcheck(Formula.apply, list(leaves.values()))


@each_dtype
@settings(max_examples=40)
@given(data=st.data(), seed=SEEDS)
def test_grouped_products(dtype: torch.dtype, data: st.DataObject, seed: int):
    torch.manual_seed(seed)
    E, K, N = (data.draw(st.integers(0, most)) for most in (4, 70, 70))
    counts = torch.tensor(data.draw(st.lists(st.integers(0, 40), min_size=E, max_size=E)), dtype=torch.int64)
    M = int(counts.sum()) + data.draw(st.integers(0, 3))
    x, grad = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
    layout = data.draw(st.sampled_from(("rows", "columns", "packed")))
    weight = torch.randn(E, K, N).to(dtype)
    passed = weight
    if layout == "columns":
        passed = weight.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "packed" and E:
        passed = ffn_ops.prepack(weight)
    bias = (
        torch.randn(E, N).to(data.draw(st.sampled_from((dtype, torch.float32))))
        if data.draw(st.booleans())
        else None
    )
    unit = torch.finfo(dtype).eps / 2

    def check(got: Tensor, exact: Tensor, size: Tensor, terms: int) -> None:
        assert got.dtype == dtype and got.shape == exact.shape
        # float32 sums in any order, and one rounding; subnormal bf16 may count as 0.
        bound = (
            (terms + 5) * 2.0**-24 * size
            + unit * exact.abs()
            + terms * 2.0**-120
            + torch.finfo(dtype).smallest_normal
        )
        assert bool(((got.double() - exact).abs() <= bound).all())

    wide = None if bias is None else bias.double()
    y = torch.ops.ffn.grouped_mm(x, passed, counts, bias)
    size = plain_grouped_mm(
        x.double().abs(), weight.double().abs(), counts, None if wide is None else wide.abs()
    )
    check(y, plain_grouped_mm(x.double(), weight.double(), counts, wide), size, K)
    if E:
        outer = torch.ops.ffn.grouped_outer(x, grad, counts)
        size = plain_grouped_outer(x.double().abs(), grad.double().abs(), counts)
        check(outer, plain_grouped_outer(x.double(), grad.double(), counts), size, M)


def test_opcheck():
    x, counts = torch.randn(9, 8, requires_grad=True), torch.tensor([3, 0, 5])
    weight, bias = torch.randn(3, 8, 6, requires_grad=True), torch.randn(3, 6, requires_grad=True)
    torch.library.opcheck(torch.ops.ffn.grouped_mm.default, (x, weight, counts, bias))
    torch.library.opcheck(
        torch.ops.ffn.grouped_outer.default, (x, torch.randn(9, 6, requires_grad=True), counts)
    )
    leaves, ids = block(torch.float32, "swiglu"), ids_of(19, 4)
    torch.library.opcheck(
        torch.ops.ffn.moe.default,
        (),
        {**leaves, "topk_ids": ids, "activation": "swiglu", "activate_left": True},
    )
    dense = {n: t.detach()[0].requires_grad_() for n, t in leaves.items() if t is not None and n[-1] in "12"}
    torch.library.opcheck(torch.ops.ffn.ffn.default, (), {**dense, "x": leaves["x"], "activation": "swiglu"})


def test_a_compiled_step_has_the_same_gradients():
    leaves, ids = block(torch.float32, "swiglu"), ids_of(19, 4)

    def call(**t: Tensor) -> Tensor:
        return torch.ops.ffn.moe(topk_ids=ids, **t, activation="swiglu")

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    x = leaves["x"]
    assert x is not None
    up = torch.randn_like(x)
    eager, traced = gradients(call, leaves, up), gradients(compiled, leaves, up)
    assert all(torch.equal(eager[name], traced[name]) for name in eager)


def second_derivatives(product: Callable[..., Tensor]) -> tuple[Tensor, ...]:
    torch.manual_seed(5)
    x = torch.randn(6, 4, requires_grad=True)
    weight, counts = torch.randn(2, 4, 3, requires_grad=True), torch.tensor([2, 4])
    (dx,) = torch.autograd.grad(product(x, weight, counts).square().sum(), x, create_graph=True)
    return torch.autograd.grad(dx.square().sum(), (x, weight))


def test_second_derivatives_of_the_grouped_product():
    ours = second_derivatives(torch.ops.ffn.grouped_mm)
    torch.testing.assert_close(ours, second_derivatives(plain_grouped_mm))


@each_activation
def test_second_derivatives_of_blocks(activation: str):
    """Of ffn.moe and ffn.ffn, beside autograd through plain PyTorch; relu's are 0 almost everywhere."""
    leaves, ids = block(torch.float32, activation, M=5, bias=False), ids_of(5, 4)
    x = leaves["x"]
    assert x is not None

    def penalty(call: Callable[..., Tensor]) -> Tensor:
        (dx,) = torch.autograd.grad(call(**leaves).square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), x)[0]

    ours = penalty(lambda **of: torch.ops.ffn.moe(topk_ids=ids, **of, activation=activation))
    plain = penalty(lambda **of: plain_moe(topk_ids=ids, **of, activation=activation))
    # Chains of some ten products of up to 32 terms, each off by a few eps of its largest.
    assert (ours - plain).abs().max() <= 2**-14 * plain.abs().max()


@pytest.mark.parametrize("recompute", [False, True])
def test_no_tokens_have_gradients_too(recompute: bool):
    """As a rank of expert parallelism that got none."""
    leaves = block(torch.float32, "swiglu", M=0)
    ids = torch.zeros(0, 2, dtype=torch.int64)
    found = gradients(
        lambda **of: torch.ops.ffn.moe(topk_ids=ids, **of, activation="swiglu"), leaves, torch.zeros(0, 24)
    )
    for name, gradient_ in found.items():
        leaf = leaves[name]
        assert leaf is not None and gradient_.shape == leaf.shape and not gradient_.any()
    moe = ffn_ops.MoE(24, 16, 4, 2, recompute=recompute)
    moe(torch.zeros(0, 24)).sum().backward()
    assert moe.weight1.grad is not None and not moe.weight1.grad.any()
    x, w1, w2 = torch.zeros(0, 24, requires_grad=True), torch.randn(24, 16), torch.randn(16, 24)
    torch.ops.ffn.ffn(x, w1, w2, "relu").sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    bias, x = torch.zeros(3, 0, requires_grad=True), torch.randn(5, 4)
    counts = torch.tensor([2, 0, 3])
    torch.ops.ffn.grouped_mm(x, torch.zeros(3, 4, 0), counts, bias).sum().backward()
    assert bias.grad is not None and bias.grad.shape == (3, 0)


def test_a_skipped_slot_has_no_part_in_a_gradient_that_is_nan():
    leaves, up = block(torch.float32, "relu", M=3), torch.ones(3, 24)
    up[1] = torch.nan
    ids = torch.tensor([[0, 1], [4, 4], [2, 3]])  # there are four experts
    found = gradients(lambda **of: torch.ops.ffn.moe(topk_ids=ids, **of, activation="relu"), leaves, up)
    assert found["topk_weights"].isfinite().all() and not found["topk_weights"][1].any()


def test_what_is_frozen_costs_no_gradient(monkeypatch: pytest.MonkeyPatch):
    leaves, ids, products = block(torch.float32, "gelu"), ids_of(19, 4), []

    def outer(*arguments: Tensor) -> Tensor:
        products.append(arguments)
        return torch.ops.ffn.grouped_outer(*arguments)

    monkeypatch.setattr(gradient, "grouped_outer", outer)
    frozen = {n: t if t is None or n == "x" else t.detach() for n, t in leaves.items()}
    x = frozen["x"]
    assert x is not None
    torch.ops.ffn.moe(topk_ids=ids, **frozen, activation="gelu").sum().backward()
    assert x.grad is not None and not products


def test_gradients_of_weights_lie_as_the_weights_do():
    """A transposed parameter's .grad is then what the product wrote."""
    x, grad = torch.randn(5, 8), torch.randn(5, 6)
    expert_tokens = torch.tensor([2, 0, 3])
    plain = torch.randn(3, 8, 6)
    expected = gradient.weight_gradient(x, grad, expert_tokens, plain)
    found = gradient.weight_gradient(x, grad, expert_tokens, plain.mT.contiguous().mT)
    assert expected.is_contiguous()
    assert found.mT.is_contiguous()
    torch.testing.assert_close(found, expected)


def test_a_tensor_beyond_its_storage_is_refused():
    weight = torch.zeros(2, 4, 3)
    weight.untyped_storage().resize_(8)
    with pytest.raises(RuntimeError, match="weight reaches to byte 96, but its storage holds 8"):
        torch.ops.ffn.grouped_mm(torch.zeros(5, 4), weight, torch.tensor([2, 3]))


def test_one_tensor_on_another_device_is_named():
    """A meta tensor among others is no fake call, which would answer with memory that nobody wrote."""
    x, counts = torch.zeros(5, 4), torch.tensor([2, 3])
    with pytest.raises(RuntimeError, match="weight is on meta and x on cpu, but"):
        torch.ops.ffn.grouped_mm(x, torch.zeros(2, 4, 3, device="meta"), counts)
    with pytest.raises(RuntimeError, match="grad is on meta and x on cpu, but"):
        torch.ops.ffn.grouped_outer(x, torch.zeros(5, 3, device="meta"), counts)


GOOD = {"x": torch.zeros(5, 4), "weight": torch.zeros(2, 4, 3), "expert_tokens": torch.tensor([2, 3])}
# The CPU's, in C++, and the NPU's, in Python, are the same.
SENTENCES = {
    "x is float64, but it must be float32, float16 or bfloat16 (cast it)": {"x": torch.zeros(5, 4).double()},
    "x has shape [4], but it must be [M, K] (flatten the leading sizes)": {"x": torch.zeros(4)},
    "weight has shape [2, 5, 3], but it must be [E, K, N] with x's K = 4 (nn.Linear's goes in transposed)": {
        "weight": torch.zeros(2, 5, 3)},
    "weight is float16, but beside float32 x it must be float32 (cast it)": {
        "weight": torch.zeros(2, 4, 3).half()},
    "expert_tokens is float32, but it must be int64 (cast it)": {"expert_tokens": torch.zeros(2)},
    "expert_tokens has shape [3], but it must be [E] = [2] (one count for each expert)": {
        "expert_tokens": torch.zeros(3).long()},
    "bias has shape [3], but it must be [E, N] = [2, 3] (one row for each expert)": {"bias": torch.zeros(3)},
    "bias is float16, but beside float32 x it must be float32 (cast it)": {"bias": torch.zeros(2, 3).half()},
    "bias is float64, but beside bfloat16 x it must be bfloat16 or float32 (cast it)": {
        "x": torch.zeros(5, 4).bfloat16(), "weight": torch.zeros(2, 4, 3).bfloat16(),
        "bias": torch.zeros(2, 3).double()},
    "N is 4, but weight has N = 3 columns (leave it out, or correct it)": {"N": 4},
}  # fmt: skip
OF_COUNTS = {  # which only the CPU reads
    "expert_tokens[1] is 4, but counts are not negative and add up to at most the M = 5 rows of x": {
        "expert_tokens": torch.tensor([2, 4])},
    "expert_tokens[0] is -1, but": {"expert_tokens": torch.tensor([-1, 4])},
}  # fmt: skip
GOOD_OUTER = {"x": torch.zeros(5, 4), "grad": torch.zeros(5, 3), "expert_tokens": torch.tensor([2, 3])}
OF_OUTER = {
    "x has shape [5], but it must be [M, K] (flatten the leading sizes)": {"x": torch.zeros(5)},
    "grad has shape [4, 3], but it must be [M, N] with x's M = 5 (rows belong together)": {
        "grad": torch.zeros(4, 3)},
    "grad is float16, but beside float32 x it must be float32 (cast it)": {"grad": torch.zeros(5, 3).half()},
    "expert_tokens has shape [1, 2], but it must be [E] (one count for each expert)": {
        "expert_tokens": torch.tensor([[2, 3]])},
}  # fmt: skip


@pytest.mark.parametrize("sentence", SENTENCES | OF_COUNTS)
def test_bad_input_is_named(sentence: str):
    with pytest.raises(RuntimeError) as refused:
        torch.ops.ffn.grouped_mm(**{**GOOD, **(SENTENCES | OF_COUNTS)[sentence]})
    assert str(refused.value).startswith(sentence)


@pytest.mark.parametrize("sentence", OF_OUTER)
def test_bad_input_of_the_outer_product_is_named(sentence: str):
    with pytest.raises(RuntimeError) as refused:
        torch.ops.ffn.grouped_outer(**{**GOOD_OUTER, **OF_OUTER[sentence]})
    assert str(refused.value).startswith(sentence)
