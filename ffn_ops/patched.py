# SPDX-License-Identifier: Apache-2.0
"""What modules that patch() has changed have in common: classes that are made at run time, and when the
operator may stand in for a layer. Used by patch.py, patch_dense.py and patch_experts.py. Torch only.
"""

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ffn_ops import contract
from ffn_ops.activation import FORMULAS
from ffn_ops.packing import FLOATS

_every_module = nn.modules.module


class Row(NamedTuple):
    """One feed-forward block: where it is, its class, what it became or why not, and whether it changed."""

    path: str
    module: str
    outcome: str
    changed: bool


def name_of(module: nn.Module) -> str:
    kind: Any = type(module)
    return kind._key[0].__name__ if isinstance(module, Patched) and "_key" in vars(kind) else kind.__name__


def not_patched(path: str, module: nn.Module, reason: str) -> Row:
    return Row(path, name_of(module), f"not patched: {reason}", False)


class Patched(nn.Module):
    """What a patched module's class has before the class that the module came with."""

    _key: tuple[Any, ...]  # the arguments of patched_class
    _attributes: tuple[str, ...] = ()

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so pickle, and deepcopy with it, cannot find it by name. A state of
        # its own is the class's before patch, or of torch's parametrizations, which refuse.
        state_of = getattr(self, "__getstate__", lambda: dict(vars(self)))
        return _blank, type(self)._key, state_of()


def _blank(*key: Any) -> Any:
    cls = patched_class(*key)
    return cls.__new__(cls)


_CLASSES: dict[tuple[Any, ...], Any] = {}


def patched_class(base: type, role: type[Patched], *attributes: Any) -> Any:
    """The subclass of `base` that is patched as `role`, with values for the role's `_attributes`."""
    key = (base, role, *attributes)
    if key not in _CLASSES:
        names = dict(zip(role._attributes, attributes, strict=True))
        names |= {"_key": key, "__module__": __name__, "__doc__": base.__doc__}
        _CLASSES[key] = type(f"Patched{base.__name__}", (role, base), names)
    return _CLASSES[key]


def watched(*modules: nn.Module) -> bool:
    """Whether somebody looks at, or has replaced, what one of the modules returns."""
    every = _every_module
    if (
        every._global_forward_hooks
        or every._global_forward_pre_hooks
        or every._global_backward_hooks
        or every._global_backward_pre_hooks
    ):
        return True
    for module in modules:
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or "forward" in module.__dict__
        ):
            return True
    return False


def matrix_of(linear: Any) -> Tensor:
    """The weight as [K, N]: nn.Linear has it transposed, transformers' Conv1D as it is."""
    return linear.weight.t() if isinstance(linear, nn.Linear) else linear.weight


def fits(linear: Any, x: Tensor) -> bool:
    """Whether the operator may stand in for `linear` here and now."""
    weight, bias = linear.weight, linear.bias
    return (
        x.dtype in FLOATS
        and x.dtype == weight.dtype
        and x.device == weight.device
        and x.device.type in ("cpu", "meta")
        and 2 <= x.dim() <= 8
        and weight.layout == torch.strided
        and (bias is None or bias.shape == matrix_of(linear).shape[1:])
        and not torch.is_autocast_enabled("cpu")
        and fwAD._current_level < 0  # forward-mode AD sees a constant in the operator
        # and torch.func has no rule for it, but tracing is a transform too
        and (torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is None)
        and not is_traceable_wrapper_subclass(weight)  # quantized, or a DTensor
        and not is_traceable_wrapper_subclass(x)
    )


def is_linear(module: nn.Module) -> bool:
    # A model that has transformers' Conv1D has imported it.
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    forward = getattr(type(module), "forward", None)
    if forward is not nn.Linear.forward and (conv1d is None or forward is not conv1d.forward):
        return False
    return isinstance(module.weight, Tensor) and module.weight.dim() == 2


@functools.cache
def _grid() -> Tensor:
    """Where activations are compared: densely where they bend, and far out."""
    near = torch.linspace(-15, 15, 6001, dtype=torch.float64, device="cpu")
    far = torch.logspace(-6, 6, 301, dtype=torch.float64, device="cpu")
    return torch.cat((near, far, -far))


def form_of(module: nn.Module) -> str | None:
    """Which of the operator's activations `module` computes.

    They may differ by 2**-27 of |x|: an eighth of float32's unit, and more than sqrt(2 / pi) in eight digits
    makes. Any two of the forms are 2**-12 apart somewhere.
    """
    try:
        y = module.forward(_grid().clone())
    except Exception:
        return None
    if not isinstance(y, Tensor) or y.shape != _grid().shape:
        return None
    for name in contract.ACTIVATIONS:
        formula = FORMULAS.get(name)
        if formula and bool(((y - formula.value(_grid())).abs() <= 2**-27 * _grid().abs()).all()):
            return name
    return None


def may_be_activation(module: nn.Module) -> bool:
    passing = (nn.Identity, nn.modules.dropout._DropoutNd)
    owns = [*module.children(), *module.parameters(), *module.buffers()]
    return not (owns or isinstance(module, (*passing, Patched)))


def obstacle_of(names: str, first: Any, last: Any) -> str:
    """Why these two layers cannot be patched, if so."""
    for linear in (first, last):
        weight = linear.weight
        if isinstance(linear, Patched) or watched(linear) or hasattr(linear, "parametrizations"):
            return f"{names} are no plain layers (one has hooks, a parametrization or another partner)"
        if weight.dtype not in FLOATS or type(weight) is not nn.Parameter:
            return (
                f"its weights are {type(weight).__name__} of {weight.dtype}, not float32, float16 or bfloat16"
            )
        if weight.device.type not in ("cpu", "meta"):
            return f"its weights are on {weight.device}, and it would run on the CPU only"
    return ""


@contextmanager
def trial(scope: nn.Module) -> Iterator[None]:
    """In eval mode and without a trace: flags and the state of random numbers are as before."""
    training = [(module, module.training) for module in scope.modules()]
    state = torch.random.get_rng_state()
    for module, _ in training:
        module.training = False
    try:
        yield
    finally:
        for module, flag in training:
            module.training = flag
        torch.random.set_rng_state(state)


def same_result(y: Any, expected: Any) -> bool:
    """Whether two results are each other's, but for roundings: these move y by few eps, anything
    else by about as much as y itself."""
    leaves, of_expected = pytree.tree_leaves(y), pytree.tree_leaves(expected)
    if len(leaves) != len(of_expected):
        return False
    for one, other in zip(leaves, of_expected, strict=True):
        if not isinstance(other, Tensor):
            continue
        if type(one) is not type(other) or one.shape != other.shape or one.dtype != other.dtype:
            return False
        if other.is_meta or not other.is_floating_point():
            continue
        off = (one - other).double().norm()
        if not bool(off <= torch.finfo(other.dtype).eps ** 0.5 * other.double().norm()):
            return False
    return True
