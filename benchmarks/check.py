# SPDX-License-Identifier: Apache-2.0
"""What a cell's answer is, in float64, and how far from it any honest implementation may be.

One bound for everyone in a cell. docs/numerics.md derives the terms; the difference from tests/tolerance.py,
which holds our kernels to their named roundings, is that here an implementation may round to the cell's dtype
after every operation, as a composition of torch operators does, and that a peer may quantize x and the
intermediate by row where the cell does not. Such a bound is wide. The error beside each figure says how good
an answer is; the bound, that it is an answer. A few rows are checked, since rows are independent.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import Case, Product
from ffn_ops.activation import GATES, activate
from ffn_ops.contract import GLU

ROWS = 6
COLUMNS = 2048  # of a weight in float64 at a time, so that it never exists whole
SLOPE = 1.13  # max |act'| over all activations (docs/numerics.md)
ACTIVATION_ERROR = 16 * 2.0**-24  # of |act(x)| + |x| / 4, in float32
# Half a unit in the last place relative to the value, and half of the smallest subnormal.
UNIT = {
    torch.float32: (2.0**-24, 2.0**-150),
    torch.float16: (2.0**-11, 2.0**-25),
    torch.bfloat16: (2.0**-8, 2.0**-134),
}


class Values(NamedTuple):
    """A value in float64, and how far from it an implementation may be."""

    value: Tensor
    error: Tensor


class Verdict(NamedTuple):
    error: float  # root mean square over the checked rows, relative to that of the answer
    share: float  # the largest error / bound of a cell; up to 1 is right
    reason: str | None  # why the answer is wrong


class Answer:
    """Of a cell, computed once for all peers."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.rows = torch.linspace(0, case.M - 1, min(ROWS, case.M)).round().long()
        self._plain = self._compute(False)
        self._by_row: Values | None = None

    def judge(self, y: Tensor, quantizes_rows: bool = False) -> Verdict:
        """quantizes_rows: the peer holds x and the intermediate in int8, with a scale for each row."""
        expected = (self.case.M, self.case.shape.K1)
        if tuple(y.shape) != expected:
            return Verdict(
                float("nan"), float("inf"), f"y has shape {tuple(y.shape)}, but it must be {expected}"
            )
        if quantizes_rows and self._by_row is None:
            self._by_row = self._compute(True)
        answer = self._by_row if quantizes_rows else self._plain
        assert answer is not None
        difference = (y.cpu()[self.rows].double() - answer.value).abs()
        error = float((difference.square().mean() / answer.value.square().mean()).sqrt())
        share = float((difference / answer.error).nan_to_num(torch.inf).max())
        wrong = (
            f"y is {share:.3g} times as far from the answer as the cell's bound allows" if share > 1 else None
        )
        return Verdict(error, share, wrong)

    def _compute(self, quantizes_rows: bool) -> Values:
        case = self.case
        x = case.x[self.rows].double()
        unit, tiny = UNIT[case.mode.dtype]
        if case.routing is None:
            return self._ffn(x, case.weights.first, case.weights.second, quantizes_rows)
        y, error, size = (torch.zeros_like(x) for _ in range(3))
        ids, routing_weights = case.routing.ids[self.rows], case.routing.weights[self.rows].double()
        for e in ids.unique().tolist():
            row, slot = (ids == e).nonzero(as_tuple=True)
            one, two = (Product(*(None if t is None else t[e] for t in p))
                        for p in (case.weights.first, case.weights.second))  # fmt: skip
            share = self._ffn(x[row], one, two, quantizes_rows)
            weight = routing_weights[row, slot, None]
            y[row] += weight * share.value
            size[row] += weight * (share.value.abs() + share.error)
            error[row] += weight * share.error
        # Each expert's y may be rounded, then weighted and rounded, and so may every partial sum.
        return Values(y, error + (case.shape.top_k + 2) * (unit * size + tiny))

    def _ffn(self, x: Tensor, first: Product, second: Product, quantizes_rows: bool) -> Values:
        case, (unit, tiny) = self.case, UNIT[self.case.mode.dtype]
        # Rounded to the nearest of 255 steps over a row's range.
        step = (
            x.abs().amax(1, keepdim=True) / 254 if quantizes_rows else torch.zeros(len(x), 1, dtype=x.dtype)
        )
        acc = self._product(Values(x, step.expand_as(x)), first, case.x_scale)
        acc = acc._replace(error=acc.error + unit * acc.value.abs() + tiny)
        h = self._activation(acc)
        if quantizes_rows:
            h = h._replace(error=h.error + (h.value.abs() + h.error).amax(1, keepdim=True) / 254)
        elif case.mode.row.scale:  # h / h_scale is rounded to float16, then to an integer that saturates
            h_scale = case.weights.h_scale
            low, high = -128 * h_scale, 127 * h_scale
            h = Values(
                h.value.clamp(low, high), h.error + h_scale / 2 + UNIT[torch.float16][0] * h.value.abs()
            )
        y = self._product(h, second, case.weights.h_scale)
        return y._replace(error=y.error + unit * y.value.abs() + tiny)

    def _product(self, a: Values, product: Product, input_scale: float) -> Values:
        """a W + b in float32, in any order; integer weights may be rounded to the cell's dtype once or
        twice."""
        K, N = product.values.shape
        relative = (K + 5) * 2.0**-24 / (1 - (K + 5) * 2.0**-24)
        if product.offset is not None:
            relative += 2 * UNIT[self.case.mode.dtype][0]
        value, error = (torch.empty(len(a.value), N, dtype=torch.float64) for _ in range(2))
        for begin in range(0, N, COLUMNS):
            columns = slice(begin, begin + COLUMNS)
            weight, gross = self._expand(product, columns)
            value[:, columns] = a.value @ weight
            error[:, columns] = relative * ((a.value.abs() + a.error) @ gross) + a.error @ gross
        if product.bias is not None:
            bias = product.bias.double()
            held = relative + UNIT[self.case.mode.dtype][0]  # as the cell's dtype has it
            value, error = value + bias, error + held * bias.abs()
            if self.case.mode.row.scale:  # in whole units of deq_scale
                assert product.scale is not None
                error = error + product.scale * input_scale / 2
        return Values(value, error)

    def _expand(self, product: Product, columns: slice) -> tuple[Tensor, Tensor]:
        """W, and what its roundings are relative to: |scale| (|w| + |offset|)."""
        values = product.values[:, columns].double()
        if product.scale is None:
            return values, values.abs()
        scale = self._by_row_of(product.scale, len(values))[:, columns]
        if product.offset is None:
            return values * scale, values.abs() * scale
        offset = self._by_row_of(product.offset, len(values))[:, columns]
        return (values + offset) * scale, (values.abs() + offset.abs()) * scale

    @staticmethod
    def _by_row_of(groups: Tensor, K: int) -> Tensor:
        """[N] or [G, N] as [K, N], or [1, N]."""
        groups = groups.double()
        return groups[None] if groups.dim() == 1 else groups.repeat_interleave(K // len(groups), dim=0)

    def _activation(self, acc: Values) -> Values:
        activation = self.case.shape.activation
        unit, tiny = UNIT[self.case.mode.dtype]
        if activation in GLU:
            left, right = (Values(*ends) for ends in zip(*(t.chunk(2, 1) for t in acc), strict=True))
            act = self._unary(right, GATES[activation])
            value = left.value * act.value
            error = left.value.abs() * act.error + (act.value.abs() + act.error) * left.error
            return Values(value, error + unit * (value.abs() + error) + tiny)
        return self._unary(acc, activation)

    def _unary(self, v: Values, activation: str) -> Values:
        value = activate(v.value, activation)
        error = SLOPE * v.error + ACTIVATION_ERROR * (value.abs() + v.value.abs() / 4 + 2 * v.error)
        unit, tiny = UNIT[self.case.mode.dtype]
        return Values(value, error + unit * (value.abs() + error) + tiny)
