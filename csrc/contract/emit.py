# SPDX-License-Identifier: Apache-2.0
"""Writes contract.inc, the tables of ffn_ops/contract.py as C++, for contract.h. CMakeLists.txt runs it.

Standard library only: python emit.py FILE
"""

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "ffn_ops"))  # not as a package: that would import torch

import contract


def cpp_tables() -> str:
    """The tables as C++ initialisers."""
    columns = [field for field in contract.Mode._fields if field not in ("name", "routes")]
    conditions, operands, facts = list(contract.CONDITIONS), list(contract.OPERANDS), list(contract.FACTS)

    def quoted(text: str) -> str:
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'

    def mask(positions: Iterable[int]) -> str:
        return f"{sum(1 << position for position in set(positions)):#x}"

    def routes(names: Sequence[str]) -> str:
        return mask(contract.ROUTES.index(name) for name in names)

    def enum(name: str, values: Iterable[str]) -> str:
        return f"enum {name} : int {{ {', '.join(values)} }};"

    def rule_row(rule: contract.Rule) -> str:
        a, b, c, members = 0, 0, 0, "0"
        if rule.check in ("given", "left_out", "dtype", "shape"):
            a = operands.index(str(rule.args[0]))
        elif rule.args:
            fact = str(rule.args[0])
            a = facts.index(fact)
            if rule.check == "one_of":
                members = mask(contract.codes(fact, rule.args[1:]))
            elif rule.check == "between":
                b, c = int(rule.args[1]), int(rule.args[2])
            elif rule.check == "equal":
                b, c = int(rule.args[1]), facts.index(str(rule.args[2]))
            elif isinstance(rule.args[1], int):  # multiple of a number
                b, c = rule.args[1], -1
            else:
                c = facts.index(rule.args[1])
        when = [str(conditions.index(name)) for name in rule.when] + ["-1", "-1"]
        return (
            f"    {{{quoted(rule.name)}, {routes(rule.routes.split())}, {{{when[0]}, {when[1]}}}, Check::{rule.check}, "
            f"{a}, {b}, {c}, {members}, {quoted(rule.text)}}},"
        )

    def shape_row(operand: str, shape: contract.Shape) -> str:
        # An axis is a fact, or -1 for x's leading axes, or -2 - n for the number n.
        axes = [-1 if a == "*" else -2 - int(a) if a.isdigit() else facts.index(a) for a in shape.axes]
        return (
            f"    {{{operands.index(operand)}, {routes(shape.routes)}, {mask(shape.experts)}, {mask(shape.per_group)}, "
            f"{len(axes)}, {{{', '.join(map(str, axes))}}}}},"
        )

    def mode_row(mode: contract.Mode) -> str:
        accepted = [getattr(mode, column).split() for column in columns]
        masks = ", ".join(mask(contract.codes("x.dtype", names)) for names in accepted)
        texts = ", ".join(quoted(" or ".join(names)) for names in accepted)
        return f"    {{{quoted(mode.name)}, {{{masks}}}, {{{texts}}}}},"

    def camel(name: str) -> str:
        return "k" + "".join(part[:1].upper() + part[1:] for part in re.split(r"[_.]", name))

    checks = list(dict.fromkeys(rule.check for rule in contract.RULES))
    lines = [
        "// Written by csrc/contract/emit.py at build time.",
        enum("class DType", (camel(name) for name in contract.DTYPES)),
        f"inline constexpr const char* kDTypeNames[] = {{{', '.join(map(quoted, contract.DTYPES))}}};",
        f"inline constexpr int kDTypeBits[] = {{{', '.join(map(str, contract.DTYPES.values()))}}};",
        f"inline constexpr int kDTypeCount = {len(contract.DTYPES)};",
        enum("Operand", (*(f"{camel(name)}Operand" for name in contract.OPERANDS), "kOperandCount")),
        f"inline constexpr const char* kOperandNames[] = {{{', '.join(map(quoted, contract.OPERANDS))}}};",
        enum("Fact", (*(f"{camel(name)}Fact" for name in contract.FACTS), "kFactCount")),
        f"inline constexpr const char* kFactNames[] = {{{', '.join(map(quoted, contract.FACTS))}}};",
        f"inline constexpr const char* kActivations[] = {{{', '.join(map(quoted, contract.ACTIVATIONS))}}};",
        f"inline constexpr int kActivationCount = {len(contract.ACTIVATIONS)};",
        f"inline constexpr unsigned kGluMask = {mask(map(contract.ACTIVATIONS.index, contract.GLU))};",
        enum("Route", (*(f"{camel(name)}Route" for name in contract.ROUTES), "kRouteCount")),
        f"inline constexpr const char* kRouteNames[] = {{{', '.join(map(quoted, contract.ROUTES))}}};",
        enum("Target", (*(f"{camel(name)}Target" for name in contract.TARGETS), "kTargetCount")),
        f"inline constexpr const char* kTargetNames[] = {{{', '.join(map(quoted, contract.TARGETS))}}};",
        f"inline constexpr unsigned kTargetRoutes[] = {{{', '.join(routes(names) for names in contract.TARGETS.values())}}};",
        enum("Mode", (*(f"{camel(mode.name)}Mode" for mode in contract.MODES), "kModeCount")),
        enum("class Check", checks),
        f"struct ModeRow {{ const char* name; unsigned columns[{len(columns)}]; const char* texts[{len(columns)}]; }};",
        "inline constexpr ModeRow kModes[] = {",
        *map(mode_row, contract.MODES),
        "};",
        enum("Column", (f"{camel(name)}Column" for name in columns)),
        f"inline constexpr int kOperandColumn[] = {{{', '.join(str(columns.index(o.column)) for o in contract.OPERANDS.values())}}};",
        "struct ShapeRow { int operand; unsigned routes, experts, per_group; int rank; int axes[4]; };",
        "inline constexpr ShapeRow kShapes[] = {",
        *(shape_row(name, shape) for name, shapes in contract.SHAPES.items() for shape in shapes),
        "};",
        "struct ConditionRow { int fact; uint64_t members; };",
        "inline constexpr ConditionRow kConditions[] = {",
        *(f"    {{{facts.index(fact)}, {mask(contract.codes(fact, values))}}}," for fact, values in contract.CONDITIONS.values()),
        "};",
        "struct RuleRow {",
        "  const char* name; unsigned routes; int when[2]; Check check; int a; int64_t b, c; uint64_t members; const char* text;",
        "};",
        "inline constexpr RuleRow kRules[] = {",
        *map(rule_row, contract.RULES),
        "};",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    file, text = Path(sys.argv[1]), cpp_tables()
    if not file.exists() or file.read_text(encoding="utf-8") != text:  # or everything would be compiled again
        file.write_text(text, encoding="utf-8")
