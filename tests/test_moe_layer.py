# SPDX-License-Identifier: Apache-2.0
"""ffn_ops.moe: routing against reference.route, and the layer against the operator, PyTorch and itself."""

import copy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gradients import assert_as_good_as_torch, plain_moe
from torch import Tensor, nn

import ffn_ops
import reference
from ffn_ops import ContractError, MoE
from ffn_ops.activation import activate
from ffn_ops.moe import (
    ACTIVATIONS,
    CLAMPED_SWIGLU,
    ROUTERS,
    clamped_swiglu,
    combine,
    load_statistics,
    permute,
    route,
)

pytestmark = pytest.mark.cpu_only
SEEDS = st.integers(0, 2**32 - 1)


@settings(max_examples=100)
@given(data=st.data(), seed=SEEDS)
def test_routing_agrees_with_the_reference(data: st.DataObject, seed: int):
    rng = np.random.default_rng(seed)
    router = data.draw(st.sampled_from(ROUTERS))
    options: dict[str, Any] = {"scaling": data.draw(st.sampled_from((1.0, 2.5)))}
    n_group = 1
    if router == "sigmoid":
        n_group = data.draw(st.sampled_from((1, 2, 4)))
        options |= {"n_group": n_group, "topk_group": data.draw(st.integers(1, n_group))}
    E = n_group * data.draw(st.integers(1, 6))
    most = E // n_group * options.get("topk_group", 1)
    top_k = 1 if router == "top1" else data.draw(st.integers(1, most))
    if router in ("softmax", "sigmoid"):
        options["renormalize"] = data.draw(st.booleans())
    # Whole steps of the logits, so that nothing is as good as equal.
    logits = np.stack([rng.permutation(E) for _ in range(data.draw(st.integers(0, 9)))] or [np.zeros((0, E))])
    logits = logits.reshape(-1, E).astype(np.float32) / 4
    bias = (
        (rng.permutation(E) / 64).astype(np.float32)
        if router == "sigmoid" and data.draw(st.booleans())
        else None
    )
    ids, weights = route(
        torch.from_numpy(logits), top_k, router, **options,
        correction_bias=None if bias is None else torch.from_numpy(bias),
    )  # fmt: skip
    want_ids, want = reference.route(logits, top_k, router, **options, correction_bias=bias)
    assert weights.dtype == torch.float32
    np.testing.assert_array_equal(ids.numpy(), want_ids)
    # A float32 exp, sum, division, and one more of each to renormalise and scale: E + 8 roundings.
    np.testing.assert_allclose(weights.numpy(), want, rtol=(E + 8) * 2.0**-23)


@settings(max_examples=50)
@given(seed=SEEDS, M=st.integers(0, 20), E=st.integers(1, 6), top_k=st.integers(0, 4))
def test_permute_sorts_by_expert_and_combine_undoes_it(seed: int, M: int, E: int, top_k: int):
    torch.manual_seed(seed)
    x, ids = torch.randn(M, 3), torch.randint(0, E + 2, (M, top_k))
    rows, expert_tokens, order = permute(x, ids, E)
    flat = ids.flatten()
    assert expert_tokens.tolist() == [int((flat == e).sum()) for e in range(E)]
    assert torch.equal(flat[order], flat.sort(stable=True).values)
    assert torch.equal(rows, x.repeat_interleave(top_k, 0)[order])
    weights = torch.rand(M, top_k)
    expected = torch.zeros(M, 3)
    for slot in range(top_k):  # in order
        expected = expected + x * weights[:, slot, None]
    torch.testing.assert_close(combine(rows, weights, order), expected)


def layer(**options: Any) -> MoE:
    torch.manual_seed(0)
    made = MoE(24, 16, 4, 2, **options)
    for name in ("bias1", "bias2"):
        if getattr(made, name) is not None:
            torch.nn.init.normal_(getattr(made, name))
    return made


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def test_forward_is_the_same_fused_and_keeping_activations(activation: str, dtype: torch.dtype):
    moe, x = layer(activation=activation, bias=True).to(dtype), torch.randn(3, 7, 24).to(dtype)
    y = moe(x)
    with torch.no_grad():
        fused = moe(x)
    assert y.requires_grad and y.shape == fused.shape == x.shape and y.dtype == fused.dtype == dtype
    exact = copy.deepcopy(moe).double()
    act = clamped_swiglu if activation == CLAMPED_SWIGLU else partial(activate, activation=activation)
    wanted, size = torch.zeros(21, 24).double(), torch.zeros(21, 24).double()
    ids, weights = moe.route(x.reshape(-1, 24))
    for t, slots in enumerate(zip(ids, weights.double(), strict=True)):
        for e, weight in zip(*slots, strict=True):
            h = act(x.reshape(-1, 24)[t].double() @ exact.weight1[e] + exact.bias1[e])
            wanted[t] += weight * (h @ exact.weight2[e] + exact.bias2[e])
            size[t] += weight * (h.abs() @ exact.weight2[e].abs() + exact.bias2[e].abs())
    # Unfused, the first product, up to six steps of the activation, and y of an expert are rounded; then the
    # sum. An activation's slope, 1.13 at most, makes of the first of them no more than two of its result's.
    for result in (y, fused):
        error = (result.reshape(-1, 24).double() - wanted).abs()
        assert bool((error <= 10 * torch.finfo(dtype).eps / 2 * size).all())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_gradients_reach_every_parameter(activation: str, recompute: bool):
    moe, x = (
        layer(activation=activation, bias=True, recompute=recompute, shared_experts=1),
        torch.randn(9, 24),
    )
    moe(x.requires_grad_()).square().sum().backward()
    assert x.grad is not None
    for name, parameter in moe.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.any()), name


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_recomputed_and_kept_gradients(activation: str):
    ids = torch.stack([torch.randperm(5)[:2] for _ in range(19)])
    for recompute in (False, True):
        moe = layer(activation=activation, bias=True, recompute=recompute)
        names = ("weight1", "weight2", "bias1", "bias2")
        leaves: dict[str, Tensor | None] = {name: getattr(moe, name) for name in names}
        leaves |= {
            "x": torch.randn(19, 24).requires_grad_(),
            "topk_weights": torch.rand(19, 2).requires_grad_(),
        }

        def ours(x: Tensor, topk_weights: Tensor, moe: MoE = moe, **parameters: Tensor) -> Tensor:
            return torch.func.functional_call(
                Experts(moe), {f"moe.{n}": p for n, p in parameters.items()}, (x, ids, topk_weights)
            )

        assert_as_good_as_torch(ours, lambda **t: plain_moe(topk_ids=ids, **t, activation=activation), leaves)


class Experts(torch.nn.Module):
    def __init__(self, moe: MoE) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, *call: Tensor) -> Tensor:
        return self.moe.experts(*call)


def saved_bytes(moe: MoE, x: Tensor) -> int:
    """Of the tensors kept for a backward pass that are neither x nor parameters."""
    known = {p.data_ptr() for p in moe.parameters()} | {x.data_ptr()}
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in known:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        moe(x)
    return sum(kept.values())


def test_recomputing_keeps_less():
    x = torch.randn(200, 24)
    kept, recomputed = (saved_bytes(layer(recompute=recompute), x) for recompute in (False, True))
    assert kept - recomputed > 200 * 2 * 32 * 4  # the first product's result, at least


def test_shared_experts_see_every_token():
    moe, x = layer(shared_experts=2, activation="relu"), torch.randn(5, 24)
    with torch.no_grad():
        routed = moe.experts(x, *moe.route(x))
        assert moe.shared_weight1 is not None and moe.shared_weight2 is not None
        shared = (torch.relu(x @ moe.shared_weight1) @ moe.shared_weight2)[0]
        torch.testing.assert_close(moe(x), routed + shared)
    assert moe.shared_weight1.shape == (1, 24, 32)


@pytest.mark.parametrize("activation", ["swiglu", CLAMPED_SWIGLU])
def test_packed(activation: str):
    moe, x = layer(activation=activation, bias=True, shared_experts=1), torch.randn(5, 24)
    with torch.no_grad():
        y = moe(x)
        plain = {name: tensor.clone() for name, tensor in moe.state_dict().items()}
        packed = copy.deepcopy(moe).pack_()
        assert "packed" in repr(packed) and torch.equal(packed(x), y)
        torch._dynamo.reset()
        assert torch.equal(torch.compile(packed, fullgraph=True, backend="aot_eager")(x), y)
        other = MoE(24, 16, 4, 2, activation=activation, bias=True, shared_experts=1)
        other.load_state_dict(packed.state_dict())
        assert torch.equal(other(x), y)
        packed.load_state_dict(plain)
        assert torch.equal(packed(x), y)
        with pytest.raises(RuntimeError, match="it is no float32 weight of shape"):
            packed.load_state_dict({**plain, "weight1": plain["weight1"][:2]})
    with pytest.raises(RuntimeError, match="no gradient beside integer or prepacked weights"):
        packed(x.requires_grad_()).sum().backward()


def test_it_compiles_in_one_graph_and_is_saved():
    moe, x = layer(router="sigmoid", n_group=2, topk_group=1, renormalize=True), torch.randn(5, 24)
    with torch.no_grad():
        assert torch.equal(torch.compile(moe, fullgraph=True, backend="aot_eager")(x), moe(x))
    moe.correction_bias += torch.arange(4)
    other = MoE(24, 16, 4, 2, router="sigmoid", n_group=2, topk_group=1, renormalize=True)
    other.load_state_dict(moe.state_dict())
    assert torch.equal(other(x), moe(x))


def test_load_statistics():
    load = load_statistics(torch.tensor([[0, 1], [0, 3], [0, 4]]), 4)  # 4 is nobody
    assert load.tokens.tolist() == [3, 1, 0, 1] and load.imbalance == 3 * 4 / 5
    assert load_statistics(torch.zeros(0, 2, dtype=torch.int64), 4).imbalance == 1
    assert load_statistics(torch.arange(4)[:, None], 4).imbalance == 1


BAD = {
    "activation is 'tanh', but it must be one of": {"activation": "tanh"},
    "router is 'best', but it must be one of softmax": {"router": "best"},
    "top_k is 5, but it must be from 1 to the 4 experts": {"top_k": 5},
    "top_k is 0, but it must be an int from 1": {"top_k": 0},
    "top_k is 2.0, but it must be an int from 1": {"top_k": 2.0},
    "topk_group is '1', but it must be an int from 1": {"topk_group": "1"},
    "scaling is nan, but it must be a finite number": {"scaling": float("nan")},
    "alpha is 'x', but it must be a finite number": {"alpha": "x"},
    "limit is -1, but it must be 0 or more": {"limit": -1},
    "top_k is 2, but router top1 has one": {"router": "top1"},
    "n_group is 3 and topk_group 1, but n_group must divide the 4 experts": {
        "router": "sigmoid",
        "n_group": 3,
    },
    "n_group is 2, but router softmax has no groups": {"n_group": 2},
    "top_k is 3, but the 1 chosen groups hold 2": {"router": "sigmoid", "n_group": 2, "top_k": 3},
    "num_experts is 0, but it must be an int from 1": {"num_experts": 0},
    "hidden_size is 8.0, but it must be an int from 1": {"hidden_size": 8.0},
    "shared_experts is -1, but it must be an int from 0": {"shared_experts": -1},
    "dtype is torch.float64, but it must be torch.float32": {"dtype": torch.float64},
}


@pytest.mark.parametrize("sentence", BAD)
def test_bad_arguments_are_named(sentence: str):
    arguments = {"hidden_size": 8, "intermediate_size": 8, "num_experts": 4, "top_k": 2} | BAD[sentence]
    with pytest.raises(ContractError) as refused:
        MoE(**arguments)
    assert str(refused.value).startswith(sentence)


def test_bad_input_is_named():
    moe = layer()
    with pytest.raises(ContractError, match="takes a last dimension of hidden_size = 24"):
        moe(torch.zeros(3, 23))
    with pytest.raises(ContractError, match="logits hold NaN for token 1, but"):
        moe(torch.tensor([0.0, torch.nan, 0.0])[:, None].expand(3, 24))
    with pytest.raises(
        ContractError, match=r"x is torch\.bfloat16 and the parameters are torch\.float32, but"
    ):
        moe(torch.zeros(3, 24).bfloat16())
    moe.gate = Double(24, moe.num_experts, bias=False).double()
    moe(torch.zeros(3, 24))
    with pytest.raises(ContractError, match="x is a list, but this MoE takes a tensor"):
        moe([0.0] * 24)


class Double(nn.Linear):
    """A gate that casts x itself."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.double()).float()


def test_routers_refuse_what_no_weight_follows_from():
    inf, logits = torch.inf, torch.zeros(2, 4)
    for row, value in (([inf, 1, 2, 3], "inf"), ([-inf] * 4, "-inf")):
        logits[1] = torch.tensor(row)
        for router in ("softmax", "topk_softmax"):
            with pytest.raises(ContractError, match=f"logits hold {value} as the largest for token 1, but"):
                route(logits, 2, router)
        assert route(logits, 2, "sigmoid").weights.isfinite().all()
    logits[1] = torch.tensor([0, -inf, -inf, 0])  # a mask
    assert route(logits, 2).weights[1].tolist() == [0.5, 0.5]
    for bias in (torch.zeros(1), torch.zeros(2, 1), torch.zeros(3)):
        with pytest.raises(ContractError, match=r"correction_bias has shape \[.*\], but it must be"):
            route(logits, 2, "sigmoid", correction_bias=bias)
    with pytest.raises(ContractError, match="correction_bias holds nan for expert 1, but it must be finite"):
        route(logits, 2, "sigmoid", correction_bias=torch.tensor([0, torch.nan, 0, 0]))
    for broken in (None, torch.tensor(1.0)):
        with pytest.raises(ContractError, match=r"but they must be a tensor \[\.\.\., E\]"):
            route(broken, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("activation", ["gelu", CLAMPED_SWIGLU])
@pytest.mark.parametrize("grad", [False, True])
def test_experts_take_tokens_of_any_rank(activation: str, grad: bool):
    moe = MoE(24, 16, 4, 2, activation=activation)
    x = torch.randn(2, 3, 24)
    with torch.set_grad_enabled(grad):
        for tokens in (x, x[:, :1], x[:, :0]):
            y = moe.experts(tokens, *moe.route(tokens))
            flat = tokens.reshape(-1, 24)
            assert torch.equal(y, moe.experts(flat, *moe.route(flat)).reshape(tokens.shape))


def test_it_runs_on_meta():
    with torch.device("meta"):
        moe = MoE(24, 16, 4, 2, shared_experts=1)
        y = moe(torch.zeros(2, 3, 24))
    assert y.is_meta and y.shape == (2, 3, 24)


def test_the_correction_stays_exact():
    moe = MoE(24, 16, 4, 2, router="sigmoid")
    moe.correction_bias.copy_(torch.linspace(1, 1.01, 4))
    kept = moe.correction_bias.clone()
    for change in (moe.bfloat16, moe.half, moe.float):
        assert torch.equal(change().correction_bias, kept)
    assert moe.to("meta").correction_bias.is_meta


EXPERTS_CALLS: dict[str, dict[str, Any]] = {
    "topk_ids holds -1, but experts are numbered from 0": {"ids": torch.tensor([[-1, 0]])},
    "topk_ids is float32, but mode float32 takes": {"ids": torch.ones(1, 2)},
    "topk_ids has shape [2], but it must be [..., top_k]": {"ids": torch.tensor([0, 1])},
    "topk_weights has shape [1, 3], but it must be": {"weights": torch.ones(1, 3)},
    "x has shape [1, 24], but it must be [..., K1] = [1, 32]": {"weight1": torch.zeros(4, 32, 24)},
    "x is bfloat16 and weight1 is float32, but": {"x": torch.zeros(1, 24).bfloat16()},
    "weight1 is on meta and x on cpu, but": {"weight1": torch.zeros(4, 24, 32, device="meta")},
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("sentence", EXPERTS_CALLS)
def test_the_same_calls_are_refused_with_and_without_gradients(sentence: str, grad: bool):
    given = {"x": torch.zeros(1, 24), "ids": torch.tensor([[0, 1]]), "weights": torch.ones(1, 2)}
    given |= EXPERTS_CALLS[sentence]
    moe = layer()
    if "weight1" in given:
        moe.weight1 = torch.nn.Parameter(given["weight1"])
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError) as refused:
        moe.experts(given["x"], given["ids"], given["weights"])
    assert str(refused.value).startswith(sentence)


@pytest.mark.parametrize("grad", [False, True])
def test_a_target_refuses_a_layer_with_and_without_gradients(grad: bool):
    with ffn_ops.target("ascend910b"), torch.set_grad_enabled(grad):
        with pytest.raises(RuntimeError, match="mode float32 runs on the cpu target only"):
            layer()(torch.zeros(1, 24))
        layer().bfloat16()(torch.zeros(1, 24).bfloat16())


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_autocast_takes_what_a_linear_layer_gives(packed: bool, grad: bool):
    moe = MoE(24, 16, 4, 2, bias=True, shared_experts=1).requires_grad_(grad)
    x = torch.randn(5, 24)
    expected = moe(x).detach()
    if packed:
        moe.pack_()
    with torch.autocast("cpu", torch.bfloat16):
        for given in (x, x.bfloat16()):
            y = moe(given)
            assert y.dtype == (torch.float32 if packed else torch.bfloat16)
            # Logits in bf16 may choose other experts, so only that it computes is shown of those rows.
            close = (y.float() - expected).norm(dim=-1) <= 2**-5 * expected.norm(dim=-1)
            assert close.sum() >= 3
    if grad and not packed:
        y.sum().backward()
        assert moe.weight1.grad is not None and moe.weight1.grad.dtype == torch.float32


def test_a_packed_layer_changes_its_dtype_and_loads_another():
    moe, other = MoE(24, 16, 4, 2), MoE(24, 16, 4, 2, dtype=torch.bfloat16)
    x = torch.randn(5, 24).bfloat16()
    with torch.no_grad():
        expected = copy.deepcopy(moe).bfloat16()(x)
        assert torch.equal(moe.pack_().bfloat16()(x), expected)
        moe = MoE(24, 16, 4, 2).pack_()
        moe.load_state_dict(other.state_dict())  # rounded to bf16 before, so exact in float32
        assert torch.equal(ffn_ops.unpack(moe.weight1), other.weight1.float())
    with pytest.raises(RuntimeError, match="it is no float32 weight of shape") as refused:
        moe.load_state_dict(other.pack_().state_dict())
    assert "Missing" not in str(refused.value)
    moe = MoE(24, 16, 4, 2, bias=True).pack_()
    with pytest.raises(ContractError, match=r"weight1 is packed in torch\.float32, but it was to become"):
        moe.double()
    assert {moe.gate.weight.dtype, moe.bias1.dtype} == {torch.float32}  # nothing has changed


def test_what_a_router_does_not_use_is_refused():
    logits = torch.randn(3, 4)
    with pytest.raises(ContractError, match="correction_bias is given, but router softmax has none"):
        route(logits, 2, correction_bias=torch.zeros(4))
    with pytest.raises(ContractError, match=r"logits are torch\.int64, but a router gives"):
        route(logits.long(), 2)
    with pytest.raises(ContractError, match="topk_ids is Routing, but it must be an int64 or int32 tensor"):
        load_statistics(route(logits, 2), 4)
    with pytest.raises(ContractError, match="topk_ids holds -1, but"):
        load_statistics(torch.tensor([-1]), 4)
    with pytest.raises(ContractError, match=r"E is 2\.5, but it must be an int from 1"):
        load_statistics(torch.tensor([1]), 2.5)  # type: ignore[arg-type]


def test_to_empty_and_reset_leave_nothing_unwritten():
    moe = MoE(24, 16, 4, 2, router="sigmoid", device="meta").to_empty(device="cpu")
    moe.correction_bias.fill_(7)
    moe.reset_parameters()
    assert not moe.correction_bias.any()
