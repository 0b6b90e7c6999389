# SPDX-License-Identifier: Apache-2.0
"""The same cells on an NPU: the fused operator through ffn_ops and torch_npu, and torch's own operators.

They need CANN, or the emulator (`python -m ffn_ops.emulator -m benchmarks`), whose times mean nothing. A
sample ends when the device is done; in a "call" case, when the call returns, on a device that was idle: what
the host pays. Operands are in the device's memory before, and nothing is evicted there. There is no "of
limit": what is public about the peaks of these SoCs contradicts itself.
"""

import ctypes
import importlib.util
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.peers import Call, Peer, biases, only
from ffn_ops.activation import activate
from ffn_ops.contract import GLU

DEVICE = "npu:0"


def to_npu(value: Any) -> Any:
    return value.to(DEVICE) if isinstance(value, Tensor) else value


def operands(case: Case) -> dict[str, Any]:
    """What ffn.ffn and npu_ffn take alike."""
    return {name: to_npu(value) for name, value in (case.weights.operands | {"x": case.operand}).items()}


def synchronous(call: Call) -> Call:
    def until_done() -> Tensor:
        y = call()
        torch.npu.synchronize()
        return y

    return until_done


class NpuPeer(Peer):
    kinds = ("dense",)
    process = "npu"
    device = "npu"
    quick = False

    def available(self) -> str | None:
        if importlib.util.find_spec("torch_npu") is None:
            return "torch_npu is not installed"
        try:
            ctypes.CDLL("libascendcl.so")
        except OSError:
            return "CANN is not installed"
        import torch_npu  # noqa: F401

        return None if torch.npu.device_count() else "torch_npu finds no NPU"

    def refuses(self, case: Case) -> str | None:
        return None

    def call(self, case: Case) -> Call:
        """That enqueues the work."""
        raise NotImplementedError

    def make(self, case: Case) -> Call:
        call = self.call(case)
        return call if case.start == "call" else synchronous(call)


class OursNpu(NpuPeer):
    """torch.ops.ffn.ffn on NPU tensors."""

    name = "ours on NPU"

    def call(self, case: Case) -> Call:
        given = operands(case)
        return lambda: torch.ops.ffn.ffn(**given)


class NpuFfn(NpuPeer):
    """torch_npu.npu_ffn."""

    name = "torch_npu.npu_ffn"

    def call(self, case: Case) -> Call:
        import torch_npu

        given = operands(case) | {"inner_precise": int(case.shape.activation in GLU)}
        return lambda: torch_npu.npu_ffn(**given)


class NpuComposition(NpuPeer):
    """Matrix product, activation, matrix product: three operators."""

    name = "torch on NPU"

    def refuses(self, case: Case) -> str | None:
        return only(case, modes="fp16 bf16")

    def call(self, case: Case) -> Call:
        x, weight1, weight2 = (
            to_npu(t) for t in (case.x, case.weights.first.values, case.weights.second.values)
        )
        bias1, bias2 = (to_npu(bias) for bias in biases(case))

        def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return x @ weight if bias is None else torch.addmm(bias, x, weight)

        return lambda: linear(activate(linear(x, weight1, bias1), case.shape.activation), weight2, bias2)


PEERS = (OursNpu, NpuFfn, NpuComposition)
