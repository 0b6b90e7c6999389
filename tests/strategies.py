# SPDX-License-Identifier: Apache-2.0
"""Hypothesis strategies for calls, drawn from the contract's tables.

`calls` draws legal calls as specs; `Call` turns one into arrays for the reference and tensors for the
operator, on the device under test. test_contract.py breaks them rule by rule, test_op.py runs them.
"""

import os
from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import numpy as np
import torch
from hypothesis import strategies as st

from ffn_ops import contract, prepack
from ffn_ops.contract import ACTIVATIONS, GLU, MODES, OPERANDS, SHAPES, VENDOR_ACTIVATIONS, Mode, Spec

DEVICE = os.environ["FFN_OPS_TEST_DEVICE"]  # "cpu" or "npu": conftest.py's option --device
TARGET = {"cpu": "cpu", "npu": "ascend910b"}[DEVICE]
NUMPY = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "int4": np.dtype(ml_dtypes.int4)}


@dataclass(frozen=True)
class Call:
    """One call: what the contract sees of it, and the values that shapes do not determine."""

    specs: dict[str, Spec]
    activation: str
    inner_precise: int | None = None
    target: str = TARGET
    tokens: tuple[int, ...] = ()  # rows of each expert
    tokens_index_flag: bool = False
    int4_storage: torch.dtype = torch.uint8
    layouts: dict[str, str] = field(default_factory=dict)
    activate_left: bool = False  # of ffn.moe

    @property
    def route(self) -> str:
        """The route that takes the call, or the one whose violations are its error."""
        return contract.nearest({route: self.violations_of(route) for route in contract.TARGETS[self.target]})

    def plan(self) -> contract.Plan:
        return contract.resolve(
            self.specs, self.activation, inner_precise=self.inner_precise, target=self.target
        )

    def violations(self) -> tuple[contract.Violation, ...]:
        return self.violations_of(self.route)

    def violations_of(self, route: str) -> tuple[contract.Violation, ...]:
        return contract.violations(
            self.specs, self.activation, route, inner_precise=self.inner_precise, target=self.target
        )

    def with_spec(self, name: str, spec: Spec | None) -> "Call":
        specs = {**self.specs, name: spec} if spec else {k: v for k, v in self.specs.items() if k != name}
        return replace(self, specs=specs)

    @property
    def overload(self) -> torch._ops.OpOverload:
        """The operator that takes this call."""
        if "topk_ids" in self.specs:
            return torch.ops.ffn.moe.default
        return torch.ops.ffn.ffn.out if "out" in self.specs else torch.ops.ffn.ffn.default

    def options(self) -> dict[str, Any]:
        """The arguments that are no tensors, as the operator takes them."""
        output = self.specs.get("output_dtype")
        options = {
            "inner_precise": self.inner_precise,
            "output_dtype": getattr(torch, output.dtype) if output else None,
        }
        if "topk_ids" in self.specs:
            return {"activate_left": self.activate_left, **options}
        return {"tokens_index_flag": self.tokens_index_flag, **options}

    def arrays(self, seed: int) -> dict[str, np.ndarray]:
        """Random operands of sizes that keep every step in range, keyed as reference.ffn's arguments."""
        rng = np.random.default_rng(seed)
        plan = self.plan()
        arrays = {}
        for name, spec in self.specs.items():
            if name not in ("out", "output_dtype", "expert_tokens"):
                arrays[name] = _random(rng, name, spec, plan)
        if "expert_tokens" in self.specs:
            tokens = np.cumsum(self.tokens) if self.tokens_index_flag else np.array(self.tokens)
            arrays["expert_tokens"] = tokens.astype(np.int64)
        return arrays

    def tensors(self, arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
        """The arrays as tensors on DEVICE, in this call's int4 storage and memory layouts."""
        return {
            name: lay_out(to_torch(array, self.int4_storage), self.layouts.get(name, "dense"))
            for name, array in arrays.items()
        }

    def hollow(self) -> dict[str, torch.Tensor]:
        """Tensors of these dtypes and shapes that take no memory, for calls that are refused before any
        work."""
        tensors = {}
        for name, (dtype, shape) in self.specs.items():
            if name == "output_dtype":
                continue
            if dtype == "int4":
                shape = (*shape[:-1], shape[-1] // {torch.uint8: 2, torch.int32: 8}[self.int4_storage])
            kind = self.int4_storage if dtype == "int4" else getattr(torch, dtype)
            tensors[name] = torch.zeros((), dtype=kind).expand(shape)
        return tensors

    def reference_options(self) -> dict[str, Any]:
        output = self.specs.get("output_dtype")
        return {**self.options(), "output_dtype": numpy_dtype(output.dtype) if output else None}


def numpy_dtype(name: str) -> np.dtype:
    return NUMPY.get(name) or np.dtype(name)


def to_torch(array: np.ndarray, int4_storage: torch.dtype = torch.uint8) -> torch.Tensor:
    if array.dtype == ml_dtypes.int4:
        nibbles = (array.astype(np.int8) & 15).astype(np.uint8)
        packed = nibbles[..., ::2] | nibbles[..., 1::2] << 4
        return torch.from_numpy(
            np.ascontiguousarray(packed).view(np.int32 if int4_storage == torch.int32 else np.uint8)
        )
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(np.ascontiguousarray(array).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def lay_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """An equal tensor on DEVICE whose memory is dense, transposed (as nn.Linear's weight.t()) or every second
    element; or the same weight prepacked."""
    if layout == "packed":
        return prepack(tensor)
    if layout == "transposed" and tensor.dim() >= 2:
        return tensor.transpose(-1, -2).contiguous().to(DEVICE).transpose(-1, -2)
    if layout == "sliced":
        wide = tensor.new_empty((*tensor.shape, 2))
        wide[..., 0] = tensor
        return wide.to(DEVICE)[..., 0]
    return tensor.to(DEVICE)


def _random(rng: np.random.Generator, name: str, spec: Spec, plan: contract.Plan) -> np.ndarray:
    shape = spec.shape
    dtype = numpy_dtype(spec.dtype)
    K = max(plan.dims["K2" if name.endswith("2") else "K1"] or 0, 1)
    if name in ("x", "weight1", "weight2"):
        if spec.dtype in ("int8", "int4"):
            low, high = (-128, 128) if spec.dtype == "int8" else (-8, 8)
            return rng.integers(low, high, shape).astype(dtype)
        return (rng.standard_normal(shape) * (1 if name == "x" else K**-0.5)).astype(dtype)
    if name.startswith("bias"):
        if spec.dtype == "int32":
            return rng.integers(-20000, 20000, shape).astype(np.int32)
        return rng.standard_normal(shape).astype(dtype)
    if name == "topk_ids":  # E and above: to be skipped
        return rng.integers(0, (plan.dims["E"] or 0) + 2, shape).astype(dtype)
    if name == "topk_weights":
        return rng.uniform(-1, 1, shape).astype(dtype)
    if name == "scale":
        return rng.uniform(20, 60, shape).astype(dtype)
    if name == "offset":
        return rng.integers(-20, 20, shape).astype(dtype)
    if name.startswith("deq_scale"):  # an int32 sum has a spread of about 73**2 * sqrt(K)
        deq = (rng.uniform(0.5, 2, shape) / (73**2 * K**0.5)).astype(np.float32)
        if spec.dtype in ("int64", "uint64"):
            return (deq.view(np.uint32).astype(np.uint64) | np.uint64(rng.integers(0, 2) << 46)).astype(dtype)
        return deq.astype(dtype)
    spread = 73 if plan.mode.weight == "int8" else 4.6
    if name.startswith("antiquant_scale"):
        return (rng.uniform(0.5, 2, shape) / (spread * K**0.5)).astype(dtype)
    return rng.integers(-3, 4, shape).astype(dtype)  # antiquant_offset


@st.composite
def calls(
    draw: st.DrawFn,
    target: str = TARGET,
    modes: tuple[str, ...] | None = None,
    glu: bool | None = None,
    experts: bool | None = None,
    per_group: bool | None = None,
    per_channel: bool | None = None,
    moe: bool = False,
    largest: int = 40,
    layouts: bool = False,
    route: str | None = None,
) -> Call:
    """Legal calls of `target`, of ffn.moe if asked; the other arguments narrow them.

    Sizes go up to `largest`, zeros included. `route` is one of the target's that takes them, by default its
    first.
    """
    route = route or contract.TARGETS[target][0]
    free = route != "fused"  # to choose any activation, with experts or not
    rows = [m for m in MODES if route in m.routes.split() and (modes is None or m.name in modes)]
    if target == "ascend310p":
        rows = [m for m in rows if m.name == "fp16"]
    if glu:
        rows = [m for m in rows if free or m.name == "fp16"]
    if per_group:
        rows = [m for m in rows if m.antiquant and (target == "cpu" or m.weight == "int4")]
    if per_channel:
        rows = [m for m in rows if m.scale]
    mode = draw(st.sampled_from(rows))

    may_glu = free or (mode.name == "fp16" and target != "ascend310p" and not (experts or moe))
    use_glu = draw(st.booleans()) if glu is None and may_glu else bool(glu)
    name = draw(
        st.sampled_from([a for a in (ACTIVATIONS if free else VENDOR_ACTIVATIONS) if (a in GLU) == use_glu])
    )
    may_experts = free or not (use_glu or target == "ascend310p")
    E = (
        draw(st.integers(1, 5))
        if moe or (draw(st.booleans()) if experts is None and may_experts else experts)
        else 0
    )
    left_out = {"out", "output_dtype"} | (set() if moe else {"topk_ids", "topk_weights"})
    if moe or not E:
        left_out.add("expert_tokens")

    step = draw(st.sampled_from((2, 8))) if mode.weight == "int4" else 1
    words = 8 if mode.weight == "int4" and route == "grouped" else step
    size = st.integers(0, largest // words).map(lambda n: n * words)
    K1, K2 = draw(size), max(draw(size), words if route == "grouped" else 0)
    may_group = bool(mode.antiquant) and (target == "cpu" or mode.weight == "int4")
    grouped = draw(st.booleans()) if per_group is None and may_group else bool(per_group)
    dims = {
        "K1": K1,
        "N1": 2 * K2 if use_glu else K2,
        "K2": K2,
        "N2": K1,
        "E": E,
        "top_k": draw(st.integers(0, 4)),
    }
    dims["G1"], dims["G2"] = draw(st.sampled_from(_divisors(K1))), draw(st.sampled_from(_divisors(K2)))

    rank = 2 if target == "ascend310p" else draw(st.integers(2, 8))
    leading = tuple(
        draw(
            st.lists(
                st.integers(0, 4) if rank > 3 else st.integers(0, 12), min_size=rank - 1, max_size=rank - 1
            )
        )
    )
    if np.prod(leading) > 64:
        leading = (1,) * (rank - 2) + leading[-1:]

    specs: dict[str, Spec] = {}
    float32_deq = draw(st.booleans()) if per_channel is None else not per_channel
    for operand in OPERANDS:
        dtypes = getattr(mode, OPERANDS[operand].column).split()
        if not dtypes or operand in left_out:
            continue
        if operand in ("bias1", "bias2") and not draw(st.booleans()):
            continue
        shapes = [
            shape.axes
            for shape in SHAPES[operand]
            if route in shape.routes and int(E > 0) in shape.experts and int(grouped) in shape.per_group
        ]
        axes = draw(st.sampled_from(shapes))
        if operand == "scale" and per_channel is not None:
            axes = shapes[per_channel]
        sizes: list[int] = []
        for axis in axes:
            sizes += leading if axis == "*" else [int(axis)] if axis.isdigit() else [dims[axis]]
        if operand == "deq_scale2":
            dtype = specs["deq_scale1"].dtype
        elif operand == "deq_scale1" and route == "fused" and not float32_deq:
            dtype = draw(st.sampled_from([d for d in dtypes if d != "float32"]))
        else:
            dtype = draw(st.sampled_from(dtypes))
        specs[operand] = Spec(dtype, tuple(sizes))
    if mode.name == "w8a8_bf16" or draw(st.booleans()):
        specs["output_dtype"] = Spec(mode.y, ())

    legal = (1,) if route == "fused" and (use_glu or target == "ascend310p") else (0, 1)
    if mode.name == "bf16" and not use_glu:
        legal = (0,)
    tokens: tuple[int, ...] = ()
    if E and not moe:
        M = int(np.prod(leading))
        cuts = sorted(draw(st.lists(st.integers(0, M), min_size=E - 1, max_size=E - 1)))
        tokens = tuple(end - begin for begin, end in zip([0, *cuts], [*cuts, M], strict=True))
    call = Call(
        specs,
        draw(st.sampled_from((name, name.upper()))),
        draw(st.sampled_from((None, *legal))),
        target,
        tokens,
        draw(st.booleans()),
        torch.int32 if step == 8 else torch.uint8,
        {name: draw(st.sampled_from(_layouts(name, target))) for name in specs} if layouts else {},
        moe and draw(st.booleans()),
    )
    if (
        call.violations() and per_channel is None and route == "fused"
    ):  # a float32 deq_scale beside a drawn per-channel scale
        uint64 = {name: Spec("uint64", specs[name].shape) for name in ("deq_scale1", "deq_scale2")}
        call = replace(call, specs={**specs, **uint64})
    return call


def _layouts(name: str, target: str) -> tuple[str, ...]:
    packed = ("packed",) if name in ("weight1", "weight2") and target == "cpu" else ()
    return ("dense", "transposed", "sliced", *packed)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0] or [1]


def mode_of(name: str) -> Mode:
    return next(mode for mode in MODES if mode.name == name)


_SIZES = st.sampled_from((0, 1, 2, 3, 4, 8, 16, 65535, 65536, 131072, 2**31, 2**40, 2**62))


@st.composite
def any_calls(draw: st.DrawFn) -> Call:
    """Calls sensible and not: a legal one with up to three operands replaced by anything, or nothing but
    noise."""
    target = draw(st.sampled_from(tuple(contract.TARGETS)))
    call = draw(calls(target=target))
    for name in draw(st.lists(st.sampled_from(tuple(OPERANDS)), max_size=3)):
        spec = call.specs.get(name)
        dtype = draw(st.sampled_from(tuple(contract.DTYPES)))
        shape = tuple(draw(st.lists(_SIZES, max_size=4)))
        kind = draw(st.sampled_from(("drop", "dtype", "shape", "noise")))
        if name == "output_dtype":
            shape = ()
        if kind == "drop" and name not in ("x", "weight1", "weight2"):
            call = call.with_spec(name, None)
        elif kind == "dtype" and spec:
            call = call.with_spec(name, Spec(dtype, spec.shape))
        elif kind == "shape" and spec and name != "output_dtype":
            sizes = list(spec.shape) or [1]
            sizes[draw(st.integers(0, len(sizes) - 1))] = draw(_SIZES)
            call = call.with_spec(name, Spec(spec.dtype, tuple(sizes)))
        else:
            call = call.with_spec(name, Spec(dtype, shape))
    activation = draw(
        st.sampled_from((call.activation, call.activation, *ACTIVATIONS, "mish", "", "gélu", "{M}"))
    )
    inner_precise = draw(st.sampled_from((call.inner_precise, call.inner_precise, 0, 1, 2, -1)))
    other = draw(st.sampled_from((target, target, *contract.TARGETS)))
    return replace(call, activation=activation, inner_precise=inner_precise, target=other)
