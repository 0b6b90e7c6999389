# SPDX-License-Identifier: Apache-2.0
"""What phase 1 of the emulated aclnnFFN refuses: the vendor's rules in the vendor's order, one table for each
step of contract.md section c. Any two rules broken at once give the first one's status and message."""

import ctypes
from itertools import combinations
from typing import Any, NamedTuple

import pytest
from emulated import (
    DTYPE,
    FRACTAL_NZ,
    INNER,
    INVALID,
    NC1HWC0,
    NCHW,
    NCL,
    ND,
    NULL,
    OBJECTS,
    TILING,
    Device,
    device,
    message,
)


class Tensor(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    format: int = ND


class Rule(NamedTuple):
    """What breaks it: operand -> Tensor or None, operand.field -> value, or argument -> value."""

    status: int
    text: str
    change: dict[str, Any]


def invalid(text: str, **change: Any) -> Rule:
    return Rule(INVALID, text, {key.replace("__", "."): value for key, value in change.items()})


def late(text: str, **change: Any) -> Rule:
    return invalid(text, **change)._replace(status=TILING)


# M = 3, K1 = N2 = 4, N1 = K2 = 6 (12 and 6 for GLU), E = 2, G1 = G2 = 2.
def call(x: str, weight: str, y: str, bias: str, **more: Any) -> dict[str, Any]:
    return {
        "x": Tensor(x, (3, 4)), "weight1": Tensor(weight, (4, 6)), "weight2": Tensor(weight, (6, 4)),
        "y": Tensor(y, (3, 4)), "bias1": Tensor(bias, (6,)), "bias2": Tensor(bias, (4,)),
        "activation": "relu", "inner_precise": 0, "size": True, "executor": True,
    } | more  # fmt: skip


QUANT = {
    "scale": Tensor("float32", (1,)), "offset": Tensor("float32", (1,)),
    "deq_scale1": Tensor("uint64", (6,)), "deq_scale2": Tensor("uint64", (4,)),
}  # fmt: skip
ANTIQUANT = {
    f"antiquant_{name}{n}": Tensor("float16", (N,))
    for name in ("scale", "offset") for n, N in ((1, 6), (2, 4))
}  # fmt: skip


def with_experts(dense: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Every shape but x's and y's gets E = 2; what is one for all becomes one for each."""
    stacked = {
        name: value._replace(shape=(2,) if value.shape == (1,) else (2, *value.shape))
        for name, value in dense.items()
        if isinstance(value, Tensor) and name not in ("x", "y")
    }
    return dense | stacked | {"expert_tokens": Tensor("int64", (2,))} | more


FP16 = call("float16", "float16", "float16", "float16")
GLU = FP16 | {
    "weight1": Tensor("float16", (4, 12)), "bias1": Tensor("float16", (12,)),
    "activation": "geglu", "inner_precise": 1,
}  # fmt: skip
W8A8 = call("int8", "int8", "float16", "int32", **QUANT)
W4A16 = call("float16", "int4", "float16", "float16", **ANTIQUANT)
W4A16_GROUPS = W4A16 | {name: tensor._replace(shape=(2, *tensor.shape)) for name, tensor in ANTIQUANT.items()}

# c.1, steps 0 to 4
ARGUMENTS = [
    Rule(NULL, "activation is null", {"activation": None}),
    invalid("activation is none of the seven names", activation="gelu "),
    *(Rule(NULL, f"{name} is null", {name: None}) for name in ("x", "weight1", "weight2", "y")),
    invalid(
        "deqScale1 and deqScale2 differ in dtype",
        deq_scale1=Tensor("int64", (6,)), deq_scale2=Tensor("uint64", (4,)),
    ),
    Rule(NULL, "workspaceSize or executor is null", {"size": False}),
    Rule(NULL, "workspaceSize or executor is null", {"executor": False}),
]  # fmt: skip


def shapes(E: tuple[int, ...], N1: int, glu: bool) -> list[Rule]:
    """c.1, steps 8 to 16. E: (2,) with experts, else ()."""
    rank = len(E)
    columns = [
        invalid("N1 must be even for a GLU activation", weight1__shape=(4, 11)),
        invalid("K2 must be N1 / 2 for a GLU activation", weight1__shape=(4, 14)),
        invalid("K1 must be N2", weight2__shape=(6, 5)),  # i.11
    ]
    if not glu:
        columns = [
            invalid("K1 must be N2", weight2__shape=(*E, 6, 5)),
            invalid("N1 must be K2", weight1__shape=(*E, 4, 7)),
        ]
    experts = [
        invalid("weight1 must have E experts", weight1__shape=(3, 4, N1)),
        invalid("weight2 must have E experts", weight2__shape=(3, 6, 4)),
    ]
    biases = [
        rule
        for name, N in (("bias1", N1), ("bias2", 4))
        for rule in (
            invalid(f"{name} has the wrong rank", **{f"{name}__shape": (1, *E, N)}),
            invalid(f"{name} has the wrong last size", **{f"{name}__shape": (*E, N + 1)}),
            *([invalid(f"{name} must have E experts", **{f"{name}__shape": (3, N)})] if E else []),
        )
    ]
    return [
        *(
            invalid(f"{name} has a private format", **{f"{name}__format": NC1HWC0})
            for name in ("x", "weight1", "weight2", "y")
        ),
        invalid("y and x differ in rank", y__shape=(1, 3, 4)),
        invalid("x must have 2 to 8 dimensions", x__shape=(4,), y__shape=(4,)),
        invalid("x must have 2 to 8 dimensions", x__shape=(1,) * 8 + (4,), y__shape=(1,) * 8 + (4,)),
        invalid(f"weight1 must have {2 + rank} dimensions", weight1__shape=(1, *E, 4, N1)),
        invalid(f"weight2 must have {2 + rank} dimensions", weight2__shape=(1, *E, 6, 4)),
        invalid("K1 and K2 must be below 65536", weight1__shape=(*E, 65536, N1)),
        invalid("K1 and K2 must be below 65536", weight2__shape=(*E, 65536, 4)),
        invalid("x and weight1 differ in K1", x__shape=(3, 5), y__shape=(3, 5)),
        *columns,
        *(experts if E else []),
        *biases,
    ]


def weights(text: str, dtype: str) -> Rule:
    return invalid(text, weight1__dtype=dtype, weight2__dtype=dtype)


# c.2, the first item
DTYPES = [
    invalid("x has the wrong dtype", x__dtype="float32"),
    invalid("weight1 and weight2 differ in dtype", weight2__dtype="uint8"),
    weights("weight1 has the wrong dtype", "float32"),
]
NO_QUANT = [
    invalid(f"{text} must be null in this mode", **{name: QUANT[name]})
    for name, text in zip(QUANT, ("scale", "offset", "deqScale1", "deqScale2"), strict=True)
]
NO_ANTIQUANT = [
    invalid(f"antiquant{text} must be null in this mode", **{f"antiquant_{text.lower()}": Tensor("int8", ())})
    for text in ("Scale1", "Scale2", "Offset1", "Offset2")
]  # fmt: skip


def bias(wrong: str) -> list[Rule]:
    return [
        invalid(f"{name} has the wrong dtype", **{f"{name}__dtype": wrong}) for name in ("bias1", "bias2")
    ]


def unquantized(wrong_bias: str) -> list[Rule]:
    return [*NO_QUANT, *NO_ANTIQUANT, *bias(wrong_bias)]


def quant(E: tuple[int, ...]) -> list[Rule]:
    needed = [
        invalid(f"{rule.text.split()[0]} is null, but int8 x needs it", **dict.fromkeys(rule.change))
        for rule in NO_QUANT
    ]
    float32 = {"deq_scale1__dtype": "float32", "deq_scale2__dtype": "float32"}
    if E:
        scale = [
            invalid("scale must be [E] or [E, N1]", scale__shape=(3,)),
            invalid("scale must be [E] or [E, N1]", scale__shape=(2, 7)),
            invalid("scale per channel excludes a float32 deqScale", scale__shape=(2, 6), **float32),
        ]
        first = [
            invalid("deqScale1 must have E experts", deq_scale1__shape=(3, 6)),
            invalid("deqScale2 must have E experts", deq_scale2__shape=(3, 4)),
        ]
    else:
        scale = [
            invalid("scale must be [1] or [N1]", scale__shape=(1, 6)),
            invalid("scale must be [1] or [N1]", scale__shape=(7,)),
            invalid("scale per channel excludes a float32 deqScale", scale__shape=(6,), **float32),
        ]
        first = []
    return [
        *DTYPES,
        weights("weight1 must be int8", "int4"),
        *bias("float16"),
        invalid("y must be float16 or bfloat16", y__dtype="float32"),
        *needed,
        invalid("deqScale1 has the wrong dtype for y", deq_scale1__dtype="int32", deq_scale2__dtype="int32"),
        invalid("scale must be float32", scale__dtype="float16"),
        invalid("offset must be float32", offset__dtype="float16"),
        *NO_ANTIQUANT,
        invalid("deqScale1 has the wrong rank", deq_scale1__shape=(*E, 1, 6)),
        invalid("deqScale2 has the wrong rank", deq_scale2__shape=(*E, 1, 4)),
        invalid("offset must have 1 dimension", offset__shape=(*E, 1, 1)),
        invalid("deqScale1 has the wrong last size", deq_scale1__shape=(*E, 4)),
        invalid("deqScale2 has the wrong last size", deq_scale2__shape=(*E, 6)),
        *scale,
        invalid("offset must be [1] or [E]", offset__shape=(6,)),
        *first,
    ]  # fmt: skip


def antiquant(E: tuple[int, ...], groups: bool) -> list[Rule]:
    G = (2,) if groups else ()
    needed = [
        invalid(f"{rule.text.split()[0]} is null, but integer weights need it", **dict.fromkeys(rule.change))
        for rule in NO_ANTIQUANT
    ]
    dtypes = [
        invalid(f"antiquant{text} must have the dtype of x", **{f"antiquant_{text.lower()}__dtype": "int8"})
        for text in ("Scale1", "Offset1", "Scale2", "Offset2")
    ]  # fmt: skip
    ranks = [
        invalid(
            f"antiquant{text} differs in rank from antiquantScale1",
            **{f"antiquant_{text.lower()}__shape": (1, *E, *G, 6)},
        )
        for text in ("Offset1", "Scale2", "Offset2")
    ]

    def pair(n: int, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return {f"antiquant_scale{n}__shape": shape, f"antiquant_offset{n}__shape": shape}

    int4 = {"weight1__dtype": "int4", "weight2__dtype": "int4"}  # as before; no other rule may change it
    odd = [
        invalid(
            "N1 and N2 must be even for int4", **int4, **pair(1, (*E, *G, 5)),
            weight1__shape=(*E, 4, 5), weight2__shape=(*E, 5, 4), bias1__shape=(*E, 5),
        ),
        invalid(
            "N1 and N2 must be even for int4", **int4, **pair(2, (*E, *G, 3)), bias2__shape=(*E, 3),
            x__shape=(3, 3), y__shape=(3, 3), weight1__shape=(*E, 3, 6), weight2__shape=(*E, 6, 3),
        ),
    ]  # fmt: skip
    experts = [
        invalid("antiquantScale1 must have E experts", **pair(1, (3, *G, 6))),
        invalid("antiquantScale2 must have E experts", **pair(2, (3, *G, 4))),
    ]
    divide = [
        invalid("the number of groups must divide K", **pair(n, (*E, count, N)))
        for n, count, N in ((1, 0, 6), (2, 0, 4), (1, 3, 6), (2, 4, 4))
    ]
    return [
        *DTYPES,
        invalid("y must be float16", y__dtype="bfloat16"),
        *needed,
        *dtypes,
        *NO_QUANT,
        *bias("float32"),
        invalid("antiquantScale1 has the wrong rank", antiquant_scale1__shape=(1, 1, 1, 6)),
        *ranks,
        invalid("antiquantOffset1 must have its scale's shape", antiquant_offset1__shape=(*E, *G, 4)),
        invalid("antiquantOffset2 must have its scale's shape", antiquant_offset2__shape=(*E, *G, 6)),
        invalid("antiquantScale1 has the wrong last size", **pair(1, (*E, *G, 4))),
        invalid("antiquantScale2 has the wrong last size", **pair(2, (*E, *G, 6))),
        *odd,
        *(experts if E else []),
        *([*divide, weights("groups are for int4 only", "int8")] if groups else []),
    ]


FP16_RULES = [
    *DTYPES,
    invalid("y must be float16", y__dtype="bfloat16"),
    weights("weight1 must be float16, int8 or int4", "bfloat16"),
    *unquantized("float32"),
]
BF16_RULES = [
    *DTYPES,
    invalid("y must be bfloat16", y__dtype="float16"),
    weights("weight1 must be bfloat16, int8 or int4", "float16"),
    invalid("bfloat16 takes innerPrecise 0", inner_precise=1),
    *unquantized("bfloat16"),
]
GLU_RULES = [
    *DTYPES,
    weights("a GLU activation takes float16", "int8"),
    invalid("a GLU activation takes innerPrecise 1", inner_precise=0),
    invalid(
        "a GLU activation takes no experts",
        **{
            f"{name}__shape" if name.startswith(("weight", "bias")) else name: value
            for name, value in {
                "expert_tokens": Tensor("int64", (2,)), "weight1": (2, 4, 12), "weight2": (2, 6, 4),
                "bias1": (2, 12), "bias2": (2, 4),
            }.items()
        },
    ),
    *bias("float32"),
    *NO_QUANT,  # i.10
    *NO_ANTIQUANT,
]  # fmt: skip
ON_310P_RULES = [  # c.4
    invalid("x must have 2 dimensions on this SoC", x__shape=(1, 3, 4), y__shape=(1, 3, 4)),
    invalid("innerPrecise must be 1 on this SoC", inner_precise=0),
    invalid("this SoC has no GLU activation", activation="reglu", weight1__shape=(4, 12), bias1__shape=(12,)),
    invalid("x must be float16 on this SoC", x__dtype="bfloat16"),
    invalid("y must be float16 on this SoC", y__dtype="bfloat16"),
    invalid(
        "this SoC takes no experts",
        expert_tokens=Tensor("int64", (2,)),
        weight1__shape=(2, 4, 6), weight2__shape=(2, 6, 4), bias1__shape=(2, 6), bias2__shape=(2, 4),
    ),
    invalid("weight1 must be float16 on this SoC", weight1__dtype="int8"),
    invalid("weight2 must be float16 on this SoC", weight2__dtype="int8"),
    *unquantized("float32"),
]  # fmt: skip


def tiling(base: dict[str, Any]) -> list[Rule]:
    """c.3 and step 23."""
    rows = ((2147483616 if base["x"].dtype == "int8" else 2147483632) + 1, 4)
    many = {
        f"{name}__shape": (257, *value.shape[1:])
        for name, value in base.items()
        if isinstance(value, Tensor) and name not in ("x", "y")
    }
    experts = [
        late("expertTokens must have E values", expert_tokens__shape=(2, 2)),
        late("there may be 256 experts at most", **many),
        late("expertTokens must be int64", expert_tokens__dtype="int32"),
    ]
    return [
        late("formats differ", weight2__format=NCHW),
        late("formats differ", y__format=NCL),
        late("innerPrecise must be 0 or 1", inner_precise=-1),
        late("x has too many rows", x__shape=rows, y__shape=rows),
        *(experts if "expert_tokens" in base else []),
        late("y must have the shape of x", y__shape=(3, 5)),
    ]


def without_precise(rules: list[Rule]) -> list[Rule]:
    """Where c.2 or c.4 has asked for one value already."""
    return [rule for rule in rules if "inner_precise" not in rule.change]


BF16 = call("bfloat16", "bfloat16", "bfloat16", "float32")
FP16_E2, W8A8_E2, W4A16_E2 = with_experts(FP16), with_experts(W8A8), with_experts(W4A16_GROUPS)
DENSE, EXPERTS = shapes((), 6, False), shapes((2,), 6, False)
GLU_TILING = without_precise(tiling(GLU))
GLU_TILING.insert(-1, late("y must be float16", y__dtype="bfloat16"))
PLACES = {
    "fp16": (FP16, [*DENSE, *FP16_RULES, *tiling(FP16)]),
    "fp16 experts": (FP16_E2, [*EXPERTS, *FP16_RULES, *tiling(FP16_E2)]),
    "bf16": (BF16, [*DENSE, *BF16_RULES, *without_precise(tiling(BF16))]),
    "glu": (GLU, [*shapes((), 12, True), *GLU_RULES, *GLU_TILING]),
    "quant": (W8A8, [*DENSE, *quant(()), *tiling(W8A8)]),
    "quant experts": (W8A8_E2, [*EXPERTS, *quant((2,)), *tiling(W8A8_E2)]),
    "antiquant": (W4A16, [*DENSE, *antiquant((), False), *tiling(W4A16)]),
    "antiquant groups": (W4A16_GROUPS, [*DENSE, *antiquant((), True), *tiling(W4A16_GROUPS)]),
    "antiquant experts": (W4A16_E2, [*EXPERTS, *antiquant((2,), True), *tiling(W4A16_E2)]),
    "310P": (FP16 | {"inner_precise": 1}, [*DENSE, *ON_310P_RULES, *without_precise(tiling(FP16))]),
}


def changed(base: dict[str, Any], *rules: Rule) -> dict[str, Any] | None:
    """The call with all of them broken; None when two change the same thing."""
    keys = [key for rule in rules for key in rule.change]
    if any(a == b or a.startswith(b + ".") or b.startswith(a + ".") for a, b in combinations(keys, 2)):
        return None
    result = dict(base)
    for rule in rules:
        for key, value in rule.change.items():
            name, _, field = key.partition(".")
            result[name] = result[name]._replace(**{field: value}) if field else value
    return result


def phase1(d: Device, arguments: dict[str, Any], version: str = "V3") -> tuple[int, str]:
    with d.scope():
        memory = d.memory(16)
        tensors = {
            name: d.hollow(*value, memory) for name, value in arguments.items() if isinstance(value, Tensor)
        }
        status, _, executor = d.phase1(
            tensors, arguments["activation"], arguments["inner_precise"], version=version,
            answers=(arguments["size"], arguments["executor"]),
        )  # fmt: skip
        if status == 0:
            assert OBJECTS.aclDestroyAclOpExecutor(executor) == 0
            return 0, ""
        return status, message()


@pytest.mark.parametrize("place", PLACES)
def test_the_first_broken_rule_answers(place: str) -> None:
    base, rules = PLACES[place]
    rules = [*ARGUMENTS, *rules]
    wrong = []
    with device("ascend310p" if place == "310P" else "ascend910b") as d:
        assert phase1(d, base) == (0, "")
        for broken in [*((rule,) for rule in rules), *combinations(rules, 2)]:
            arguments = changed(base, *broken)
            if arguments is not None:
                got = phase1(d, arguments)
                if got != (broken[0].status, f"aclnnFFNV3: {broken[0].text}"):
                    wrong.append((got, *broken))
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.parametrize("version", ["", "V2"])
@pytest.mark.parametrize("place", [name for name, (base, _) in PLACES.items() if "expert_tokens" not in base])
def test_versions_1_and_2_have_the_same_rules(place: str, version: str) -> None:
    base, rules = PLACES[place]
    with device("ascend310p" if place == "310P" else "ascend910b") as d:
        if place == "310P" and not version:
            assert phase1(d, base, version) == (INVALID, "aclnnFFN: is not for this SoC")
            return
        assert phase1(d, base, version) == (0, "")
        for rule in [*ARGUMENTS, *rules]:
            if "expert_tokens" not in rule.change:  # their lists: test_emulator_ffn.py
                arguments = changed(base, rule)
                assert phase1(d, arguments, version) == (rule.status, f"aclnnFFN{version}: {rule.text}"), rule


FORMATS = {  # c.1, step 8
    "accepted": (NCHW, 1, ND, 16, 27, 30, 35, NCL),
    "private": (NC1HWC0, 4, 12, 32, 33),
    "nz": (FRACTAL_NZ, 50, 51, 52, 53, 54),
    "unknown": (-1, 55),
}


@pytest.mark.parametrize("target", ["ascend910b", "ascend310p"])
@pytest.mark.parametrize("kind", FORMATS)
def test_formats(kind: str, target: str) -> None:
    base = FP16 | {"inner_precise": 1}
    accepted = kind == "accepted" or (kind == "nz" and target == "ascend310p")
    with device(target) as d:
        for format in FORMATS[kind]:
            checked = {f"{name}.format": format for name in ("x", "weight1", "weight2", "y")}
            text = f"aclnnFFNV3: x has {'an unknown' if kind == 'unknown' else 'a private'} format"
            got = phase1(d, changed(base, Rule(0, "", checked)))
            assert got == ((0, "") if accepted else (INVALID, text)), format
            assert phase1(d, changed(base, Rule(0, "", {"bias1.format": format}))) == (0, "")


def test_the_emulator_computes_no_fractal_nz() -> None:
    """The 310P does, but how the format lies in memory is not in the contract."""
    base = changed(
        FP16 | {"inner_precise": 1},
        Rule(0, "", {f"{name}.format": FRACTAL_NZ for name in ("weight1", "weight2")}),
    )
    with device("ascend310p") as d:
        tensors = {name: d.hollow(*value) for name, value in base.items() if isinstance(value, Tensor)}
        status, size, executor = d.phase1(tensors, "relu", 1)
        assert status == 0
        assert d.phase2(size, executor) == INNER


@pytest.mark.parametrize(
    ("rule", "flips"),
    [
        (Rule(0, "", {}), True),
        (Rule(TILING, "innerPrecise must be 0 or 1", {"inner_precise": 5}), True),
        (Rule(NULL, "workspaceSize or executor is null", {"size": False}), True),
        (Rule(INVALID, "scale is null, but int8 x needs it", {"scale": None}), True),
        (Rule(INVALID, "deqScale1 has the wrong dtype for y", {"y.dtype": "bfloat16"}), False),
        (Rule(INVALID, "deqScale1 and deqScale2 differ in dtype", {"deq_scale2.dtype": "uint64"}), False),
        (Rule(NULL, "y is null", {"y": None}), False),
    ],
)
def test_int64_deq_scales_become_uint64(rule: Rule, flips: bool) -> None:
    """c.1, step 3a: in the caller's tensor, whatever the later steps say."""
    base = changed(W8A8, Rule(0, "", {"deq_scale1.dtype": "int64", "deq_scale2.dtype": "int64"}))
    arguments = changed(base, rule)
    with device() as d:
        tensors = {name: d.hollow(*value) for name, value in arguments.items() if isinstance(value, Tensor)}
        status, _, executor = d.phase1(
            tensors, "relu", arguments["inner_precise"], answers=(arguments["size"], True)
        )
        assert status == rule.status
        if status:
            assert message() == f"aclnnFFNV3: {rule.text}"
        else:
            assert OBJECTS.aclDestroyAclOpExecutor(executor) == 0
        for name in ("deq_scale1", "deq_scale2"):
            dtype = ctypes.c_int()
            assert OBJECTS.aclGetDataType(tensors[name], ctypes.byref(dtype)) == 0
            before = arguments[name].dtype
            assert dtype.value == DTYPE["uint64" if flips else before]


THIRD = (2**63 + 1) // 3  # 3 * THIRD is 1 in 63 bits, so (2, 3, THIRD) has 2 elements where products wrap


@pytest.mark.parametrize(
    ("base", "rule"),
    [
        *(
            (FP16, late("x has too many rows", x__shape=shape, y__shape=shape))
            for shape in ((2**40, 2**40, 4), (2, 3, THIRD, 4), (2**32, 2**32, 4), (2**62, 4))
        ),
        (FP16, Rule(0, "", {"x.shape": (2**40, 2**40, 0, 4), "y.shape": (2**40, 2**40, 0, 4)})),
        (FP16, late("y must have the shape of x", y__shape=(2**63 - 1, 2**63 - 1))),
        (FP16, invalid("K1 and K2 must be below 65536", weight1__shape=(2**40, 6))),
        (FP16, invalid("N1 must be K2", weight1__shape=(4, 2**40))),
        (GLU, invalid("N1 must be even for a GLU activation", weight1__shape=(4, 2**63 - 1))),
        (GLU, invalid("K2 must be N1 / 2 for a GLU activation", weight1__shape=(4, 2**62))),
        (FP16_E2, late("expertTokens must have E values", expert_tokens__shape=(2, 3, THIRD))),
        (FP16_E2, invalid("weight1 must have E experts", expert_tokens__shape=(2**40,))),
        (W4A16_GROUPS, invalid("the number of groups must divide K", **{
            f"antiquant_{name}1__shape": (2**40, 6) for name in ("scale", "offset")
        })),
        (FP16, invalid("x has a negative size", x__shape=(-3, 4), y__shape=(-3, 4))),
        (FP16, invalid("x has a negative size", x__shape=(0, -3, 4), y__shape=(0, -3, 4))),
    ],
)  # fmt: skip
def test_sizes_beyond_int64(base: dict[str, Any], rule: Rule) -> None:
    with device() as d:
        expected = f"aclnnFFNV3: {rule.text}" if rule.status else ""
        assert phase1(d, changed(base, rule)) == (rule.status, expected)


@pytest.mark.parametrize(
    ("strides", "offset", "storage", "accepted"),
    [
        (None, 0, (3, 4), True),
        (None, 0, (12,), True),
        ((4, 1), 4, (16,), True),
        ((-4, 1), 8, (12,), True),
        (None, 0, (11,), False),
        (None, 0, (-3, -4), False),
        (None, 1, (12,), False),
        (None, -1, (12,), False),
        ((-4, 1), 7, (12,), False),
        ((2**62, 1), 0, (12,), False),
        ((2**63, 1), 0, (12,), False),  # a negative one
        ((2**62, 2**62), 0, (12,), False),
        ((1, 1), 2**63 - 1, (12,), False),
        ((-1, -1), -(2**63), (12,), False),
        ((2**61, 0), 0, (2**40, 2**40), False),  # 2**61 elements, 2**65 bits
        ((1, 1), 2**60, (2**63 - 1,), False),
        ((1, 1), 100, (2**63 - 1,), False),  # behind the allocation
    ],
)
def test_a_view_stays_in_its_memory(
    strides: tuple[int, ...] | None, offset: int, storage: tuple[int, ...], accepted: bool
) -> None:
    with device() as d:
        memory = d.memory(32)
        tensors = {name: d.hollow(*value) for name, value in FP16.items() if isinstance(value, Tensor)}
        tensors["x"] = d.tensor(memory, "float16", (3, 4), strides, offset, storage)
        status, _, executor = d.phase1(tensors, "relu", 0)
        assert status == (0 if accepted else INVALID)
        if accepted:
            assert OBJECTS.aclDestroyAclOpExecutor(executor) == 0
        else:
            assert message().startswith("aclnnFFNV3: x ")
