# SPDX-License-Identifier: Apache-2.0
"""The hardware-free planner: what a target would do with a call, and every rule in its way.

Evaluates contract.py, without running anything. The operator itself stops at the first broken rule.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ffn_ops import contract
from ffn_ops.contract import ContractError, Plan, Spec, Violation, spec_of
from ffn_ops.op import broken_ids, current_target, holds_values, target_of
from ffn_ops.packing import is_packed, packed_spec

_ACLNN_SYSTEM = 16 * 1024 * 1024  # bytes that CANN reserves in every workspace
_CUBE_CORES, _VECTOR_CORES = 20, 40  # Atlas 910B3
_GLU_BASE_TILE = 128 * 256  # elements; the vendor's tiling picks it, so the GLU figure is an estimate


@dataclass(frozen=True)
class Explanation:
    """What one target makes of one call. Prints as text.

    routes: the routes that the operator has on the target, best first, each with every rule it breaks (none:
    the route takes the call). grouped is ffn.moe's alone.
    plan: mode, sizes and route, when a route takes the call. workspace: bytes that aclnnFFNV3 would ask for,
    an estimate from contract section f; None by other routes.
    """

    target: str
    routes: Mapping[str, tuple[Violation, ...]]
    plan: Plan | None
    workspace: int | None

    @property
    def ok(self) -> bool:
        """True when the target takes the call."""
        return self.plan is not None

    @property
    def mode(self) -> str | None:
        return self.plan.mode.name if self.plan else None

    @property
    def route(self) -> str | None:
        return self.plan.route if self.plan else None

    @property
    def violations(self) -> tuple[Violation, ...]:
        """Every rule that the nearest route breaks; empty when a route takes the call."""
        return () if self.plan else self.routes[contract.nearest(self.routes)]

    def __str__(self) -> str:
        lines = []
        if self.plan:
            lines.append(f"{self.target} takes this call: mode {self.mode}, route {self.route}")
            sizes = " ".join(f"{name}={size}" for name, size in self.plan.dims.items() if size is not None)
            lines.append(f"  sizes: {sizes}")
            lines.append(f"  y: {self.plan.out.dtype} {list(self.plan.out.shape)}")
            if self.workspace is not None:
                lines.append(f"  workspace: about {self.workspace} bytes")
        else:
            lines.append(f"{self.target} refuses this call")
        for route, violations in self.routes.items():
            if not violations and route != self.route:
                lines.append(f"  route {route} would take it too")
            for violation in violations:
                lines.append(f"  route {route}, rule {violation.rule}: {violation.text}")
        return "\n".join(lines)


def explain(
    x: Any,
    weight1: Any,
    weight2: Any,
    activation: str,
    expert_tokens: Any = None,
    bias1: Any = None,
    bias2: Any = None,
    scale: Any = None,
    offset: Any = None,
    deq_scale1: Any = None,
    deq_scale2: Any = None,
    antiquant_scale1: Any = None,
    antiquant_scale2: Any = None,
    antiquant_offset1: Any = None,
    antiquant_offset2: Any = None,
    *,
    topk_ids: Any = None,
    topk_weights: Any = None,
    tokens_index_flag: bool = False,
    inner_precise: int | None = None,
    output_dtype: Any = None,
    out: Any = None,
    activate_left: bool = False,
    target: str | None = None,
) -> Explanation:
    """What `target` (by default x's NPU, else the current one) would do with the call that ffn() takes with
    these arguments, or torch.ops.ffn.moe with topk_ids and topk_weights.

    Each tensor may be a tensor of any device, meta included, a NumPy array, or a (dtype, shape) pair such as
    ("float16", (4, 1024)); a dtype is a torch dtype or its name. Weights given as "int4" have their shape in
    int4 elements, packed int32 and uint8 ones in stored elements; what `prepack` made counts as what it was
    made from. Values of expert_tokens are checked where they can be read (a list, an array or a tensor on the
    CPU), for every target, as the vendor documents them: a device cannot enforce that. Raises ContractError
    only for an unknown target and for arguments that are none of the above. activate_left changes nothing of
    what is legal.
    """
    given = {
        "x": x, "weight1": weight1, "weight2": weight2, "expert_tokens": expert_tokens,
        "bias1": bias1, "bias2": bias2, "scale": scale, "offset": offset,
        "deq_scale1": deq_scale1, "deq_scale2": deq_scale2,
        "antiquant_scale1": antiquant_scale1, "antiquant_scale2": antiquant_scale2,
        "antiquant_offset1": antiquant_offset1, "antiquant_offset2": antiquant_offset2,
        "topk_ids": topk_ids, "topk_weights": topk_weights, "out": out, "output_dtype": output_dtype,
    }  # fmt: skip
    if target is None:
        target = target_of(x) if isinstance(x, torch.Tensor) else current_target()
    elif target not in contract.TARGETS:
        raise ContractError(
            f"target is '{target}', but it must be one of {', '.join(contract.TARGETS)} (name one of them)"
        )
    if not isinstance(activation, str):
        raise ContractError(f"activation is {activation!r}, but it must be a string (name one)")
    specs = {name: _spec(name, value) for name, value in given.items() if value is not None}
    tokens = _readable(expert_tokens)
    routes = {}
    moe = topk_ids is not None or topk_weights is not None
    for route in contract.TARGETS[target]:
        if route == "grouped" and not moe:
            continue
        broken = contract.violations(specs, activation, route, inner_precise=inner_precise, target=target)
        routes[route] = (
            broken or _token_violations(tokens, specs["x"], tokens_index_flag) or _id_violations(topk_ids)
        )
    plan = None
    if not all(routes.values()):
        plan = contract.resolve(specs, activation, inner_precise=inner_precise, target=target)
    workspace = _workspace(plan, specs, target) if plan and plan.route == "fused" else None
    return Explanation(target, routes, plan, workspace)


def _spec(name: str, value: Any) -> Spec:
    prepacked = name in ("weight1", "weight2") and isinstance(value, torch.Tensor) and is_packed(value)
    return packed_spec(value) if prepacked and holds_values(value) else spec_of(name, value)


def _readable(expert_tokens: Any) -> list[int] | None:
    """The values of expert_tokens, or None when they are on a device, symbolic or only described."""
    if isinstance(expert_tokens, torch.Tensor):
        readable = expert_tokens.dtype == torch.int64 and holds_values(expert_tokens)
        return expert_tokens.tolist() if readable else None
    if hasattr(expert_tokens, "tolist"):
        return expert_tokens.tolist()
    if isinstance(expert_tokens, (list, tuple)) and all(isinstance(value, int) for value in expert_tokens):
        return list(expert_tokens)
    return None


def _token_violations(tokens: list[int] | None, x: Spec, tokens_index_flag: bool) -> tuple[Violation, ...]:
    if tokens is None:
        return ()
    rows = contract.row_count(x)
    try:
        if rows is not None:
            contract.row_ends(tokens, rows, tokens_index_flag)
    except ContractError as error:
        return (Violation("expert_tokens-values", str(error)),)
    return ()


def _id_violations(topk_ids: Any) -> tuple[Violation, ...]:
    broken = broken_ids(topk_ids) if isinstance(topk_ids, torch.Tensor) else None
    return (Violation("topk_ids-values", broken),) if broken else ()


def _workspace(plan: Plan, specs: Mapping[str, Spec], target: str) -> int:
    """Contract section f, for an Atlas 910B3; copies of non-contiguous inputs are not counted."""
    M, K1, N1, N2 = (plan.dims[name] or 0 for name in ("M", "K1", "N1", "N2"))
    if plan.dims["top_k"] is not None:
        M *= plan.dims["top_k"]
    E = max(plan.dims["E"] or 0, 1)
    if M == 0 or K1 == 0:
        return 0
    x_bytes = contract.DTYPES[plan.mode.x] // 8
    bf16_out = plan.mode.y == "bfloat16"
    if plan.activation in contract.GLU:
        kernel = _GLU_BASE_TILE * 2 * 4 * _VECTOR_CORES + M * (N1 // 2) * 2
    else:
        float32_first = bf16_out or (plan.mode.name == "fp16" and plan.inner_precise == 0)
        first = 0 if target == "ascend310p" else M * N1 * (4 if float32_first else 2)
        second = M * N1 * x_bytes
        extra = 0
        if plan.mode.scale and specs["deq_scale1"].dtype == "float32":
            first, second = (first + 63) // 64 * 64, (second + 63) // 64 * 64
            extra += E * (N1 + N2) * 8
        if plan.mode.scale and bf16_out:
            extra += M * N2 * 4
        if plan.mode.antiquant:
            extra += (K1 * N1 + N1 * N2) * x_bytes * 2
        kernel = first + second + extra + _CUBE_CORES * 2 * 32
    return (kernel + _ACLNN_SYSTEM + 32 + 511) & ~511
