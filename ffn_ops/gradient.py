# SPDX-License-Identifier: Apache-2.0
"""The gradients of ffn.ffn, ffn.moe and the grouped products in the float modes; op.py registers them.

Only a call's inputs are kept: the first product is computed again. Products are ffn.grouped_mm and
ffn.grouped_outer, of the CPU's kernels (csrc/op/grouped_cpu.cc) or of the NPU (npu.py), so that these
formulas are the same on both. Activations and the routing are in float32. The roundings of the forward pass
count as the identity.

For y_t = sum over slots s of w_ts (a_ts W2 + b2), where a = act(h) and h = x W1 + b1, with g the gradient of
y: da = g W2^T, dw = <da, a> + <g, b2>, dh = act'(h) w da, dx = dh W1^T, and dW1 = x^T dh, dW2 = a^T w g, db1
and db2 the sums of dh and w g over an expert's rows.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ffn_ops.activation import activate, activate_backward
from ffn_ops.moe import permute, restore

grouped_mm, grouped_outer = torch.ops.ffn.grouped_mm, torch.ops.ffn.grouped_outer


class Block(NamedTuple):
    """The operands of a call that have gradients: weights are [E, K, N], biases [E, N] or None."""

    weight1: Tensor
    weight2: Tensor
    bias1: Tensor | None
    bias2: Tensor | None
    activation: str
    activate_left: bool = False


class Gradients(NamedTuple):
    """Of weights and biases only where they require one: frozen experts cost no product."""

    rows: Tensor  # of x, in the order of the experts
    weights: Tensor | None  # of the routing, in the same order, float32
    weight1: Tensor | None
    weight2: Tensor | None
    bias1: Tensor | None
    bias2: Tensor | None


Wanted = Sequence[bool]  # whether weight1, weight2, bias1 and bias2 require a gradient


def wanted_of(block: Block) -> Wanted:
    return [tensor is not None and tensor.requires_grad for tensor in block[:4]]


_Parts = TypeVar("_Parts", Block, Gradients)


def block_gradients(
    grad: Tensor, rows: Tensor, expert_tokens: Tensor, block: Block, wanted: Wanted,
    weights: Tensor | None = None,
) -> Gradients:  # fmt: skip
    """Gradients of the experts' blocks.

    grad [rows, N2] and rows [rows, K1] are sorted by expert, expert_tokens counts the rows of each [E], and
    what they leave over has no expert. weights [rows], float32: of the routing; without them all are 1.
    """
    dtype = rows.dtype
    h = grouped_mm(rows, block.weight1, expert_tokens, block.bias1).float()
    a = activate(h, block.activation, block.activate_left)
    da = grouped_mm(grad, block.weight2.transpose(1, 2), expert_tokens).float()
    dweights = None
    weighted = grad
    if weights is not None:
        dweights = (a * da).sum(-1)
        if block.bias2 is not None:
            dweights = dweights + (grad.float() * by_row(block.bias2, expert_tokens, rows.shape[0])).sum(-1)
        # Rows without an expert contribute nothing, not even where their gradient is NaN.
        nobodys = torch.arange(rows.shape[0], device=rows.device) >= expert_tokens.sum()
        dweights = dweights.masked_fill(nobodys, 0)
        da = da * weights[:, None]
        weighted = (grad.float() * weights[:, None]).to(dtype)
    dh = activate_backward(da, h, block.activation, block.activate_left)
    return Gradients(
        grouped_mm(dh.to(dtype), block.weight1.transpose(1, 2), expert_tokens),
        dweights,
        weight_gradient(rows, dh.to(dtype), expert_tokens, block.weight1) if wanted[0] else None,
        weight_gradient(a.to(dtype), weighted, expert_tokens, block.weight2) if wanted[1] else None,
        sums(dh, expert_tokens).to(block.bias1.dtype) if block.bias1 is not None and wanted[2] else None,
        sums(weighted, expert_tokens).to(block.bias2.dtype)
        if block.bias2 is not None and wanted[3]
        else None,
    )


def weight_gradient(rows: Tensor, grad: Tensor, expert_tokens: Tensor, weight: Tensor) -> Tensor:
    """Of weight [E, K, N], and as it lies: else a transposed parameter's .grad would be a copy of it."""
    if weight.stride(1) == 1:
        return grouped_outer(grad, rows, expert_tokens).transpose(1, 2)
    return grouped_outer(rows, grad, expert_tokens)


def sums(rows: Tensor, expert_tokens: Tensor) -> Tensor:
    """The sum of each expert's rows [rows, N], in float32: [E, N]."""
    rows = rows.float()
    return grouped_outer(rows.new_ones(rows.shape[0], 1), rows, expert_tokens).squeeze(1)


def by_row(bias: Tensor, expert_tokens: Tensor, rows: int) -> Tensor:
    """Each row's own bias [rows, N], in float32; zeros for rows without an expert."""
    expert = torch.searchsorted(
        expert_tokens.cumsum(0), torch.arange(rows, device=bias.device), right=True
    )  # E for those
    return F.pad(bias.float(), (0, 0, 0, 1))[expert]


def ffn_gradients(
    grad: Tensor, x: Tensor, expert_tokens: Tensor | None, tokens_index_flag: bool, block: Block
) -> tuple[Tensor, Gradients]:
    """The gradient of x, and all others, for ffn.ffn: x [..., K1], weights with E when expert_tokens is
    given."""
    rows, wanted = x.flatten(0, -2), wanted_of(block)
    dense = expert_tokens is None or len(expert_tokens) == 0
    if expert_tokens is None or dense:
        expert_tokens = torch.full((1,), rows.shape[0], dtype=torch.int64, device=x.device)
        block = _each(block, lambda tensor: tensor[None])
    elif tokens_index_flag:
        expert_tokens = expert_tokens.diff(prepend=expert_tokens.new_zeros(1))
    found = block_gradients(grad.flatten(0, -2), rows, expert_tokens, block, wanted)
    dx = found.rows.reshape(x.shape)
    return dx, _each(found, lambda tensor: tensor[0]) if dense else found


def _each(parts: _Parts, change: Callable[[Tensor], Tensor]) -> _Parts:
    """With all weights and biases changed."""
    changed: dict[str, Any] = {}
    for name in ("weight1", "weight2", "bias1", "bias2"):
        tensor = getattr(parts, name)
        changed[name] = None if tensor is None else change(tensor)
    return parts._replace(**changed)


def moe_gradients(
    grad: Tensor, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, block: Block
) -> tuple[Tensor, Tensor, Gradients]:
    """The gradients of x and topk_weights, and all others, for ffn.moe: x [..., K1], topk_ids
    [..., top_k]."""
    rows, top_k = x.flatten(0, -2), topk_ids.shape[-1]
    sorted_rows, expert_tokens, order = permute(rows, topk_ids.flatten(0, -2), len(block.weight1))
    grads = grad.flatten(0, -2)[order // max(top_k, 1)]
    weights = topk_weights.reshape(-1)[order].float()
    found = block_gradients(grads, sorted_rows, expert_tokens, block, wanted_of(block), weights)
    slots = restore(found.rows, order).reshape(rows.shape[0], top_k, rows.shape[1])
    dx = slots.float().sum(1).to(x.dtype)
    assert found.weights is not None
    dweights = restore(found.weights, order).reshape(topk_weights.shape).to(topk_weights.dtype)
    return dx.reshape(x.shape), dweights, found
