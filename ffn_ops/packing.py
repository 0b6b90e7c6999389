# SPDX-License-Identifier: Apache-2.0
"""Storage forms of the operator's tensors: weights prepacked for the CPU, packed int4, 64-bit deq_scale, the
order of GLU halves.

quantize/ and layer.py build on it; users of torch.ops.ffn.ffn call it on their own weights. Torch only.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ffn_ops import contract
from ffn_ops.contract import ContractError, Spec

# x's dtypes in the modes without integers.
FLOATS = tuple(getattr(torch, mode.x) for mode in contract.MODES if mode.name in contract.FLOAT_MODES)
# The 19 bits of an FP32 pattern that the hardware multiplies by: sign, exponent, 10 of mantissa.
_DEQ_BITS = 0xFFFFE000
_DEQ_FLAG = 1 << 46  # npu_trans_quant_param sets it; the operator ignores it
_INT4_PER_WORD = {torch.uint8: 2, torch.int32: 8}


def pack_int4(values: Tensor, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Packs int8 `values` in [-8, 7] along the last dimension, low nibble first.

    uint8 holds two per byte; int32 holds eight per word, in the same bytes (torch_npu's convention).
    """
    if dtype not in _INT4_PER_WORD:
        raise ContractError(f"dtype is {dtype}, but int4 is stored in torch.uint8 or torch.int32 (pass one)")
    if values.dtype != torch.int8:
        raise ContractError(
            f"values is {values.dtype}, but int4 is packed from torch.int8 (round and cast it)"
        )
    per_word = _INT4_PER_WORD[dtype]
    if values.dim() == 0 or values.shape[-1] % per_word:
        raise ContractError(
            f"values has shape {tuple(values.shape)}, but {dtype} takes a last dimension divisible by "
            f"{per_word} (pad it with zeros)"
        )
    if values.numel() and (values.min() < -8 or values.max() > 7):
        raise ContractError(
            f"values spans [{values.min()}, {values.max()}], but int4 holds [-8, 7] "
            "(clamp it, or quantize with a larger scale)"
        )
    nibbles = (values & 0xF).to(dtype).unflatten(-1, (values.shape[-1] // per_word, per_word))
    shifts = 4 * torch.arange(per_word, dtype=dtype, device=values.device)
    return (nibbles << shifts).sum(-1, dtype=dtype)  # no two share a bit, so the sum is their union


def unpack_int4(packed: Tensor) -> Tensor:
    """The int8 values of a tensor packed by `pack_int4`."""
    if packed.dtype not in _INT4_PER_WORD or packed.dim() == 0:
        raise ContractError(
            f"packed is {packed.dtype} of shape {tuple(packed.shape)}, but packed int4 is torch.uint8 or "
            "torch.int32 with one dimension or more (see pack_int4)"
        )
    # An empty tensor is contiguous with any strides, so contiguous() would keep what view() refuses.
    pairs = packed.clone(memory_format=torch.contiguous_format).view(torch.int8)
    # The right shift of int8 extends the sign of each nibble.
    return torch.stack(((pairs << 4) >> 4, pairs >> 4), dim=-1).flatten(-2)


def pack_deq_scale(scale: Tensor) -> Tensor:
    """float32 `scale` as the int64 that deq_scale1 and deq_scale2 take, as npu_trans_quant_param makes it."""
    if scale.dtype != torch.float32:
        raise ContractError(f"scale is {scale.dtype}, but a deq_scale is packed from torch.float32 (cast it)")
    return (scale.view(torch.int32).to(torch.int64) & _DEQ_BITS) | _DEQ_FLAG


def unpack_deq_scale(packed: Tensor) -> Tensor:
    """The float32 that the operator multiplies by when it is given `packed`."""
    if packed.dtype not in (torch.int64, torch.uint64):
        raise ContractError(f"packed is {packed.dtype}, but a deq_scale is torch.int64 (see pack_deq_scale)")
    bits = packed.view(torch.int64) & _DEQ_BITS
    return bits.to(torch.int32).view(torch.float32)  # the cast keeps the low 32 bits


def swap_glu_halves(tensor: Tensor, dim: int = -1) -> Tensor:
    """Exchanges the halves of a GLU weight or bias along `dim`, the one of size N1.

    Hugging Face packs [gate | up] and computes act(left) * right; the operator computes left * act(right).
    Packed int4 weights can be passed too: a half is whole bytes whenever the packed size is even.
    """
    if is_packed(tensor):
        raise ContractError(
            "tensor is a row of uint8, as prepacked weights are, but their halves lie in panels "
            "(swap the weight before prepack)"
        )
    if tensor.shape[dim] % 2:
        raise ContractError(
            f"tensor has size {tensor.shape[dim]} along dimension {dim}, but two halves need an even size "
            "(choose the dimension that holds both halves)"
        )
    return tensor.roll(tensor.shape[dim] // 2, dim)


def prepack(weight: Tensor | Sequence[Tensor]) -> Tensor:
    """`weight` in the order in which the CPU's kernels read it: a row of uint8 that torch.ops.ffn.ffn and
    ffn.moe take wherever they take `weight`.

    weight: [K, N] or [E, K, N] on the CPU, in a dtype of the contract's weights (int4 as `pack_int4` stores
    it); transposed views are read as they are. A sequence gives the [K, N] of each expert, which is asked for
    when it is packed, so no two copies of all experts need exist. The tensor can be saved, loaded, cloned and
    shared like any other; its memory lies on pages of 2 MB where Linux grants them.
    """
    experts: Sequence[Tensor] | Tensor = weight
    E = len(weight)
    if isinstance(weight, Tensor) and weight.dim() == 2:
        experts, E = [weight], 0
    elif E == 0 or (isinstance(weight, Tensor) and weight.dim() != 3):
        shape = tuple(weight.shape) if isinstance(weight, Tensor) else (0,)
        raise ContractError(
            f"weight has shape {shape}, but it must be [K, N] or [E, K, N] with an expert or more "
            "(pass the weight of one product)"
        )
    first = experts[0]
    _check_cpu("weight", first)
    try:
        block = torch.ops.ffn.new_block(first, E)
        for expert in range(max(E, 1)):
            torch.ops.ffn.pack_expert(block, experts[expert], expert)
    except RuntimeError as error:
        raise ContractError(str(error)) from None
    return block


def unpack(packed: Tensor) -> Tensor:
    """The contiguous weight that `prepack` was given, bit for bit; int4 comes in uint8."""
    _check_cpu("packed", packed)
    try:
        return torch.ops.ffn.unpack(packed)
    except RuntimeError as error:
        raise ContractError(str(error)) from None


def is_packed(weight: Tensor) -> bool:
    """Whether `weight` looks as `prepack` returns it."""
    return weight.dtype == torch.uint8 and weight.dim() == 1


def packed_spec(packed: Tensor) -> Spec:
    """Dtype and shape of the weight that was packed. Raises ContractError when it is no packed weight."""
    from ffn_ops import _native  # op.py imports this module before it looks whether anything is built

    try:
        dtype, shape = _native.packed_spec(bytes(packed[:64].tolist()), packed.numel())
        return Spec(dtype, tuple(shape))
    except ValueError as error:
        raise ContractError(str(error)) from None


def packed_float(packed: Tensor) -> torch.dtype | None:
    """The dtype of a packed weight of a float mode; None for integers."""
    dtype = getattr(torch, packed_spec(packed).dtype, torch.int8)  # torch has no int4
    return dtype if dtype.is_floating_point else None


def _check_cpu(name: str, tensor: Tensor) -> None:
    if tensor.device.type != "cpu":
        raise ContractError(
            f"{name} is on {tensor.device}, but only the CPU's kernels read packed weights "
            "(move it with .cpu())"
        )


_Module = TypeVar("_Module", bound="Packable")


class Packable(nn.Module):
    """A module whose weights `packed_names` can be prepacked for the CPU, which ends their training."""

    packed_names: tuple[str, ...]

    @torch.no_grad()
    def pack_(self: _Module) -> _Module:
        """Prepacks the weights in place, one after the other, and returns the module.

        They are buffers then, and frozen: backward passes give gradients to what lies around them only where
        they need none themselves. state_dict holds them packed; load_state_dict takes packed and plain ones,
        packed module or not, and .to(dtype) packs them again.
        """
        for name in self.packed_names:
            weight = getattr(self, name)
            if weight is None or is_packed(weight):
                continue
            packed = prepack(weight.detach())
            self._parameters.pop(name, None)
            self.register_buffer(name, packed)
        return self

    def _apply(self: _Module, fn: Any, recurse: bool = True) -> _Module:
        changes: dict[str, torch.dtype] = {}
        for name in self.packed_names:
            weight = getattr(self, name)
            if weight is None or not is_packed(weight) or weight.device.type != "cpu":
                continue
            dtype = packed_float(weight)
            wanted = dtype and fn(torch.empty(0, dtype=dtype)).dtype
            if wanted is None or wanted == dtype:
                continue
            if wanted not in FLOATS:  # before anything has changed
                raise ContractError(
                    f"{name} is packed in {dtype}, but it was to become {wanted}, and the operators take "
                    "float32, float16 or bfloat16 (cast to one of these)"
                )
            changes[name] = wanted
        super()._apply(fn, recurse)
        for name, wanted in changes.items():
            weight = getattr(self, name)
            if weight.device.type == "cpu":
                self._buffers[name] = prepack(unpack(weight).to(wanted))
        return self

    def _match_packing(self, state_dict: dict[str, Any], prefix: str, error_msgs: list[str]) -> None:
        """Makes the weights in state_dict prepacked or not, as the module's own are."""
        for name in self.packed_names:
            loaded, own = state_dict.get(prefix + name), getattr(self, name)
            if isinstance(loaded, Tensor) and own is not None and is_packed(loaded) | is_packed(own):
                try:
                    state_dict[prefix + name] = _as_packed_as(own, loaded.detach())
                except ContractError as error:
                    error_msgs.append(f"{prefix}{name}: {error}")
                    state_dict[prefix + name] = own  # which is not missing

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        self._match_packing(state_dict, prefix, error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _as_packed_as(own: Tensor, loaded: Tensor) -> Tensor:
    """The weight `loaded`, prepacked or not as the module's `own` is."""
    if not is_packed(loaded):
        kept = packed_float(own) if loaded.is_floating_point() else None
        loaded = prepack(loaded.to(kept or loaded.dtype))  # cast as load_state_dict casts plain ones
    if not is_packed(own):
        return unpack(loaded)
    if packed_spec(loaded) != packed_spec(own):
        dtype, shape = packed_spec(own)
        raise ContractError(
            f"it is no {dtype} weight of shape {list(shape)}, which this module has "
            "(load it into a module of the mode and sizes that it was saved from)"
        )
    return loaded
