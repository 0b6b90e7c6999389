# SPDX-License-Identifier: Apache-2.0
"""The operator's Python half: its library, fake kernels, autograd and targets; ffn() and npu_ffn().

The schema and the CPU kernel are in csrc/op; what is legal is in contract.py.
"""

import contextlib
import ctypes
import functools
import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ffn_ops import contract
from ffn_ops.contract import ContractError, Spec, spec_of
from ffn_ops.packing import is_packed, packed_spec


def _load() -> ctypes.CDLL:
    path = Path(__file__).with_name("_op.so")
    if not path.exists():
        raise ImportError(
            f"ffn_ops is not built: {path.name} is missing beside the Python files "
            "(run `make build`, or `pip install --no-build-isolation -e .` in the checkout)"
        )
    try:
        torch.ops.load_library(path)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise ImportError(
            f"{path.name} does not load under torch {torch.__version__}: it needs 2.10 or later ({error})"
        ) from error


_library = _load()
_TARGETS = tuple(contract.TARGETS)


def current_target() -> str:
    """The target that this thread's calls are checked for: `target`, else FFN_OPS_TARGET, else "cpu"."""
    index = _library.ffn_ops_target()
    if index < 0:
        raise ContractError(
            f"FFN_OPS_TARGET is '{os.environ.get('FFN_OPS_TARGET')}', but the targets are "
            f"{', '.join(_TARGETS)} (unset it, or name one of them)"
        )
    return _TARGETS[index]


@contextlib.contextmanager
def target(name: str) -> Iterator[None]:
    """Within the block, this thread's calls are legal exactly when target `name` would take them.

    A target ("cpu", "ascend910b", "ascend310p") changes what is legal, never what the CPU computes. Blocks
    nest, and each thread has its own: no block may span an await. Raises ContractError for an unknown name.
    """
    if name not in _TARGETS:
        raise ContractError(
            f"target is '{name}', but it must be one of {', '.join(_TARGETS)} (name one of them)"
        )
    before = _library.ffn_ops_set_target(_TARGETS.index(name))
    try:
        yield
    finally:
        _library.ffn_ops_set_target(before)


def operand_bias(bias: Tensor | None) -> Tensor | None:
    """A model's bias in the dtype that the contract has for it: beside bfloat16 float32, else its own."""
    return bias.float() if bias is not None and bias.dtype == torch.bfloat16 else bias


def npu_target() -> str:
    """The target of this machine's NPU; "ascend910b" where there is none to ask, as while tracing without
    it."""
    index = _library.ffn_ops_npu_target()
    return _TARGETS[index] if index >= 0 else "ascend910b"


def target_of(x: Tensor) -> str:
    """The target that a call with this x is checked for: its NPU, also if it is fake, else the current."""
    return npu_target() if x.device.type == "npu" else current_target()


def holds_values(tensor: Tensor) -> bool:
    """Neither on a device nor fake."""
    return tensor.device.type == "cpu" and not isinstance(tensor, torch._subclasses.FakeTensor)


# The optional tensors of ffn.ffn's schema, in its order; ffn.moe's lacks the first.
_OPTIONAL = tuple(contract.OPERANDS)[3:-4]


def _check(
    x: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    activation: str,
    operands: Mapping[str, Tensor | None],
    inner_precise: int | None,
    output_dtype: torch.dtype | None,
) -> torch.dtype:
    """The dtype of y, after the contract's checks. x's leading sizes may be symbolic: nothing looks at them.

    What a prepacked weight holds cannot be known from a fake one, so such a call is checked when it runs.
    """
    specs = _specs({"x": x, "weight1": weight1, "weight2": weight2, **operands}, output_dtype)
    for name in ("x", "topk_ids", "topk_weights", "out"):
        if name in specs and specs[name].shape:
            dtype, shape = specs[name]
            specs[name] = Spec(dtype, (*(None for _ in shape[:-1]), shape[-1]))
    if is_packed(weight1) or is_packed(weight2):
        return x.dtype if x.is_floating_point() else output_dtype or torch.float16
    return getattr(torch, _plan(tuple(specs.items()), activation, inner_precise, target_of(x)).out.dtype)


def _specs(tensors: Mapping[str, Tensor | None], output_dtype: torch.dtype | None) -> dict[str, Spec]:
    """What the contract sees of a call, the first tensor being x. RuntimeError when they are not on one
    device."""
    specs = {}
    device = next(tensor.device for tensor in tensors.values() if tensor is not None)
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.device != device:
            raise RuntimeError(
                f"{name} is on {tensor.device} and x on {device}, but all tensors of a call must be on one "
                "device (move one of them there)"
            )
        specs[name] = spec_of(name, tensor)
    if output_dtype is not None:
        specs["output_dtype"] = spec_of("output_dtype", output_dtype)
    return specs


def _plan(
    specs: tuple[tuple[str, Spec], ...], activation: str, inner_precise: int | None, target: str
) -> contract.Plan:
    try:
        return contract.resolve(dict(specs), activation, inner_precise=inner_precise, target=target)
    except ContractError as error:
        raise RuntimeError(str(error)) from None


@torch.library.register_fake("ffn::ffn")
def _fake(
    x: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    activation: str,
    *optional: Tensor | None,
    tokens_index_flag: bool = False,
    inner_precise: int | None = None,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    operands = dict(zip(_OPTIONAL, optional, strict=False))
    dtype = _check(x, weight1, weight2, activation, operands, inner_precise, output_dtype)
    return x.new_empty(x.shape, dtype=dtype)


@torch.library.register_fake("ffn::moe")
def _fake_moe(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    activation: str,
    *optional: Tensor | None,
    inner_precise: int | None = None,
    output_dtype: torch.dtype | None = None,
    activate_left: bool = False,
) -> Tensor:
    operands = dict(zip(_OPTIONAL[1:], optional, strict=False))
    operands |= {"topk_ids": topk_ids, "topk_weights": topk_weights}
    dtype = _check(x, weight1, weight2, activation, operands, inner_precise, output_dtype)
    return x.new_empty(x.shape, dtype=dtype)


@torch.library.register_fake("ffn::ffn.out")
def _fake_out(
    x: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    activation: str,
    *optional: Tensor | None,
    tokens_index_flag: bool = False,
    inner_precise: int | None = None,
    output_dtype: torch.dtype | None = None,
    out: Tensor,
) -> None:
    operands = {**dict(zip(_OPTIONAL, optional, strict=False)), "out": out}
    _check(x, weight1, weight2, activation, operands, inner_precise, output_dtype)


NO_GRADIENT = (
    "ffn has no gradient beside integer or prepacked weights (use plain weights of a float mode, or run it "
    "under torch.no_grad())"
)


@torch.library.register_fake("ffn::grouped_mm")
def _fake_grouped_mm(
    x: Tensor, weight: Tensor, expert_tokens: Tensor, bias: Tensor | None = None, *, N: int | None = None
) -> Tensor:
    _specs({"x": x, "weight": weight, "expert_tokens": expert_tokens, "bias": bias}, None)
    if is_packed(weight) and N is None:
        raise RuntimeError(
            "weight is prepacked, but its N cannot be read while tracing (pass N to grouped_mm)"
        )
    return x.new_empty(x.shape[0], weight.shape[-1] if N is None else N)


@torch.library.register_fake("ffn::grouped_outer")
def _fake_grouped_outer(x: Tensor, grad: Tensor, expert_tokens: Tensor) -> Tensor:
    _specs({"x": x, "grad": grad, "expert_tokens": expert_tokens}, None)
    return x.new_empty(expert_tokens.shape[0], x.shape[-1], grad.shape[-1])


def _no_gradient(grad: Tensor) -> None:
    # torch.compile traces this, where raising would refuse the forward pass too. So it is an assertion, of
    # something false that depends on a gradient, for only that belongs to the backward pass.
    never = grad.isnan().any() & grad.isfinite().all()
    torch._assert_async(never, NO_GRADIENT)


def _keep(ctx: Any, inputs: Sequence[Any], keyword_only_inputs: Any, output: Tensor) -> None:
    """All inputs and nothing else: the backward pass computes the first product again."""
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
    ctx.inputs = [None if isinstance(value, Tensor) else value for value in inputs]
    ctx.is_tensor = [isinstance(value, Tensor) for value in inputs]
    ctx.options = dict(keyword_only_inputs)


def _kept(ctx: Any) -> list[Any]:
    saved = iter(ctx.saved_tensors)
    return [next(saved) if tensor else value for value, tensor in zip(ctx.inputs, ctx.is_tensor, strict=True)]


def _differentiable(weight: Tensor) -> bool:
    return weight.is_floating_point() and not is_packed(weight)


def _ffn_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    from ffn_ops.gradient import Block, ffn_gradients

    x, weight1, weight2, activation, expert_tokens, bias1, bias2, *others = _kept(ctx)
    none = (None,) * len(others)
    if not _differentiable(weight1):
        _no_gradient(grad)
        return (None,) * 7 + none
    block = Block(weight1, weight2, bias1, bias2, activation.lower())
    dx, of = ffn_gradients(grad, x, expert_tokens, ctx.options["tokens_index_flag"], block)
    return (dx, of.weight1, of.weight2, None, None, of.bias1, of.bias2, *none)


def _moe_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    from ffn_ops.gradient import Block, moe_gradients

    x, topk_ids, topk_weights, weight1, weight2, activation, bias1, bias2, *others = _kept(ctx)
    none = (None,) * len(others)
    if not _differentiable(weight1):
        _no_gradient(grad)
        return (None,) * 8 + none
    block = Block(weight1, weight2, bias1, bias2, activation.lower(), ctx.options["activate_left"])
    dx, dweights, of = moe_gradients(grad, x, topk_ids, topk_weights, block)
    return (dx, None, dweights, of.weight1, of.weight2, None, of.bias1, of.bias2, *none)


def _keep_grouped(ctx: Any, inputs: Sequence[Any], output: Tensor, keyword_only_inputs: Any = None) -> None:
    ctx.save_for_backward(*inputs)


def _grouped_mm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    from ffn_ops.gradient import sums, weight_gradient

    x, weight, expert_tokens, bias = ctx.saved_tensors
    if not _differentiable(weight):
        _no_gradient(grad)
        return None, None, None, None
    of_x, of_weight, *_ = ctx.needs_input_grad
    return (
        torch.ops.ffn.grouped_mm(grad, weight.transpose(1, 2), expert_tokens) if of_x else None,
        weight_gradient(x, grad, expert_tokens, weight) if of_weight else None,
        None,
        sums(grad, expert_tokens).to(bias.dtype) if bias is not None and bias.requires_grad else None,
    )


def _grouped_outer_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, other, expert_tokens = ctx.saved_tensors
    return (
        torch.ops.ffn.grouped_mm(other, grad.transpose(1, 2), expert_tokens),
        torch.ops.ffn.grouped_mm(x, grad, expert_tokens),
        None,
    )


torch.library.register_autograd("ffn::ffn", _ffn_backward, setup_context=_keep)
torch.library.register_autograd("ffn::moe", _moe_backward, setup_context=_keep)
torch.library.register_autograd("ffn::grouped_mm", _grouped_mm_backward, setup_context=_keep_grouped)
torch.library.register_autograd("ffn::grouped_outer", _grouped_outer_backward, setup_context=_keep_grouped)

# On an NPU ffn.ffn is C++ (csrc/op/ffn_npu.cc), and the others are made of torch_npu's operators.
_on_npu = torch.library.Library("ffn", "IMPL", "PrivateUse1")
_known_plan = functools.lru_cache(maxsize=4096)(_plan)  # to check a call takes longer than to launch it


def broken_ids(topk_ids: Tensor) -> str | None:
    """What is wrong with the values of topk_ids, where the host reads them, as csrc/op/ffn_cpu.cc says it."""
    if not holds_values(topk_ids):
        return None
    negative = topk_ids[topk_ids < 0]
    if negative.numel() == 0:
        return None
    return (
        f"topk_ids holds {int(negative[0])}, but experts are numbered from 0 (an id of E or more is one to "
        "skip)"
    )


def check_moe(activation: str, **tensors: Tensor | None) -> None:
    """Raises what torch.ops.ffn.moe would raise for a call with these tensors, x first, whose work is done by
    other operators.

    While tracing nothing is looked at: the operators' own checks come when the graph runs.
    """
    if torch.compiler.is_compiling():
        return
    specs = _specs(tensors, None)
    for name, tensor in tensors.items():
        if (
            tensor is not None
            and name in ("weight1", "weight2")
            and is_packed(tensor)
            and holds_values(tensor)
        ):
            specs[name] = packed_spec(tensor)
    x, topk_ids = tensors["x"], tensors["topk_ids"]
    assert x is not None and topk_ids is not None
    _known_plan(tuple(specs.items()), activation, None, target_of(x))
    broken = broken_ids(topk_ids)
    if broken:
        raise RuntimeError(broken)


def _moe_npu(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    activation: str,
    *optional: Tensor | None,
    inner_precise: int | None = None,
    output_dtype: torch.dtype | None = None,
    activate_left: bool = False,
) -> Tensor:
    from ffn_ops import npu

    tensors = {
        "x": x, "topk_ids": topk_ids, "topk_weights": topk_weights, "weight1": weight1, "weight2": weight2,
        **dict(zip(_OPTIONAL[1:], optional, strict=False)),
    }  # fmt: skip
    npu.refuse_packed("weight1", weight1)
    npu.refuse_packed("weight2", weight2)
    specs = tuple(_specs(tensors, output_dtype).items())
    plan = _known_plan(specs, activation, inner_precise, npu_target())
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    return npu.moe(plan, given, activate_left, inner_precise, output_dtype)


def _grouped_mm_npu(
    x: Tensor, weight: Tensor, expert_tokens: Tensor, bias: Tensor | None = None, *, N: int | None = None
) -> Tensor:
    from ffn_ops import npu

    return npu.grouped_mm(x, weight, expert_tokens, bias, N)


def _grouped_outer_npu(x: Tensor, grad: Tensor, expert_tokens: Tensor) -> Tensor:
    from ffn_ops import npu

    return npu.grouped_outer(x, grad, expert_tokens)


_on_npu.impl("moe", _moe_npu)
_on_npu.impl("grouped_mm", _grouped_mm_npu)
_on_npu.impl("grouped_outer", _grouped_outer_npu)

# register_autograd refuses operators with an out argument. Like torch's own, this one has no gradient ever.
_autograd = torch.library.Library("ffn", "IMPL", "Autograd")


def _out_below_autograd(*args: Any, out: Tensor, **kwargs: Any) -> None:
    tensors = [value for value in (*args, out) if isinstance(value, Tensor)]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError(
            "ffn with out= has no gradient, but a tensor requires grad "
            "(leave out= away, or run under torch.no_grad())"
        )
    with torch._C._AutoDispatchBelowAutograd():
        torch.ops.ffn.ffn.out(*args, out=out, **kwargs)
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)  # a graph that has saved out must notice


_autograd.impl("ffn.out", _out_below_autograd)


def ffn(
    x: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    activation: str,
    expert_tokens: Tensor | Sequence[int] | None = None,
    bias1: Tensor | None = None,
    bias2: Tensor | None = None,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    deq_scale1: Tensor | None = None,
    deq_scale2: Tensor | None = None,
    antiquant_scale1: Tensor | None = None,
    antiquant_scale2: Tensor | None = None,
    antiquant_offset1: Tensor | None = None,
    antiquant_offset2: Tensor | None = None,
    *,
    tokens_index_flag: bool = False,
    inner_precise: int | None = None,
    output_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`y = act(x·W1 + b1)·W2 + b2`, dense or by expert, in every mode of the contract.

    The same as torch.ops.ffn.ffn, but expert_tokens may be a list, out is returned, and a call that the
    contract refuses raises ContractError with the first rule it breaks (`explain` lists all of them).

    x: [..., K1], 2 to 8 dimensions, M rows in all. weight1: [K1, N1] and weight2: [K2, N2], with a leading E
    when expert_tokens is given; int4 weights are packed in int32 (8 values) or uint8 (2 values), low nibble
    first; on the CPU, weights from `prepack` are fastest. expert_tokens: E row counts, or inclusive end rows
    with tokens_index_flag; their total is M, and expert e owns the rows after those of expert e - 1. GLU
    activations compute left * act(right) of the first product's halves. scale, offset, deq_scale1, deq_scale2
    belong to int8 x, the four antiquant tensors to integer weights beside 16-bit x. inner_precise (fp16
    only): 0 high precision, 1 high performance; by default what the activation has. output_dtype: float16
    (default) or bfloat16 for int8 x. Returns y, in x's shape.

    Dtypes and shapes: README's table of modes, contract.OPERANDS. Source: contract sections a, b and d.
    """
    if not isinstance(x, Tensor) or not isinstance(activation, str):
        raise ContractError(
            f"x is a {type(x).__name__} and activation a {type(activation).__name__}, "
            "but they must be a torch.Tensor and a string (convert them)"
        )
    if expert_tokens is not None and not isinstance(expert_tokens, Tensor):
        expert_tokens = _tokens(expert_tokens, x, tokens_index_flag)
    optional = (expert_tokens, bias1, bias2, scale, offset, deq_scale1, deq_scale2,
                antiquant_scale1, antiquant_scale2, antiquant_offset1, antiquant_offset2)  # fmt: skip
    options: dict[str, Any] = {
        "tokens_index_flag": tokens_index_flag,
        "inner_precise": inner_precise,
        "output_dtype": output_dtype,
    }
    try:
        if out is None:
            return torch.ops.ffn.ffn(x, weight1, weight2, activation, *optional, **options)
        torch.ops.ffn.ffn.out(x, weight1, weight2, activation, *optional, **options, out=out)
        return out
    except RuntimeError:
        from ffn_ops.explain import explain  # only on the way to an error

        explanation = explain(x, weight1, weight2, activation, *optional, **options, out=out)
        if explanation.ok:
            raise
        raise ContractError(explanation.violations[0].text) from None


def npu_ffn(
    x: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    activation: str,
    *,
    expert_tokens: Sequence[int] | None = None,
    expert_tokens_index: Sequence[int] | None = None,
    bias1: Tensor | None = None,
    bias2: Tensor | None = None,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    deq_scale1: Tensor | None = None,
    deq_scale2: Tensor | None = None,
    antiquant_scale1: Tensor | None = None,
    antiquant_scale2: Tensor | None = None,
    antiquant_offset1: Tensor | None = None,
    antiquant_offset2: Tensor | None = None,
    inner_precise: int | None = None,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """torch_npu.npu_ffn, the same signature, defaults and meaning, wherever the operator runs.

    As there: the two token lists are host lists and exclude each other, inner_precise=None is 0, and
    output_dtype counts only beside deq_scale1. Raises ContractError. Source: contract section h.
    """
    counts, ends = (None if t is None or len(t) == 0 else t for t in (expert_tokens, expert_tokens_index))
    if counts is not None and ends is not None:
        raise ContractError(
            "expert_tokens and expert_tokens_index are both given, but they exclude each other "
            "(pass counts, or end rows)"
        )
    return ffn(
        x, weight1, weight2, activation, ends if counts is None else counts, bias1, bias2, scale,
        offset, deq_scale1, deq_scale2, antiquant_scale1, antiquant_scale2,
        antiquant_offset1, antiquant_offset2, tokens_index_flag=ends is not None,
        inner_precise=0 if inner_precise is None else inner_precise,
        output_dtype=output_dtype if deq_scale1 is not None else None,
    )  # fmt: skip


def _tokens(values: Sequence[int], x: Tensor, tokens_index_flag: bool) -> Tensor:
    """The list as a tensor beside x. On the host its values can be checked, which a device's cannot."""
    try:
        numbers = [operator.index(value) for value in values]
        tokens = torch.tensor(numbers, dtype=torch.int64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ContractError(
            f"expert_tokens is {values!r}, but it must hold int64 numbers "
            "(pass a list of ints, or an int64 tensor)"
        ) from error
    M = contract.row_count(spec_of("x", x))
    if x.device.type == "npu" and numbers and M is not None and not torch.compiler.is_compiling():
        contract.row_ends(numbers, M, tokens_index_flag)
    return tokens.to(x.device)
