# SPDX-License-Identifier: Apache-2.0
"""Dense feed-forward blocks through torch.ops.ffn.ffn, for patch.py.

The first layer of a block hands on a `_Deferred` in place of its output, the activation marks it, and the
second layer makes one call of the operator out of it. Whoever else touches a `_Deferred` gets the tensor that
it stands for. So what is fused is what a block does when it runs, and a block that does anything else
computes what it always did. Torch only; what experts need too is in patched.py, the operator in op.py.
"""

import functools
import gc
import inspect
import re
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ffn_ops.op import operand_bias
from ffn_ops.patched import (
    Patched,
    Row,
    fits,
    form_of,
    is_linear,
    matrix_of,
    may_be_activation,
    name_of,
    not_patched,
    obstacle_of,
    patched_class,
    same_result,
    trial,
    watched,
)


class _Deferred:
    """The output of a first layer, and after the activation of that, which nobody has computed yet.

    It acts as the tensor in everything, and becomes one when it must. Only an activation that the operator
    has, dropout outside training, and the second layer know better.
    """

    # While a block is tried: who asked for the tensor, or "" for the operator, and after which activation.
    asked: list[tuple[str, str | None]] | None = None

    # While a block is tried: all that it made.
    made: "list[weakref.ref[_Deferred]] | None" = None

    def __init__(self, first: Any, x: Tensor):
        if self.made is not None:
            self.made.append(weakref.ref(self))
        self.first, self.x = first, x
        self.form: str | None = None
        self.activate: Any = None
        self.tensor: Tensor | None = None
        self.grad = torch.is_grad_enabled()
        self.version = _version(x)

    def value(self, asker: str) -> Tensor:
        if self.asked is not None:
            self.asked.append((asker, self.form))
        if self.tensor is None:
            self.check_x()
            # As it was when the first layer was called; _fits saw no autocast there.
            with torch.set_grad_enabled(self.grad), torch.autocast("cpu", enabled=False):
                h = self.first.layer(self.x)
                self.tensor = h if self.activate is None else self.activate(h)
        return self.tensor

    def check_x(self) -> None:
        now = _version(self.x)  # None where nothing counts, as on one side of a part that is compiled alone
        if self.version is not None and now is not None and self.version != now:
            raise RuntimeError(
                "x of a patched feed-forward block was changed in place after the first layer, but both "
                "layers are computed at the second (change a copy, or ffn_ops.unpatch the model)"
            )

    def takes_activation(self) -> bool:
        return self.form is None and self.tensor is None and self.grad == torch.is_grad_enabled()

    def activated(self, form: str, activate: Any, inplace: bool) -> "_Deferred":
        h = self if inplace else type(self)(self.first, self.x)
        h.form, h.activate, h.grad, h.version = form, activate, self.grad, self.version
        return h

    def through(self, last: Any) -> Tensor | None:
        """What `last` makes of it, by the operator; None when that must not be."""
        first, x = self.first, self.x
        if (
            self.form is None
            or self.tensor is not None
            or last.training
            or self.grad != torch.is_grad_enabled()
            or not (fits(first, x) and fits(last, x))
        ):
            return None
        weight1, weight2 = matrix_of(first), matrix_of(last)
        if (x.shape[-1], *weight1.shape[::-1]) != (weight1.shape[0], *weight2.shape):
            return None  # somebody has given it another weight
        self.check_x()
        if self.asked is not None:
            self.asked.append(("", self.form))
        return torch.ops.ffn.ffn(
            x, weight1, weight2, self.form, bias1=operand_bias(first.bias), bias2=operand_bias(last.bias)
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    @property
    def device(self) -> torch.device:
        return self.x.device

    def __getattr__(self, name: str) -> Any:
        return getattr(self.value(name), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], _Deferred) and args[0].tensor is None:
            h = args[0]
            if func is F.dropout and kwargs.get("training") is False:
                return h
            form = None
            if func is F.relu or func is torch.relu:
                form = "relu"
            elif func is F.silu:
                form = "silu"
            elif func is F.gelu:
                form = "gelu" if kwargs.get("approximate") == "tanh" else "gelu_erf"
            if form and h.takes_activation():
                return h.activated(form, functools.partial(func, **kwargs), kwargs.get("inplace", False))
        name = getattr(func, "__name__", "an operator")
        args, kwargs = pytree.tree_map_only(_Deferred, lambda h: h.value(name), (args, kwargs))
        return func(*args, **kwargs)


def _operator(name: str) -> Any:
    return lambda self, *args: getattr(self.value(name.strip("_")), name)(*args)


# Python looks operators up in the class, past __getattr__. What makes a class a class is not among them.
_ITS_OWN = {
    f"__{name}__" for name in ("class", "new", "hash", "torch_dispatch", "init_subclass", "subclasshook")
}
for _name_of in set(dir(Tensor)) - set(vars(_Deferred)) - _ITS_OWN:
    _method = getattr(Tensor, _name_of)
    if (
        re.fullmatch(r"__\w+__", _name_of)
        and callable(_method)
        and _method != getattr(object, _name_of, None)
    ):
        setattr(_Deferred, _name_of, _operator(_name_of))


def _version(x: Tensor) -> int | None:
    return None if torch.compiler.is_compiling() or x.is_inference() else x._version


class First(Patched):
    """The first layer of a block."""

    _deferred = _Deferred

    def layer(self, x: Tensor) -> Tensor:
        return super().forward(x)

    def forward(self, x: Tensor) -> Any:
        if self.training or watched(self) or not (isinstance(x, Tensor) and fits(self, x)):
            return self.layer(x)
        # In inference mode nothing counts who writes to x before the second layer reads it, so that has a
        # copy, which costs little beside two products.
        uncounted = not torch.compiler.is_compiling() and x.is_inference()
        return self._deferred(self, x.clone() if uncounted else x)


class _Marked(Patched):
    """A module on the way of a _Deferred, which none of its hooks shall see."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], _Deferred) and watched(self):
            args = (args[0].value(f"a hook of {name_of(self)}"), *args[1:])
        return super().__call__(*args, **kwargs)


class _Activation(_Marked):
    """The activation of a block."""

    _attributes = ("_form",)
    _form: str

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name not in ("training", "forward") and not name.startswith("_"):
            self.__class__ = self._key[0]  # what it computes may have changed, and it is no longer known

    def forward(self, x: Any) -> Any:
        if not isinstance(x, _Deferred):
            return super().forward(x)
        if not x.takes_activation():
            return super().forward(x.value(f"another {name_of(self)}"))
        return x.activated(self._form, super().forward, getattr(self, "inplace", False))


class _Last(_Marked):
    """The second layer of a block."""

    def forward(self, x: Any) -> Tensor:
        if not isinstance(x, _Deferred):
            return super().forward(x)
        y = x.through(self)
        return super().forward(x.value(f"another {name_of(self)}")) if y is None else y


class _Neighbour(_Marked):
    """One of two modules that share a block, as BERT's do."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        y = super().forward(*args, **kwargs)
        return y.value(f"a hook of {name_of(self)}") if isinstance(y, _Deferred) and watched(self) else y


# --- Finding blocks ---


class _Block(NamedTuple):
    """Two layers that may belong together, and the smallest module that runs them.

    neighbours: the modules between scope and layers, if these are in two. in_order: the layers were made in
    the order of their use, as most are.
    """

    scope: nn.Module
    names: str
    first: Any
    last: Any
    neighbours: tuple[nn.Module, ...] = ()
    in_order: bool = True


def _blocks(model: nn.Module, path: str, owner: nn.Module) -> Iterator[_Block]:
    """[K -> N -> K] pairs that begin in `owner`: within it, or else in its parent and that one's children."""
    own = [(name, child) for name, child in owner.named_children() if is_linear(child)]
    parent_path, _, name = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    owners = {
        linear: child for child in parent.children() if child is not owner for linear in child.children()
    }
    beside = [(n, child) for n, child in parent.named_children() if is_linear(child)]
    for n, child in parent.named_children():
        linears = [(f"{n}.{part}", linear) for part, linear in child.named_children() if is_linear(linear)]
        beside += linears if child is not owner else []

    def partners(first: nn.Module, others: Any) -> Any:
        return [
            (n, last)
            for n, last in others
            if last is not first and matrix_of(last).t().shape == matrix_of(first).shape
        ]

    for i, (first_name, first) in enumerate(own):
        after, before = partners(first, own[i:]), partners(first, own[:i])
        for last_name, last in after + before:
            in_order = (last_name, last) in after
            yield _Block(owner, f"{first_name} and {last_name}", first, last, in_order=in_order)
        for last_name, last in partners(first, beside) if path and not after + before else ():
            neighbours = (owner, owners[last]) if last in owners else (owner,)
            yield _Block(parent, f"{name}.{first_name} and {last_name}", first, last, neighbours)


def patch_dense(model: nn.Module, path: str, owner: nn.Module) -> Iterator[Row]:
    children = list(owner.children())
    if any(isinstance(child, First) for child in children):
        yield Row(path, name_of(owner), "already patched", False)
        return
    acts = {child: form_of(child) for child in children if may_be_activation(child)}
    # Without an activation in sight, as where it is a function: attention is full of [K -> K -> K].
    blocks = [
        block for block in _blocks(model, path, owner) if acts or len(set(matrix_of(block.first).shape)) == 2
    ]
    if not blocks:
        return
    for act, form in acts.items():
        if form and not watched(act):
            act.__class__ = patched_class(type(act), _Activation, form)
    used: set[nn.Module] = set()
    reasons = []
    for block in blocks:
        if block.first in used or block.last in used:
            continue
        obstacle = obstacle_of(block.names, block.first, block.last)
        form, why = (None, obstacle) if obstacle else _try(block, list(filter(None, acts.values())))
        if form:
            used |= {block.first, block.last}
            for module in block.neighbours:
                if not isinstance(module, Patched):
                    module.__class__ = patched_class(type(module), _Neighbour)
            yield Row(path, name_of(owner), f"ffn, {form}: {block.names}{why}", True)
        elif why:
            reasons.append(why)
    if not used:
        for act in acts:
            if isinstance(act, _Activation):
                act.__class__ = act._key[0]
        unknown = [name_of(act) for act, form in acts.items() if not form]
        if unknown:
            reasons = [f"the operator has no activation that computes what {', '.join(unknown)} does"]
        if reasons:
            yield not_patched(path, owner, reasons[0])


def _try(block: _Block, forms: list[str]) -> tuple[str | None, str]:
    """Patches both layers if the block is seen to fuse them: the activation and a remark; else None, why not.

    A block that does not run alone is patched when it has one of the operator's activations, `forms`: if it
    does anything else with it, it computes what it did before.
    """
    first, last = block.first, block.last
    with trial(block.scope):
        inputs, expected, why = _inputs(block)
    if inputs is None and not (forms and block.in_order):
        return None, ""
    first.__class__ = patched_class(type(first), First)
    last.__class__ = patched_class(type(last), _Last)
    if inputs is None:
        return forms[0], f" (not tried: alone it raises {why})"
    asked: list[tuple[str, str | None]] = []
    made: list[weakref.ref[_Deferred]] = []
    first._deferred = type("_Tried", (_Deferred,), {"asked": asked, "made": made})
    try:
        with trial(block.scope):
            y = block.scope.forward(*inputs)
            if not same_result(y, expected):
                asked.append(("code that takes no stand-in for a tensor", None))
            del y
            gc.collect()
            if any(alive() is not None for alive in made):
                asked.append(("something that outlives the block", None))
    except Exception as error:
        asked.append((f"code that raises {type(error).__name__} ({error})", None))
    finally:
        del first._deferred
    others = [ask for ask in asked if ask[0]]
    if asked and not others:
        return asked[0][1], ""
    first.__class__, last.__class__ = first._key[0], last._key[0]
    if not asked:
        return None, f"{block.names} do not meet when it runs"
    asker, form = others[0]
    gate = " (a gate has two weights, the operator one that holds both)" if form and asker == "mul" else ""
    return (
        None,
        f"what {block.names.split()[0]} gives{' the activation' if form else ''} goes into {asker}{gate}",
    )


def _inputs(block: _Block) -> tuple[tuple[Any, ...] | None, Any, str]:
    """Arguments that the block runs on, made up from the width of its first layer, and what it gives for
    them; or None twice, and why not."""
    weight = matrix_of(block.first)
    parameters = inspect.signature(block.scope.forward).parameters.values()
    needed = [
        p
        for p in parameters
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty
    ]
    why = ""
    for leading in ((1, 3), (3,)):
        shape = (*leading, weight.shape[0])
        x = torch.linspace(-1, 1, 3 * weight.shape[0], device=weight.device).to(weight.dtype).reshape(shape)
        for rest in (None, x):
            inputs = (x, *(rest for _ in needed[1:]))
            try:
                return inputs, block.scope.forward(*inputs), ""
            except Exception as error:
                why = why or f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None, None, why
