# SPDX-License-Identifier: Apache-2.0
"""ffn_ops/layer.py and ffn_ops/quantize: what from_linear folds, against the nn.Linear pair it was made from.

The operator's own numerics are tested elsewhere; here y is held to a bound derived from the quantization
steps alone.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ffn_ops import contract
from ffn_ops.layer import FFN
from ffn_ops.packing import swap_glu_halves, unpack_deq_scale, unpack_int4
from ffn_ops.quantize import quantize_int4, quantize_int8

FLOAT = ["float32", "fp16", "bf16"]
W8A8 = ["w8a8", "w8a8_bf16"]
ANTIQUANT = ["w8a16", "w8a16_bf16", "w4a16", "w4a16_bf16"]
MODES = FLOAT + W8A8 + ANTIQUANT
K1, K2 = 64, 96


def block(bias: bool = True) -> tuple[nn.Linear, nn.Linear, torch.Tensor]:
    torch.manual_seed(0)
    fc1, fc2 = nn.Linear(K1, K2, bias=bias), nn.Linear(K2, K1, bias=bias)
    x = torch.randn(5, 9, K1) * torch.linspace(0.1, 4, K1)  # channels of unequal range, as activations have
    return fc1, fc2, x


def make(mode: str, activation: str = "relu", group_size: int | None = None, bias: bool = True) -> FFN:
    fc1, fc2, x = block(bias)
    return FFN.from_linear(fc1, fc2, activation, mode, group_size, (sample for sample in [x[:2], x[2:]]))


def error_bound(
    ffn: FFN, fc1: nn.Linear, fc2: nn.Linear, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """y in float64, and how far rounding x, weights and h to their steps may move it (relu has slope 1)."""
    row = next(row for row in contract.MODES if row.name == ffn.mode)
    u = (
        torch.finfo(getattr(torch, row.y)).eps / 2
    )  # the relative error of one rounding to the dtype of x or y
    x, W1, W2 = x.double(), fc1.weight.detach().double().t(), fc2.weight.detach().double().t()
    b1 = torch.zeros(len(W1.t())).double() if fc1.bias is None else fc1.bias.detach().double()
    b2 = torch.zeros(len(W2.t())).double() if fc2.bias is None else fc2.bias.detach().double()
    h = F.relu(x @ W1 + b1)
    y = h @ W2 + b2
    # The steps of x, W1, W2 and h, and the error of each bias.
    dx, dW1, dW2, dh = u * x.abs(), u * W1.abs(), u * W2.abs(), u * h
    db1, db2 = u * b1.abs(), u * b2.abs()
    if row.antiquant:
        for name, dW in (("1", dW1), ("2", dW2)):
            scale = getattr(ffn, f"antiquant_scale{name}").double().reshape(-1, dW.shape[1])
            dW += (
                scale.repeat_interleave(len(dW) // len(scale), 0) / 2 * (1 + 32 * u)
            )  # 32 u: test_a_weight_...
    if row.scale:
        used = [d.double() if d.dtype == torch.bfloat16 else unpack_deq_scale(d).double()
                for d in (ffn.deq_scale1, ffn.deq_scale2)]  # fmt: skip
        step = 1 / ffn.scale.double()
        dx = (ffn.x_scale.double() / 2).expand_as(x)
        dW1 = (used[0] / 2 / ffn.x_scale.double()[:, None]).expand_as(W1)
        dW2 = (used[1] / 2 / step).expand_as(W2)
        db1, db2 = used[0] / 2, used[1] / 2
        # Half a step for q, half for the offset's own rounding, a quarter for float16 in Q at sizes up to
        # 256.
        dh = 1.25 * step + u * h
    dh = dh + dx @ W1.abs() + (x.abs() + dx) @ dW1 + db1
    dh = dh * (1 + u)
    dy = dh @ W2.abs() + (h + dh) @ dW2 + db2
    # float32 accumulation is below all that except in mode float32; 2**-24 * K on each product covers any
    # order.
    accumulated = (K1 + K2) * 2**-24 * (((x.abs() @ W1.abs() + b1.abs()) @ W2.abs()) + b2.abs())
    return y, dy + accumulated + u * (y.abs() + dy)


def exceeds(ffn: FFN, fc1: nn.Linear, fc2: nn.Linear, x: torch.Tensor, y: torch.Tensor) -> bool:
    exact, bound = error_bound(ffn, fc1, fc2, x)
    return not bool(((y.double() - exact).abs() <= bound).all())


CASES = [(mode, None) for mode in MODES] + [(mode, 16) for mode in ANTIQUANT]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("mode", "group_size"), CASES)
def test_y_is_within_the_quantization_steps_of_the_linear_pair(mode, group_size, bias):
    fc1, fc2, x = block(bias)
    ffn = make(mode, group_size=group_size, bias=bias)
    assert not exceeds(ffn, fc1, fc2, x, ffn(x))


@pytest.mark.parametrize(("mode", "group_size"), CASES)
def test_every_buffer_matters(mode, group_size):
    """The bound above would notice any tensor that is lost, misplaced or folded wrongly."""
    fc1, fc2, x = block()
    # Nothing cancels and biases weigh as much as products, so the bound is a small part of y.
    x = x.abs()
    with torch.no_grad():
        fc1.weight.abs_()
        fc2.weight.abs_()
        fc1.bias.fill_(fc1(x).mean())
        fc2.bias.fill_(fc2(F.relu(fc1(x))).mean())
    ffn = FFN.from_linear(fc1, fc2, "relu", mode, group_size, [x])
    assert not exceeds(ffn, fc1, fc2, x, ffn(x))
    for name, _ in ffn.named_buffers():
        broken = copy.deepcopy(ffn)
        buffer = broken.get_buffer(name)
        if bool((buffer == 0).all()):
            buffer.fill_(8)  # the offsets of symmetric weights
        elif buffer.dtype == torch.uint8:
            buffer.fill_(0x77)  # int4 zeros stand for the middle of a range: too near to what was there
        else:
            buffer.zero_()
        assert exceeds(ffn, fc1, fc2, x, broken(x)), name


@pytest.mark.parametrize(("mode", "group_size"), CASES)
def test_a_state_dict_survives_the_round_trip(mode, group_size, tmp_path):
    _, _, x = block()
    ffn = make(mode, group_size=group_size)
    torch.save(ffn.state_dict(), tmp_path / "ffn.pt")
    loaded = FFN(K1, K2, "relu", mode, group_size)
    loaded.load_state_dict(torch.load(tmp_path / "ffn.pt", weights_only=True))
    assert torch.equal(loaded(x), ffn(x))


def test_a_state_dict_of_another_mode_is_refused():
    with pytest.raises(
        RuntimeError, match=r"deq_scale1 is torch.int64, but mode w8a8_bf16 takes torch.bfloat16"
    ):
        FFN(K1, K2, "relu", "w8a8_bf16").load_state_dict(make("w8a8").state_dict())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "move", [nn.Module.half, nn.Module.double, nn.Module.bfloat16, lambda m: m.to("cpu")]
)
def test_casting_a_model_leaves_the_dtypes_of_the_operator(mode, move):
    _, _, x = block()
    ffn = make(mode)
    model = nn.Sequential(nn.Linear(K1, K1), copy.deepcopy(ffn))
    move(model)
    moved = model[1].state_dict()
    assert moved.keys() == ffn.state_dict().keys()
    for name, tensor in ffn.state_dict().items():
        assert moved[name].dtype == tensor.dtype
        assert torch.equal(moved[name], tensor), name
    assert torch.equal(model[1](x), ffn(x))
    assert model(x.to(model[0].weight.dtype)).dtype == model[0].weight.dtype


def test_moving_to_another_device_moves_every_buffer():
    ffn = make("w8a8").to("meta", torch.float64)
    assert {buffer.device.type for buffer in ffn.buffers()} == {"meta"}
    assert ffn.deq_scale1.dtype == torch.int64
    assert ffn.x_scale.dtype == torch.float32


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_y_has_the_dtype_and_shape_of_x(mode, dtype):
    _, _, x = block()
    y = make(mode)(x.to(dtype))
    assert (y.dtype, y.shape) == (dtype, x.shape)


@pytest.mark.parametrize("mode", W8A8 + ANTIQUANT)
def test_glu_of_integer_weights_is_nearer_to_its_own_order_than_to_the_other(mode):
    torch.manual_seed(0)
    fc1, fc2, x = nn.Linear(K1, 2 * K2), nn.Linear(K2, K1), torch.randn(50, K1)
    left, right = fc1(x).chunk(2, -1)
    expected, swapped = fc2(left * F.silu(right)), fc2(F.silu(left) * right)
    y = FFN.from_linear(fc1, fc2, "swiglu", mode, calibration=[x])(x)
    assert 4 * (y - expected).norm() < (y - swapped).norm()


@pytest.mark.parametrize("mode", FLOAT)
def test_glu_weights_are_in_the_order_of_the_operator(mode):
    torch.manual_seed(0)
    fc1, fc2, x = nn.Linear(K1, 2 * K2), nn.Linear(K2, K1), torch.randn(7, K1)
    left, right = fc1(x).chunk(2, -1)
    expected, swapped = fc2(left * F.silu(right)), fc2(F.silu(left) * right)
    tolerance = 16 * torch.finfo(getattr(torch, {"fp16": "float16", "bf16": "bfloat16"}.get(mode, mode))).eps
    ffn = FFN.from_linear(fc1, fc2, "swiglu", mode)
    assert (ffn(x) - expected).norm() < tolerance * expected.norm()
    assert (
        ffn(x) - swapped
    ).norm() > 0.1 * expected.norm()  # far enough apart for the first line to mean something

    # Hugging Face's [gate | up] has the activation on the left.
    with torch.no_grad():
        fc1.weight.copy_(swap_glu_halves(fc1.weight, dim=0))
        fc1.bias.copy_(swap_glu_halves(fc1.bias, dim=0))
    assert (FFN.from_linear(fc1, fc2, "swiglu", mode)(x) - swapped).norm() < tolerance * expected.norm()


@pytest.mark.parametrize(
    ("sizes", "arguments", "sentence"),
    [
        ((8, 12, 10, 8), ("relu", "fp16"), "fc2 takes 10, but relu needs the same number"),
        ((8, 12, 12, 8), ("swiglu", "fp16"), "fc2 takes 12, but swiglu needs twice as many"),
        ((8, 12, 12, 6), ("relu", "fp16"), "fc2 gives 6 features and fc1 takes 8, but y has x's shape"),
        ((8, 12, 12, 8), ("relu", "int8"), "mode is 'int8', but it must be one of float32, fp16, bf16"),
        ((8, 12, 12, 8), ("tanh", "fp16"), "activation is 'tanh', but it must be one of fastgelu, gelu"),
        ((8, 12, 12, 8), ("relu", "w8a8"), "calibration is missing, but mode w8a8"),
        ((8, 12, 12, 8), ("relu", "w8a8", None, []), "calibration holds no rows"),
        ((8, 12, 12, 8), ("relu", "w8a8", None, [torch.zeros(3, 12)]), "(3, 12), but the last size must be"),
        ((8, 12, 12, 8), ("relu", "w8a8", None, [torch.full((1, 8), torch.nan)]), "leads to inf or NaN"),
        ((8, 12, 12, 8), ("relu", "w4a16", 3), "group_size is 3, but it must divide K1 = 8"),
        ((8, 12, 12, 8), ("relu", "w4a16", 8), "group_size is 8, but it must divide K2 = 12"),
        ((8, 12, 12, 8), ("relu", "w4a16", 0), "group_size is 0, but it must divide K1 = 8"),
        ((8, 12, 12, 8), ("relu", "fp16", 4), "group_size is 4, but mode fp16 has no groups"),
        ((8, 12, 12, 8), ("relu", "w8a8", 4), "group_size is 4, but mode w8a8 has no groups"),
        ((8, 13, 13, 8), ("relu", "w4a16"), "N1 = 13 int4 columns, but two share a byte"),
        ((9, 12, 12, 9), ("relu", "w4a16"), "N2 = 9 int4 columns, but two share a byte"),
    ],
)  # fmt: skip
def test_what_no_layer_can_be_made_from_is_refused(sizes, arguments, sentence):
    fc1, fc2 = nn.Linear(*sizes[:2]), nn.Linear(*sizes[2:])
    with pytest.raises(ValueError) as error:
        FFN.from_linear(fc1, fc2, *arguments)
    assert sentence in str(error.value)


@pytest.mark.parametrize("mode", W8A8 + ANTIQUANT)
@pytest.mark.parametrize("name", ["fc1.weight", "fc2.bias"])
def test_weights_that_no_integer_holds_are_refused(mode, name):
    pair = nn.ModuleDict(dict(zip(("fc1", "fc2"), block()[:2], strict=True)))
    with torch.no_grad():
        pair.get_parameter(name)[3] = torch.inf
    with pytest.raises(ValueError, match=f"{name} holds inf or NaN"):
        FFN.from_linear(pair.fc1, pair.fc2, "relu", mode)


@pytest.mark.parametrize("mode", ["float32", "w8a8"])
@pytest.mark.parametrize("shape", [(4, 1), (4, K1 + 1), (0,), ()])
def test_x_of_another_width_is_refused(mode, shape):
    with pytest.raises(ValueError, match=rf"takes a last dimension of K1 = {K1}"):
        make(mode)(torch.zeros(shape))


@pytest.mark.parametrize("mode", MODES)
def test_backward_is_refused_beside_integer_weights_never_silent(mode):
    _, _, x = block()
    y = make(mode)(x.requires_grad_())
    if mode in FLOAT:
        y.sum().backward()
        assert x.grad is not None and bool(x.grad.any())
        return
    with pytest.raises(RuntimeError, match="ffn has no gradient beside integer or prepacked weights"):
        y.sum().backward()


@pytest.mark.parametrize("mode", MODES)
def test_the_linear_pair_is_copied_not_shared(mode):
    fc1, fc2, x = block()
    before = copy.deepcopy((fc1.state_dict(), fc2.state_dict()))
    ffn = FFN.from_linear(fc1, fc2, "gelu", mode, calibration=[x])
    y = ffn(x)
    for fc, state in zip((fc1, fc2), before, strict=True):
        for name, tensor in fc.state_dict().items():
            assert torch.equal(tensor, state[name])
            tensor.zero_()
    assert torch.equal(ffn(x), y)
    assert not any(buffer.requires_grad for buffer in ffn.buffers())


@pytest.mark.parametrize("mode", MODES)
def test_the_layer_compiles_without_a_graph_break(mode):
    _, _, x = block()
    ffn = make(mode, "gelu")
    torch.compiler.reset()  # all modes share one forward, which dynamo recompiles eight times at most
    with torch.no_grad():
        assert torch.equal(torch.compile(ffn, fullgraph=True, backend="aot_eager")(x), ffn(x))


@pytest.mark.parametrize("mode", W8A8)
def test_x_beyond_its_calibrated_range_saturates(mode):
    ffn = make(mode)
    top = ffn.x_scale * 127
    assert torch.equal(ffn(top * 50 + torch.zeros(3, K1)), ffn(top + torch.zeros(3, K1)))


@pytest.mark.parametrize("mode", W8A8)
def test_dead_weights_and_silent_channels_leave_the_biases(mode):
    fc1, fc2, x = block()
    with torch.no_grad():
        fc1.weight[:, 3] = 0  # an input that nothing reads
        fc1.weight[5] = 0  # a neuron with its bias only
        fc1.bias[5] = 0.75
        fc2.weight[7] = 0  # an output with its bias only
        fc2.bias[7] = -3.5
    x[..., 11] = 0  # a channel that calibration never sees
    ffn = FFN.from_linear(fc1, fc2, "relu", mode, calibration=[x])
    y = ffn(x)
    assert not exceeds(ffn, fc1, fc2, x, y)
    # Both are sums of few bits: the bias in 2**24 units of a truncated deq_scale, rounded once to y's dtype.
    u = torch.finfo(torch.float16 if mode == "w8a8" else torch.bfloat16).eps / 2
    assert ((y[..., 7] + 3.5).abs() <= 3.5 * (2**-23 + u)).all()


@pytest.mark.parametrize("mode", ANTIQUANT)
def test_weights_of_zeros_stay_zeros(mode):
    fc1, fc2, x = block()
    with torch.no_grad():
        fc1.weight.zero_()
        fc2.weight.zero_()
    y = FFN.from_linear(fc1, fc2, "relu", mode, 16)(x)
    assert torch.equal(
        y, fc2.bias.to(torch.float16 if mode.endswith("a16") else torch.bfloat16).float().expand_as(y)
    )


@given(
    st.sampled_from([torch.float16, torch.bfloat16]),
    st.sampled_from([None, 4, 12]),
    st.floats(1e-2, 1e2),  # int8 scales are then normal float16 numbers, whose rounding is relative
    st.floats(-3, 3),
    st.integers(0, 2**32),
)
def test_a_weight_is_off_by_half_a_step_at_most(dtype, group_size, size, shift, seed):
    weight = size * (torch.randn(24, 6, generator=torch.Generator().manual_seed(seed)) + shift)
    u = torch.finfo(dtype).eps / 2
    for quantizer, low, high in ((quantize_int8, -127, 127), (quantize_int4, -8, 7)):
        quantized = quantizer(weight, group_size, dtype)
        groups = 1 if group_size is None else 24 // group_size
        assert quantized.values.dtype == torch.int8
        assert low <= quantized.values.min() and quantized.values.max() <= high
        assert quantized.scale.dtype == quantized.offset.dtype == dtype
        assert quantized.scale.shape == ((6,) if group_size is None else (groups, 6))
        scale, offset = (t.double().reshape(groups, 6).repeat_interleave(24 // groups, 0)
                         for t in (quantized.scale, quantized.offset))  # fmt: skip
        error = (weight.double() - (quantized.values.double() + offset) * scale).abs()
        # Rounding the scale down by u leaves 15 steps u short at the ends of an int4 range; int8 stays below
        # half.
        assert (error <= scale / 2 * (1 + 32 * u) + 1e-6 * size).all()


def test_int4_weights_are_packed_bytes_low_nibble_first():
    fc1, fc2, _ = block()
    ffn = FFN.from_linear(fc1, fc2, "relu", "w4a16", 16)
    assert (ffn.weight1.dtype, ffn.weight1.shape) == (torch.uint8, (K1, K2 // 2))
    values = quantize_int4(fc1.weight.detach().t(), 16, torch.float16).values
    assert torch.equal(unpack_int4(ffn.weight1), values)


def test_repr_names_sizes_mode_and_groups():
    assert repr(make("w4a16", "gelu", 16)) == "FFN(K1=64, K2=96, activation=gelu, mode=w4a16, group_size=16)"
    assert (
        repr(make("fp16", bias=False))
        == "FFN(K1=64, K2=96, activation=relu, mode=fp16, bias1=False, bias2=False)"
    )


def test_what_a_modes_dtypes_cannot_hold_is_refused():
    fc1, fc2, _ = block()
    with torch.no_grad():
        fc1.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"weight1 would hold inf or NaN in torch\.float16"):
        FFN.from_linear(fc1, fc2, "relu", "fp16")
    FFN.from_linear(fc1, fc2, "relu", "bf16")
    with torch.no_grad():
        fc1.weight.mul_(1e6)
    with pytest.raises(ValueError, match=r"intermediate of up to .* but w8a8 holds it in float16"):
        FFN.from_linear(fc1, fc2, "relu", "w8a8_bf16", calibration=[torch.ones(4, fc1.in_features)])


@pytest.mark.parametrize("mode", W8A8)
def test_w8a8_gives_nan_for_rows_that_int8_cannot_hold(mode):
    fc1, fc2, _ = block()
    layer = FFN.from_linear(fc1, fc2, "relu", mode, calibration=[torch.randn(8, fc1.in_features)])
    x = torch.randn(4, fc1.in_features)
    expected = layer(x)
    x[1, 0], x[2, 0] = torch.nan, torch.inf
    y = layer(x)
    assert y[[1, 2]].isnan().all() and torch.equal(y[[0, 3]], expected[[0, 3]])


def test_x_of_any_rank_and_of_float_dtypes_only():
    fc1, fc2, _ = block()
    layer = FFN.from_linear(fc1, fc2, "relu", "float32")
    x = torch.randn(fc1.in_features)
    assert torch.equal(layer(x), layer(x[None])[0])
    assert layer(x.expand(*(1,) * 9, -1)).shape == (*(1,) * 9, fc1.in_features)
    with pytest.raises(ValueError, match=r"x is torch.int64, but an FFN takes floating-point x"):
        layer(x.long())


def test_only_linears_are_taken():
    fc1, fc2, _ = block()
    with pytest.raises(ValueError, match=r"fc1 is a Parameter, but it must be an nn.Linear"):
        FFN.from_linear(fc1.weight, fc2, "relu", "float32")
    with pytest.raises(ValueError, match=r"fc2 is on the meta device"):
        FFN.from_linear(fc1, fc2.to("meta"), "relu", "w8a16")
    with pytest.raises(ValueError, match="calibration yields a tuple"):
        FFN.from_linear(*block()[:2], "relu", "w8a8", calibration=[(torch.ones(2, 2), None)])


@pytest.mark.parametrize("mode", MODES)
def test_a_packed_module_computes_saves_and_loads_as_the_plain_one(mode, tmp_path):
    _, _, x = block()
    plain, packed = make(mode), make(mode).pack_()
    assert "packed" in repr(packed) and packed.pack_() is packed
    y = plain(x)
    assert torch.equal(packed(x), y)
    torch.save(packed.state_dict(), tmp_path / "packed.pt")
    state = torch.load(tmp_path / "packed.pt", weights_only=True)
    for empty in (FFN(K1, K2, "relu", mode), FFN(K1, K2, "relu", mode).pack_()):
        before = empty.weight1.dim()
        for saved in (state, plain.state_dict()):
            empty.load_state_dict(saved)
            assert torch.equal(empty(x), y) and empty.weight1.dim() == before


def test_a_packed_weight_of_another_mode_is_not_loaded():
    with pytest.raises(RuntimeError, match=r"weight1: it is no bfloat16 weight of shape \[64, 96\]"):
        make("bf16").pack_().load_state_dict(make("fp16").pack_().state_dict())
