# SPDX-License-Identifier: Apache-2.0
"""The mixture-of-experts operators around FFN, through torch_npu, against what they are described to do, in
NumPy.

Row order numbers choice j of token i as i * K + j, column order as j * N + i; chain A is in column order,
chain B in row order.
"""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch_npu
from process import run

import ffn_ops

# torch_npu's own: some of these operators are marked for removal, and tensors have no internal format here.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

N, H, K, E = 11, 8, 3, 5
EPS = float(np.finfo(np.float32).eps)


def npu(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).npu()


def normal(*size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def close(result: torch.Tensor, expected: np.ndarray, terms: int = 16) -> None:
    """Equal up to the rounding of so many float32 operations."""
    np.testing.assert_allclose(result.cpu().float().numpy(), expected, rtol=terms * EPS, atol=terms * EPS)


def same(result: torch.Tensor, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(result.cpu().numpy(), expected)


def routed(experts: int = E, seed: int = 1) -> np.ndarray:
    """Experts of each token, all different; expert 2 gets nothing."""
    rng = np.random.default_rng(seed)
    others = np.array([e for e in range(experts) if e != 2], np.int32)
    return np.stack([rng.permutation(others)[:K] for _ in range(N)])


def stable_order(expert_idx: np.ndarray) -> np.ndarray:
    return np.argsort(expert_idx.ravel(), kind="stable")


@pytest.mark.parametrize("leading", [(N,), (2, 3)])
@pytest.mark.parametrize("with_finished", [False, True])
def test_gating_top_k_softmax(leading: tuple[int, ...], with_finished: bool):
    x = normal(*leading, E)
    x[..., 3] = x[..., 1]  # ties keep the lower index
    finished = np.arange(int(np.prod(leading))).reshape(leading) % 3 == 0
    y, expert_idx, row_idx = torch_npu.npu_moe_gating_top_k_softmax(
        npu(x), npu(finished) if with_finished else None, K
    )
    p = softmax(x)
    top = np.argsort(-p, axis=-1, kind="stable")[..., :K]
    close(y, np.take_along_axis(p, top, -1))
    same(expert_idx, np.where(finished[..., None], E, top) if with_finished else top)
    rows = int(np.prod(leading))
    same(row_idx, (np.arange(K)[None] * rows + np.arange(rows)[:, None]).reshape(*leading, K))
    assert expert_idx.dtype == row_idx.dtype == torch.int32


def test_gating_rounds_before_it_chooses():
    """Weights that are equal in x's dtype are ties: the lower index wins, whatever float32 said."""
    x = np.array([[1, 1 + 2**-10, 1, 12]], np.float16)
    p = softmax(x.astype(np.float32))
    assert p[0, 1] > p[0, 0] and np.float16(p[0, 1]) == np.float16(p[0, 0])  # subnormal numbers
    for y, expert_idx, _ in (
        torch_npu.npu_moe_gating_top_k_softmax(npu(x), None, K),
        torch_npu.npu_moe_gating_top_k_softmax_v2(npu(x), k=K),
    ):
        same(expert_idx, np.array([[3, 0, 1]]))
        assert y.dtype == torch.float16
        same(y, p.astype(np.float16)[:, [3, 0, 1]])


@pytest.mark.parametrize("renorm", [0, 1])
def test_gating_top_k_softmax_v2(renorm: int):
    x = normal(N, E)
    y, expert_idx, _ = torch_npu.npu_moe_gating_top_k_softmax_v2(npu(x), k=K, renorm=renorm)
    top = np.argsort(-x, axis=-1, kind="stable")[:, :K]
    same(expert_idx, top)
    chosen = np.take_along_axis(x if renorm else softmax(x), top, -1)
    close(y, softmax(chosen) if renorm else chosen)
    if renorm == 0:
        close(torch_npu.npu_moe_gating_top_k_softmax_v2(npu(x), k=K, output_softmax=True)[2], softmax(x))


@pytest.mark.parametrize("active_num", [N, 4, 99])
def test_init_routing(active_num: int):
    x, expert_idx = normal(N, H), routed()
    row_idx = np.ascontiguousarray(np.arange(N * K, dtype=np.int32).reshape(K, N).T)
    expanded_x, expanded_row_idx, experts = torch_npu.npu_moe_init_routing(
        npu(x), npu(row_idx), npu(expert_idx), active_num
    )
    rows = row_idx.ravel()[stable_order(expert_idx)]
    same(experts, np.sort(expert_idx.ravel()))
    same(expanded_x, x[rows % N][: min(N, active_num) * K])
    inverse = np.empty(N * K, np.int32)
    inverse[rows] = np.arange(N * K)
    same(expanded_row_idx, inverse)


def route_v3(x: np.ndarray, expert_idx: np.ndarray, **options: Any) -> tuple[torch.Tensor, ...]:
    settings = {
        "expert_num": E,
        "active_expert_range": [0, E],
        "expert_tokens_num_flag": True,
        "active_num": N * K,
    }
    return torch_npu.npu_moe_init_routing_v2(npu(x), npu(expert_idx), **(settings | options))


# Pairs of expert and count (kind 2) are described for all experts only.
@pytest.mark.parametrize("kind,first,last", [(0, 0, E), (0, 1, 4), (1, 0, E), (1, 1, 4), (2, 0, E)])
def test_init_routing_v3_dropless(kind: int, first: int, last: int):
    x, expert_idx = normal(N, H), routed()
    expanded_x, row_idx, tokens, _ = route_v3(
        x, expert_idx, active_expert_range=[first, last], expert_tokens_num_type=kind, row_idx_type=0
    )
    flat = expert_idx.ravel()
    order = np.array([r for r in stable_order(expert_idx) if first <= flat[r] < last])
    same(expanded_x[: len(order)], x[order // K])
    expected = np.full(N * K, -1)
    expected[order] = np.arange(len(order))
    same(row_idx, expected)
    counts = np.bincount(flat, minlength=E)[first:last]
    if kind == 2:
        pairs = [(e, n) for e, n in enumerate(counts) if n > 0] + [(0, 0)]  # expert 2 is empty
        same(tokens, np.array(pairs))
    else:
        same(tokens, np.cumsum(counts) if kind == 0 else counts)
    assert tokens.dtype == torch.int64
    scattered = route_v3(
        x, expert_idx, active_expert_range=[first, last], expert_tokens_num_type=kind, row_idx_type=1
    )
    same(scattered[1][: len(order)], order)


def test_init_routing_v3_drops_and_pads():
    x, expert_idx, c = normal(N, H), routed(), 4
    expanded_x, row_idx, tokens, _ = route_v3(
        x, expert_idx, drop_pad_mode=1, expert_capacity=c, expert_tokens_num_type=1, row_idx_type=0
    )
    expected_x, expected_idx = np.zeros((E, c, H), np.float32), np.full(N * K, -1)
    filled = [0] * E
    for r, e in enumerate(expert_idx.ravel()):
        if filled[e] < c:
            expected_x[e, filled[e]], expected_idx[r] = x[r // K], e * c + filled[e]
        filled[e] += 1
    assert max(filled) > c > min(filled)
    same(expanded_x, expected_x)
    same(row_idx, expected_idx)
    same(tokens, np.array(filled))


def test_init_routing_v3_quantises_each_row():
    x, expert_idx = normal(N, H), routed()
    expanded_x, _, _, scale = route_v3(x, expert_idx, quant_mode=1, expert_tokens_num_type=1, row_idx_type=0)
    rows = x[stable_order(expert_idx) // K]
    close(scale, np.abs(rows).max(1) / 127)
    same(expanded_x, np.rint(rows / (np.abs(rows).max(1, keepdims=True) / np.float32(127))).astype(np.int8))


def test_init_routing_v3_quantises_by_one_scale():
    x, expert_idx = normal(N, H).astype(np.float16), routed()
    scale, offset = np.array([80], np.float32), np.array([3], np.float32)
    expanded_x, _, _, _ = route_v3(
        x, expert_idx, quant_mode=0, scale=npu(scale), offset=npu(offset), expert_tokens_num_type=1
    )
    rows = x[stable_order(expert_idx) // K].astype(np.float32)
    expected = np.clip(np.rint(rows * scale + offset), -128, 127)
    assert expected.max() == 127  # saturated
    same(expanded_x, expected.astype(np.int8))


V2 = """
import json, torch_npu
x, expert_idx = (torch.tensor(given).npu() for given in {given})
results = torch_npu.npu_moe_init_routing_v2(
    x.half(), expert_idx.int(), expert_num={E}, active_expert_range=[0, {E}], expert_tokens_num_flag=True,
    expert_tokens_num_type=1, active_num=expert_idx.numel(), row_idx_type=0)
print(json.dumps([result.cpu().tolist() for result in results[:3]]))
"""


def test_init_routing_v2():
    """torch_npu calls it on a 310P, without dropping, and asks for the groups' ends whatever it was asked."""
    x, expert_idx = normal(N, H).astype(np.float16), routed()
    program = V2.format(given=(x.tolist(), expert_idx.tolist()), E=E)
    done = run(program, soc="Ascend310P3", operators=True)
    assert done.returncode == 0, done.stderr
    expanded_x, row_idx, tokens = json.loads(done.stdout.splitlines()[-1])
    order = stable_order(expert_idx)
    np.testing.assert_array_equal(expanded_x, x[order // K])
    np.testing.assert_array_equal(row_idx, np.argsort(order))
    np.testing.assert_array_equal(tokens, np.cumsum(np.bincount(expert_idx.ravel(), minlength=E)))


def test_compute_expert_tokens():
    same(
        torch_npu.npu_moe_compute_expert_tokens(npu(np.array([0, 0, 0, 1, 1, 2], np.int32)), 3),
        np.array([3, 5, 6]),
    )
    values = np.sort(routed().ravel()).astype(np.int32)
    tokens = torch_npu.npu_moe_compute_expert_tokens(npu(values), E)
    same(tokens, np.searchsorted(values, np.arange(E), side="right"))
    assert tokens.dtype == torch.int32


@pytest.mark.parametrize("mode", [0, 1, 2, 3])
@pytest.mark.parametrize("extras", [False, True])
def test_finalize_routing(mode: int, extras: bool):
    rng = np.random.default_rng(mode)
    rows = normal(N * K, H) if mode % 2 == 0 else normal(E, N, H)
    indices = rng.permutation(rows.size // H)[: N * K].astype(np.int32)
    if mode % 2 == 1:
        indices[::4] = -1
    scales, expert_idx = normal(N, K, seed=2), routed()
    skip1, skip2, bias = normal(N, H, seed=3), normal(N, H, seed=4), normal(E, H, seed=5)
    out = torch_npu.npu_moe_finalize_routing(
        npu(rows), *((npu(skip1), npu(skip2), npu(bias)) if extras else (None, None, None)),
        npu(scales), npu(indices), npu(expert_idx), mode,
    )  # fmt: skip
    flat = np.concatenate([rows.reshape(-1, H), np.zeros((1, H), np.float32)])  # -1 reads the zeros
    expected = skip1 + skip2 if extras else np.zeros((N, H), np.float32)
    for j in range(K):
        index = indices.reshape(N, K)[:, j] if mode >= 2 else indices.reshape(K, N)[j]
        expected = expected + scales[:, j, None] * (flat[index] + (bias[expert_idx[:, j]] if extras else 0))
    close(out, expected)


def grouped_reference(x: np.ndarray, weight: np.ndarray, counts: np.ndarray) -> np.ndarray:
    ends = np.cumsum(counts)
    parts = [x[end - n : end].astype(np.float64) @ weight[g].astype(np.float64)
             for g, (n, end) in enumerate(zip(counts, ends, strict=True))]  # fmt: skip
    return np.concatenate(parts)


COUNTS = np.array([4, 0, 3, 2, 2])
GROUP_LISTS = {  # by group_list_type
    0: np.cumsum(COUNTS),
    1: COUNTS,
    2: np.array([(0, 4), (2, 3), (3, 2), (4, 2), (0, 0)]),  # as routing writes them: used experts, then zeros
}


@pytest.mark.parametrize("split_item", [2, 3])
@pytest.mark.parametrize("kind", GROUP_LISTS)
@pytest.mark.parametrize("stacked", [False, True])
def test_grouped_matmul(split_item: int, kind: int, stacked: bool):
    x, weight, bias = normal(N, H), normal(E, H, 6, seed=1), normal(E, 6, seed=2)
    (y,) = torch_npu.npu_grouped_matmul(
        [npu(x)],
        [npu(weight)] if stacked else [npu(w) for w in weight],
        bias=[npu(bias)] if stacked else [npu(b) for b in bias],
        group_list=npu(GROUP_LISTS[kind]),
        split_item=split_item, group_type=0, group_list_type=kind,
    )  # fmt: skip
    close(y, grouped_reference(x, weight, COUNTS) + np.repeat(bias, COUNTS, 0), terms=8 * H)


def test_grouped_matmul_of_lists():
    xs, weights = [normal(3, H), normal(5, H, seed=1)], [normal(H, 6, seed=2), normal(H, 6, seed=3)]
    on_npu = [npu(x) for x in xs], [npu(w) for w in weights]
    expected = [x @ w for x, w in zip(xs, weights, strict=True)]
    ys = torch_npu.npu_grouped_matmul(*on_npu, split_item=0, group_type=-1)
    for y, value in zip(ys, expected, strict=True):
        close(y, value, terms=8 * H)
    counts = torch.tensor([3, 5]).npu()
    (y,) = torch_npu.npu_grouped_matmul(
        *on_npu, group_list=counts, split_item=3, group_type=0, group_list_type=1
    )
    close(y, np.concatenate(expected), terms=8 * H)


def test_grouped_matmul_with_host_ends():
    """The older form: the groups' ends as a list of Python's, several results or one."""
    x, weight = normal(N, H), normal(E, H, 6, seed=1)
    expected, ends = grouped_reference(x, weight, COUNTS), np.cumsum(COUNTS).tolist()
    for split_item in (1, 3):
        ys = torch_npu.npu_grouped_matmul(
            [npu(x)], [npu(w) for w in weight], group_list=ends, split_item=split_item
        )
        assert [y.shape[0] for y in ys] == (COUNTS.tolist() if split_item == 1 else [N])
        close(torch.cat(list(ys)), expected, terms=8 * H)


def test_grouped_matmul_in_training():
    """As autograd functions around it call it: dx by transposed weights, dw by groups along K."""
    x, weight, grad = normal(N, H), normal(E, H, 6, seed=1), normal(N, 6, seed=2)
    (dx,) = torch_npu.npu_grouped_matmul(
        [npu(grad)], [npu(weight).transpose(1, 2)], bias=None, group_list=npu(COUNTS),
        split_item=2, group_type=0, group_list_type=1,
    )  # fmt: skip
    close(dx, grouped_reference(grad, weight.transpose(0, 2, 1), COUNTS), terms=8 * H)
    (dw,) = torch_npu.npu_grouped_matmul(
        [npu(x).t()], [npu(grad)], bias=None, group_list=npu(COUNTS),
        split_item=3, group_type=2, group_list_type=1,
    )  # fmt: skip
    parts = np.split(np.arange(N), np.cumsum(COUNTS)[:-1])
    close(dw, np.stack([x[rows].T @ grad[rows] for rows in parts]), terms=8 * H)


def int8(*size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-99, 99, size).astype(np.int8)


ACTIVATIONS: dict[int, Callable[[torch.Tensor], torch.Tensor]] = {  # by act_type
    0: lambda y: y,
    1: torch.relu,
    2: lambda y: F.gelu(y, approximate="tanh"),
    4: lambda y: y * torch.sigmoid(1.702 * y),
    5: F.silu,
}


@pytest.mark.parametrize("act_type", ACTIVATIONS)
@pytest.mark.parametrize("kind", GROUP_LISTS)
def test_grouped_matmul_w8a8(act_type: int, kind: int):
    """Scales for each row of x and each column of weight; scale is bfloat16 where y is."""
    x, weight = int8(N, H), int8(E, H, 6, seed=1)
    scale, per_token = np.abs(normal(E, 6)) / 2**12, np.abs(normal(N))
    for dtype, given in ((torch.bfloat16, npu(scale).bfloat16()), (torch.float16, npu(scale))):
        (y,) = torch_npu.npu_grouped_matmul(
            [npu(x)], [npu(weight)], scale=[given], per_token_scale=[npu(per_token)],
            group_list=npu(GROUP_LISTS[kind]), split_item=2, group_type=0, group_list_type=kind,
            act_type=act_type, output_dtype=dtype,
        )  # fmt: skip
        columns = np.repeat(given.cpu().double().numpy(), COUNTS, 0)
        exact = grouped_reference(x, weight, COUNTS) * columns * per_token[:, None]
        expected = ACTIVATIONS[act_type](torch.from_numpy(exact))
        # Some float32 steps, then one rounding; the smallest float16 numbers are 2^-24 apart.
        finfo = torch.finfo(dtype)
        torch.testing.assert_close(y.cpu().double(), expected, rtol=finfo.eps / 2 + 64 * EPS, atol=2.0**-20)


def test_grouped_matmul_w8a8_of_lists():
    """One weight and one scale for each expert, as expert load balancing keeps them; int32 bias."""
    x, weight, bias = int8(N, H), int8(E, H, 6, seed=1), int8(E, 6, seed=2).astype(np.int32)
    scale = npu(np.abs(normal(E, 6))).bfloat16()
    (y,) = torch_npu.npu_grouped_matmul(
        [npu(x)], [npu(w) for w in weight], scale=list(scale), bias=[npu(b) for b in bias],
        group_list=npu(COUNTS), split_item=2, group_type=0, group_list_type=1, output_dtype=torch.bfloat16,
    )  # fmt: skip
    exact = grouped_reference(x, weight, COUNTS) + np.repeat(bias, COUNTS, 0)
    expected = exact * np.repeat(scale.cpu().double().numpy(), COUNTS, 0)
    np.testing.assert_allclose(y.cpu().double().numpy(), expected, rtol=2.0**-8 + 8 * EPS)


def test_grouped_matmul_to_int32():
    """The sums themselves, for an operator that scales them later; not all of them are float32 numbers."""
    x, weight = np.full((N, 2048), 127, np.int8), np.full((E, 2048, 6), 127, np.int8)
    x[:, 0] = 2
    (y,) = torch_npu.npu_grouped_matmul(
        [npu(x)], [npu(weight)], group_list=npu(COUNTS), split_item=2, group_type=0, group_list_type=1,
        output_dtype=torch.int32,
    )  # fmt: skip
    expected = 127 * 127 * 2047 + 127 * 2
    assert int(np.float32(expected)) != expected
    same(y, np.full((N, 6), expected))


@pytest.mark.parametrize("bits,groups", [(8, None), (4, None), (4, 1), (4, 2)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_grouped_matmul_of_integer_weights(dtype: torch.dtype, bits: int, groups: int | None):
    """int4 as vllm-ascend packs it, eight in an int32. Scales for each column, or (int4) for each of the
    groups along K too. (w + offset) * scale is rounded to float16 after both steps, to bfloat16 once."""
    n = 16
    weight = np.random.default_rng(0).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (E, H, n)).astype(np.int8)
    shape = (E, n) if groups is None else (E, groups, n)
    scale = torch.from_numpy(np.abs(normal(*shape, seed=1))).to(dtype)
    offset = torch.from_numpy(normal(*shape, seed=2)).to(dtype)
    x = torch.from_numpy(normal(N, H)).to(dtype)
    given = npu(weight)
    if bits == 4:
        given = torch_npu.npu_convert_weight_to_int4pack(npu(weight.astype(np.int32)).flatten(0, 1))
        given = given.view(E, H, n // 8)
    (y,) = torch_npu.npu_grouped_matmul(
        [x.npu()], [given], antiquant_scale=[scale.npu()], antiquant_offset=[offset.npu()],
        group_list=npu(COUNTS), split_item=2, group_type=0, group_list_type=1, output_dtype=dtype,
    )  # fmt: skip
    rows = [t.reshape(E, -1, n).repeat_interleave(H // (groups or 1), 1) for t in (offset, scale)]
    step = dtype if dtype == torch.float16 else torch.float32
    dequantised = ((torch.from_numpy(weight).to(step) + rows[0].to(step)) * rows[1].to(step)).to(dtype)
    w, values = dequantised.double().numpy(), x.double().numpy()
    expected = grouped_reference(values, w, COUNTS)
    magnitude = grouped_reference(np.abs(values), np.abs(w), COUNTS)  # of which float32 sums lose a share
    error = np.abs(y.cpu().double().numpy() - expected)
    assert np.all(error <= torch.finfo(dtype).eps / 2 * np.abs(expected) + 2 * H * EPS * magnitude + 2.0**-25)


REFUSED = {  # what npu_grouped_matmul is given, and what it answers
    "[h], [q], antiquant_scale=[s.half().unsqueeze(1)]": "antiquant_scale has groups along K",
    "[h], [q]": "antiquant_scale is missing",
    "[q[0, :1]], [q.int()], scale=[s], output_dtype=torch.float16": "which is not emulated (use int8)",
    "[q[0, :1]], [q]": "results in int8 are not emulated",
}


CALL = """
import torch_npu
h, q = torch.ones(1, 8).half().npu(), torch.ones(1, 8, 8).to(torch.int8).npu()
s, counts = torch.ones(1, 8).npu(), torch.ones(1).long().npu()
torch_npu.npu_grouped_matmul({}, group_list=counts, split_item=2, group_type=0, group_list_type=1)
torch.npu.synchronize()
"""


@pytest.mark.parametrize("call", REFUSED)
def test_what_grouped_matmul_does_not_do_is_named(call: str):
    done = run(CALL.format(call), operators=True)
    assert done.returncode != 0
    message = done.stdout + done.stderr
    assert "aclnnGroupedMatmulV5: " in message and REFUSED[call] in message, message


def test_grouped_matmul_takes_1024_groups():
    call = "[h], [h.view(1, 8, 1).expand(1025, 8, 1).contiguous()]"
    done = run(CALL.format(call).replace("torch.ones(1)", "torch.zeros(1025)"), operators=True)
    assert done.returncode != 0
    assert "group_list has 1025 groups, but 1024 are the most" in done.stdout + done.stderr


def test_trans_quant_param():
    scale, offset = np.abs(normal(16)), 300 * normal(16, seed=1)
    bits = scale.view(np.uint32).astype(np.int64) & 0xFFFFE000 | 1 << 46
    same(torch_npu.npu_trans_quant_param(npu(scale)), bits)
    nine = np.clip(np.rint(offset), -256, 255).astype(np.int64) & 0x1FF
    assert len({*nine.tolist()} & {0x100, 0xFF}) == 2  # saturated on both sides
    same(torch_npu.npu_trans_quant_param(npu(scale), npu(offset)), bits | nine << 37)


def test_swiglu():
    x = normal(N, H)
    a, b = np.split(x, 2, -1)
    close(torch_npu.npu_swiglu(npu(x)), a / (1 + np.exp(-a)) * b)
    a, b = np.split(x[:10], 2, 0)
    close(torch_npu.npu_swiglu(npu(x[:10].copy()), 0), a / (1 + np.exp(-a)) * b)


def test_swiglu_backward():
    x, grad = normal(N, H), normal(N, H // 2, seed=1)
    on_npu = npu(x).requires_grad_()
    torch_npu.npu_swiglu(on_npu).backward(npu(grad))
    a, b = np.split(x.astype(np.float64), 2, -1)
    s = 1 / (1 + np.exp(-a))
    assert on_npu.grad is not None
    close(on_npu.grad, np.concatenate([grad * b * (s + a * s * (1 - s)), grad * a * s], -1))


def test_dynamic_quant():
    x, smooth = normal(N, H), np.abs(normal(H, seed=1))
    x[0] = 0
    for factor in (None, smooth):
        values = x if factor is None else x * factor
        y, scale = torch_npu.npu_dynamic_quant(npu(x), smooth_scales=None if factor is None else npu(factor))
        close(scale, np.abs(values).max(1) / 127)
        expected = values / np.where(scale.cpu().numpy() == 0, 1, scale.cpu().numpy())[:, None]
        same(y, np.rint(expected).astype(np.int8))
    each, ends = np.abs(normal(E, H, seed=2)).astype(np.float16), np.cumsum(COUNTS).astype(np.int32)
    rows = x.astype(np.float16)
    y, scale = torch_npu.npu_dynamic_quant(npu(rows), smooth_scales=npu(each), group_index=npu(ends))
    values = rows.astype(np.float32) * np.repeat(each.astype(np.float32), COUNTS, 0)  # one row for each group
    close(scale, np.abs(values).max(1) / 127)
    same(y[1:], np.rint(values[1:] / scale.cpu().numpy()[1:, None]).astype(np.int8))
    y, scale, offset = torch_npu.npu_dynamic_quant_asymmetric(npu(x[1:]))
    back = (y.cpu().numpy() - offset.cpu().numpy()[:, None]) * scale.cpu().numpy()[:, None]
    assert np.all(np.abs(back - x[1:]) <= scale.cpu().numpy()[:, None] * (0.5 + 256 * EPS))


def layer_reference(x: np.ndarray, gate: np.ndarray, weight1: np.ndarray, weight2: np.ndarray) -> np.ndarray:
    """A mixture-of-experts layer, token by token."""
    p = softmax(x.astype(np.float32) @ gate)
    top = np.argsort(-p, axis=-1, kind="stable")[:, :K]
    out = np.zeros_like(x, np.float64)
    for i, j in np.ndindex(N, K):
        e = top[i, j]
        hidden = np.maximum(x[i].astype(np.float64) @ weight1[e], 0)
        out[i] += p[i, e] * (hidden @ weight2[e])
    return out


@pytest.mark.parametrize("chain", ["A", "A, ffn_ops", "B", "B, ffn_ops"])
def test_a_chain_is_a_mixture_of_experts_layer(chain: str):
    h, wide = 16, 32
    x, gate = normal(N, h) / 4, normal(h, E, seed=1)
    gate[:, 2] = -9 * np.abs(gate[:, 2])
    weight1, weight2 = normal(E, h, wide, seed=2) / 4, normal(E, wide, h, seed=3) / 4
    x16, w1, w2 = (a.astype(np.float16) for a in (x, weight1, weight2))
    y, expert_idx, row_idx = torch_npu.npu_moe_gating_top_k_softmax(npu(x16).float() @ npu(gate), None, K)

    if chain.startswith("A"):
        rows, row_idx, experts = torch_npu.npu_moe_init_routing(npu(x16), row_idx, expert_idx, N)
        tokens, cumulative, mode = torch_npu.npu_moe_compute_expert_tokens(experts, E).long(), True, 0
    else:
        rows, row_idx, tokens, _ = torch_npu.npu_moe_init_routing_v2(
            npu(x16), expert_idx, expert_num=E, active_expert_range=[0, E], expert_tokens_num_flag=True,
            expert_tokens_num_type=1, active_num=N * K, row_idx_type=0,
        )  # fmt: skip
        cumulative, mode = False, 2
    if chain.endswith("ffn_ops"):
        out = ffn_ops.ffn(
            rows,
            npu(w1),
            npu(w2),
            "relu",
            expert_tokens=tokens,
            tokens_index_flag=cumulative,
            inner_precise=1,
        )
    else:
        name = "expert_tokens_index" if cumulative else "expert_tokens"
        out = torch_npu.npu_ffn(rows, npu(w1), npu(w2), "relu", inner_precise=1, **{name: tokens.tolist()})
    result = torch_npu.npu_moe_finalize_routing(out, None, None, None, y.half(), row_idx, expert_idx, mode)

    expected = layer_reference(x16, gate, w1.astype(np.float64), w2.astype(np.float64))
    # float16 rounds rows, hidden values, results, weights and sums: a handful of half-ulps of the largest
    # value.
    assert np.abs(result.float().cpu().numpy() - expected).max() <= 16 * 2.0**-11 * np.abs(expected).max()
