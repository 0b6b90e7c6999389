# SPDX-License-Identifier: Apache-2.0
"""The contract's activations and their derivatives as torch computes them, in the dtype of their argument.

What the kernels do is in csrc/cpu/activation-inl.h, what is true in reference/activation.py. This is for what
runs beside the operators: gradients (gradient.py), calibration (quantize/), the unfused MoE layer (moe.py).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_aten = torch.ops.aten


class _Formula(NamedTuple):
    value: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]  # (gradient of the value, x) -> gradient of x


def _fastgelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    s = torch.sigmoid(1.702 * x)
    return grad * (s + 1.702 * x * s * (1 - s))


def _silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    if grad.requires_grad or x.requires_grad:  # torch's own operator has no derivative
        s = torch.sigmoid(x)
        return grad * s * (1 + x * (1 - s))
    return _aten.silu_backward(grad, x)


def _gelu(form: str) -> _Formula:
    """Either form. On an NPU not torch's operators, which torch_npu makes one and the same for both."""

    def value(x: Tensor) -> Tensor:
        if x.device.type == "npu":
            return torch.ops.npu.npu_gelu(x, approximate=form)
        return F.gelu(x, approximate=form)

    def backward(grad: Tensor, x: Tensor) -> Tensor:
        if x.device.type == "npu":
            return torch.ops.npu.npu_gelu_backward(grad, x, approximate=form)
        return _aten.gelu_backward(grad, x, approximate=form)

    return _Formula(value, backward)


FORMULAS = {
    "fastgelu": _Formula(lambda x: x * torch.sigmoid(1.702 * x), _fastgelu_backward),
    "gelu": _gelu("tanh"),
    "relu": _Formula(F.relu, lambda grad, x: _aten.threshold_backward(grad, x, 0)),
    "silu": _Formula(F.silu, _silu_backward),
    "gelu_erf": _gelu("none"),
    "relu2": _Formula(lambda x: F.relu(x).square(), lambda grad, x: grad * 2 * F.relu(x)),
}
GATES = {"geglu": "gelu", "swiglu": "silu", "reglu": "relu"}  # what each GLU does to one of its halves


def activate(x: Tensor, activation: str, activate_left: bool = False) -> Tensor:
    """The activation of x [..., N1]; a GLU is left * act(right) of x's halves, or act(left) * right."""
    if activation not in GATES:
        return FORMULAS[activation].value(x)
    up, gate = _halves(x, activate_left)
    return up * FORMULAS[GATES[activation]].value(gate)


def activate_backward(grad: Tensor, x: Tensor, activation: str, activate_left: bool = False) -> Tensor:
    """The gradient of x from that of activate(x, ...)."""
    if activation not in GATES:
        return FORMULAS[activation].backward(grad, x)
    formula = FORMULAS[GATES[activation]]
    up, gate = _halves(x, activate_left)
    parts = grad * formula.value(gate), formula.backward(grad * up, gate)
    return torch.cat(parts[::-1] if activate_left else parts, dim=-1)


def _halves(x: Tensor, activate_left: bool) -> tuple[Tensor, Tensor]:
    left, right = x.chunk(2, dim=-1)
    return (right, left) if activate_left else (left, right)
