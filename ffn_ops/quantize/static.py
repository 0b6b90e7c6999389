# SPDX-License-Identifier: Apache-2.0
"""Static int8 for weights, x and the intermediate (w8a8), calibrated on samples of x.

The layer computes x8 = round(x / x_scale) with one x_scale for each input channel; everything else is folded
into the operator's tensors: x_scale into weight1, the biases into int32 before dequantisation, and the
intermediate's offset into bias2. Notation: h is the intermediate, act(x W1 + b1).
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ffn_ops.activation import activate
from ffn_ops.contract import ContractError
from ffn_ops.packing import pack_deq_scale, unpack_deq_scale

# How much of a channel's range x_scale takes; weight1 keeps the rest. At 1 every channel of x8 uses all of
# int8. The embeddings of the demo's encoder are best, and flat, around this value.
_X_SHARE = 0.75


class _Ranges(NamedTuple):
    x: Tensor  # [K1]: largest |x| of each channel
    low: Tensor  # of h, zero included
    high: Tensor


def quantize_w8a8(
    fc1: nn.Linear,
    fc2: nn.Linear,
    activation: str,
    calibration: Iterable[Tensor],
    deq_dtype: torch.dtype,
) -> dict[str, Tensor]:
    """The operator's tensors, and x_scale, by name.

    `deq_dtype` is torch.int64 for float16 results or torch.bfloat16 for bfloat16 results.
    """
    weight1, weight2 = fc1.weight.t().float(), fc2.weight.t().float()
    bias1, bias2 = (None if fc.bias is None else fc.bias.float() for fc in (fc1, fc2))
    ranges = _observe(calibration, weight1, bias1, activation.lower())
    x_scale = _share_range(ranges.x, weight1.abs().amax(1))

    # scale = 255 / (high - low), in float16 as the operator uses it; low becomes -128.
    scale = (255 / (ranges.high - ranges.low)).clamp(max=torch.finfo(torch.float16).max).half().float()
    offset = (-128 - ranges.low * scale).round().clamp(-128, 127)

    values1, folded1, deq_scale1 = _quantize(
        weight1 * x_scale[:, None], bias1, torch.ones_like(scale), deq_dtype
    )
    values2, folded2, deq_scale2 = _quantize(weight2, bias2, 1 / scale, deq_dtype)
    # The second product sums (h8 - offset) * q2; a product with h8 alone leaves this much per column.
    folded2 -= offset.to(torch.int64) * values2.sum(0, dtype=torch.int64)
    tensors = {
        "x_scale": x_scale,
        "weight1": values1,
        "weight2": values2,
        "bias2": folded2.to(torch.int32),
        "scale": scale.reshape(1),
        "offset": offset.reshape(1),
        "deq_scale1": deq_scale1,
        "deq_scale2": deq_scale2,
    }
    if bias1 is not None:
        tensors["bias1"] = folded1.to(torch.int32)
    return tensors


def _observe(
    calibration: Iterable[Tensor], weight1: Tensor, bias1: Tensor | None, activation: str
) -> _Ranges:
    K1 = weight1.shape[0]
    largest = torch.zeros(K1, device=weight1.device)
    low = high = torch.zeros((), device=weight1.device)
    rows = 0
    for sample in calibration:
        if not isinstance(sample, Tensor):
            raise ContractError(
                f"calibration yields a {type(sample).__name__}, but it must yield tensors "
                "(take x out of each batch)"
            )
        if sample.shape[-1:] != (K1,):
            raise ContractError(
                f"a calibration tensor has shape {tuple(sample.shape)}, but the last size must be K1 = {K1} "
                "(pass inputs of this feed-forward block)"
            )
        x = sample.detach().to(weight1.device, torch.float32).reshape(-1, K1)
        if not len(x):
            continue
        h = activate(F.linear(x, weight1.t(), bias1), activation)
        largest = torch.maximum(largest, x.abs().amax(0))
        low, high = torch.minimum(low, h.amin()), torch.maximum(high, h.amax())
        rows += len(x)
    if not rows:
        raise ContractError(
            "calibration holds no rows, but w8a8 derives its scales from them (pass inputs of the block)"
        )
    if not all(bool(value.isfinite().all()) for value in (largest, low, high)):
        raise ContractError(
            "calibration leads to inf or NaN, but scales must be finite (check the inputs and weights)"
        )
    if max(float(high), -float(low)) > torch.finfo(torch.float16).max:
        raise ContractError(
            f"calibration leads to an intermediate of up to {max(float(high), -float(low)):.3g}, "
            "but w8a8 holds it in float16, up to 65504 (use w8a16_bf16)"
        )
    return _Ranges(largest, low, high)


def _share_range(x: Tensor, weight: Tensor) -> Tensor:
    """x_scale [K1] from the largest |x| and |weight1| of each channel; the largest x becomes 127."""

    def floored(sizes: Tensor) -> Tensor:
        # A channel that calibration never saw, or that no weight reads, counts as 1/1024 of the largest.
        return sizes.clamp_min((sizes.amax() * 2**-10).clamp_min(torch.finfo(torch.float32).tiny))

    x, weight = floored(x), floored(weight)
    balance = x**_X_SHARE / weight ** (1 - _X_SHARE)
    return balance * (x / balance).amax() / 127


def _quantize(
    weight: Tensor, bias: Tensor | None, input_scale: Tensor, deq_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """int8 values, the int64 bias in units of deq_scale, and deq_scale = input_scale * weight scale, stored.

    The first two are computed with the deq_scale that the operator will use, after its own rounding.
    """
    if bias is None:
        bias = torch.zeros_like(weight[0])
    # A column's bias may dwarf its weights; up to 2**24, float32(accumulator) is exact.
    deq_scale = torch.maximum(weight.abs().amax(0) / 127 * input_scale, bias.abs() * 2**-24)
    deq_scale = deq_scale.clamp_min(torch.finfo(torch.float32).tiny)
    if deq_dtype == torch.int64:
        stored = pack_deq_scale(deq_scale)
        used = unpack_deq_scale(stored)
    else:
        stored = deq_scale.to(deq_dtype)
        used = stored.float()
    values = (weight / (used / input_scale)).round().clamp(-127, 127).to(torch.int8)
    return values, (bias.double() / used).round().to(torch.int64), stored
