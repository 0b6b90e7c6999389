# SPDX-License-Identifier: Apache-2.0
"""Integer weights beside 16-bit x: W = (q + offset) * scale, per channel or per group of rows.

Scales are rounded to the operator's dtype first and q is computed with the rounded ones, so that rounding a
scale does not shift a whole group.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class QuantizedWeight(NamedTuple):
    values: Tensor  # int8 [K, N]
    scale: Tensor  # [N], or [G, N] with groups of K / G consecutive rows
    offset: Tensor  # as scale


def quantize_int8(weight: Tensor, group_size: int | None, dtype: torch.dtype) -> QuantizedWeight:
    """Symmetric int8 with zero offsets. `weight` is float32 [K, N]; `dtype` is that of scale and offset."""
    groups = _groups(weight, group_size)
    scale = _representable(groups.abs().amax(1) / 127, dtype)
    values = (groups / scale.float()[:, None]).round().clamp(-127, 127)
    return _shaped(weight, group_size, values, scale, torch.zeros_like(scale))


def quantize_int4(weight: Tensor, group_size: int | None, dtype: torch.dtype) -> QuantizedWeight:
    """Asymmetric int4: each group's range, widened to hold zero, spans the 16 values."""
    groups = _groups(weight, group_size)
    low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
    scale = _representable((high - low) / 15, dtype)
    # Zero lies in the range, so the offset is an integer in [-7, 8], exact in either dtype.
    offset = ((low / scale.float()).round() + 8).clamp(-7, 8)
    values = (groups / scale.float()[:, None] - offset[:, None]).round().clamp(-8, 7)
    return _shaped(weight, group_size, values, scale, offset.to(dtype))


def _groups(weight: Tensor, group_size: int | None) -> Tensor:
    """[G, K / G, N]; per channel is one group."""
    K, N = weight.shape
    return weight.reshape(-1, group_size or K, N)


def _representable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds to `dtype`, never to zero: a group of zeros divides by its scale too."""
    info = torch.finfo(dtype)
    return scale.to(dtype).clamp_min(info.tiny * info.eps)  # the smallest subnormal


def _shaped(
    weight: Tensor, group_size: int | None, values: Tensor, scale: Tensor, offset: Tensor
) -> QuantizedWeight:
    if group_size is None:
        scale, offset = scale[0], offset[0]
    return QuantizedWeight(values.reshape(weight.shape).to(torch.int8), scale, offset)
