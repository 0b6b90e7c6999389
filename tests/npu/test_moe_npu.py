# SPDX-License-Identifier: Apache-2.0
"""torch.ops.ffn.moe on emulated NPU tensors: both routes against the reference, what they never do, and what
is refused. Which route takes which call is test_contract.py's affair, gradients are test_gradients_npu.py's.
"""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operands import on_cpu
from process import run as run_process
from strategies import Call, calls, to_numpy
from tolerance import Kernel, assert_moe_close

import ffn_ops
from ffn_ops import emulator
from ffn_ops.contract import ACTIVATIONS, GLU, MODES, VENDOR_ACTIVATIONS

SEEDS = st.integers(0, 2**32 - 1)
ROUTES = [
    (route, mode.name) for route in ("fused", "grouped") for mode in MODES if route in mode.routes.split()
]
moe = torch.ops.ffn.moe
each_route = pytest.mark.parametrize("route,activation", [("fused", "gelu"), ("grouped", "swiglu")])


def run(call: Call, arrays: dict[str, np.ndarray]) -> np.ndarray:
    return to_numpy(moe(**call.tensors(arrays), activation=call.activation, **call.options()))


@pytest.mark.parametrize("route,mode", ROUTES)
@settings(max_examples=40)
@given(data=st.data(), seed=SEEDS)
def test_a_legal_call_agrees_with_the_reference(route: str, mode: str, data: st.DataObject, seed: int):
    call = data.draw(calls(modes=(mode,), moe=True, layouts=True, route=route))
    arrays = call.arrays(seed)
    kernel = Kernel(stepwise=True, composed=call.route)
    y = run(call, arrays)
    assert_moe_close(y, kernel=kernel, **arrays, activation=call.activation, **call.reference_options())


def block(
    M: int = 6, E: int = 4, top_k: int = 2, activation: str = "gelu", dtype: torch.dtype = torch.float16
) -> list[torch.Tensor]:
    """x, topk_ids, topk_weights, weight1 and weight2, on the NPU."""
    torch.manual_seed(0)
    N1 = 64 if activation in GLU else 32
    x, weights = torch.randn(M, 16).to(dtype), torch.rand(M, top_k)
    weight1, weight2 = (torch.randn(E, 16, N1) / 4).to(dtype), (torch.randn(E, 32, 16) / 5).to(dtype)
    return [t.npu() for t in (x, torch.randint(0, E, (M, top_k)), weights, weight1, weight2)]


def assert_close(y: torch.Tensor, tensors: list[torch.Tensor], activation: str, **options: Any) -> None:
    """Within the bound of the route that explain names."""
    x, ids, weights, weight1, weight2 = tensors
    route = ffn_ops.explain(x, weight1, weight2, activation, topk_ids=ids, topk_weights=weights).route
    assert route is not None
    arrays = [to_numpy(tensor) for tensor in tensors]
    assert_moe_close(
        to_numpy(y), *arrays, activation, kernel=Kernel(stepwise=True, composed=route), **options
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("activate_left", [False, True])
@pytest.mark.parametrize("E", [4, 300])
def test_every_activation(activation: str, dtype: torch.dtype, activate_left: bool, E: int):
    """Of 300 experts every activation is the route grouped's."""
    tensors = block(activation=activation, dtype=dtype, M=40, E=E)
    y = moe(*tensors, activation, activate_left=activate_left)
    assert_close(y, tensors, activation, activate_left=activate_left)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("E", [1, 256, 257, 1024])
def test_many_experts_most_of_them_empty(E: int, activation: str):
    tensors = block(E=E, activation=activation)
    assert_close(moe(*tensors, activation), tensors, activation)


@each_route
@pytest.mark.parametrize("share", ["one expert", "every expert once", "none"])
def test_any_skew(share: str, route: str, activation: str):
    x, ids, weights, weight1, weight2 = block(M=100, activation=activation)
    if share == "one expert":
        ids = torch.full_like(ids, 2)
    elif share == "none":
        ids = torch.full_like(ids, 4)
    else:
        ids, x, weights = torch.arange(4)[:, None].npu(), x[:4], weights[:4, :1]
    tensors = [x, ids, weights, weight1, weight2]
    y = moe(*tensors, activation)
    assert_close(y, tensors, activation)
    assert share != "none" or not y.any()


@each_route
def test_skipped_ids_count_for_nothing_whatever_their_size(route: str, activation: str):
    """Of int64 ids int32 keeps the lower half, in which the second of these would be expert 1."""
    x, ids, weights, weight1, weight2 = block(activation=activation)
    for skipped in (4, 2**32 + 1, 2**63 - 1):
        some = ids.clone()
        some[::2, 0] = skipped
        silent = weights.clone()
        silent[::2, 0] = 0
        assert torch.equal(
            moe(x, some, weights, weight1, weight2, activation),
            moe(x, ids, silent, weight1, weight2, activation),
        )


@each_route
def test_it_neither_waits_for_the_device_nor_reads_from_it(route: str, activation: str):
    tensors = block(activation=activation)
    for _ in range(2):  # allocates what the next call reuses
        moe(*tensors, activation)
    torch.npu.synchronize()
    before = emulator.counters()
    y = moe(*tensors, activation)
    during = emulator.counters()
    for name in ("synchronizations", "device_to_host_copies", "host_to_device_copies", "allocations"):
        assert during[name] == before[name], name
    assert_close(y, tensors, activation)


def operators(tensors: list[torch.Tensor], activation: str, **options: Any) -> list[str]:
    """What runs on the device, in order."""
    torch.npu.synchronize()
    with emulator.trace() as calls:
        moe(*tensors, activation, **options)
        torch.npu.synchronize()
    return [name for name in calls if name.startswith("aclnn") and not name.endswith("GetWorkspaceSize")]


def test_both_routes_are_the_newer_chain_and_no_loop():
    """Routing by row order (V3), and the sum that goes with it; as many operators for 200 experts as for
    3."""
    chain = "aclnnMoeInitRoutingV3", "aclnnMoeFinalizeRoutingV4"
    for activation, products in (("gelu", ["aclnnFFNV3"]), ("reglu", ["aclnnGroupedMatmulV5"] * 2)):
        few, many = (operators(block(E=E, activation=activation), activation) for E in (3, 200))
        assert few == many
        vendor = [name for name in few if "Moe" in name or "Grouped" in name or "FFN" in name]
        assert vendor == [chain[0], *products, chain[1]]


def test_a_glu_with_the_activation_on_the_left_is_one_operator():
    tensors = block(activation="swiglu")
    left, right = (operators(tensors, "swiglu", activate_left=left) for left in (True, False))
    assert "aclnnSwiGlu" in left and "aclnnSwiGlu" not in right and len(left) < len(right)


@each_route
def test_no_tokens_no_experts_and_no_slots(route: str, activation: str):
    x, ids, weights, weight1, weight2 = block(activation=activation)
    assert moe(x[:0], ids[:0], weights[:0], weight1, weight2, activation).shape == (0, 16)
    assert not moe(x, ids[:, :0], weights[:, :0], weight1, weight2, activation).any()
    if route == "grouped":  # aclnnFFNV3 has at least one expert
        assert not moe(x, ids, weights, weight1[:0], weight2[:0], activation).any()


@each_route
def test_tokens_may_have_leading_sizes(route: str, activation: str):
    x, ids, weights, *others = block(activation=activation)
    y = moe(x, ids, weights, *others, activation)
    shaped = moe(x.view(2, 3, 16), ids.view(2, 3, 2), weights.view(2, 3, 2), *others, activation)
    assert torch.equal(shaped.view(6, 16), y)


@pytest.mark.parametrize("activation", VENDOR_ACTIVATIONS)
def test_explain_names_the_route_of_tensors_on_the_device(activation: str):
    x, ids, weights, weight1, weight2 = block(activation=activation)
    explanation = ffn_ops.explain(x, weight1, weight2, activation, topk_ids=ids, topk_weights=weights)
    assert explanation.target == "ascend910b"
    assert explanation.route == ("grouped" if activation in GLU else "fused")


def bad(name: str, change: Any) -> dict[str, torch.Tensor]:
    tensors = dict(zip(("x", "topk_ids", "topk_weights", "weight1", "weight2"), block(), strict=True))
    return tensors | {name: change(tensors[name])}


BAD = {
    "x is float32 and weight1 is float16, but": ("x", lambda x: x.float()),
    "topk_ids is float32, but": ("topk_ids", lambda ids: ids.float()),
    "topk_ids has shape [5, 2], but it must be [..., top_k] = [6, 2]": ("topk_ids", lambda ids: ids[:5]),
    "topk_weights has shape [6, 1], but": ("topk_weights", lambda weights: weights[:, :1]),
    "weight1 has shape [16, 32], but it must be [E, K1, N1]": ("weight1", lambda weight: weight[0]),
    "weight1 is a row of uint8, as prepacked weights are, but": (
        "weight1", lambda weight: torch.zeros(64, dtype=torch.uint8).npu()),
    "topk_weights is on cpu and x on npu:0, but": ("topk_weights", lambda weights: weights.cpu()),
}  # fmt: skip


@pytest.mark.parametrize("sentence", BAD)
def test_bad_input_is_named_before_anything_runs(sentence: str):
    tensors = bad(*BAD[sentence])
    torch.npu.synchronize()
    with emulator.trace() as calls, pytest.raises(RuntimeError) as refused:
        moe(**tensors, activation="gelu")
    assert str(refused.value).startswith(sentence)
    assert not [name for name in calls if name.startswith("aclnn")]


def test_what_no_route_does_is_refused_with_the_reason():
    x, ids, weights, weight1, weight2 = (t.cpu() for t in block(activation="swiglu"))
    quantized = [t.to(torch.int8).npu() for t in (x, weight1, weight2)]
    scales = {"scale": torch.ones(4), "offset": torch.zeros(4),
              "deq_scale1": torch.ones(4, 64).long(), "deq_scale2": torch.ones(4, 16).long()}  # fmt: skip
    with pytest.raises(RuntimeError, match="aclnnFFNV3 has GLU in fp16 only"):
        moe(quantized[0], ids.npu(), weights.npu(), *quantized[1:], "swiglu",
            **{name: tensor.npu() for name, tensor in scales.items()})  # fmt: skip
    x, ids, weights, weight1, weight2 = block(E=1025)
    with pytest.raises(RuntimeError, match="npu_grouped_matmul takes at most 1024"):
        moe(x, ids, weights, weight1, weight2, "gelu")


def test_ascend310p_refuses():
    program = (
        "x, w1, w2 = operands()\n"
        "ids = torch.zeros(6, 2, dtype=torch.int64).npu()\n"
        "torch.ops.ffn.moe(x, ids, torch.ones(6, 2).npu(), w1, w2, 'gelu')"
    )
    assert "ascend310p has dense calls only" in run_process(program, soc="Ascend310P3", operators=True).stderr


@each_route
def test_a_call_runs_where_x_is(route: str, activation: str):
    tensors = [tensor.to("npu:1") for tensor in block(activation=activation)]
    y = moe(*tensors, activation)
    assert y.device == torch.device("npu:1") and torch.npu.current_device() == 0
    assert_close(y, tensors, activation)


@each_route
def test_a_call_runs_on_the_current_stream(route: str, activation: str):
    tensors = block(activation=activation)
    side = torch.npu.Stream()
    with emulator.slow(task_us=2000), torch.npu.stream(side):
        y = moe(*tensors, activation)
        done = side.record_event()
    done.synchronize()
    assert_close(y, tensors, activation)


@each_route
def test_opcheck(route: str, activation: str):
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic", "test_autograd_registration")
    result = torch.library.opcheck(
        moe.default, (*block(activation=activation), activation), test_utils=checks
    )
    assert result == dict.fromkeys(checks, "SUCCESS")


@each_route
def test_it_compiles_in_one_graph(route: str, activation: str):
    x, ids, weights, *others = block(activation=activation)

    def layer(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return moe(x + 1, ids, weights, *others, activation) * 2

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for M in (6, 4):
        call = x[:M], ids[:M], weights[:M]
        assert torch.equal(compiled(*call), layer(*call))


LAYERS: list[dict[str, Any]] = [
    {},
    {"activation": "gelu", "bias": True, "shared_experts": 2},
    {"activation": "swiglu", "shared_experts": 1, "renormalize": True},
    {"activation": "relu2", "shared_experts": 1},
    {"activation": "swiglu_clamped", "router": "topk_softmax"},
    {"router": "sigmoid", "n_group": 2, "topk_group": 1},
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", LAYERS)
def test_the_layer_computes_what_it_does_on_the_cpu_and_reads_nothing(
    options: dict[str, Any], dtype: torch.dtype
):
    torch.manual_seed(0)
    layer, x = ffn_ops.MoE(16, 32, 4, 2, dtype=dtype, **options), torch.randn(6, 16).to(dtype)
    with torch.no_grad():
        expected = layer(x).double()
        layer, x = layer.npu(), x.npu()
        for _ in range(2):
            y = layer(x)
        torch.npu.synchronize()
        before = emulator.counters()
        layer(x)
        during = emulator.counters()
    for name in ("synchronizations", "device_to_host_copies", "host_to_device_copies"):
        assert during[name] == before[name], name
    # Rows, hidden values, results, weights and sums are rounded: some half-steps of the largest value.
    unit = torch.finfo(dtype).eps / 2
    assert (y.cpu().double() - expected).abs().max() <= 16 * unit * expected.abs().max()


@pytest.mark.parametrize("kind", [torch.uint8, torch.int32])
def test_packed_int4_from_the_middle_of_a_tensor(kind: torch.dtype):
    """Bytes become the int32 that npu_grouped_matmul reads, from wherever they begin."""
    torch.manual_seed(1)
    x, ids, weights, *_ = block()
    packed = [torch.randint(0, 256, size, dtype=torch.uint8) for size in ((4, 16, 32), (4, 32, 8))]
    parameters = {
        f"antiquant_{what}{i}": (torch.rand(4, n) * factor).half()
        for what, factor in (("scale", 0.05), ("offset", 3)) for i, n in (("1", 64), ("2", 16))
    }  # fmt: skip
    call = {"activation": "geglu", **{name: value.npu() for name, value in parameters.items()}}
    expected = moe(x, ids, weights, *(w.view(torch.int32).npu() for w in packed), **call)
    shifted = [
        torch.cat([torch.zeros(1, dtype=torch.uint8), w.flatten()]).npu()[1:].view(w.shape) for w in packed
    ]
    given = shifted if kind == torch.uint8 else [w.view(kind).npu() for w in packed]
    assert torch.equal(moe(x, ids, weights, *given, **call), expected)
    on_host = moe(*on_cpu(x, ids, weights), *packed, "geglu", **parameters)
    torch.testing.assert_close(expected.cpu(), on_host, rtol=2**-7, atol=2**-7)
