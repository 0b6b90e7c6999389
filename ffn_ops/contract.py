# SPDX-License-Identifier: Apache-2.0
"""The contract: every call the feed-forward operator accepts, stated once.

Tables say which tensors exist (OPERANDS), which dtype combinations run (MODES) and what must hold (RULES).
`resolve` checks one call against them and returns a `Plan`, or raises the first violated rule in table order;
`violations` lists all of them. The fake kernel, `explain`, the tests and the README's mode table use this
module, and csrc/contract/emit.py turns the tables into C++ at build, where they are evaluated without Python.
Standard library only.

Sizes: x is [..., K1] with M rows, weight1 [K1, N1], weight2 [K2, N2], each with a leading E when experts are
used; G1 and G2 are the antiquant groups of weight1 and weight2. int4 weights are described in int4 elements.
Source: the vendor's aclnnFFNV3 documentation and checks; docs/architecture.md says how a call passes through.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

GLU = ("geglu", "swiglu", "reglu")
ACTIVATIONS = ("fastgelu", "gelu", "relu", "silu", "gelu_erf", "relu2", *GLU)
VENDOR_ACTIVATIONS = (*ACTIVATIONS[:4], *GLU)  # aclnnFFNV3's
# The CPU kernels; aclnnFFNV3; npu_grouped_matmul, activation, npu_grouped_matmul, which only ffn.moe takes.
ROUTES = ("cpu", "fused", "grouped")
# Target -> the implemented routes that may carry a call there, best first.
TARGETS = {"cpu": ("cpu",), "ascend910b": ("fused", "grouped"), "ascend310p": ("fused",)}

# Every dtype a tensor may arrive with, and its bits per element; "other" stands for all the rest.
DTYPES = {
    "float32": 32, "float16": 16, "bfloat16": 16, "int8": 8, "int4": 4, "int32": 32, "int64": 64, "uint64": 64,
    "float64": 64, "int16": 16, "uint8": 8, "uint16": 16, "uint32": 32, "bool": 8, "complex32": 32,
    "complex64": 64, "complex128": 128, "other": 8,
}  # fmt: skip


class Mode(NamedTuple):
    """One row of dtypes that run together. An empty column means the operand must be left out."""

    name: str
    routes: str
    x: str
    weight: str
    y: str
    bias: str
    scale: str = ""
    deq_scale: str = ""
    antiquant: str = ""
    tokens: str = "int64"
    ids: str = "int64 int32"
    routing: str = "float32 float16 bfloat16"


# The dtypes of x, weight1 and (for int8 x) output_dtype choose the mode; the first row is output_dtype's
# default.
MODES = (
    #    name          routes               x           weight      y           bias
    Mode("float32",    "cpu",               "float32",  "float32",  "float32",  "float32"),
    Mode("fp16",       "cpu fused grouped", "float16",  "float16",  "float16",  "float16"),
    Mode("bf16",       "cpu fused grouped", "bfloat16", "bfloat16", "bfloat16", "float32"),
    Mode("w8a8",       "cpu fused",         "int8",     "int8",     "float16",  "int32", "float32", "uint64 int64 float32"),
    Mode("w8a8_bf16",  "cpu fused",         "int8",     "int8",     "bfloat16", "int32", "float32", "bfloat16"),
    Mode("w8a16",      "cpu fused grouped", "float16",  "int8",     "float16",  "float16", antiquant="float16"),
    Mode("w8a16_bf16", "cpu fused grouped", "bfloat16", "int8",     "bfloat16", "float32", antiquant="bfloat16"),
    Mode("w4a16",      "cpu fused grouped", "float16",  "int4",     "float16",  "float16", antiquant="float16"),
    Mode("w4a16_bf16", "cpu fused grouped", "bfloat16", "int4",     "bfloat16", "float32", antiquant="bfloat16"),
)  # fmt: skip
FLOAT_MODES = ("float32", "fp16", "bf16")


class Operand(NamedTuple):
    """A tensor of the call: its dtype column in MODES, the shapes it may have, and how to mend a wrong one.

    Shapes are axes by name. `*` is x's leading axes; `E?` is there exactly when experts are used, `G1?`
    exactly when antiquant_scale1 is per group; `E|1` is E with experts and 1 without. `cpu dense:` limits a
    shape to that route and to calls without experts (torch_npu's own tests pass deq_scale as [1, N]).
    """

    column: str
    shapes: tuple[str, ...]
    dtype_fix: str = ""
    shape_fix: str = ""


_BIAS_FIX = "cast it: float32 beside bfloat16 x, int32 beside int8 x, else x's dtype"
_ANTIQUANT_FIX = "cast it to x's dtype"
_ANTIQUANT_SHAPE = "all four are [N], or all are [G, N] with one row for each group: transpose what is [N, G]"
OPERANDS = {
    "x": Operand("x", ("* K1",), "", "K1 is weight1's rows; weights are [K, N], so nn.Linear's goes in as weight.t(), and int4 is packed along N"),
    "weight1": Operand("weight", ("E? K1 N1",), "", "weights have an axis E exactly when expert_tokens or topk_ids is given, with one entry for each expert"),
    "weight2": Operand(
        "weight", ("E? K2 N2",), "give both weights one dtype", "weights have an axis E exactly when expert_tokens or topk_ids is given, with one entry for each expert"
    ),
    "expert_tokens": Operand("tokens", ("E",), "cast it with .long(); biases are passed by name, as bias1=", "one entry for each expert"),
    "bias1": Operand("bias", ("E? N1",), _BIAS_FIX, "N1 is weight1's columns"),
    "bias2": Operand("bias", ("E? N2",), _BIAS_FIX, "N2 is weight2's columns"),
    "scale": Operand("scale", ("E|1", "E? K2"), "cast it with .float()", "one value for each expert, or each column"),
    "offset": Operand("scale", ("E|1",), "cast it with .float()", "one value for each expert, never per column"),
    "deq_scale1": Operand(
        "deq_scale", ("E? N1", "cpu dense: 1 N1"),
        "output_dtype=bfloat16 goes with bfloat16; float16 with ffn_ops.packing.pack_deq_scale", "N1 is weight1's columns",
    ),
    "deq_scale2": Operand(
        "deq_scale", ("E? N2", "cpu dense: 1 N2"),
        "output_dtype=bfloat16 goes with bfloat16; float16 with ffn_ops.packing.pack_deq_scale", "N2 is weight2's columns",
    ),
    "antiquant_scale1": Operand("antiquant", ("E? G1? N1",), _ANTIQUANT_FIX, _ANTIQUANT_SHAPE),
    "antiquant_scale2": Operand("antiquant", ("E? G2? N2",), _ANTIQUANT_FIX, _ANTIQUANT_SHAPE),
    "antiquant_offset1": Operand("antiquant", ("E? G1? N1",), _ANTIQUANT_FIX, _ANTIQUANT_SHAPE),
    "antiquant_offset2": Operand("antiquant", ("E? G2? N2",), _ANTIQUANT_FIX, _ANTIQUANT_SHAPE),
    "topk_ids": Operand("ids", ("* top_k",), "cast it with .long()", "top_k expert numbers for each row of x"),
    "topk_weights": Operand("routing", ("* top_k",), "cast it with .float()", "one weight for each of topk_ids"),
    "out": Operand("y", ("* N2",), "allocate it with this dtype", "allocate it with x's leading sizes"),
    "output_dtype": Operand("y", (), "leave it out, or name this dtype"),  # an argument, checked like a dtype
}  # fmt: skip
OPTIONAL = ("expert_tokens", "bias1", "bias2", "topk_ids", "topk_weights", "out", "output_dtype")

# What a rule looks at. Sizes first; then codes and flags: activation, mode and target are positions in their
# tables, experts, moe, per_group and per_channel are 0 or 1, `name.dtype` is a position in DTYPES. A fact that the
# call does not determine (a size behind a missing operand, a symbolic M) is unknown, and rules that need it
# are passed over.
FACTS = (
    "M", "K1", "N1", "K2", "N2", "E", "G1", "G2", "top_k", "rank", "inner_precise",
    "activation", "mode", "target", "experts", "moe", "per_group", "per_channel",
    *(f"{name}.dtype" for name in OPERANDS),
)  # fmt: skip
_VALUES: dict[str, Sequence[str]] = {"activation": ACTIVATIONS, "target": tuple(TARGETS)}
_VALUES["mode"] = tuple(mode.name for mode in MODES)

# Condition -> (fact, the values it may have).
CONDITIONS: dict[str, tuple[str, tuple[str | int, ...]]] = {
    "glu": ("activation", GLU),
    "not glu": ("activation", ACTIVATIONS[:-3]),
    "experts": ("experts", (1,)),
    "moe": ("moe", (1,)),
    "per group": ("per_group", (1,)),
    "per channel": ("per_channel", (1,)),
    "int4": ("weight1.dtype", ("int4",)),
    "int8 x": ("x.dtype", ("int8",)),
    "16-bit x": ("x.dtype", ("float16", "bfloat16")),
    "bf16": ("mode", ("bf16",)),
    "310p": ("target", ("ascend310p",)),
}


class Rule(NamedTuple):
    """One thing that must hold. `check` is one of the closed set of kinds that `_holds` evaluates:

    given, left_out, dtype, shape    args = (operand)
    one_of                           args = (fact, *values)
    equal                            args = (fact, factor, fact): the first is factor times the second
    multiple                         args = (fact, fact or number): the first is divisible by the second
    between                          args = (fact, least, most)
    known_activation, known_mode, addressable   named predicates, written by hand here and in csrc/contract
    """

    name: str
    routes: str
    when: tuple[str, ...]
    check: str
    args: tuple[str | int, ...]
    text: str


EVERY = " ".join(ROUTES)
NPU = "fused grouped"


def _operand_rules() -> Iterator[Rule]:
    """Presence, then dtype, of every operand against the mode's columns."""
    families = {
        "scale": "scale, offset, deq_scale1 and deq_scale2 go together, with int8 x and int8 weights",
        "deq_scale": "scale, offset, deq_scale1 and deq_scale2 go together, with int8 x and int8 weights",
        "antiquant": "the four antiquant tensors go together, with integer weights and 16-bit x; zero offsets are symmetric",
    }
    for name, operand in OPERANDS.items():
        if operand.column in families:
            fix = families[operand.column]
            yield Rule(f"{name}-needed", EVERY, (), "given", (name,),
                       f"{name} is missing, but mode {{mode}} needs it ({fix})")  # fmt: skip
            yield Rule(f"{name}-unused", EVERY, (), "left_out", (name,),
                       f"{name} is given, but mode {{mode}} takes none ({fix})")  # fmt: skip
    for name in (
        "output_dtype",
        *(name for name in OPERANDS if name != "output_dtype"),
    ):  # it may be why others fail
        operand = OPERANDS[name]
        if name not in ("x", "weight1"):  # these two choose the mode
            yield Rule(f"{name}-dtype", EVERY, (), "dtype", (name,),
                       f"{name} is {{dtype}}, but mode {{mode}} takes {{dtypes}} ({operand.dtype_fix})")  # fmt: skip


def _shape_rules() -> Iterator[Rule]:
    for name, operand in OPERANDS.items():
        if operand.shapes:
            yield Rule(f"{name}-shape", EVERY, (), "shape", (name,),
                       f"{name} has shape {{shape}}, but it must be {{pattern}} ({operand.shape_fix})")  # fmt: skip


_PAIRS = ", ".join(dict.fromkeys(f"{mode.x} with {mode.weight}" for mode in MODES))
# In the order in which they are reported.
RULES = (
    Rule("activation", EVERY, (), "known_activation", (),
         f"activation is {{activation}}, but it must be one of {', '.join(ACTIVATIONS)} (gelu is the tanh form, gelu_erf the exact one, fastgelu x * sigmoid(1.702 x), relu2 relu squared)"),
    Rule("mode", EVERY, (), "known_mode", (),
         f"x is {{x.dtype}} and weight1 is {{weight1.dtype}}, but the pairs that run are {_PAIRS} (cast x and the weights to one of them)"),
    Rule("moe-310p", "fused", ("310p",), "one_of", ("moe", 0),
         "topk_ids is given, but ascend310p has dense calls only (run torch.ops.ffn.moe on a 910B, or on the CPU)"),
    Rule("grouped-is-moe", "grouped", (), "one_of", ("moe", 1),
         "topk_ids is missing, but only torch.ops.ffn.moe takes the route grouped (give it topk_ids and topk_weights)"),
    Rule("mode-on-npu", NPU, (), "one_of", ("mode", *(mode.name for mode in MODES if "fused" in mode.routes.split())),
         "mode {mode} runs on the cpu target only (use float16 or bfloat16 tensors)"),
    Rule("mode-grouped", "grouped", ("int8 x",), "one_of", ("mode", *(mode.name for mode in MODES if "grouped" in mode.routes.split())),
         "mode {mode} is aclnnFFNV3's alone, for between grouped products nothing quantizes again (use 16-bit x, with integer weights if need be)"),
    Rule("mode-310p", "fused", ("310p",), "one_of", ("mode", "fp16"),
         "mode {mode} does not exist on ascend310p, which has fp16 only (use float16 x and weights)"),
    Rule("activation-on-npu", "fused", (), "one_of", ("activation", *VENDOR_ACTIVATIONS),
         "activation is {activation}, but aclnnFFNV3 has fastgelu, gelu, relu, silu and their GLUs only (use one of these; beside 16-bit x torch.ops.ffn.moe has the others)"),
    Rule("activation-310p", "fused", ("310p",), "one_of", ("activation", *VENDOR_ACTIVATIONS[:4]),
         "activation is {activation}, but ascend310p has fastgelu, gelu, relu and silu only (use one of these, or a 910B or the CPU for a GLU)"),
    *_operand_rules(),
    Rule("topk_ids-needed", EVERY, ("moe",), "given", ("topk_ids",),
         "topk_ids is missing, but topk_weights is given and they go together (pass both)"),
    Rule("topk_weights-needed", EVERY, ("moe",), "given", ("topk_weights",),
         "topk_weights is missing, but topk_ids is given and they go together (pass both)"),
    Rule("tokens-or-ids", EVERY, ("moe",), "one_of", ("expert_tokens.dtype",),
         "expert_tokens is {expert_tokens.dtype} and topk_ids is given too, but rows go to experts by one of them (leave one out)"),
    Rule("deq_scale-same-dtype", EVERY, (), "equal", ("deq_scale1.dtype", 1, "deq_scale2.dtype"),
         "deq_scale2 is {deq_scale2.dtype}, but deq_scale1 is {deq_scale1.dtype} and both must have one dtype (convert one of them)"),
    Rule("per-channel-scale-needs-packed-deq_scale", "fused", ("per channel",), "one_of",
         ("deq_scale1.dtype", "uint64", "int64", "bfloat16"),
         "deq_scale1 is {deq_scale1.dtype}, but a per-channel scale excludes float32 (convert it with ffn_ops.packing.pack_deq_scale)"),
    Rule("x-rank", EVERY, (), "between", ("rank", 2, 8),
         "x is of rank {rank}, but the operator takes 2 to 8 dimensions (reshape x; x[None] adds one)"),
    *_shape_rules(),
    Rule("glu-columns", EVERY, ("glu",), "equal", ("N1", 2, "K2"),
         "weight1 has N1 = {N1} columns and weight2 K2 = {K2} rows, but {activation} needs N1 = 2 * K2 (weight1 holds both halves, and both weights are [K, N])"),
    Rule("columns", EVERY, ("not glu",), "equal", ("N1", 1, "K2"),
         "weight1 has N1 = {N1} columns and weight2 K2 = {K2} rows, but {activation} needs N1 = K2 (is one of them not yet transposed to [K, N]?)"),
    Rule("output-size", EVERY, (), "equal", ("N2", 1, "K1"),
         "weight2 has N2 = {N2} columns, but y has x's shape, so N2 must be K1 = {K1} (pad or project outside)"),
    Rule("int4-even-columns1", EVERY, ("int4",), "multiple", ("N1", 2),
         "weight1 has N1 = {N1} int4 columns, but two share a byte, so N1 must be even (pad a column)"),
    Rule("int4-even-columns2", EVERY, ("int4",), "multiple", ("N2", 2),
         "weight2 has N2 = {N2} int4 columns, but two share a byte, so N2 must be even (pad a column)"),
    Rule("per-group-int4-only", NPU, ("per group",), "one_of", ("weight1.dtype", "int4"),
         "weight1 is {weight1.dtype}, but per-group antiquant scales are for int4 weights (use [N] scales, or int4 weights)"),
    Rule("groups1", EVERY, ("per group",), "between", ("G1", 1, 2**63 - 1),
         "antiquant_scale1 has G1 = {G1} groups, but there must be at least one (use [1, N1])"),
    Rule("groups2", EVERY, ("per group",), "between", ("G2", 1, 2**63 - 1),
         "antiquant_scale2 has G2 = {G2} groups, but there must be at least one (use [1, N2])"),
    Rule("groups1-divide", EVERY, ("per group",), "multiple", ("K1", "G1"),
         "antiquant_scale1 has G1 = {G1} groups, but they must divide K1 = {K1} (choose another group size)"),
    Rule("groups2-divide", EVERY, ("per group",), "multiple", ("K2", "G2"),
         "antiquant_scale2 has G2 = {G2} groups, but they must divide K2 = {K2} (choose another group size)"),
    Rule("K1-limit", "fused", (), "between", ("K1", 0, 65535),
         "weight1 has K1 = {K1} rows, but aclnnFFNV3 takes at most 65535 (split the layer)"),
    Rule("K2-limit", "fused", (), "between", ("K2", 0, 65535),
         "weight2 has K2 = {K2} rows, but aclnnFFNV3 takes at most 65535 (split the layer)"),
    # 131071 products of -128 * -128 are the most that an int32 sum holds.
    Rule("K1-int32-sum", "cpu", ("int8 x",), "between", ("K1", 0, 131071),
         "weight1 has K1 = {K1} rows, but an int32 sum of int8 products holds at most 131071 (split the layer)"),
    Rule("K2-int32-sum", "cpu", ("int8 x",), "between", ("K2", 0, 131071),
         "weight2 has K2 = {K2} rows, but an int32 sum of int8 products holds at most 131071 (split the layer)"),
    # floor(INT32_MAX / b) * b with b = 32 bytes / sizeof(x): the vendor's tiling, contract section c.3.
    Rule("M-limit", "fused", ("16-bit x",), "between", ("M", 0, 2147483632),
         "x has M = {M} rows, but aclnnFFNV3 takes at most 2147483632 of 16 bits (split x)"),
    Rule("M-limit-int8", "fused", ("int8 x",), "between", ("M", 0, 2147483616),
         "x has M = {M} rows, but aclnnFFNV3 takes at most 2147483616 of int8 (split x)"),
    Rule("E-limit", "fused", ("experts",), "between", ("E", 1, 256),
         "there are E = {E} experts, but aclnnFFNV3 takes 1 to 256 (split them over calls of 256; beside 16-bit x route grouped of torch.ops.ffn.moe takes up to 1024)"),
    Rule("glu-mode-npu", "fused", ("glu",), "one_of", ("mode", "fp16"),
         "activation is {activation} in mode {mode}, but aclnnFFNV3 has GLU in fp16 only (use float16 x and weights; beside 16-bit x torch.ops.ffn.moe has it)"),
    Rule("glu-experts", "fused", ("glu",), "one_of", ("experts", 0),
         "activation is {activation} with E = {E} experts, but aclnnFFNV3 has no GLU by expert (beside 16-bit x route grouped of torch.ops.ffn.moe has it, with topk_ids instead of expert_tokens)"),
    Rule("rank-310p", "fused", ("310p",), "between", ("rank", 2, 2),
         "x is of rank {rank}, but ascend310p takes exactly 2 dimensions (flatten the leading ones)"),
    Rule("experts-310p", "fused", ("310p",), "one_of", ("experts", 0),
         "there are E = {E} experts, but ascend310p has dense calls only (call once for each expert)"),
    # Of one weight for all groups, npu_grouped_matmul's documentation takes 1024; of x and weight, a last axis, which
    # is K1, N1 or K2 depending on who is transposed, below 65536. It says nothing of empty ones.
    Rule("E-limit-grouped", "grouped", (), "between", ("E", 0, 1024),
         "there are E = {E} experts, but npu_grouped_matmul takes at most 1024 (split them over calls of 1024, where an id of E or more is skipped)"),
    Rule("K1-limit-grouped", "grouped", (), "between", ("K1", 0, 65535),
         "weight1 has K1 = {K1} rows, but npu_grouped_matmul takes at most 65535 (split the layer)"),
    Rule("N1-limit-grouped", "grouped", (), "between", ("N1", 1, 65535),
         "weight1 has N1 = {N1} columns, but npu_grouped_matmul takes 1 to 65535 (split the layer)"),
    Rule("int4-words1", "grouped", ("int4",), "multiple", ("N1", 8),
         "weight1 has N1 = {N1} int4 columns, but npu_grouped_matmul takes them by eight in an int32 (pad columns)"),
    Rule("int4-words2", "grouped", ("int4",), "multiple", ("N2", 8),
         "weight2 has N2 = {N2} int4 columns, but npu_grouped_matmul takes them by eight in an int32 (pad columns)"),
    Rule("inner_precise", EVERY, (), "one_of", ("inner_precise", 0, 1),
         "inner_precise is {inner_precise}, but it must be 0 (high precision) or 1 (high performance) (leave it out for the default)"),
    Rule("inner_precise-bf16", EVERY, ("bf16", "not glu"), "one_of", ("inner_precise", 0),
         "inner_precise is {inner_precise}, but mode bf16 has high precision only (pass 0, or leave it out)"),
    Rule("inner_precise-glu", "fused", ("glu",), "one_of", ("inner_precise", 1),
         "inner_precise is {inner_precise}, but {activation} has high performance only (pass inner_precise=1)"),
    Rule("inner_precise-310p", "fused", ("310p",), "one_of", ("inner_precise", 1),
         "inner_precise is {inner_precise}, but ascend310p has high performance only (pass inner_precise=1)"),
    Rule("addressable", EVERY, (), "addressable", (),
         "the shapes hold 2**63 bytes or more in one tensor, which no memory has (check the sizes)"),
)  # fmt: skip


class ContractError(ValueError):
    """A call that the contract does not allow. The text names subject, value, rule and fix."""


class Spec(NamedTuple):
    """What the contract sees of a tensor: a name from DTYPES and the sizes; None is a size not known yet."""

    dtype: str
    shape: tuple[int | None, ...]


def spec_of(name: str, value: Any) -> Spec:
    """The Spec of operand `name` given as a tensor, an array, a list of tokens, a (dtype, shape) pair or a
    Spec.

    Weights of dtype int32 (8 values a word) and uint8 (2 a byte) are packed int4 and counted in int4
    elements.
    """
    dtype: Any
    shape: tuple[Any, ...]
    try:
        dtype, shape = _dtype_and_shape(name, value)
        dtype = (
            getattr(dtype, "name", None)
            or getattr(dtype, "__name__", None)
            or str(dtype).removeprefix("torch.")
        )
    except (TypeError, ValueError):
        raise ContractError(
            f"{name} is {value!r}, but it must be a tensor, an array or a (dtype, shape) pair (pass one of these)"
        ) from None
    if isinstance(value, tuple) and value and value[0] == dtype and dtype not in DTYPES:
        raise ContractError(
            f"{name} has dtype '{dtype}', but the names are {', '.join(tuple(DTYPES)[:-1])} (write one of them)"
        )
    if any(isinstance(size, (float, str)) or (isinstance(size, int) and size < 0) for size in shape):
        raise ContractError(
            f"{name} has shape {list(shape)}, but sizes are whole numbers from 0 (correct them)"
        )
    packed = {"int32": 8, "uint8": 2}.get(dtype) if name in ("weight1", "weight2") else None
    if packed:
        dtype, shape = "int4", shape[:-1] + tuple(size and size * packed for size in shape[-1:])
    return Spec(dtype if dtype in DTYPES else "other", shape)


def _dtype_and_shape(name: str, value: Any) -> tuple[Any, tuple[Any, ...]]:
    if name == "output_dtype":
        return value, ()
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return value.dtype, tuple(value.shape)
    if name == "expert_tokens" and not (len(value) == 2 and isinstance(value[1], Sequence)):
        return "int64", (len(value),)
    dtype, shape = value
    return dtype, tuple(shape)


class Violation(NamedTuple):
    rule: str
    text: str


class Plan(NamedTuple):
    """A checked call: what to compute and by which route, free of tensors and of torch."""

    mode: Mode
    route: str
    activation: str
    dims: dict[str, int | None]  # M K1 N1 K2 N2 E G1 G2 top_k; E is 0 without experts
    inner_precise: int
    per_channel: bool  # scale has one value for each column
    per_group: bool
    out: Spec


class _Call(NamedTuple):
    specs: Mapping[str, Spec]
    activation: str  # as the caller wrote it
    mode: Mode | None
    facts: dict[str, int | None]


def resolve(
    specs: Mapping[str, Spec], activation: str, *, inner_precise: int | None = None, target: str = "cpu"
) -> Plan:
    """Checks a call for `target` and returns its plan.

    `specs` maps names of OPERANDS to what is known of them; absent operands are left out, and the argument
    output_dtype is given as Spec(dtype, ()). If no route takes the call, raises ContractError with the first
    violated rule of the route that is `nearest`.
    """
    call = _describe(specs, activation, inner_precise, target)
    routes: dict[str, tuple[Violation, ...]] = {}
    for route in TARGETS[target]:
        routes[route] = tuple(islice(_violations(call, route), 1))
        if not routes[route]:
            return _plan(call, route)
    raise ContractError(routes[nearest(routes)][0].text)


def nearest(routes: Mapping[str, Sequence[Violation]]) -> str:
    """The first route that takes the call, or else the one whose first violated rule is last in the table: it
    was the closest to taking it, so its sentence is the one to act on."""
    order = [rule.name for rule in RULES]
    places = {
        route: order.index(broken[0].rule) if broken and broken[0].rule in order else len(order)
        for route, broken in routes.items()
    }
    return max(routes, key=lambda route: (not routes[route], places[route]))


def violations(
    specs: Mapping[str, Spec],
    activation: str,
    route: str,
    *,
    inner_precise: int | None = None,
    target: str = "cpu",
) -> tuple[Violation, ...]:
    """Every rule of `route` that the call breaks, in table order; empty when the route takes it."""
    return tuple(_violations(_describe(specs, activation, inner_precise, target), route))


def row_ends(expert_tokens: Sequence[int], M: int, tokens_index_flag: bool) -> list[int]:
    """The end row of each expert from its values (contract section d). Raises ContractError when they do not
    fit M.

    Only the CPU can check values: on a device they are not read. csrc/contract holds the twin.
    """
    ends, end = [], 0
    for e, value in enumerate(expert_tokens):
        if value < (end if tokens_index_flag else 0):
            raise ContractError(
                f"expert_tokens[{e}] is {value}, but end rows start at 0 and cannot decrease "
                "(leave tokens_index_flag out to pass counts)"
                if tokens_index_flag
                else f"expert_tokens[{e}] is {value}, but a count of rows cannot be negative "
                "(pass the number of rows of each expert)"
            )
        end = value if tokens_index_flag else end + value
        if end > M:
            raise ContractError(
                f"expert_tokens[{e}] is {value}, but then experts own more than the M = {M} rows of x "
                f"(their total must be M; {'end rows' if tokens_index_flag else 'counts'} were expected)"
            )
        ends.append(end)
    if ends and end != M:
        raise ContractError(
            f"expert_tokens covers {end} rows, but x has M = {M} (every row needs an expert: drop the rest of x)"
        )
    return ends


def row_count(x: Spec) -> int | None:
    """M: the product of x's leading sizes; None while one of them is unknown."""
    return _product(x.shape[:-1])


def _describe(specs: Mapping[str, Spec], activation: str, inner_precise: int | None, target: str) -> _Call:
    """Derives the facts. Each size has one source, so that a disagreement is always the other tensor's."""

    def axis(name: str, position: int, least_rank: int) -> int | None:
        shape = specs[name].shape if name in specs else ()
        return shape[position] if len(shape) >= least_rank else None

    facts: dict[str, int | None] = dict.fromkeys(FACTS)
    tokens = specs["expert_tokens"].shape if "expert_tokens" in specs else (0,)
    facts["moe"] = int("topk_ids" in specs or "topk_weights" in specs)
    facts["experts"] = int(facts["moe"] or len(tokens) == 0 or tokens[0] != 0)
    if facts["moe"]:
        facts["E"] = axis("weight1", 0, 3)
    elif not facts["experts"]:
        facts["E"] = 0
    elif len(tokens) == 1:
        facts["E"] = tokens[0]
    facts["top_k"] = axis("topk_ids", -1, 2)
    facts["K1"], facts["N1"] = axis("weight1", -2, 2), axis("weight1", -1, 2)
    facts["K2"], facts["N2"] = axis("weight2", -2, 2), axis("weight2", -1, 2)
    facts["rank"] = len(specs["x"].shape)
    facts["M"] = row_count(specs["x"])
    scale1 = specs["antiquant_scale1"].shape if "antiquant_scale1" in specs else ()
    facts["per_group"] = int(len(scale1) == (3 if facts["experts"] else 2))
    if facts["per_group"]:
        facts["G1"], facts["G2"] = scale1[-2], axis("antiquant_scale2", -2, 2)
    scale = specs["scale"].shape if "scale" in specs else (1,)
    facts["per_channel"] = int(len(scale) == 2 if facts["experts"] else len(scale) == 1 and scale[0] != 1)

    codes = list(DTYPES)
    for name, spec in specs.items():
        facts[f"{name}.dtype"] = codes.index(spec.dtype)
    name = activation.lower() if activation.isascii() else ""
    facts["activation"] = ACTIVATIONS.index(name) if name in ACTIVATIONS else None
    facts["target"] = list(TARGETS).index(target)
    if inner_precise is None:
        fp16_only = target == "ascend310p" and specs["x"].dtype != "bfloat16"
        inner_precise = int(name in GLU or fp16_only)
    facts["inner_precise"] = max(inner_precise, 1 - 2**63)  # as in C++, where -2**63 stands for unknown

    pair = (specs["x"].dtype, specs["weight1"].dtype)
    rows = [mode for mode in MODES if (mode.x, mode.weight) == pair]
    asked = specs["output_dtype"].dtype if "output_dtype" in specs else None
    mode = next((row for row in rows if row.y == asked), rows[0] if rows else None)
    facts["mode"] = MODES.index(mode) if mode else None
    return _Call(specs, activation, mode, facts)


def _violations(call: _Call, route: str) -> Iterator[Violation]:
    for rule in RULES:
        if route not in rule.routes.split():
            continue
        if all(_member(call.facts, *CONDITIONS[name]) for name in rule.when) and not _holds(
            rule, call, route
        ):
            yield Violation(rule.name, _render(rule, call, route))


def _member(facts: Mapping[str, int | None], fact: str, values: Sequence[str | int]) -> bool:
    return facts[fact] in codes(fact, values)


def codes(fact: str, values: Sequence[str | int]) -> list[int]:
    """The numbers that stand for `values` in `fact`."""
    names = tuple(DTYPES) if fact.endswith(".dtype") else _VALUES.get(fact, ())
    return [value if isinstance(value, int) else names.index(value) for value in values]


def _columns(mode: Mode, operand: str) -> list[str]:
    """The dtypes that `mode` takes for `operand`."""
    return getattr(mode, OPERANDS[operand].column).split()


def _holds(rule: Rule, call: _Call, route: str) -> bool:
    facts, args = call.facts, rule.args
    operand = str(args[0]) if args else ""
    if rule.check == "known_activation":
        return facts["activation"] is not None
    if rule.check == "known_mode":
        return call.mode is not None
    if rule.check == "addressable":
        return all(
            (count := _product(spec.shape)) is None
            or count * DTYPES[spec.dtype] // 8 < 2**63 - 1  # where _product saturates
            for spec in call.specs.values()
        )
    if rule.check == "given":
        return call.mode is None or operand in call.specs or not _columns(call.mode, operand)
    if rule.check == "left_out":
        return call.mode is None or operand not in call.specs or bool(_columns(call.mode, operand))
    if rule.check == "dtype":
        accepted = _columns(call.mode, operand) if call.mode else []
        return not accepted or operand not in call.specs or call.specs[operand].dtype in accepted
    if rule.check == "shape":
        return operand not in call.specs or any(
            _fits(call, operand, shape) for shape in SHAPES[operand] if _applies(shape, call, route)
        )
    value = facts[operand]
    if value is None:
        return True
    if rule.check == "one_of":
        return value in codes(operand, args[1:])
    if rule.check == "between":
        least, most = args[1:]
        return int(least) <= value <= int(most)
    if rule.check == "equal":
        other = facts[str(args[2])]
        return other is None or value == int(args[1]) * other
    assert rule.check == "multiple", rule.check
    divisor = args[1] if isinstance(args[1], int) else facts[args[1]]
    return not divisor or value % divisor == 0


class Shape(NamedTuple):
    """One concrete shape of an operand, and when it applies: routes, and 0/1 values of experts and
    per_group."""

    routes: tuple[str, ...]
    experts: tuple[int, ...]
    per_group: tuple[int, ...]
    axes: tuple[str, ...]


def _shapes(text: str) -> Iterator[Shape]:
    limit, _, pattern = text.rpartition(":")
    routes = ("cpu",) if "cpu" in limit.split() else ROUTES
    for experts in (0,) if "dense" in limit.split() else (0, 1):
        for per_group in (0, 1):
            axes = []
            for axis in pattern.split():
                if axis == "E|1":
                    axis = "E" if experts else "1"
                if (axis == "E?" and not experts) or (axis in ("G1?", "G2?") and not per_group):
                    continue
                axes.append(axis.rstrip("?"))
            yield Shape(routes, (experts,), (per_group,), tuple(axes))


def _merge(shapes: Iterator[Shape]) -> tuple[Shape, ...]:
    """Joins shapes that differ only in when they apply."""
    merged: dict[tuple[tuple[str, ...], tuple[str, ...], tuple[int, ...]], Shape] = {}
    for shape in shapes:
        key = (shape.routes, shape.axes, shape.experts)
        before = merged.get(key)
        merged[key] = shape._replace(per_group=before.per_group + shape.per_group) if before else shape
    return tuple(merged.values())


# Operand -> its shapes with every optional axis spelled out.
SHAPES = {
    name: _merge(shape for text in operand.shapes for shape in _shapes(text))
    for name, operand in OPERANDS.items()
}


def _applies(shape: Shape, call: _Call, route: str) -> bool:
    return (
        route in shape.routes
        and call.facts["experts"] in shape.experts
        and call.facts["per_group"] in shape.per_group
    )


def _sizes(call: _Call, shape: Shape) -> list[int | None]:
    """The sizes that `shape` demands in this call; None where any will do."""
    sizes: list[int | None] = []
    for axis in shape.axes:
        if axis == "*":
            sizes += call.specs["x"].shape[:-1]
        else:
            sizes.append(int(axis) if axis.isdigit() else call.facts[axis])
    return sizes


def _fits(call: _Call, operand: str, shape: Shape) -> bool:
    got, want = call.specs[operand].shape, _sizes(call, shape)
    return len(got) == len(want) and all(
        g is None or w is None or g == w for g, w in zip(got, want, strict=True)
    )


def _render(rule: Rule, call: _Call, route: str) -> str:
    """The rule's sentence with the call's values in it."""
    operand = str(rule.args[0]) if rule.args else ""

    def value(match: re.Match[str]) -> str:
        field = match[1]
        if field == "activation":
            return f"'{call.activation}'"
        if field == "mode":
            return call.mode.name if call.mode else "?"
        if field == "dtype":
            return call.specs[operand].dtype
        if field == "dtypes":
            return " or ".join(_columns(call.mode, operand)) if call.mode else "?"
        if field == "shape":
            return _brackets(call.specs[operand].shape)
        if field == "pattern":
            shapes = [shape for shape in SHAPES[operand] if _applies(shape, call, route)]
            return " or ".join(f"{_names(shape)} = {_brackets(_sizes(call, shape))}" for shape in shapes)
        fact = call.facts[field]
        return "?" if fact is None else list(DTYPES)[fact] if field.endswith(".dtype") else str(fact)

    return re.sub(r"\{([^{}]+)\}", value, rule.text)


def _names(shape: Shape) -> str:
    return "[" + ", ".join("..." if axis == "*" else axis for axis in shape.axes) + "]"


def _brackets(sizes: Sequence[int | None]) -> str:
    return "[" + ", ".join("?" if size is None else str(size) for size in sizes) + "]"


def _product(sizes: Sequence[int | None]) -> int | None:
    """The product, held at 2**63 - 1 as in C++; None when a size is unknown."""
    product = 1
    for size in sizes:
        if size is None:
            return None
        product *= size
    return min(product, 2**63 - 1)


def _plan(call: _Call, route: str) -> Plan:
    facts, mode = call.facts, call.mode
    assert mode is not None and facts["inner_precise"] is not None
    dims = {name: facts[name] for name in FACTS[:9]}
    return Plan(
        mode=mode,
        route=route,
        activation=call.activation.lower(),
        dims=dims,
        inner_precise=facts["inner_precise"],
        per_channel=bool(facts["per_channel"]),
        per_group=bool(facts["per_group"]),
        out=Spec(mode.y, (*call.specs["x"].shape[:-1], dims["N2"])),
    )


def modes_table() -> str:
    """The README's table of modes, in Markdown."""
    lines = ["| mode | x | weights | y | bias | other operands | runs on |", "|---|---|---|---|---|---|---|"]
    for mode in MODES:
        others = [f"scale, offset {mode.scale}"] if mode.scale else []
        if mode.deq_scale:
            others.append(f"deq_scale {' / '.join(mode.deq_scale.split())}")
        if mode.antiquant:
            others.append(f"antiquant scale, offset {mode.antiquant}")
        runs = "CPU, NPU" if "fused" in mode.routes else "CPU"
        row = (f"`{mode.name}`", mode.x, mode.weight, mode.y, mode.bias, "; ".join(others), runs)
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def routes_table() -> str:
    """Which route takes which calls on the NPUs, in Markdown: what the rules say of a small call of each kind.
    The 310P has nothing with experts."""
    activations = {
        ", ".join(f"`{name}`" for name in names): names[0]
        for names in (VENDOR_ACTIVATIONS[:4], ACTIVATIONS[4:6], GLU)
    }
    kinds = {  # column -> target, E, whether it is a call of ffn.moe
        "dense": ("ascend910b", 0, False),
        "`expert_tokens`": ("ascend910b", 4, False),
        "`ffn.moe`, E ≤ 256": ("ascend910b", 4, True),
        "`ffn.moe`, E ≤ 1024": ("ascend910b", 1024, True),
        "dense, 310P": ("ascend310p", 0, False),
    }
    rows: dict[tuple[str, ...], list[str]] = {}
    for label, activation in activations.items():
        for mode in MODES:
            cells = (_route(mode, activation, *kind) or "no" for kind in kinds.values())
            rows.setdefault((label, *cells), []).append(f"`{mode.name}`")
    lines = [("activation", "modes", *kinds), ("---",) * (2 + len(kinds))]
    lines += [(label, ", ".join(modes), *cells) for (label, *cells), modes in rows.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _route(mode: Mode, activation: str, target: str, E: int, moe: bool) -> str | None:
    """The route of the smallest call of its kind, with nothing optional; None where all refuse."""
    N1 = 32 if activation in GLU else 16
    sizes = {"K1": 16, "N1": N1, "K2": 16, "N2": 16, "E": E, "top_k": 2, "1": 1, "*": 4}
    specs = {"output_dtype": Spec(mode.y, ())}
    routed = {"topk_ids", "topk_weights"} if moe else {"expert_tokens"} if E else set()
    for name, operand in OPERANDS.items():
        dtypes = getattr(mode, operand.column).split()
        if dtypes and (name not in OPTIONAL or name in routed):
            axes = next(shape.axes for shape in SHAPES[name] if int(E > 0) in shape.experts)
            specs[name] = Spec(dtypes[0], tuple(sizes[axis] for axis in axes))
    try:
        return resolve(specs, activation, target=target).route
    except ContractError:
        return None


if __name__ == "__main__":
    print(modes_table(), routes_table(), sep="\n", end="")
