# SPDX-License-Identifier: Apache-2.0
"""Ours and torch's own competitors, one class each; the modules in known() have those of other packages.

A peer is given the case's operands and brings them into the form it likes before the time counts. What counts
is the same for all: from x to y, and in a MoE from (x, ids, weights) to the combined y.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ffn_ops
from benchmarks.cases import Case, Product
from ffn_ops.activation import activate
from ffn_ops.contract import GLU

Call = Callable[[], Tensor]
OURS = {"cpu": ("ours packed", "ours", "ours in the encoder"), "npu": ("ours on NPU",)}  # by device
OURS_NAMES = {name for names in OURS.values() for name in names}


class Peer:
    """A competitor. Refusals are sentences, and become the result of the cell; so does what make() raises."""

    name: str
    kinds: tuple[str, ...] = ("dense", "moe")  # of shapes that it is for
    process = ""  # peers of another process than the others': their threads must not meet
    device = "cpu"
    packs = False  # make() brings the weights into a layout of its own: worth a figure
    quick = True  # takes part in a quick run
    quantizes_rows = False  # x and the intermediate in int8, scaled by row, where the cell says otherwise
    other_numerics = False  # cruder than the cell asks for: shown, and never the best peer

    def available(self) -> str | None:
        """Why it cannot run on this machine at all."""
        return None

    def refuses(self, case: Case) -> str | None:
        """Why this cell is not for it."""
        raise NotImplementedError

    def make(self, case: Case) -> Call:
        raise NotImplementedError

    def weight1(self, case: Case) -> Tensor | None:
        """The larger weight as it is read, where the share of it on huge pages is of interest."""
        return None


def only(case: Case, *, modes: str = "", activations: str = "", bias: bool = True) -> str | None:
    """The refusals that most peers need; the lists are separated by spaces."""
    shape = case.shape
    if modes and case.mode.row.name not in modes.split():
        return f"has no {case.mode.row.name}"
    if activations and shape.activation not in activations.split():
        return f"has no {shape.activation}"
    if shape.bias and not bias:
        return "has no bias"
    return None


def linear_weights(product: Product) -> Tensor:
    """[N, K], or [E, N, K], as nn.Linear: for peers that pack it and drop it. See Weights.linear."""
    return product.values.mT.contiguous()


def biases(case: Case) -> tuple[Tensor | None, Tensor | None]:
    """In the dtype of x."""
    first, second = (p.bias for p in (case.weights.first, case.weights.second))
    return tuple(None if bias is None else bias.to(case.mode.dtype) for bias in (first, second))


def gate_first(weight: Tensor, case: Case, dim: int = -1) -> Tensor:
    """GLU weights as gated peers want them, [gate | up]: the operator has [up | gate]."""
    return ffn_ops.packing.swap_glu_halves(weight, dim) if case.shape.activation in GLU else weight


def by_expert(case: Case, expert: Callable[[int, Tensor], Tensor]) -> Tensor:
    """A MoE block as a composition of torch operators: expert(e, rows of x) for every expert that has
    rows."""
    assert case.routing is not None
    x, (ids, weights) = case.operand, case.routing
    order = ids.flatten().argsort(stable=True)
    tokens = order // ids.shape[1]
    counts = torch.bincount(ids.flatten(), minlength=case.shape.E).tolist()
    y = torch.zeros(case.M, case.shape.K1, dtype=torch.float32)
    scale = weights.flatten()[order].unsqueeze(1)
    begin = 0
    for e, count in enumerate(counts):
        if count:
            rows = slice(begin, begin + count)
            y.index_add_(0, tokens[rows], expert(e, x[tokens[rows]]) * scale[rows])
            begin += count
    return y.to(case.mode.dtype)


class Ours(Peer):
    """torch.ops.ffn.ffn and torch.ops.ffn.moe on the weights as they are, [K, N]."""

    name = "ours"

    def refuses(self, case: Case) -> str | None:
        return None  # the operator says it itself

    def operands(self, case: Case) -> dict[str, Any]:
        return case.weights.operands

    def weight1(self, case: Case) -> Tensor | None:
        return self.operands(case)["weight1"]

    def make(self, case: Case) -> Call:
        operands = self.operands(case)
        x = case.operand
        if case.routing is None:
            return lambda: torch.ops.ffn.ffn(x, **operands)
        ids, weights = case.routing
        return lambda: torch.ops.ffn.moe(x, ids, weights, **operands)


class OursPacked(Ours):
    """The same with ffn_ops.prepack."""

    name = "ours packed"
    packs = True

    def operands(self, case: Case) -> dict[str, Any]:
        plain = case.weights.operands
        return plain | case.weights.kept(
            self.name, lambda: {name: ffn_ops.prepack(plain[name]) for name in ("weight1", "weight2")}
        )


class Eager(Peer):
    """F.linear, the activation, F.linear: nn.Linear's weights. In a MoE a loop over the experts that have
    rows."""

    name = "torch eager"

    def refuses(self, case: Case) -> str | None:
        return only(case, modes="float32 fp16 bf16")

    def weights(self, case: Case) -> list[Tensor]:
        return [weight.mT for weight in case.weights.linear]

    def make(self, case: Case) -> Call:
        weight1, weight2 = self.weights(case)
        bias1, bias2 = biases(case)

        def block(x: Tensor, e: int | None = None) -> Tensor:
            w1, w2, b1, b2 = (t if t is None or e is None else t[e] for t in (weight1, weight2, bias1, bias2))
            return F.linear(activate(F.linear(x, w1.t(), b1), case.shape.activation), w2.t(), b2)

        if case.routing is None:
            return lambda: block(case.x)
        return lambda: by_expert(case, lambda e, x: block(x, e))


class EagerRows(Eager):
    """The same on weights as they are, [K, N]."""

    name = "torch eager KxN"

    def weights(self, case: Case) -> list[Tensor]:
        return [case.weights.first.values, case.weights.second.values]


class PaddedBmm(Peer):
    """Every expert's rows padded to the most that one has, and torch.bmm."""

    name = "torch bmm padded"
    kinds = ("moe",)

    def refuses(self, case: Case) -> str | None:
        refusal = only(case, modes="float32 fp16 bf16")
        if refusal is None and max(case.histogram or [0]) * case.shape.E > 8 * case.M * case.shape.top_k:
            return "would compute more than 8 times as many rows as there are"
        return refusal

    def make(self, case: Case) -> Call:
        assert case.routing is not None
        (ids, weights), (E, top_k) = case.routing, (case.shape.E, case.shape.top_k)
        weight1, weight2 = case.weights.first.values, case.weights.second.values
        bias1, bias2 = biases(case)

        def call() -> Tensor:
            flat = ids.flatten()
            order = flat.argsort(stable=True)
            counts = torch.bincount(flat, minlength=E)
            place = torch.arange(len(flat)) - (counts.cumsum(0) - counts)[flat[order]]
            slot = flat[order] * int(counts.max()) + place
            padded = case.x.new_zeros(E * int(counts.max()), case.shape.K1)
            padded[slot] = case.x[order // top_k]
            padded = padded.view(E, -1, case.shape.K1)
            if bias1 is None or bias2 is None:
                y = torch.bmm(activate(torch.bmm(padded, weight1), case.shape.activation), weight2)
            else:
                h = activate(torch.baddbmm(bias1.unsqueeze(1), padded, weight1), case.shape.activation)
                y = torch.baddbmm(bias2.unsqueeze(1), h, weight2)
            rows = y.view(-1, case.shape.K1)[slot].float() * weights.flatten()[order].unsqueeze(1)
            out = torch.zeros(case.M, case.shape.K1)
            return out.index_add_(0, order // top_k, rows).to(case.mode.dtype)

        return call


class GroupedMM(Peer):
    """F.grouped_mm on rows sorted by expert, as Hugging Face's grouped_mm experts do."""

    name = "torch grouped_mm"
    kinds = ("moe",)

    def refuses(self, case: Case) -> str | None:
        return only(case, modes="float32 fp16 bf16", bias=False)

    def make(self, case: Case) -> Call:
        assert case.routing is not None
        ids, weights = case.routing
        weight1, weight2 = (weight.mT for weight in case.weights.linear)

        def call() -> Tensor:
            flat = ids.flatten()
            order = flat.argsort(stable=True)
            ends = torch.bincount(flat, minlength=case.shape.E).cumsum(0).to(torch.int32)
            h = activate(
                F.grouped_mm(case.x[order // ids.shape[1]], weight1, offs=ends), case.shape.activation
            )
            rows = F.grouped_mm(h, weight2, offs=ends).float() * weights.flatten()[order].unsqueeze(1)
            y = torch.empty_like(rows).index_copy_(0, order, rows)
            return y.view(case.M, ids.shape[1], -1).sum(1).to(case.mode.dtype)

        return call


class Inductor(Eager):
    """torch.compile of the eager block with frozen weights and max-autotune."""

    name = "torch inductor"
    kinds = ("dense",)
    quick = False  # compiles for a minute

    def refuses(self, case: Case) -> str | None:
        return only(case, modes="float32 fp16 bf16")

    def make(self, case: Case) -> Call:
        import torch._inductor.config

        class Block(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                bias1, bias2 = biases(case)
                self.register_buffer("weight1", linear_weights(case.weights.first))
                self.register_buffer("weight2", linear_weights(case.weights.second))
                self.register_buffer("bias1", bias1)
                self.register_buffer("bias2", bias2)

            def forward(self, x: Tensor) -> Tensor:
                h = activate(F.linear(x, self.weight1, self.bias1), case.shape.activation)
                return F.linear(h, self.weight2, self.bias2)

        torch._dynamo.reset()
        torch._inductor.config.freezing = True
        compiled = torch.compile(Block(), mode="max-autotune", fullgraph=True, dynamic=False)
        return lambda: compiled(case.x)


class Mkldnn(Peer):
    """oneDNN through mkldnn._linear_pointwise, weights reordered for it, the activation in the first
    product."""

    name = "mkldnn prepacked"
    kinds = ("dense",)
    packs = True

    def available(self) -> str | None:
        return None if torch.backends.mkldnn.is_available() else "torch has no mkldnn"

    def refuses(self, case: Case) -> str | None:
        return only(case, modes="float32 fp16 bf16")

    def make(self, case: Case) -> Call:
        mode = case.mode.row.name
        if mode != "float32" and not getattr(torch.ops.mkldnn, f"_is_mkldnn_{mode}_supported")():
            raise RuntimeError(f"oneDNN has no {mode} on this CPU")
        weight1, weight2 = (torch.ops.mkldnn._reorder_linear_weight(linear_weights(p), case.M)
                            for p in (case.weights.first, case.weights.second))  # fmt: skip
        bias1, bias2 = biases(case)
        linear = torch.ops.mkldnn._linear_pointwise
        fused = {"gelu": ("gelu", "tanh"), "relu": ("relu", ""), "silu": ("swish", "")}.get(
            case.shape.activation
        )

        def call() -> Tensor:
            if fused:
                h = linear(case.x, weight1, bias1, fused[0], [], fused[1])
            else:
                h = activate(linear(case.x, weight1, bias1, "none", [], ""), case.shape.activation)
            return linear(h, weight2, bias2, "none", [], "")

        return call


class QLinear(Peer):
    """oneDNN's int8 linear with static scales, the activation and the requantisation in the first product."""

    name = "onednn.qlinear"
    kinds = ("dense",)
    packs = True

    def available(self) -> str | None:
        return (
            None
            if "onednn" in torch.backends.quantized.supported_engines
            else "torch has no oneDNN quantization"
        )

    def refuses(self, case: Case) -> str | None:
        return only(case, modes="w8a8_bf16", activations="gelu relu")

    def make(self, case: Case) -> Call:
        first, second = case.weights.first, case.weights.second
        packed = [torch.ops.onednn.qlinear_prepack(p.values.t().contiguous(), None) for p in (first, second)]
        zeros = [torch.zeros_like(p.scale, dtype=torch.int64) for p in (first, second)]
        linear = torch.ops.onednn.qlinear_pointwise
        activation, algorithm = case.shape.activation, "tanh" if case.shape.activation == "gelu" else ""
        h_scale = case.weights.h_scale

        def call() -> Tensor:
            weight, scale, bias = packed[0], first.scale, first.bias
            h = linear(case.x8, case.x_scale, 0, weight, scale, zeros[0], bias, h_scale, 0, torch.int8,
                       activation, [], algorithm)  # fmt: skip
            weight, scale, bias = packed[1], second.scale, second.bias
            return linear(
                h, h_scale, 0, weight, scale, zeros[1], bias, 1.0, 0, torch.bfloat16, "none", [], ""
            )

        return call


class IntMM(Peer):
    """torch._int_mm, and the rest of W8A8 as torch operators; in a MoE a loop over experts."""

    name = "torch _int_mm"

    def refuses(self, case: Case) -> str | None:
        return only(case, modes="w8a8 w8a8_bf16")

    def make(self, case: Case) -> Call:
        weights = [weight.mT for weight in case.weights.linear]
        scales = [case.weights.first.scale * case.x_scale, case.weights.second.scale * case.weights.h_scale]
        bias = [case.weights.first.bias, case.weights.second.bias]

        def block(x: Tensor, e: int | None = None) -> Tensor:
            (w1, w2), (s1, s2), (b1, b2) = ([t if t is None or e is None else t[e] for t in pair]
                                            for pair in (weights, scales, bias))  # fmt: skip
            h = torch._int_mm(x, w1) * s1
            h = activate(h if b1 is None else h + b1, case.shape.activation)
            q = (h / case.weights.h_scale).round().clamp(-128, 127).to(torch.int8)
            y = torch._int_mm(q, w2) * s2
            return y if b2 is None else y + b2

        if case.routing is None:
            return lambda: block(case.x8).to(case.mode.dtype)
        return lambda: by_expert(case, lambda e, x: block(x, e))


class Int8Pack(Peer):
    """aten's weight-only int8 product, one scale for each column."""

    name = "aten int8pack_mm"
    kinds = ("dense",)

    def refuses(self, case: Case) -> str | None:
        grouped = "has no groups" if case.mode.group else None
        return only(case, modes="w8a16 w8a16_bf16") or grouped

    def make(self, case: Case) -> Call:
        first, second = case.weights.first, case.weights.second
        weights = case.weights.linear
        bias1, bias2 = biases(case)
        multiply = torch.ops.aten._weight_int8pack_mm

        def call() -> Tensor:
            h = multiply(case.x, weights[0], first.scale)
            y = multiply(
                activate(h if bias1 is None else h + bias1, case.shape.activation), weights[1], second.scale
            )
            return y if bias2 is None else y + bias2

        return call


class Int4Pack(Peer):
    """aten's weight-only int4 product, scales and offsets for groups."""

    name = "aten int4pack_mm"
    kinds = ("dense",)
    packs = True

    def refuses(self, case: Case) -> str | None:
        refusal = only(case, modes="w4a16 w4a16_bf16")
        return refusal or (
            None if case.mode.group in (32, 64, 128, 256) else "needs groups of 32, 64, 128 or 256"
        )

    def make(self, case: Case) -> Call:
        group = case.mode.group
        products = (case.weights.first, case.weights.second)
        convert = torch.ops.aten._convert_weight_to_int4pack_for_cpu
        packed = [convert((linear_weights(p).to(torch.int32) + 8).contiguous(), 1) for p in products]
        # What it multiplies by is (unsigned value - 8) * scale + zero.
        scales = [torch.stack((p.scale, p.offset * p.scale), -1).contiguous() for p in products]
        bias1, bias2 = biases(case)
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu

        def call() -> Tensor:
            h = multiply(case.x, packed[0], group, scales[0])
            h = activate(h if bias1 is None else h + bias1, case.shape.activation)
            y = multiply(h, packed[1], group, scales[1])
            return y if bias2 is None else y + bias2

        return call


PEERS: tuple[type[Peer], ...] = (
    Ours, OursPacked, Eager, EagerRows, PaddedBmm, GroupedMM, Inductor, Mkldnn, QLinear, IntMM, Int8Pack,
    Int4Pack,
)  # fmt: skip


def known() -> dict[str, type[Peer]]:
    """Every peer by its name, those of other packages included."""
    from benchmarks import encoder, kt_kernel, npu, onnxruntime, openvino, sgl, vllm  # built on this module

    others = (vllm, sgl, openvino, onnxruntime, kt_kernel, encoder, npu)
    return {peer.name: peer for peer in (*PEERS, *(peer for module in others for peer in module.PEERS))}


def load(name: str) -> Peer:
    """A peer by its name, or by module:Class for one that is not in the list."""
    if name in known():
        return known()[name]()
    module, _, attribute = name.partition(":")
    if not attribute:
        raise ValueError(f"peer is '{name}', but it must be one of {', '.join(known())}, or module:Class")
    return getattr(importlib.import_module(module), attribute)()
