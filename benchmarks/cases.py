# SPDX-License-Identifier: Apache-2.0
"""What is computed: shapes of real models (shapes/*.toml), and the operands of a cell, which all peers are
given.

A cell is a shape in a mode with M rows. Weights are made once for a shape and mode, whatever M. The letters
are the contract's: x is [M, K1], weight1 [K1, N1] and weight2 [K2, N2] with N2 = K1, where N1 is 2 * K2 for
GLU.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ffn_ops import contract, packing
from ffn_ops.activation import activate
from ffn_ops.contract import GLU

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

SHAPES = Path(__file__).with_name("shapes")
UNIFORM = "uniform"
SKEWED = ("zipf", "one-expert", "empty-experts")
SEED = 20260101
EVICTED_BY = "reading"  # how caches are emptied before a cold sample, as results files say
# Starts with weights that are out of the caches. A peer in a process of its own would else find its weights
# there, and those who share one would not.
EVICTED = ("cold", "idle")
# Rows up to which a call starts with cold weights: such a call reads each weight once, as decoding does
# between other layers. With more rows the weights stay in use, and a call starts warm.
COLD_ROWS = {"dense": 128, "moe": 64, "encoder": 0}
_X_SCALE = 2.0**-5  # of int8 x, a power of two so that x8 * _X_SCALE is exact in every dtype


class Bar(NamedTuple):
    """How many times as fast as the best peer ours must be, in some cells of a shape. Elsewhere it is 1."""

    ratio: float
    modes: tuple[str, ...]
    m: tuple[int, ...]
    of: str = "peer"  # or "peer with bf16 x", or "ours in bf16"


class Shape(NamedTuple):
    """A feed-forward block of a model; E = 0 is dense. An encoder has several, and more."""

    name: str
    model: str  # where the sizes come from
    K1: int
    K2: int
    activation: str
    bias: bool
    m: tuple[int, ...]
    E: int = 0
    top_k: int = 0
    skew_m: tuple[int, ...] = ()  # rows of the cases with other routings than the uniform one
    idle_m: tuple[int, ...] = ()  # rows of the post-idle case
    modes: tuple[str, ...] = ()  # unless the command line names others; empty: all
    bars: tuple[Bar, ...] = ()
    tokens: int = 0  # of a sentence; not 0: a whole encoder, and m counts sentences

    @property
    def kind(self) -> str:
        return "encoder" if self.tokens else "moe" if self.E else "dense"

    @property
    def N1(self) -> int:
        return 2 * self.K2 if self.activation in GLU else self.K2

    def weight_bytes(self, mode: str) -> int:
        return (self.E or 1) * self.expert_bytes(mode)

    def expert_bytes(self, mode: str) -> int:
        """Of the weights alone; scales and biases are small beside them."""
        bits = {"float32": 32, "float16": 16, "bfloat16": 16, "int8": 8, "int4": 4}[Mode(mode).row.weight]
        return self.K1 * (self.N1 + self.K2) * bits // 8


def read_shapes(file: Path) -> list[Shape]:
    shapes = []
    for entry in tomllib.loads(file.read_text())["shape"]:
        bars = tuple(Bar(**_tuples(bar)) for bar in entry.pop("bar", ()))
        shapes.append(Shape(**{"bias": False, **_tuples(entry), "bars": bars}))
    return shapes


def _tuples(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}


class Mode:
    """A mode of the contract; "w4a16:128" has scales for groups of 128 rows."""

    def __init__(self, text: str) -> None:
        name, _, group = text.partition(":")
        found = [row for row in contract.MODES if row.name == name]
        if not found or (group and not (group.isdigit() and found[0].antiquant)):
            names = ", ".join(row.name for row in contract.MODES)
            raise ValueError(
                f"mode is '{text}', but it must be one of {names} (w8a16 and w4a16 forms take :GROUP)"
            )
        self.row, self.group = found[0], int(group) if group else None
        # The float dtype in which a peer holds x and y: y's where x is int8.
        self.dtype: torch.dtype = getattr(torch, self.row.y)


class Product(NamedTuple):
    """One product's weights, with a leading E for experts. What they stand for is (values + offset) *
    scale."""

    values: Tensor  # [K, N] in a float dtype, or int8 for all integer weights
    bias: Tensor | None  # float32 [N]
    scale: Tensor | None  # [N], or [G, N]; float32 for w8a8
    offset: Tensor | None


class Weights:
    """Of a shape in a mode."""

    def __init__(self, shape: Shape, mode: str) -> None:
        self.shape, self.mode = shape, Mode(mode)
        generator = torch.Generator().manual_seed(SEED)
        self.h_scale = 0.0  # of the int8 intermediate
        self.pack_seconds: dict[str, float] = {}  # by peer
        self._kept: dict[str, Any] = {}
        self.first = self._product(shape.K1, shape.N1, generator)
        self.second = self._product(shape.K2, shape.K1, generator)
        if self.mode.row.scale:
            # The intermediate's scale, from a sample; values beyond saturate, as the contract has it.
            x = torch.randn(64, shape.K1, generator=generator)
            first = self.first.values if shape.E == 0 else self.first.values[0]
            scale = self.first.scale if shape.E == 0 else self.first.scale[0]
            bias = 0 if self.first.bias is None else self.first.bias.reshape(-1, shape.N1)[0]
            h = activate((x @ first.float()) * scale + bias, shape.activation)
            self.h_scale = 1 / float((127 / h.abs().max()).half())  # the operator's scale is used in float16
            # deq_scale1 is what the operator multiplies by, so that all peers have the same weights.
            self.first = self.first._replace(scale=self._deq(self.first.scale, _X_SCALE) / _X_SCALE)
            self.second = self.second._replace(
                scale=self._deq(self.second.scale, self.h_scale) / self.h_scale
            )

    def _deq(self, scale: Tensor | None, input_scale: float) -> Tensor:
        """The scale of the integer sum, with the bits that the operator keeps."""
        assert scale is not None
        wanted = scale * input_scale
        if "bfloat16" in self.mode.row.deq_scale:
            return wanted.bfloat16().float()
        return packing.unpack_deq_scale(packing.pack_deq_scale(wanted))

    def _product(self, K: int, N: int, generator: torch.Generator) -> Product:
        row, E = self.mode.row, self.shape.E
        scale = offset = None
        if row.weight.startswith("int"):
            top = 7 if row.weight == "int4" else 127
            base = torch.randint(-top, top + 1, (K, N), generator=generator, dtype=torch.int8)
            groups = () if self.mode.group is None else (K // self.mode.group,)
            # Uniform integers have a deviation of top / sqrt(3): sums of K terms then have one of about 1.
            scale = (0.5 + torch.rand(*groups, N, generator=generator)) * (math.sqrt(3 / K) / top)
            if row.antiquant:
                scale = scale.to(getattr(torch, row.antiquant))
                offset = torch.zeros_like(scale)
                if row.weight == "int4":
                    offset.copy_(torch.randint(-2, 3, scale.shape, generator=generator))
        else:
            base = (torch.randn(K, N, generator=generator) / math.sqrt(K)).to(getattr(torch, row.weight))
        bias = torch.randn(N, generator=generator) / 8 if self.shape.bias else None
        if bias is not None and row.bias in ("float16", "bfloat16"):
            bias = bias.to(getattr(torch, row.bias)).float()
        if not E:
            return Product(base, bias, scale, offset)
        # Experts are one random matrix, shifted: other bytes in memory at a fraction of the time.
        values = torch.empty(E, K, N, dtype=base.dtype)
        for e in range(E):
            values[e] = base.roll(e, dims=1)
        per_expert = [
            None if t is None else t.expand(E, *t.shape).contiguous() for t in (bias, scale, offset)
        ]
        return Product(values, *per_expert)

    def kept(self, peer: str, pack: Callable[[], Any]) -> Any:
        """What `pack` makes of the weights, once for all cells of this shape and mode, and timed."""
        if peer not in self._kept:
            begin = time.perf_counter()
            self._kept[peer] = pack()
            self.pack_seconds[peer] = time.perf_counter() - begin
        return self._kept[peer]

    @cached_property
    def linear(self) -> tuple[Tensor, Tensor]:
        """Both weights as nn.Linear has them, [N, K]; one copy for all peers that keep them so."""
        first, second = (product.values.mT.contiguous() for product in (self.first, self.second))
        return first, second

    @cached_property
    def operands(self) -> dict[str, Any]:
        """What torch.ops.ffn.ffn and torch.ops.ffn.moe take beside x and the routing."""
        row = self.mode.row
        operands: dict[str, Any] = {"activation": self.shape.activation}
        inputs = ((1, self.first, _X_SCALE), (2, self.second, self.h_scale))
        for i, product, input_scale in inputs:
            values = product.values
            operands[f"weight{i}"] = packing.pack_int4(values) if row.weight == "int4" else values
            if row.antiquant:
                operands[f"antiquant_scale{i}"], operands[f"antiquant_offset{i}"] = (
                    product.scale,
                    product.offset,
                )
            elif row.scale:
                assert product.scale is not None
                deq = product.scale * input_scale
                bfloat16 = "bfloat16" in row.deq_scale
                operands[f"deq_scale{i}"] = deq.bfloat16() if bfloat16 else packing.pack_deq_scale(deq)
            if product.bias is not None:
                bias = product.bias
                if row.bias == "int32":
                    assert product.scale is not None
                    bias = (bias / (product.scale * input_scale)).round()
                operands[f"bias{i}"] = bias.to(getattr(torch, row.bias))
        if row.scale:
            operands["scale"] = torch.full((self.shape.E or 1,), 1 / self.h_scale)
            operands["offset"] = torch.zeros(self.shape.E or 1)
            operands["output_dtype"] = self.mode.dtype
        return operands


class Routing(NamedTuple):
    """Which experts a row visits, and with which weights; all peers start from these."""

    ids: Tensor  # int64 [M, top_k]
    weights: Tensor  # float32 [M, top_k]


def route(shape: Shape, name: str, M: int) -> Routing:
    """uniform: every expert is as likely; zipf: expert e with probability 1 / (e + 1); one-expert: every
    row's first choice is expert 0; empty-experts: half of the experts get nothing."""
    generator = torch.Generator().manual_seed(SEED + M)
    odds = torch.ones(shape.E)
    if name == "zipf":
        odds /= torch.arange(1.0, shape.E + 1)
    elif name == "empty-experts":
        odds[: shape.E // 2] = 0
    elif name == "one-expert":
        odds[0] = 1e9
    ids = torch.multinomial(odds.expand(M, -1), shape.top_k, generator=generator)
    weights = torch.rand(M, shape.top_k, generator=generator) + 0.5
    return Routing(ids, weights / weights.sum(1, keepdim=True))


@dataclass
class Case:
    """A cell's operands."""

    weights: Weights
    M: int
    start: str  # "cold", "warm" or "idle"
    routing_name: str | None

    def __post_init__(self) -> None:
        self.shape, self.mode = self.weights.shape, self.weights.mode
        generator = torch.Generator().manual_seed(SEED + 1)
        x = torch.randn(self.M, self.shape.K1, generator=generator)
        if self.mode.row.x == "int8":
            self.x8: Tensor | None = (x / _X_SCALE).round().clamp(-128, 127).to(torch.int8)
            self.x = (self.x8.float() * _X_SCALE).to(self.mode.dtype)
        else:
            self.x8 = None
            self.x = x.to(self.mode.dtype)
        self.routing = route(self.shape, self.routing_name, self.M) if self.routing_name else None

    x_scale = _X_SCALE

    @property
    def operand(self) -> Tensor:
        """x as the operator takes it."""
        return self.x if self.x8 is None else self.x8

    @property
    def histogram(self) -> list[int] | None:
        """Rows of each expert."""
        if self.routing is None:
            return None
        return torch.bincount(self.routing.ids.flatten(), minlength=self.shape.E).tolist()

    @property
    def operations(self) -> int:
        """Of the two products: 2 for each multiply-add."""
        return 2 * self.M * (self.shape.top_k or 1) * self.shape.K1 * (self.shape.N1 + self.shape.K2)

    @property
    def bytes(self) -> int:
        """What must be read and written at least once: the weights of the experts that have rows, x and y."""
        hit = sum(rows > 0 for rows in self.histogram) if self.routing else 1
        moved = self.operand.nbytes + self.x.numel() * self.mode.dtype.itemsize
        return hit * self.shape.expert_bytes(self.mode_name) + moved

    @property
    def facts(self) -> dict[str, Any]:
        return {"operations": self.operations, "bytes": self.bytes, "histogram": self.histogram}

    @property
    def mode_name(self) -> str:
        return self.mode.row.name + (f":{self.mode.group}" if self.mode.group else "")
