# SPDX-License-Identifier: Apache-2.0
"""The contract: every rule is broken by a test, and Python, C++, the operator and explain give one verdict.

Calls come from strategies.py. BREAKS holds, for each rule, legal calls and the one change that breaks it.
"""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Call, any_calls, calls, mode_of

import ffn_ops
from ffn_ops import _native, contract
from ffn_ops.contract import FLOAT_MODES, MODES, OPERANDS, RULES, VENDOR_ACTIVATIONS, Spec

QUANT = ("w8a8", "w8a8_bf16")
ANTIQUANT = ("w8a16", "w8a16_bf16", "w4a16", "w4a16_bf16")
INT4 = ("w4a16", "w4a16_bf16")


def resized(call: Call, **dims: int) -> Call:
    """The call with other sizes, every operand's shape following them."""
    plan = call.plan()
    sizes = {**plan.dims, **dims}
    specs = {}
    for name, spec in call.specs.items():
        axes = next(
            (
                shape.axes
                for shape in contract.SHAPES[name]
                if call.route in shape.routes
                and int((plan.dims["E"] or 0) > 0) in shape.experts
                and int(plan.per_group) in shape.per_group
                and shape_of(shape.axes, plan.dims, call) == spec.shape
            ),
            (),
        )
        specs[name] = Spec(spec.dtype, shape_of(axes, sizes, call))
    return replace(call, specs=specs)


def shape_of(axes: tuple[str, ...], sizes: dict, call: Call) -> tuple[int, ...]:
    shape: tuple[int, ...] = ()
    for axis in axes:
        shape += (
            call.specs["x"].shape[:-1] if axis == "*" else (int(axis) if axis.isdigit() else sizes[axis],)
        )
    return shape


def present(call: Call, name: str) -> Call:
    """The call with optional operand `name` given, in its first shape and dtype."""
    if name in call.specs:
        return call
    plan = call.plan()
    dtype = getattr(plan.mode, OPERANDS[name].column).split()[0]
    experts = int((plan.dims["E"] or 0) > 0)
    axes = next((shape.axes for shape in contract.SHAPES[name] if experts in shape.experts), ())
    return call.with_spec(name, Spec(dtype, shape_of(axes, plan.dims, call)))


def wrong_dtype(name: str) -> Callable[[Call], Call]:
    def change(call: Call) -> Call:
        shape = present(call, name).specs[name].shape
        return call.with_spec(name, Spec("int16", shape))

    return change


def wrong_shape(name: str) -> Callable[[Call], Call]:
    def change(call: Call) -> Call:
        dtype, shape = present(call, name).specs[name]
        if name in ("weight1", "weight2"):
            return call.with_spec(name, Spec(dtype, (1, *shape)))
        if name in ("expert_tokens", "topk_ids"):
            return call.with_spec(name, Spec(dtype, (*shape, 1)))
        return call.with_spec(name, Spec(dtype, (*shape[:-1], shape[-1] + 1000)))

    return change


def takers(name: str) -> tuple[str, ...]:
    return tuple(mode.name for mode in MODES if getattr(mode, OPERANDS[name].column))


def with_deq(first: str, second: str) -> Callable[[Call], Call]:
    def change(call: Call) -> Call:
        for name, dtype in (("deq_scale1", first), ("deq_scale2", second)):
            call = call.with_spec(name, Spec(dtype, call.specs[name].shape))
        return call

    return change


def with_x(*leading: int) -> Callable[[Call], Call]:
    """x (and out, which follows it) with other leading sizes."""

    def change(call: Call) -> Call:
        dtype, shape = call.specs["x"]
        return call.with_spec("x", Spec(dtype, (*leading, *shape[-1:])))

    return change


def grow(name: str, by: int) -> Callable[[Call], Call]:
    return lambda call: resized(call, **{name: (call.plan().dims[name] or 0) + by})


npu = "ascend910b"
FLOATS16 = ("fp16", "bf16")


def by_groups(**options: Any) -> st.SearchStrategy[Call]:
    return calls(target=npu, moe=True, route="grouped", **options)


def in_bytes(call: Call) -> Call:
    """Any even number of int4 can be stored two in a byte."""
    return replace(call, int4_storage=torch.uint8)


def on_npu(call: Call) -> Call:
    activation = call.activation if call.activation.lower() in VENDOR_ACTIVATIONS else "gelu"
    return replace(call, target=npu, activation=activation)


# Rule -> legal calls, and the change that makes this the first rule they break.
BREAKS: dict[str, tuple[st.SearchStrategy[Call], Callable[[Call], Call]]] = {
    "activation": (calls(), lambda call: replace(call, activation="gelu ")),
    "mode": (calls(), wrong_dtype("x")),
    "moe-310p": (
        calls(target=npu, moe=True, modes=("fp16",)),
        lambda call: replace(call, target="ascend310p", inner_precise=None),
    ),
    "E-limit-grouped": (by_groups(modes=FLOATS16), lambda call: resized(call, E=1025)),
    "K1-limit-grouped": (by_groups(modes=FLOATS16, glu=True), lambda call: resized(call, K1=65536, N2=65536)),
    "N1-limit-grouped": (by_groups(modes=FLOATS16, glu=True), lambda call: resized(call, N1=65536, K2=32768)),
    "int4-words1": (
        by_groups(modes=INT4, glu=True, per_group=False),
        lambda call: in_bytes(resized(call, N1=12, K2=6)),
    ),
    "int4-words2": (
        by_groups(modes=INT4, glu=True, per_group=False),
        lambda call: in_bytes(resized(call, K1=10, N2=10)),
    ),
    "topk_ids-needed": (calls(moe=True), lambda call: call.with_spec("topk_ids", None)),
    "topk_weights-needed": (calls(moe=True), lambda call: call.with_spec("topk_weights", None)),
    "tokens-or-ids": (
        calls(moe=True),
        lambda call: call.with_spec("expert_tokens", Spec("int64", (call.plan().dims["E"],))),
    ),
    "mode-on-npu": (calls(modes=("float32",), glu=False), on_npu),
    "deq_scale-same-dtype": (calls(modes=("w8a8",)), with_deq("int64", "uint64")),
    "per-channel-scale-needs-packed-deq_scale": (
        calls(target=npu, modes=("w8a8",), per_channel=True).filter(lambda call: call.plan().per_channel),
        with_deq("float32", "float32"),
    ),
    "x-rank": (calls(experts=False), with_x()),
    "glu-columns": (calls(glu=True), grow("K2", 1)),
    "columns": (calls(glu=False), grow("K2", 8)),
    "output-size": (calls(), grow("K1", 8)),
    "int4-even-columns1": (calls(modes=INT4, glu=False), lambda call: resized(call, N1=5, K2=5)),
    "int4-even-columns2": (calls(modes=INT4), lambda call: resized(call, K1=5, N2=5)),
    "per-group-int4-only": (
        calls(modes=("w8a16", "w8a16_bf16"), per_group=True),
        on_npu,
    ),
    "groups1": (calls(per_group=True), lambda call: resized(call, G1=0)),
    "groups2": (calls(per_group=True), lambda call: resized(call, G2=0)),
    "groups1-divide": (calls(per_group=True), lambda call: resized(call, K1=8, N2=8, G1=3)),
    "groups2-divide": (calls(per_group=True, glu=False), lambda call: resized(call, K2=8, N1=8, G2=16)),
    "K1-limit": (calls(target=npu), lambda call: resized(call, K1=65536, N2=65536, G1=1)),
    "K2-limit": (calls(target=npu, glu=False), lambda call: resized(call, K2=65536, N1=65536, G2=1)),
    "K1-int32-sum": (calls(modes=QUANT), lambda call: resized(call, K1=131072, N2=131072)),
    "K2-int32-sum": (calls(modes=QUANT, glu=False), lambda call: resized(call, K2=131072, N1=131072)),
    "M-limit": (calls(target=npu, modes=("fp16", "bf16", *ANTIQUANT)), with_x(2147483633)),
    "M-limit-int8": (calls(target=npu, modes=QUANT), with_x(2147483617)),
    "E-limit": (
        calls(target=npu, experts=True, modes=("fp16", "w4a16"), glu=False),
        lambda call: resized(call, E=257),
    ),
    "inner_precise": (calls(), lambda call: replace(call, inner_precise=2)),
    "inner_precise-bf16": (calls(modes=("bf16",), glu=False), lambda call: replace(call, inner_precise=1)),
    "inner_precise-glu": (calls(target=npu, glu=True), lambda call: replace(call, inner_precise=0)),
    "inner_precise-310p": (calls(target="ascend310p"), lambda call: replace(call, inner_precise=0)),
    "glu-mode-npu": (
        calls(modes=("bf16",), glu=True, experts=False),
        lambda call: replace(on_npu(call), inner_precise=None),
    ),
    "glu-experts": (
        calls(modes=("fp16",), glu=True, experts=True),
        lambda call: replace(on_npu(call), inner_precise=None),
    ),
    "mode-310p": (
        calls(target=npu, modes=("bf16", *QUANT, *ANTIQUANT), glu=False),
        lambda call: replace(call, target="ascend310p", inner_precise=None),
    ),
    "activation-on-npu": (calls(target=npu, glu=False), lambda call: replace(call, activation="relu2")),
    "activation-310p": (
        calls(target="ascend310p"),
        lambda call: replace(resized(call, N1=16, K2=8), activation="reglu"),
    ),
    "rank-310p": (calls(target="ascend310p"), with_x(2, 3)),
    "experts-310p": (
        calls(target=npu, modes=("fp16",), experts=True, glu=False).filter(
            lambda c: len(c.specs["x"].shape) == 2
        ),
        lambda call: replace(call, target="ascend310p", inner_precise=None),
    ),
    "addressable": (calls(), lambda call: with_x(2**62)(resized(call, K1=16, N2=16, G1=1))),
}
for operand in OPERANDS:
    taking = takers(operand)
    if OPERANDS[operand].column in ("scale", "deq_scale", "antiquant"):
        others = tuple(mode.name for mode in MODES if mode.name not in taking)
        BREAKS[f"{operand}-needed"] = (
            calls(modes=taking),
            lambda call, name=operand: call.with_spec(name, None),
        )
        BREAKS[f"{operand}-unused"] = (
            calls(modes=others),
            lambda call, name=operand: call.with_spec(name, Spec("float32", (1,))),
        )
    legal = calls(
        modes=taking,
        experts=True if operand == "expert_tokens" else None,
        moe=operand in ("topk_ids", "topk_weights"),
    )
    if operand not in ("x", "weight1"):
        BREAKS[f"{operand}-dtype"] = (legal, wrong_dtype(operand))
    if OPERANDS[operand].shapes:
        BREAKS[f"{operand}-shape"] = (legal, wrong_shape(operand))

# Rules that are never the nearest route's: of calls that they keep from `grouped`, `fused` says more.
FAR = {
    "grouped-is-moe": calls(target=npu),
    "mode-grouped": calls(target=npu, moe=True, modes=QUANT),
}

# Torch has no tensors of these shapes, or the operators' schemas have no place for them, so only the
# evaluators can be asked.
NO_TENSORS = ("addressable", "int4-even-columns1", "int4-even-columns2",
              "topk_ids-needed", "topk_weights-needed", "tokens-or-ids")  # fmt: skip


def native_violations(call: Call, route: str | None = None) -> list[tuple[str, str]]:
    return _native.violations(
        {name: (spec.dtype, list(spec.shape)) for name, spec in call.specs.items()},
        call.activation, call.inner_precise, route or call.route, call.target,
    )  # fmt: skip


def test_every_rule_has_a_call_that_breaks_it():
    assert set(BREAKS) | set(FAR) == {rule.name for rule in RULES}
    assert len({rule.name for rule in RULES}) == len(RULES)


@pytest.mark.parametrize("rule", FAR)
@settings(max_examples=12)
@given(data=st.data())
def test_a_rule_of_a_farther_route_is_shown(rule: str, data: st.DataObject):
    call = data.draw(FAR[rule])
    assert call.plan().route == "fused"
    violations = call.violations_of("grouped")
    assert violations[0].rule == rule
    assert native_violations(call, "grouped") == [tuple(violation) for violation in violations]


@pytest.mark.parametrize("rule", list(BREAKS))
@settings(max_examples=12)
@given(data=st.data())
def test_a_broken_rule_is_named_by_everyone(rule: str, data: st.DataObject):
    legal, change = BREAKS[rule]
    call = data.draw(legal)
    assert not call.violations()
    broken = change(call)
    violations = broken.violations()
    assert violations[0].rule == rule, violations
    text = violations[0].text
    assert "{" not in text

    with pytest.raises(ffn_ops.ContractError) as refused:
        broken.plan()
    assert str(refused.value) == text
    assert native_violations(broken) == [tuple(violation) for violation in violations]
    pairs = {name: tuple(spec) for name, spec in broken.specs.items() if name != "output_dtype"}
    output = broken.specs.get("output_dtype")
    explanation = ffn_ops.explain(
        **pairs, activation=broken.activation, inner_precise=broken.inner_precise, target=broken.target,
        output_dtype=output.dtype if output else None,
    )  # fmt: skip
    assert not explanation.ok and explanation.violations == violations
    if rule in NO_TENSORS:
        return

    tensors, options = broken.hollow(), broken.options()
    with ffn_ops.target(broken.target):
        overload = broken.overload
        with pytest.raises(RuntimeError) as refused:
            overload(**tensors, activation=broken.activation, **options)
        assert str(refused.value) == text
        if overload is not torch.ops.ffn.moe.default:
            with pytest.raises(ffn_ops.ContractError) as refused:
                ffn_ops.ffn(**tensors, activation=broken.activation, **options)
            assert str(refused.value) == text
        if rule not in ("M-limit", "M-limit-int8"):  # the fake kernel looks at no row count
            meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
            with pytest.raises(RuntimeError) as refused:
                overload(**meta, activation=broken.activation, **options)
            shapes = ("x-shape", "topk_ids-shape", "topk_weights-shape", "out-shape")
            seen = text.split("[")[0] if rule in shapes else text  # nor shows one
            assert str(refused.value).startswith(seen)


@settings(max_examples=2000)
@given(call=any_calls())
def test_python_and_cpp_agree_on_any_call(call: Call):
    for route in contract.TARGETS[call.target]:
        assert native_violations(call, route) == [tuple(found) for found in call.violations_of(route)]


@pytest.mark.parametrize("target", contract.TARGETS)
@settings(max_examples=100)
@given(data=st.data())
def test_legal_calls_have_a_plan_and_an_explanation(target: str, data: st.DataObject):
    moe = target != "ascend310p" and data.draw(st.booleans())
    call = data.draw(by_groups() if moe and target == npu else calls(target=target, moe=moe))
    assert native_violations(call) == []
    plan = call.plan()
    assert (
        plan.route == call.route and plan.out.shape == call.specs["x"].shape and plan.out.dtype == plan.mode.y
    )
    specs = {name: spec for name, spec in call.specs.items() if name != "output_dtype"}
    explanation = ffn_ops.explain(
        **specs,
        activation=call.activation,
        inner_precise=call.inner_precise,
        target=target,
        output_dtype=plan.mode.y,
    )
    assert explanation.ok and explanation.plan == plan and not explanation.violations
    assert (explanation.workspace is None) == (plan.route != "fused")
    assert list(explanation.routes) == [r for r in contract.TARGETS[target] if moe or r != "grouped"]
    assert plan.mode.name in str(explanation)


# One row of contract section a.1 each: (x, weight, y, bias, scale, deq_scale, antiquant), and what is asked
# for.
LEGAL_ROWS = {
    "fp16": ("float16", "float16", "float16", "float16", None, None, None),
    "bf16": ("bfloat16", "bfloat16", "bfloat16", "float32", None, None, None),
    "w8a8 uint64": ("int8", "int8", "float16", "int32", "float32", "uint64", None),
    "w8a8 int64": ("int8", "int8", "float16", "int32", "float32", "int64", None),
    "w8a8 float32": ("int8", "int8", "float16", "int32", "float32", "float32", None),
    "w8a8_bf16": ("int8", "int8", "bfloat16", "int32", "float32", "bfloat16", None),
    "w8a16": ("float16", "int8", "float16", "float16", None, None, "float16"),
    "w4a16": ("float16", "int4", "float16", "float16", None, None, "float16"),
    "w8a16_bf16": ("bfloat16", "int8", "bfloat16", "float32", None, None, "bfloat16"),
    "w4a16_bf16": ("bfloat16", "int4", "bfloat16", "float32", None, None, "bfloat16"),
}


@pytest.mark.parametrize("experts", [0, 3])
@pytest.mark.parametrize("row", LEGAL_ROWS)
def test_every_row_of_the_vendors_table_is_legal_on_ascend910b(row: str, experts: int):
    x, weight, y, bias, scale, deq, antiquant = LEGAL_ROWS[row]
    E = (experts,) if experts else ()
    specs = {"x": Spec(x, (5, 8)), "weight1": Spec(weight, (*E, 8, 16)), "weight2": Spec(weight, (*E, 16, 8)),
             "bias1": Spec(bias, (*E, 16)), "bias2": Spec(bias, (*E, 8)),
             "output_dtype": Spec(y, ())}  # fmt: skip
    if experts:
        specs["expert_tokens"] = Spec("int64", E)
    if scale:
        specs |= {"scale": Spec(scale, E or (1,)), "offset": Spec(scale, E or (1,)),
                  "deq_scale1": Spec(deq, (*E, 16)), "deq_scale2": Spec(deq, (*E, 8))}  # fmt: skip
    if antiquant:
        for kind in ("scale", "offset"):
            specs |= {
                f"antiquant_{kind}1": Spec(antiquant, (*E, 16)),
                f"antiquant_{kind}2": Spec(antiquant, (*E, 8)),
            }
    plan = contract.resolve(specs, "relu", target="ascend910b")
    assert plan.mode.name == row.split()[0] and plan.out == Spec(y, (5, 8))
    assert plan.dims["E"] == experts and plan.route == "fused"


def test_the_defaults_of_inner_precise_follow_activation_and_target():
    def default(mode: str, activation: str, target: str) -> int:
        row = mode_of(mode)
        N1 = 16 if activation in contract.GLU else 8
        specs = {
            "x": Spec(row.x, (2, 8)),
            "weight1": Spec(row.weight, (8, N1)),
            "weight2": Spec(row.weight, (8, 8)),
        }
        return contract.resolve(specs, activation, target=target).inner_precise

    assert (
        default("fp16", "gelu", "cpu")
        == default("fp16", "gelu", "ascend910b")
        == default("bf16", "relu", "cpu")
        == 0
    )
    assert default("fp16", "swiglu", "cpu") == default("fp16", "geglu", "ascend910b") == 1
    assert default("fp16", "gelu", "ascend310p") == 1


@pytest.mark.parametrize("mode", FLOAT_MODES)
def test_cpu_takes_what_the_npu_cannot(mode: str):
    row = mode_of(mode)
    specs = {"x": Spec(row.x, (4, 8)), "weight1": Spec(row.weight, (300, 8, 16)),
             "weight2": Spec(row.weight, (300, 8, 8)), "expert_tokens": Spec("int64", (300,))}  # fmt: skip
    assert contract.resolve(specs, "swiglu").dims["E"] == 300
    refused = {v.rule for v in contract.violations(specs, "swiglu", "fused", target="ascend910b")}
    assert {"E-limit", "glu-experts"} <= refused


def test_per_tensor_wins_where_a_scale_of_one_column_could_be_both():
    specs = {"x": Spec("int8", (4, 8)), "weight1": Spec("int8", (8, 1)), "weight2": Spec("int8", (1, 8)),
             "scale": Spec("float32", (1,)), "offset": Spec("float32", (1,)),
             "deq_scale1": Spec("float32", (1,)), "deq_scale2": Spec("float32", (8,))}  # fmt: skip
    assert not contract.resolve(specs, "relu", target="ascend910b").per_channel


@given(
    values=st.lists(st.integers(-3, 9) | st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=6),
    M=st.integers(0, 12),
    index=st.booleans(),
)
def test_token_values_get_one_verdict(values: list[int], M: int, index: bool):
    try:
        expected = contract.row_ends(values, M, index)
    except ffn_ops.ContractError as error:
        expected = str(error)
    assert _native.row_ends(values, M, index) == expected
    counts = [b - a for a, b in pairwise([0, *values])] if index else values
    legal = all(count >= 0 for count in counts) and sum(counts) == M
    assert isinstance(expected, list) == legal


def test_contract_imports_the_standard_library_only():
    code = (
        "import sys, runpy; runpy.run_path(sys.argv[1]); "
        "print([m for m in ('torch', 'numpy') if m in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-I", "-c", code, contract.__file__], capture_output=True, text=True
    )
    assert run.stdout.strip() == "[]", run.stderr


def experts_call(
    mode: str, activation: str, E: int = 4, N1: int | None = None, **more: Any
) -> dict[str, Any]:
    """ffn.moe of 6 tokens, 2 of E experts each, in the words of explain."""
    row = mode_of(mode)
    N1 = N1 or (32 if activation in contract.GLU else 16)
    K2 = N1 // 2 if activation in contract.GLU else N1
    call: dict[str, Any] = {
        "x": (row.x, (6, 8)), "weight1": (row.weight, (E, 8, N1)), "weight2": (row.weight, (E, K2, 8)),
        "topk_ids": ("int64", (6, 2)), "topk_weights": ("float32", (6, 2)), "activation": activation,
    }  # fmt: skip
    columns = {"1": N1, "2": 8}
    for kind in ("scale", "offset") if row.antiquant else ():
        call |= {f"antiquant_{kind}{i}": (row.antiquant, (E, columns[i])) for i in "12"}
    if row.scale:
        call |= {"scale": ("float32", (E,)), "offset": ("float32", (E,))}
        call |= {f"deq_scale{i}": (row.deq_scale.split()[0], (E, columns[i])) for i in "12"}
        call["output_dtype"] = row.y
    return call | more


TAKEN = {  # by which route ascend910b takes a call of ffn.moe
    "fused": [(mode, "gelu", 256) for mode in ("fp16", "bf16", *QUANT, *ANTIQUANT)],
    "grouped": [(mode, activation, E) for mode in ("fp16", "bf16", *ANTIQUANT)
                for activation, E in (("swiglu", 4), ("relu2", 4), ("gelu", 257), ("geglu", 1024))],
}  # fmt: skip


@pytest.mark.parametrize("route", TAKEN)
def test_experts_take_the_route_that_can_do_it(route: str):
    for mode, activation, E in TAKEN[route]:
        explanation = ffn_ops.explain(**experts_call(mode, activation, E), target=npu)
        assert (explanation.mode, explanation.route) == (mode, route), str(explanation)
        assert list(explanation.routes) == ["fused", "grouped"]


REFUSED = {  # what ascend910b does not do, and what it says
    "aclnnFFNV3 has GLU in fp16 only": experts_call("w8a8", "swiglu"),
    "there are E = 257 experts, but aclnnFFNV3 takes 1 to 256": experts_call("w8a8_bf16", "gelu", 257),
    "activation is 'relu2', but aclnnFFNV3 has": experts_call("w8a8", "relu2"),
    "there are E = 1025 experts, but npu_grouped_matmul takes": experts_call("fp16", "gelu", 1025),
    "weight1 has N1 = 12 int4 columns, but npu_grouped_matmul": experts_call("w4a16", "swiglu", N1=12),
    "per-group antiquant scales are for int4 weights": experts_call(
        "w8a16", "swiglu", **{f"antiquant_{kind}{i}": ("float16", (4, 2, columns))
                              for kind in ("scale", "offset") for i, columns in ((1, 32), (2, 8))}),
    "mode float32 runs on the cpu target only": experts_call("float32", "gelu"),
}  # fmt: skip


@pytest.mark.parametrize("sentence", REFUSED)
def test_experts_are_refused_with_the_reason_to_act_on(sentence: str):
    explanation = ffn_ops.explain(**REFUSED[sentence], target=npu)
    assert not explanation.ok and sentence in explanation.violations[0].text, str(explanation)
    for route in ("fused", "grouped"):
        assert f"route {route}, rule " in str(explanation)


def test_ascend310p_has_no_experts():
    explanation = ffn_ops.explain(**experts_call("fp16", "gelu"), target="ascend310p")
    assert explanation.violations[0].rule == "moe-310p" and list(explanation.routes) == ["fused"]


def test_glu_experts_are_sent_to_moe():
    call = experts_call("fp16", "swiglu")
    del call["topk_ids"], call["topk_weights"]
    explanation = ffn_ops.explain(**call, expert_tokens=("int64", (4,)), target=npu)
    assert "torch.ops.ffn.moe has it" in explanation.violations[0].text
    assert list(explanation.routes) == ["fused"]
