# SPDX-License-Identifier: Apache-2.0
"""The expert computation of a MoE block: each token's experts by the steps of ffn.py, weighted and added.

Until the sum everything is as in `reference.ffn`, but for y's rounding, which comes after it.
"""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from reference.activation import GLU
from reference.ffn import Expert, Product, exact_results, experts, results
from reference.rounding import Array, nearest_even


class Share(NamedTuple):
    """The tokens that have one expert in one of their slots."""

    tokens: Array  # rows of x and y as matrices
    expert: Expert
    weight: Array  # [tokens, 1] float32


@np.errstate(all="ignore")
def moe(
    x: Array,
    topk_ids: Array,
    topk_weights: Array,
    weight1: Array,
    weight2: Array,
    activation: str,
    *,
    inner_precise: int | None = None,
    output_dtype: npt.DTypeLike | None = None,
    activate_left: bool = False,
    rounding: Literal["ascend", "exact"] = "ascend",
    **operands: Array,
) -> Array:
    """y[t] = sum over slots s of topk_weights[t, s] * ffn(x[t]) by expert topk_ids[t, s].

    Added in float32 in the order of the slots, beginning with 0, and rounded once; an id of E or more
    contributes nothing. `operands` are those of reference.ffn. activate_left makes a GLU act(left) * right.
    rounding="exact" is the formula, in and as float64.
    """
    activation = activation.lower()
    if activate_left and activation in GLU:
        weight1, operands = halves_exchanged(weight1, operands)
    if inner_precise is None:
        inner_precise = 1 if activation in GLU else 0
    dtype = np.dtype(output_dtype or (np.float16 if x.dtype == np.int8 else x.dtype))
    matrix = x.reshape(int(np.prod(x.shape[:-1])), x.shape[-1])
    exact = rounding == "exact"
    y = np.zeros((len(matrix), weight2.shape[-1]), np.float64 if exact else np.float32)
    for share in shares(len(matrix), topk_ids, topk_weights, weight1, weight2, operands):
        rows = matrix[share.tokens]
        if exact:
            y[share.tokens] += share.weight * exact_results(rows, share.expert, activation)
        else:
            y[share.tokens] += share.weight * results(rows, share.expert, activation, inner_precise, dtype)
    return (y if exact else nearest_even(y, dtype)).reshape(*x.shape[:-1], weight2.shape[-1])


def halves_exchanged(weight1: Array, operands: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
    """What makes act(left) * right of a GLU's left * act(right): all that there is for each of N1 columns."""
    names = ("bias1", "deq_scale1", "antiquant_scale1", "antiquant_offset1")
    half = weight1.shape[-1] // 2
    changed = {name: np.roll(operands[name], half, -1) for name in names if name in operands}
    return np.roll(weight1, half, -1), {**operands, **changed}


def shares(
    M: int, topk_ids: Array, topk_weights: Array, weight1: Array, weight2: Array, operands: dict[str, Any]
) -> Iterator[Share]:
    """Slot by slot, and within a slot expert by expert; a token is in at most one share of a slot."""

    def product(weight: Array, i: int) -> Product:
        names = ("bias", "deq_scale", "antiquant_scale", "antiquant_offset")
        return Product(weight, *(operands.get(f"{name}{i}") for name in names))

    E = len(weight1)
    top_k = topk_ids.shape[-1]
    ids, weights = topk_ids.reshape(M, top_k), topk_weights.reshape(M, top_k).astype(np.float32)
    for slot in range(top_k):
        order = np.argsort(ids[:, slot], kind="stable")
        order = order[ids[order, slot] < E]
        counts = np.bincount(ids[order, slot], minlength=E)
        for expert in experts(
            product(weight1, 1), product(weight2, 2), operands.get("scale"), operands.get("offset"),
            counts, False, len(order),
        ):  # fmt: skip
            tokens = order[expert.rows]
            yield Share(tokens, expert, weights[tokens, slot, None])
