# SPDX-License-Identifier: Apache-2.0
"""ffn.moe, ffn.grouped_mm and ffn.grouped_outer on an NPU, made of torch_npu's public operators and ffn.ffn.

op.py checks a call and registers these; torch_npu is imported where it is called, since only NPU tensors come
here. ffn.ffn's own NPU kernel is csrc/op/ffn_npu.cc. No value of a tensor is read on the host, so that
nothing waits for the device. Rows are in the vendor's row order: choice j of token i is i * top_k + j.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ffn_ops.activation import activate
from ffn_ops.contract import Plan
from ffn_ops.packing import FLOATS, is_packed

_ROUTED = ("x", "topk_ids", "topk_weights")
_GROUPS = 1024  # contract.py's rule E-limit-grouped


def moe(
    plan: Plan,
    tensors: Mapping[str, Tensor],
    activate_left: bool,
    inner_precise: int | None,
    output_dtype: torch.dtype | None,
) -> Tensor:
    """A call that the contract has taken: routing, the experts by the plan's route, and the weighted sum.

    Ids of E or more are skipped; negative ones cannot be found without reading them, and mean nothing. Gate
    weights are rounded to y's dtype, in which each expert's row arrives at the sum.
    """
    import torch_npu

    x, ids, weights = (tensors[name] for name in _ROUTED)
    y_dtype = getattr(torch, plan.out.dtype)
    E, K1, top_k = (plan.dims[name] or 0 for name in ("E", "K1", "top_k"))
    slots = ids.numel()
    if slots == 0 or E == 0 or K1 == 0:
        return x.new_zeros(x.shape, dtype=y_dtype)

    # E stands for every id beyond, also for those that int32 would wrap. For the vendor it is an expert like
    # others, of which the first E are active. The range is never left out: torch_npu keeps the first call's.
    experts = ids.reshape(-1, top_k).clamp(max=E).to(torch.int32)
    rows, places, counts, _ = torch_npu.npu_moe_init_routing_v2(
        x.reshape(-1, K1).contiguous(), experts, expert_num=E + 1, active_expert_range=[0, E],
        active_num=slots, expert_tokens_num_flag=True, expert_tokens_num_type=1, row_idx_type=0,
    )  # fmt: skip
    operands = {name: tensor for name, tensor in tensors.items() if name not in _ROUTED}
    if plan.route == "fused":
        y = torch.ops.ffn.ffn(
            rows, activation=plan.activation, expert_tokens=counts, **operands,
            inner_precise=inner_precise, output_dtype=output_dtype,
        )  # fmt: skip
    else:
        h = _product(rows, counts, operands, "1")
        y = _product(_activate(h, plan.activation, activate_left), counts, operands, "2")
    # The places of skipped ids are -1, which is a row of zeros in mode 3 (drop/pad, row order) and undefined
    # in mode 2; all rows as those of one expert are what mode 3 takes.
    return torch_npu.npu_moe_finalize_routing(
        y.unsqueeze(0), None, None, None, weights.reshape(-1, top_k).to(y_dtype), places, None, 3
    ).reshape(x.shape)


def _activate(h: Tensor, activation: str, activate_left: bool) -> Tensor:
    """As activation.activate, by one operator where torch_npu has it."""
    import torch_npu

    if activation == "swiglu" and activate_left:
        return torch_npu.npu_swiglu(h)
    if activation == "fastgelu":
        return torch_npu.npu_fast_gelu(h)
    return activate(h, activation, activate_left)


def _product(x: Tensor, counts: Tensor, operands: Mapping[str, Tensor], which: str) -> Tensor:
    """One of the block's two products by expert, with what belongs to it."""
    parameters = {
        name: operands[name + which]
        for name in ("bias", "antiquant_scale", "antiquant_offset")
        if name + which in operands
    }
    return _grouped_matmul(x, _plain(operands["weight" + which]), counts, parameters)


def _plain(weight: Tensor) -> Tensor:
    """[E, K, N] as npu_grouped_matmul reads it: rows or columns dense, and int4 by eight in an int32."""
    if weight.dtype == torch.uint8:
        weight = weight.contiguous()
        aligned = weight if weight.storage_offset() % 4 == 0 else weight.clone()
        return aligned.view(torch.int32)
    if weight.dtype != torch.int32 and weight.mT.is_contiguous():
        return weight
    return weight.contiguous()


def _grouped_matmul(
    x: Tensor, weight: Tensor, counts: Tensor, parameters: Mapping[str, Tensor], group_type: int = 0
) -> Tensor:
    import torch_npu

    # The count of a single group is not taken, but its end, which is the same number.
    (y,) = torch_npu.npu_grouped_matmul(
        [x], [weight], group_list=counts, group_list_type=int(len(counts) > 1), group_type=group_type,
        split_item=3, **{name: [tensor.contiguous()] for name, tensor in parameters.items()},
    )  # fmt: skip
    return y


def grouped_mm(
    x: Tensor, weight: Tensor, expert_tokens: Tensor, bias: Tensor | None, wanted_N: int | None = None
) -> Tensor:
    """ffn.grouped_mm: each expert's rows of x [M, K] times its weight [E, K, N], plus its bias; zeros in rows
    that expert_tokens [E] leaves over."""
    refuse_packed("weight", weight)
    _check_operands({"x": x, "weight": weight, "expert_tokens": expert_tokens, "bias": bias})
    M, K = x.shape
    if weight.dim() != 3 or weight.shape[1] != K:
        raise RuntimeError(
            f"weight has shape {list(weight.shape)}, but it must be [E, K, N] with x's K = {K} (nn.Linear's "
            "goes in transposed)"
        )
    E, _, N = weight.shape
    if wanted_N not in (None, N):
        raise RuntimeError(f"N is {wanted_N}, but weight has N = {N} columns (leave it out, or correct it)")
    if expert_tokens.shape != (E,):
        raise RuntimeError(
            f"expert_tokens has shape {list(expert_tokens.shape)}, but it must be [E] = [{E}] (one count for "
            "each expert)"
        )
    if bias is not None and bias.shape != (E, N):
        raise RuntimeError(
            f"bias has shape {list(bias.shape)}, but it must be [E, N] = [{E}, {N}] (one row for each expert)"
        )
    if M * N == 0 or E == 0 or (K == 0 and bias is None):
        return x.new_zeros(M, N)
    parameters = {}
    if bias is not None:  # beside float16 the vendor takes float16, else float32
        parameters["bias"] = bias.to(x.dtype if x.dtype == torch.float16 else torch.float32)
    y = _grouped_matmul(x.contiguous(), _plain(weight), expert_tokens, parameters)
    left_over = torch.arange(M, device=x.device) >= expert_tokens.sum()
    return y.masked_fill_(left_over.unsqueeze(1), 0)  # the operator has not written there


def grouped_outer(x: Tensor, grad: Tensor, expert_tokens: Tensor) -> Tensor:
    """ffn.grouped_outer: of each expert's rows, x [M, K] transposed times grad [M, N]: [E, K, N]."""
    _check_operands({"x": x, "grad": grad, "expert_tokens": expert_tokens})
    M, K = x.shape
    if grad.dim() != 2 or grad.shape[0] != M:
        raise RuntimeError(
            f"grad has shape {list(grad.shape)}, but it must be [M, N] with x's M = {M} (rows belong "
            "together)"
        )
    if expert_tokens.dim() != 1:
        raise RuntimeError(
            f"expert_tokens has shape {list(expert_tokens.shape)}, but it must be [E] (one count for each "
            "expert)"
        )
    E, N = len(expert_tokens), grad.shape[1]
    if M * K * N * E == 0:
        return x.new_zeros(E, K, N)
    return _grouped_matmul(x.contiguous().t(), grad.contiguous(), expert_tokens, {}, group_type=2)


def refuse_packed(name: str, weight: Tensor) -> None:
    if is_packed(weight):
        raise RuntimeError(
            f"{name} is a row of uint8, as prepacked weights are, but those are for the CPU's kernels "
            "(unpack it there with ffn_ops.unpack, and move the weight)"
        )


def _check_operands(tensors: Mapping[str, Tensor | None]) -> None:
    """Devices, dtypes and x of a grouped product, in the sentences of csrc/op/grouped_cpu.cc."""
    x, expert_tokens = tensors["x"], tensors["expert_tokens"]
    assert x is not None and expert_tokens is not None
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    name_of = {tensor.dtype: str(tensor.dtype).removeprefix("torch.") for tensor in given.values()}
    for name, tensor in given.items():
        if tensor.device != x.device:
            raise RuntimeError(
                f"{name} is on {tensor.device} and x on {x.device}, but all tensors of a call must be on one "
                "device (move one of them there)"
            )
    if x.dtype not in FLOATS:
        raise RuntimeError(f"x is {name_of[x.dtype]}, but it must be float32, float16 or bfloat16 (cast it)")
    if x.dim() != 2:
        raise RuntimeError(f"x has shape {list(x.shape)}, but it must be [M, K] (flatten the leading sizes)")
    if expert_tokens.dtype != torch.int64:
        raise RuntimeError(f"expert_tokens is {name_of[expert_tokens.dtype]}, but it must be int64 (cast it)")
    for name in given:
        if name in ("x", "expert_tokens"):
            continue
        dtype = given[name].dtype
        or_float32 = name == "bias" and x.dtype != torch.float32
        if dtype != x.dtype and not (or_float32 and dtype == torch.float32):
            raise RuntimeError(
                f"{name} is {name_of[dtype]}, but beside {name_of[x.dtype]} x it must be "
                f"{name_of[x.dtype]}{' or float32' if or_float32 else ''} (cast it)"
            )
    if expert_tokens.dim() == 1 and len(expert_tokens) > _GROUPS:
        raise RuntimeError(
            f"there are {len(expert_tokens)} experts, but npu_grouped_matmul takes at most {_GROUPS} "
            f"(split them over calls of {_GROUPS})"
        )
