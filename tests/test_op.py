# SPDX-License-Identifier: Apache-2.0
"""torch.ops.ffn.ffn against the reference on random legal calls, and what must hold whatever the numbers are.

On the CPU, and with `pytest --device npu` on emulated NPU tensors, with the calls that are legal there. Calls
come from strategies.py, the bound from tolerance.py. Kernels by instruction set are test_kernels.py's affair,
bad input is test_bad_input.py's, tracing test_compile.py's.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native import BOUNDARY, KERNELS
from strategies import DEVICE, TARGET, Call, calls, to_numpy
from tolerance import Kernel, assert_close

import ffn_ops
import reference
from ffn_ops import _native
from ffn_ops.contract import MODES, TARGETS

MODE_NAMES = tuple(mode.name for mode in MODES if TARGETS[TARGET][0] in mode.routes.split())
ISA = _native.selected_isa()
KERNEL = KERNELS[ISA] if DEVICE == "cpu" else Kernel(stepwise=True)
SEEDS = st.integers(0, 2**32 - 1)
op = torch.ops.ffn.ffn

each_mode = pytest.mark.parametrize("mode", MODE_NAMES)


def run(call: Call, arrays: dict[str, np.ndarray], **changes: object) -> torch.Tensor:
    """y, on the CPU."""
    return op(**call.tensors(arrays), activation=call.activation, **{**call.options(), **changes}).cpu()


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).half().to(DEVICE)


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(*shape).half().to(DEVICE)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and to_numpy(a).tobytes() == to_numpy(b).tobytes()


@each_mode
@settings(max_examples=60)
@given(data=st.data(), seed=SEEDS)
def test_a_legal_call_agrees_with_the_reference(mode: str, data: st.DataObject, seed: int):
    call = data.draw(calls(modes=(mode,), layouts=True))
    arrays = call.arrays(seed)
    y = run(call, arrays)
    options = call.reference_options()
    assert_close(to_numpy(y), kernel=KERNEL, **arrays, activation=call.activation, **options)
    if mode.startswith("w8a8") and call.activation.lower() == "relu":
        expected = reference.ffn(**arrays, activation=call.activation, **options)
        assert np.array_equal(to_numpy(y), expected, equal_nan=True)


@each_mode
@settings(max_examples=25)
@given(data=st.data(), seed=SEEDS)
def test_out_and_the_fake_kernel_and_ffn_give_the_same(mode: str, data: st.DataObject, seed: int):
    call = data.draw(calls(modes=(mode,), layouts=True))
    arrays = call.arrays(seed)
    tensors, options = call.tensors(arrays), call.options()
    y = op(**tensors, activation=call.activation, **options)

    layout = data.draw(st.sampled_from(("dense", "wide", "transposed")))
    sevens = torch.full((*y.shape, 2), 7.0, dtype=y.dtype)
    wide, dense, transposed = (t.to(DEVICE) for t in (sevens, sevens[..., 0], sevens[..., 0].mT.contiguous()))
    out = {"dense": dense, "wide": wide[..., 0], "transposed": transposed.mT}[layout]
    assert op(**tensors, activation=call.activation, **options, out=out) is None
    assert same_bits(out, y)
    assert (wide.cpu()[..., 1] == 7).all()

    if "expert_tokens" in tensors:
        tensors["expert_tokens"] = arrays["expert_tokens"].tolist()
    assert same_bits(ffn_ops.ffn(**tensors, activation=call.activation, **options), y)

    fake = op(
        **{k: v.to("meta") for k, v in call.tensors(arrays).items()}, activation=call.activation, **options
    )
    assert (fake.shape, fake.dtype, fake.is_contiguous()) == (y.shape, y.dtype, True)


def matrix(x: np.ndarray) -> np.ndarray:
    return x.reshape(int(np.prod(x.shape[:-1])), x.shape[-1])


def rows_of(
    call: Call, arrays: dict[str, np.ndarray], begin: int, end: int
) -> tuple[Call, dict[str, np.ndarray]]:
    """The call on rows [begin, end) of x alone."""
    x = matrix(arrays["x"])[begin:end]
    ends = np.clip(np.cumsum(call.tokens), begin, end)
    part = {**arrays, "x": x}
    if call.tokens:
        part["expert_tokens"] = np.diff(ends, prepend=begin)
    return replace(call, tokens_index_flag=False), part


@each_mode
@settings(max_examples=25)
@given(data=st.data(), seed=SEEDS)
def test_a_row_depends_on_no_other_row(mode: str, data: st.DataObject, seed: int):
    """But fewer rows of an expert may take another multiplication."""
    call = data.draw(calls(modes=(mode,), largest=80))
    arrays = call.arrays(seed)
    y = run(call, arrays).flatten(0, -2)
    cut = data.draw(st.integers(0, len(y)))
    for begin, end in ((0, cut), (cut, len(y))):
        part, of_part = rows_of(call, arrays, begin, end)
        y_of_part = run(part, of_part)
        if DEVICE == "cpu" and mode in BOUNDARY[ISA]:
            options = {"activation": call.activation, **part.reference_options()}
            assert_close(to_numpy(y_of_part), kernel=KERNEL, **of_part, **options)
        else:
            assert same_bits(y_of_part, y[begin:end])

    if cut < len(y) and arrays["x"].size:  # noise in one row stays in it
        x = arrays["x"].copy()
        matrix(x)[cut] = 3
        other = run(call, {**arrays, "x": x}).reshape(y.shape)
        keep = torch.arange(len(y)) != cut
        assert same_bits(other[keep], y[keep])


@pytest.mark.cpu_only
@each_mode
@settings(max_examples=10)
@given(data=st.data(), seed=SEEDS)
def test_the_number_of_threads_changes_no_bit(mode: str, data: st.DataObject, seed: int):
    call = data.draw(calls(modes=(mode,), largest=200))
    arrays = call.arrays(seed)
    before = torch.get_num_threads()
    try:
        answers = []
        for threads in (1, 2, 8):
            torch.set_num_threads(threads)
            answers.append(run(call, arrays))
    finally:
        torch.set_num_threads(before)
    assert same_bits(answers[0], answers[1]) and same_bits(answers[0], answers[2])


@each_mode
@settings(max_examples=25)
@given(data=st.data(), seed=SEEDS)
def test_experts_are_dense_calls_side_by_side(mode: str, data: st.DataObject, seed: int):
    call = data.draw(calls(modes=(mode,), experts=True))
    arrays = call.arrays(seed)
    y = run(call, arrays)

    counts = {**arrays, "expert_tokens": np.array(call.tokens)}
    index = {**arrays, "expert_tokens": np.cumsum(call.tokens)}
    assert same_bits(run(call, counts, tokens_index_flag=False), y)
    assert same_bits(run(call, index, tokens_index_flag=True), y)

    # Each expert alone, as an ordinary dense call.
    x = matrix(arrays["x"])
    ends = np.cumsum(call.tokens)
    dense = []
    for e, (begin, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        one = {name: array[e] for name, array in arrays.items() if name not in ("x", "expert_tokens")}
        one = {name: array.reshape(1) if array.ndim == 0 else array for name, array in one.items()}
        dense.append(run(call, {"x": x[begin:end], **one}))
    assert same_bits(torch.cat(dense), y.flatten(0, -2))

    # Experts under other names: their rows move with them.
    order = data.draw(st.permutations(range(len(call.tokens))))
    rows = np.concatenate([np.arange(ends[e] - call.tokens[e], ends[e]) for e in order]).astype(int)
    moved = {name: array[list(order)] for name, array in arrays.items() if name not in ("x", "expert_tokens")}
    moved |= {"x": x[rows], "expert_tokens": np.array(call.tokens)[list(order)]}
    relabelled = run(call, moved, tokens_index_flag=False)
    assert same_bits(relabelled, y.flatten(0, -2)[torch.from_numpy(rows)])


@pytest.mark.cpu_only
def test_a_thousand_experts_most_of_them_empty():
    generator = torch.Generator().manual_seed(7)
    E, K, N = 1024, 16, 24
    tokens = torch.zeros(E, dtype=torch.int64)
    tokens[torch.randperm(E, generator=generator)[:90]] = torch.randint(1, 4, (90,), generator=generator)
    x = torch.randn(int(tokens.sum()), K, generator=generator)
    w1 = torch.randn(E, K, 2 * N, generator=generator) / 4
    w2 = torch.randn(E, N, K, generator=generator) / 5
    w1[tokens == 0] = torch.nan  # an empty expert's weights are not read
    y = op(x, w1, w2, "swiglu", tokens)
    expected, begin = [], 0
    for e in range(E):
        left, right = (x[begin : begin + tokens[e]] @ w1[e]).chunk(2, dim=-1)
        expected.append((left * torch.nn.functional.silu(right)) @ w2[e])
        begin += int(tokens[e])
    torch.testing.assert_close(y, torch.cat(expected))


@pytest.mark.parametrize("alias", ["x", "weight1", "bias2", "part of x"])
def test_out_may_share_memory_with_an_input(alias: str):
    torch.manual_seed(0)
    tensors = {"x": randn(8, 8), "weight1": randn(8, 8), "weight2": randn(8, 8), "bias2": randn(8)}
    wide = randn(12, 8)
    if alias == "part of x":
        tensors["x"] = wide[:8]
    expected = op(**tensors, activation="gelu")
    out = (
        wide[4:]
        if alias == "part of x"
        else tensors[alias].expand(1, 8)
        if alias == "bias2"
        else tensors[alias]
    )
    if alias == "bias2":
        tensors["x"], expected = tensors["x"][:1], expected[:1]
    op(**tensors, activation="gelu", out=out)
    assert same_bits(out, expected)


def test_in_every_position_a_size_of_zero_is_right_or_refused():
    for M, K, N in ((0, 4, 6), (3, 0, 6), (3, 4, 0), (0, 0, 0)):
        x, w1, w2 = randn(M, K), randn(K, N), randn(N, K)
        b2 = randn(K)
        y = op(x, w1, w2, "gelu", bias2=b2)
        assert y.shape == (M, K)
        if N == 0:
            assert same_bits(y, b2.expand(M, K))
    x = randn(2, 0, 3, 4)
    assert op(x, randn(4, 5), randn(5, 4), "relu").shape == x.shape
    empty = torch.empty(0, dtype=torch.int64, device=DEVICE)
    dense = op(ones(2, 4), ones(4, 5), ones(5, 4), "relu", empty)
    assert same_bits(dense, 20 * ones(2, 4))


def test_activation_names_are_case_insensitive():
    x, w = randn(3, 4), randn(4, 4)
    assert same_bits(op(x, w, w, "GeLu"), op(x, w, w, "gelu"))


@pytest.mark.cpu_only
def test_gradients_beside_packed_weights_are_refused_by_name_and_only_in_backward():
    x, w = randn(3, 4).requires_grad_(), randn(4, 4)
    packed = ffn_ops.prepack(w.cpu())
    y = op(x, packed, packed, "gelu")
    assert y.requires_grad and same_bits(y.detach(), op(x.detach(), w, w, "gelu"))
    with pytest.raises(RuntimeError, match="ffn has no gradient beside integer or prepacked weights"):
        y.sum().backward()
    torch._dynamo.reset()
    compiled = torch.compile(lambda v: op(v, packed, packed, "gelu") * 2, backend="aot_eager")(x)
    assert same_bits(compiled.detach(), y.detach() * 2)
    with pytest.raises(RuntimeError, match="ffn has no gradient beside integer or prepacked weights"):
        compiled.sum().backward()


def test_out_has_no_gradient():
    x, w = randn(3, 4).requires_grad_(), randn(4, 4)
    with pytest.raises(RuntimeError, match="out= has no gradient"):
        op(x, w, w, "gelu", out=ones(3, 4))
    with torch.no_grad():
        op(x, w, w, "gelu", out=ones(3, 4))


def test_a_graph_that_saved_out_notices_that_it_was_written():
    x, w, p = randn(3, 4), randn(4, 4), ones(3, 4).requires_grad_()
    out = ones(3, 4)
    z = (p * out).sum()
    op(x, w, w, "gelu", out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.backward()


@pytest.mark.cpu_only
def test_flushing_subnormals_on_one_thread_changes_no_bit():
    a, eye = torch.randn(300, 128) * 1e-38, torch.eye(128)
    expected = op(a, eye, eye, "relu")
    assert ((expected != 0) & (expected.abs() < torch.finfo(torch.float32).tiny)).any()
    torch.set_flush_denormal(True)
    try:
        answers = [op(a, eye, eye, "relu") for _ in range(10)]
    finally:
        torch.set_flush_denormal(False)
    assert all(same_bits(answer, expected) for answer in answers)


def test_calls_from_many_threads_at_once_are_right():
    import concurrent.futures

    x, w1, w2 = randn(40, 64), randn(64, 200), randn(200, 64)
    expected = op(x, w1, w2, "silu")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for y in pool.map(lambda _: op(x, w1, w2, "silu"), range(40)):
            assert same_bits(y, expected)
