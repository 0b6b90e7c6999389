# SPDX-License-Identifier: Apache-2.0
"""The mixture-of-experts operators around FFN, through torch_npu, against what they are described to do, in
NumPy.

Row order numbers choice j of token i as i * K + j, column order as j * N + i; chain A is in column order,
chain B in row order.
"""

from typing import Any

import numpy as np
import pytest
import torch
import torch_npu

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


@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize("first,last", [(0, E), (1, 4)])
def test_init_routing_v3_dropless(kind: int, first: int, last: int):
    x, expert_idx = normal(N, H), routed()
    if kind == 2 and first > 0:
        pytest.skip("pairs are described for all experts only")
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


@pytest.mark.parametrize("split_item", [2, 3])
@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("stacked", [False, True])
def test_grouped_matmul(split_item: int, kind: int, stacked: bool):
    counts = np.array([4, 0, 3, 2, 2])
    x, weight, bias = normal(N, H), normal(E, H, 6, seed=1), normal(E, 6, seed=2)
    (y,) = torch_npu.npu_grouped_matmul(
        [npu(x)],
        [npu(weight)] if stacked else [npu(w) for w in weight],
        bias=[npu(bias)] if stacked else [npu(b) for b in bias],
        group_list=npu(counts if kind else np.cumsum(counts)),
        split_item=split_item, group_type=0, group_list_type=kind,
    )  # fmt: skip
    close(y, grouped_reference(x, weight, counts) + np.repeat(bias, counts, 0), terms=8 * H)


def test_grouped_matmul_of_lists():
    xs, weights = [normal(3, H), normal(5, H, seed=1)], [normal(H, 6, seed=2), normal(H, 6, seed=3)]
    ys = torch_npu.npu_grouped_matmul(
        [npu(x) for x in xs], [npu(w) for w in weights], split_item=0, group_type=-1
    )
    for y, x, w in zip(ys, xs, weights, strict=True):
        close(y, x @ w, terms=8 * H)


def test_grouped_matmul_quantised():
    rng = np.random.default_rng(0)
    counts = np.array([4, 0, 3, 2, 2])
    x, weight = (rng.integers(-99, 99, size).astype(np.int8) for size in ((N, H), (E, H, 6)))
    scale, per_token = np.abs(normal(E, 6)), np.abs(normal(N))
    bf16 = npu(scale).bfloat16()
    (y,) = torch_npu.npu_grouped_matmul(
        [npu(x)], [npu(weight)], scale=[bf16], per_token_scale=[npu(per_token)],
        group_list=npu(np.cumsum(counts)), split_item=2, group_type=0, group_list_type=0,
        output_dtype=torch.bfloat16,
    )  # fmt: skip
    exact = (
        grouped_reference(x, weight, counts)
        * np.repeat(bf16.float().cpu().numpy(), counts, 0)
        * per_token[:, None]
    )
    np.testing.assert_allclose(y.float().cpu().numpy(), exact, rtol=2.0**-8)  # one rounding to bfloat16

    half, shift = np.abs(normal(E, 6, seed=1)).astype(np.float16), normal(E, 6, seed=2).astype(np.float16)
    rows = normal(N, H).astype(np.float16)
    (y,) = torch_npu.npu_grouped_matmul(
        [npu(rows)], [npu(weight)], antiquant_scale=[npu(half)], antiquant_offset=[npu(shift)],
        group_list=npu(counts), split_item=2, group_type=0, group_list_type=1,
    )  # fmt: skip
    dequantised = (weight.astype(np.float64) + shift[:, None]) * half[:, None]
    expected = grouped_reference(rows, dequantised, counts)
    magnitude = grouped_reference(np.abs(rows), np.abs(dequantised), counts)
    assert np.all(
        np.abs(y.cpu().numpy() - expected) <= 2.0**-11 * np.abs(expected) + 2 * H * EPS * magnitude + 2.0**-25
    )


def test_swiglu():
    x = normal(N, H)
    a, b = np.split(x, 2, -1)
    close(torch_npu.npu_swiglu(npu(x)), a / (1 + np.exp(-a)) * b)
    a, b = np.split(x[:10], 2, 0)
    close(torch_npu.npu_swiglu(npu(x[:10].copy()), 0), a / (1 + np.exp(-a)) * b)


def test_dynamic_quant():
    x, smooth = normal(N, H), np.abs(normal(H, seed=1))
    x[0] = 0
    for factor in (None, smooth):
        values = x if factor is None else x * factor
        y, scale = torch_npu.npu_dynamic_quant(npu(x), smooth_scales=None if factor is None else npu(factor))
        close(scale, np.abs(values).max(1) / 127)
        expected = values / np.where(scale.cpu().numpy() == 0, 1, scale.cpu().numpy())[:, None]
        same(y, np.rint(expected).astype(np.int8))
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
