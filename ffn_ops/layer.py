# SPDX-License-Identifier: Apache-2.0
"""FFN, a feed-forward block as a module: it owns the operator's tensors and casts x to what its mode takes.

contract.py says which tensors a mode has, quantize/ makes the integer ones, and torch.ops.ffn.ffn computes.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ffn_ops import contract, quantize
from ffn_ops.contract import ContractError, Mode, Spec
from ffn_ops.op import NO_GRADIENT, ffn
from ffn_ops.packing import Packable, is_packed, pack_int4


class FFN(Packable):
    """y = act(x W1 + b1) W2 + b2 by torch.ops.ffn.ffn, with x and y of any float dtype.

    Its buffers are the operator's tensors, under their names there: weight1 is [K1, N1] and weight2 [K2, K1],
    where N1 is 2 * K2 for GLU activations and K2 otherwise; int4 weights are packed two per byte. Modes with
    int8 x also own x_scale [K1], and always bias2, which carries the offset of the intermediate. Made by
    `from_linear`, or empty (all zeros) for `load_state_dict`. Inference only.
    """

    packed_names = ("weight1", "weight2")
    # _operands() names the buffers that exist; the others are None and no buffers, for torch.export.
    bias1: Tensor | None
    bias2: Tensor | None
    x_scale: Tensor | None

    def __init__(
        self,
        K1: int,
        K2: int,
        activation: str,
        mode: str,
        group_size: int | None = None,
        bias1: bool = True,
        bias2: bool = True,
    ) -> None:
        super().__init__()
        self.K1, self.K2, self.activation, self.mode, self.group_size = K1, K2, activation, mode, group_size
        row = _mode(mode)
        if group_size is not None:
            _check_group_size(group_size, row, K1, K2)
        N1 = 2 * K2 if activation.lower() in contract.GLU else K2
        specs = _operands(row, K1, N1, K2, group_size, bias1, bias2 or row.x == "int8")
        call = {"x": Spec(row.x, (None, K1)), **specs, "output_dtype": Spec(row.y, ())}
        contract.resolve(call, activation)
        self._x_dtype, self._y_dtype = getattr(torch, row.x), getattr(torch, row.y)
        for name, operand in contract.OPERANDS.items():
            if operand.column not in ("x", "tokens", "ids", "routing", "y"):
                self._own(name, _zeros(specs[name]) if name in specs else None)
        self._own("x_scale", torch.zeros(K1) if row.x == "int8" else None)

    def _own(self, name: str, tensor: Tensor | None) -> None:
        if tensor is None:
            setattr(self, name, None)
        else:
            self.register_buffer(name, tensor)

    @classmethod
    @torch.no_grad()
    def from_linear(
        cls,
        fc1: nn.Linear,
        fc2: nn.Linear,
        activation: str,
        mode: str,
        group_size: int | None = None,
        calibration: Iterable[Tensor] | None = None,
    ) -> "FFN":
        """The block fc2(act(fc1(x))) in `mode`, with copies of the weights.

        For GLU, fc1 holds the operator's half order: left * act(right). Hugging Face's [gate | up] has the
        activation on the left half, so exchange the halves of its weight and bias first, with
        packing.swap_glu_halves(weight, dim=0).

        `group_size` rows of a weight share a scale, in the w8a16 and w4a16 modes; None is one scale for each
        column. `calibration` is an iterable of inputs of this block, real tokens only; only w8a8 modes
        need it.
        """
        row = _mode(mode)
        _check_linear(fc1=fc1, fc2=fc2)
        K1, N1, K2, N2 = fc1.in_features, fc1.out_features, fc2.in_features, fc2.out_features
        glu = activation.lower() in contract.GLU
        if (2 * K2 if glu else K2) != N1:
            raise ContractError(
                f"fc1 gives {N1} features and fc2 takes {K2}, but {activation} needs "
                f"{'twice as many from fc1, both halves' if glu else 'the same number'} (check the pair)"
            )
        if N2 != K1:
            raise ContractError(
                f"fc2 gives {N2} features and fc1 takes {K1}, but y has x's shape (project outside the block)"
            )
        with torch.device("meta"):
            layer = cls(K1, K2, activation, mode, group_size, fc1.bias is not None, fc2.bias is not None)

        if row.weight.startswith("int"):
            _check_finite(fc1=fc1, fc2=fc2)
        if row.x == "int8":
            if calibration is None:
                raise ContractError(
                    f"calibration is missing, but mode {mode} derives its scales from it "
                    "(pass an iterable of this block's inputs)"
                )
            deq_dtype = layer.get_buffer("deq_scale1").dtype
            tensors = quantize.quantize_w8a8(fc1, fc2, activation, calibration, deq_dtype)
        else:
            tensors = {}
            for suffix, fc in (("1", fc1), ("2", fc2)):
                if fc.bias is not None:
                    tensors[f"bias{suffix}"] = _copy(fc.bias, getattr(torch, row.bias))
                if not row.antiquant:
                    tensors[f"weight{suffix}"] = _copy(fc.weight.t(), getattr(torch, row.weight))
                    continue
                int4 = row.weight == "int4"
                quantizer = quantize.quantize_int4 if int4 else quantize.quantize_int8
                weight = quantizer(fc.weight.t().float(), group_size, getattr(torch, row.antiquant))
                tensors[f"weight{suffix}"] = pack_int4(weight.values) if int4 else weight.values
                tensors[f"antiquant_scale{suffix}"] = weight.scale
                tensors[f"antiquant_offset{suffix}"] = weight.offset
        if all(bool(p.isfinite().all()) for fc in (fc1, fc2) for p in fc.parameters()):
            _check_range(mode, tensors)
        layer.load_state_dict(tensors, assign=True)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        # Checked here since x / x_scale would broadcast.
        if x.shape[-1:] != (self.K1,):
            raise ContractError(
                f"x has shape {tuple(x.shape)}, but this FFN takes a last dimension of K1 = {self.K1} "
                "(check which block it replaces)"
            )
        if not x.is_floating_point():
            raise ContractError(
                f"x is {x.dtype}, but an FFN takes floating-point x and gives y in its dtype (cast x)"
            )
        rows = x.reshape(-1, self.K1)  # any rank, as nn.Linear
        tensors = {name: tensor for name, tensor in self._buffers.items() if name != "x_scale"}
        options = {"activation": self.activation, "output_dtype": self._y_dtype, **tensors}
        if self.x_scale is None:
            return ffn(rows.to(self._x_dtype), **options).to(x.dtype).reshape(x.shape)
        scaled = rows.detach() / self.x_scale
        # int8 holds neither NaN nor infinity: such rows come out as NaN, which either is times -0, and
        # adding -0 changes nothing. (isfinite and masked_fill took a tenth of the time; K1 = 384, Zen 4.)
        unheld = scaled.abs().amax(-1, keepdim=True).mul_(-0.0).to(x.dtype)
        y = ffn(scaled.round_().clamp_(-128, 127).nan_to_num_(0).to(torch.int8), **options).to(x.dtype)
        y = (y + unheld).reshape(x.shape)
        return _NoGradient.apply(y, x) if x.requires_grad and torch.is_grad_enabled() else y

    def extra_repr(self) -> str:
        parts = [f"K1={self.K1}, K2={self.K2}, activation={self.activation}, mode={self.mode}"]
        if self.group_size is not None:
            parts.append(f"group_size={self.group_size}")
        parts += [f"{name}=False" for name in ("bias1", "bias2") if getattr(self, name) is None]
        parts += ["packed"] if is_packed(self.get_buffer("weight1")) else []
        return ", ".join(parts)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FFN":
        # .half(), .to(dtype) and the like move the buffers, but their dtypes are the mode's and stay.
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        self._match_packing(state_dict, prefix, error_msgs)
        # nn.Module would cast: a deq_scale packed in int64 would become a meaningless bfloat16.
        for name, buffer in self.named_buffers(recurse=False):
            loaded = state_dict.get(prefix + name)
            if isinstance(loaded, nn.Parameter):  # with assign=True it would become a parameter, not a buffer
                state_dict[prefix + name] = loaded = loaded.detach()
            if isinstance(loaded, Tensor) and loaded.dtype != buffer.dtype:
                error_msgs.append(
                    f"{prefix}{name} is {loaded.dtype}, but mode {self.mode} takes {buffer.dtype} "
                    "(load it into an FFN of the mode that it was saved from)"
                )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


class _NoGradient(torch.autograd.Function):
    """Ties y to x where int8 cuts the graph, so that backward fails as the operator's own does."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(NO_GRADIENT)


def _mode(name: str) -> Mode:
    for row in contract.MODES:
        if row.name == name:
            return row
    raise ContractError(
        f"mode is {name!r}, but it must be one of {', '.join(row.name for row in contract.MODES)} (name one)"
    )


def _check_group_size(group_size: int, row: Mode, K1: int, K2: int) -> None:
    if not row.antiquant:
        grouped = ", ".join(mode.name for mode in contract.MODES if mode.antiquant)
        raise ContractError(
            f"group_size is {group_size}, but mode {row.name} has no groups (leave it out, or use {grouped})"
        )
    for name, K in (("K1", K1), ("K2", K2)):
        if group_size < 1 or K % group_size:
            raise ContractError(
                f"group_size is {group_size}, but it must divide {name} = {K} (choose a divisor of K1 and K2)"
            )


def _check_linear(**linears: Any) -> None:
    for name, linear in linears.items():
        if not isinstance(linear, nn.Linear) or isinstance(linear, nn.modules.lazy.LazyModuleMixin):
            raise ContractError(
                f"{name} is a {type(linear).__name__}, but it must be an nn.Linear (pass the module)"
            )
        if linear.weight.is_meta:
            raise ContractError(f"{name} is on the meta device, but its values are needed (load them first)")


def _check_finite(**linears: nn.Linear) -> None:
    for name, linear in linears.items():
        for part, tensor in linear.named_parameters():
            if not bool(tensor.float().isfinite().all()):
                raise ContractError(
                    f"{name}.{part} holds inf or NaN in float32, but integers hold neither (use a float mode)"
                )


def _check_range(mode: str, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise ContractError(
                f"{name} would hold inf or NaN in {tensor.dtype}, but mode {mode} needs weights in its range "
                "(use a mode of a wider dtype)"
            )


def _operands(
    row: Mode, K1: int, N1: int, K2: int, group_size: int | None, bias1: bool, bias2: bool
) -> dict[str, Spec]:
    """The operator's tensors in this mode, in the contract's terms."""
    specs = {"weight1": Spec(row.weight, (K1, N1)), "weight2": Spec(row.weight, (K2, K1))}
    if bias1:
        specs["bias1"] = Spec(row.bias, (N1,))
    if bias2:
        specs["bias2"] = Spec(row.bias, (K1,))
    if row.scale:
        deq_dtype = "int64" if "int64" in row.deq_scale.split() else row.deq_scale
        specs["scale"] = specs["offset"] = Spec(row.scale, (1,))
        specs["deq_scale1"], specs["deq_scale2"] = Spec(deq_dtype, (N1,)), Spec(deq_dtype, (K1,))
    if row.antiquant:
        for suffix, K, N in (("1", K1, N1), ("2", K2, K1)):
            spec = Spec(row.antiquant, (N,) if group_size is None else (K // group_size, N))
            specs[f"antiquant_scale{suffix}"] = specs[f"antiquant_offset{suffix}"] = spec
    return specs


def _zeros(spec: Spec) -> Tensor:
    *leading, last = (int(size) for size in spec.shape if size is not None)
    if spec.dtype == "int4":
        return torch.zeros(*leading, last // 2, dtype=torch.uint8)
    return torch.zeros(*leading, last, dtype=getattr(torch, spec.dtype))


def _copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
