# SPDX-License-Identifier: Apache-2.0
"""Writes operators.txt as C++: both phases of each operator, over aten.h. Run by ffn_ops/emulator/operators.py.

generate.py operators.txt first.cc second.cc ...  # the operators are dealt to the files, which build in parallel
"""

import re
import sys
from pathlib import Path

# type in the table: (parameter of phase 1, what it becomes in a lambda's capture, what its body sees)
VALUE = "{name} = call.Value({text}, {name})"
TYPES = {
    "tensor": (
        "const aclTensor*",
        "call.Input({text}, {name}, false);",
        "const at::Tensor {name} = read.One();",
    ),
    "tensor?": ("const aclTensor*", "call.Input({text}, {name}, true);", "const auto {name} = read.Maybe();"),
    "tensor[]": (
        "const aclTensorList*",
        "{count} = call.Input({text}, {name})",
        "const Tensors {name} = read.Many({count});",
    ),
    "out": (
        "const aclTensor*",
        "call.Output({text}, {name}, false);",
        "const at::Tensor {name} = read.One();",
    ),
    "out?": (
        "const aclTensor*",
        "call.Output({text}, {name}, true);",
        "const at::Tensor {name} = read.One();",
    ),
    "out[]": (
        "const aclTensorList*",
        "{count} = call.Output({text}, {name})",
        "const Tensors {name} = read.Many({count});",
    ),
    "shrink": (
        "const aclTensor*",
        "call.Output({text}, {name}, false); const aclTensor* const caller_{name} = {name};",
        "const at::Tensor {name} = read.One();",
    ),
    "scalar": ("const aclScalar*", VALUE, ""),
    "scalar?": ("const aclScalar*", "{name} = call.Maybe({text}, {name})", ""),
    "ints": ("const aclIntArray*", VALUE, ""),
    "bools": ("const aclBoolArray*", VALUE, ""),
    "string": ("const char*", VALUE, ""),
    "dtype": ("aclDataType", VALUE, ""),
    "int": ("int64_t", VALUE, ""),
    "int32": ("int32_t", VALUE, ""),
    "int8": ("int8_t", VALUE, ""),
    "bool": ("bool", VALUE, ""),
    "double": ("double", VALUE, ""),
    "float": ("float", VALUE, ""),
}


def lines(table: str) -> list[str]:
    """The operators' lines: comments left out, continuations joined, {a|b} written out for each alternative."""
    found = []
    for line in re.sub(r"\n +", " ", table).splitlines():
        if not line or line.startswith("#"):
            continue
        groups = [group[1:-1].split("|") for group in re.findall(r"\{[^{}|]+\|[^{}]+\}", line)]
        for k in range(len(groups[0]) if groups else 1):
            expanded = line
            for group in groups:
                expanded = expanded.replace("{" + "|".join(group) + "}", group[k])
            found.append(expanded)
    return found


def parse(line: str) -> tuple[str, list[tuple[str, str]], str]:
    """Name, (type, name) of each parameter, and the expression."""
    match = re.fullmatch(r"(aclnn\w+)\(([^()]*)\) = (.+)", line)
    if not match:
        sys.exit(f"operators.txt: {line!r} is not of the form aclnnName(parameters) = expression")
    parameters = []
    for text in match[2].split(", "):
        kind, _, name = text.rpartition(" ")
        parameters.append((kind or ("out" if name == "out" else "tensor"), name))
    return match[1], parameters, match[3]


def operator(name: str, parameters: list[tuple[str, str]], expression: str) -> str:
    signature, statements, captures, body, outputs = [], [], [], [], []
    for kind, parameter in parameters:
        declared, taken, seen = TYPES[kind]
        words = {"name": parameter, "text": f'"{parameter}"', "count": f"{parameter}_count"}
        signature.append(f"[[maybe_unused]] {declared} {parameter}")
        # A parameter that the expression does not mention is only part of the ABI.
        used = kind.startswith(("tensor", "out", "shrink")) or re.search(rf"\b{parameter}\b", expression)
        taken = taken.format(**words)
        if taken.endswith(";"):
            statements.append(taken)
        elif used:
            # Tensors are taken in the order of the parameters, so lists may not wait for the captures.
            statements.append(f"auto captured_{taken};")
            target = taken.split(" ")[0]
            captures.append(f"{target} = captured_{target}")
        if kind == "shrink":
            captures.append(f"caller_{parameter}")
        if seen:
            body.append(f"[[maybe_unused]] {seen.format(**words)}")
        if kind.startswith(("out", "shrink")):
            outputs.append((kind, parameter))
    store = {"shrink": "Shrink(caller_{0}, {0}, {1});"}
    if not outputs:
        body.append(f"{expression};")
    elif len(outputs) == 1:
        kind, output = outputs[0]
        body.append(store.get(kind, "Assign({0}, {1});").format(output, expression))
    else:
        body.append(f"const auto results = {expression};")
        body += [
            store.get(kind, "Assign({0}, {1});").format(output, f"std::get<{i}>(results)")
            for i, (kind, output) in enumerate(outputs)
        ]
    inner = "\n    ".join(body)
    outer = "\n  ".join(statements)
    return f"""
EMULATOR_API int {name}GetWorkspaceSize({", ".join(signature)}, uint64_t* workspace_size, aclOpExecutor** executor) {{
  if (const int code = emulator_call(__func__)) return code;
  emulator::Call call("{name}");
  {outer}
  return call.Publish([{", ".join(captures)}]([[maybe_unused]] Reader read) {{
    {inner}
  }}, workspace_size, executor);
}}
EMULATOR_API int {name}(void* workspace, uint64_t workspace_size, aclOpExecutor* executor, aclrtStream stream) {{
  return emulator::Launch(__func__, workspace, workspace_size, executor, stream);
}}
"""


def main(table: str, *targets: str) -> None:
    operators = [parse(line) for line in lines(Path(table).read_text())]
    for i, target in enumerate(targets):
        share = operators[i :: len(targets)]
        functions = sorted(
            {f for _, _, expression in share for f in re.findall(r"\bat::([a-z_]\w*)\(", expression)}
        )
        headers = "".join(f"#include <ATen/ops/{function}.h>\n" for function in functions)
        code = "".join(operator(*parsed) for parsed in share)
        Path(target).write_text(
            f'{headers}#include "emulator/aten/aten.h"\n#include "emulator/aten/moe.h"\n'
            f"using emulator::Assign, emulator::Indices, emulator::Random, emulator::Reader, emulator::Shrink, "
            f"emulator::Tensors;\nusing namespace emulator::moe;\n{code}"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
