# SPDX-License-Identifier: Apache-2.0
"""patch() and unpatch(): the feed-forward blocks of a finished model through torch.ops.ffn, in place.

A patched module is the same object with another class: parameters, names and places in the model stay. The
first layer of a block hands on a `_Deferred` in place of its output, the activation marks it, and the second
layer makes one call of the operator out of it. Whoever else touches a `_Deferred` gets the tensor that it
stands for. So what is fused is what a block does when it runs, and a block that does anything else computes
what it always did. The experts that transformers has no hook for are at the end. Torch only; the operators
are in op.py.
"""

import functools
import inspect
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ffn_ops import contract
from ffn_ops.activation import FORMULAS
from ffn_ops.contract import ContractError
from ffn_ops.op import operand_bias

_DTYPES = tuple(getattr(torch, mode.x) for mode in contract.MODES if mode.name in contract.FLOAT_MODES)


class Row(NamedTuple):
    """One feed-forward block: where it is, its class, what it became or why not, and whether it changed."""

    path: str
    module: str
    outcome: str
    changed: bool


class Report(list[Row]):
    """What `patch` or `unpatch` did, block by block; printed, blocks that differ in a number are one line."""

    @property
    def changed(self) -> int:
        return sum(row.changed for row in self)

    def __str__(self) -> str:
        counts: dict[tuple[str, str, str], int] = {}
        for row in self:
            line = (re.sub(r"\b\d+\b", "*", row.path) or "(the model)", row.module, row.outcome)
            counts[line] = counts.get(line, 0) + 1
        text = [f"{self.changed} of {len(self)} feed-forward blocks changed"]
        for (path, module, outcome), count in counts.items():
            text.append(f"  {count:>3} x {path} ({module}): {outcome}")
        return "\n".join(text)

    __repr__ = __str__


@torch.inference_mode(False)
@torch.no_grad()
def patch(model: nn.Module) -> Report:
    """Makes the feed-forward blocks of `model` run as torch.ops.ffn.ffn and torch.ops.ffn.moe, in place.

    A block is two linear layers [K -> N -> K] with an activation between, in one module (ViT, T5, GPT-2), in
    two neighbours (BERT) or amid other code (OPT); and the experts of Switch and NLLB-MoE. Each is run on
    made-up numbers, and patched if it is seen to compute just that. Parameters stay the same objects under
    the same names, so state_dict, save_pretrained, optimizers, .to(), deepcopy and pickle work as before.

    A block computes as before while it trains, under autocast, off the CPU, in other dtypes than float32,
    float16 and bfloat16, and when its layers have hooks; experts also where gradients are recorded, and under
    torch.compile. Returns a Report; `unpatch` undoes it.
    """
    _check_model(model)
    report = Report()
    within: set[nn.Module] = set()  # modules of experts, which are patched as a whole
    for path, module in list(model.named_modules()):
        if module in within:
            continue
        if isinstance(module, _Experts):
            report.append(Row(path, _name(module), "already patched", False))
        elif type(module).__name__ in _ROUTING:
            report.append(_patch_experts(path, module))
        elif hasattr(module, "_apply_gate"):  # set by transformers' @use_experts_implementation
            fix = 'import ffn_ops.hf and call model.set_experts_implementation("ffn_ops")'
            report.append(_not_patched(path, module, f"transformers has a hook for its experts ({fix})"))
        else:
            report.extend(_patch_dense(model, path, module))
        if isinstance(module, _Experts):
            within.update(module.modules())
    return report


def unpatch(model: nn.Module) -> Report:
    """Gives every module that `patch` changed its own class back. Returns a Report."""
    _check_model(model)
    report = Report()
    for path, module in list(model.named_modules()):
        if isinstance(module, _Experts) or any(isinstance(child, _First) for child in module.children()):
            report.append(Row(path, _name(module), "as it was", True))
    for path, module in list(model.named_modules()):
        if isinstance(module, _Patched):
            if "_key" in vars(type(module)):
                module.__class__ = module._key[0]
            else:  # a class derived from ours
                reason = "still patched: its class was changed after patch (undo that, then unpatch again)"
                report.append(Row(path, type(module).__name__, reason, False))
    return report


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ContractError(
            f"model is a {type(model).__name__}, but it must be a torch.nn.Module (pass the model itself)"
        )


def _name(module: nn.Module) -> str:
    kind: Any = type(module)
    return kind._key[0].__name__ if isinstance(module, _Patched) and "_key" in vars(kind) else kind.__name__


def _not_patched(path: str, module: nn.Module, reason: str) -> Row:
    return Row(path, _name(module), f"not patched: {reason}", False)


# --- Classes that patched modules have ---


class _Patched(nn.Module):
    """What a patched module's class has before the class that the module came with."""

    _key: tuple[Any, ...]  # the arguments of _class
    _attributes: tuple[str, ...] = ()

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so pickle, and deepcopy with it, cannot find it by name.
        return _blank, type(self)._key, dict(vars(self))


def _blank(*key: Any) -> Any:
    cls = _class(*key)
    return cls.__new__(cls)


_CLASSES: dict[tuple[Any, ...], Any] = {}


def _class(base: type, role: type[_Patched], *attributes: Any) -> Any:
    """The subclass of `base` that is patched as `role`, with values for the role's `_attributes`."""
    key = (base, role, *attributes)
    if key not in _CLASSES:
        names = dict(zip(role._attributes, attributes, strict=True))
        names |= {"_key": key, "__module__": __name__, "__doc__": base.__doc__}
        _CLASSES[key] = type(f"Patched{base.__name__}", (role, base), names)
    return _CLASSES[key]


class _Deferred:
    """The output of a first layer, and after the activation of that, which nobody has computed yet.

    It acts as the tensor in everything, and becomes one when it must. Only an activation that the operator
    has, dropout outside training, and the second layer know better.
    """

    # While a block is tried: who asked for the tensor, or "" for the operator, and after which activation.
    asked: list[tuple[str, str | None]] | None = None

    def __init__(self, first: Any, x: Tensor):
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
            with torch.set_grad_enabled(self.grad):
                h = self.first.layer(self.x)
                self.tensor = h if self.activate is None else self.activate(h)
        return self.tensor

    def check_x(self) -> None:
        if self.version != _version(self.x):
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
            or not (_fits(first, x) and _fits(last, x))
        ):
            return None
        weight1, weight2 = _matrix(first), _matrix(last)
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
    # Where there is none, it rests on the trial: a block that changes x on its way raises there.
    return None if torch.compiler.is_compiling() or x.is_inference() else x._version


class _First(_Patched):
    """The first layer of a block."""

    _deferred = _Deferred

    def layer(self, x: Tensor) -> Tensor:
        return super().forward(x)

    def forward(self, x: Tensor) -> Any:
        if self.training or _watched(self) or not (isinstance(x, Tensor) and _fits(self, x)):
            return self.layer(x)
        return self._deferred(self, x)


class _Marked(_Patched):
    """A module on the way of a _Deferred, which none of its hooks shall see."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], _Deferred) and _watched(self):
            args = (args[0].value(f"a hook of {_name(self)}"), *args[1:])
        return super().__call__(*args, **kwargs)


class _Activation(_Marked):
    """The activation of a block."""

    _attributes = ("_form",)
    _form: str

    def forward(self, x: Any) -> Any:
        if not isinstance(x, _Deferred):
            return super().forward(x)
        if not x.takes_activation():
            return super().forward(x.value(f"another {_name(self)}"))
        return x.activated(self._form, super().forward, getattr(self, "inplace", False))


class _Last(_Marked):
    """The second layer of a block."""

    def forward(self, x: Any) -> Tensor:
        if not isinstance(x, _Deferred):
            return super().forward(x)
        y = x.through(self)
        return super().forward(x.value(f"another {_name(self)}")) if y is None else y


class _Neighbour(_Marked):
    """One of two modules that share a block, as BERT's do."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        y = super().forward(*args, **kwargs)
        return y.value(f"a hook of {_name(self)}") if isinstance(y, _Deferred) and _watched(self) else y


def _watched(module: nn.Module) -> bool:
    """Whether somebody looks at, or has replaced, what `module` returns."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
    )


def _matrix(linear: Any) -> Tensor:
    """The weight as [K, N]: nn.Linear has it transposed, transformers' Conv1D as it is."""
    return linear.weight.t() if isinstance(linear, nn.Linear) else linear.weight


def _fits(linear: Any, x: Tensor) -> bool:
    """Whether the operator may stand in for `linear` here and now."""
    weight = linear.weight
    return (
        x.dtype in _DTYPES
        and x.dtype == weight.dtype
        and x.device == weight.device
        and x.device.type in ("cpu", "meta")
        and 2 <= x.dim() <= 8
        and not torch.is_autocast_enabled("cpu")
        and not is_traceable_wrapper_subclass(weight)  # quantized, or a DTensor
        and not is_traceable_wrapper_subclass(x)
    )


# --- Finding blocks ---


def _is_linear(module: nn.Module) -> bool:
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


def _form(module: nn.Module) -> str | None:
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
    own = [(name, child) for name, child in owner.named_children() if _is_linear(child)]
    parent_path, _, name = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    owners = {
        linear: child for child in parent.children() if child is not owner for linear in child.children()
    }
    beside = [(n, child) for n, child in parent.named_children() if _is_linear(child)]
    for n, child in parent.named_children():
        linears = [(f"{n}.{part}", linear) for part, linear in child.named_children() if _is_linear(linear)]
        beside += linears if child is not owner else []

    def partners(first: nn.Module, others: Any) -> Any:
        return [
            (n, last)
            for n, last in others
            if last is not first and _matrix(last).t().shape == _matrix(first).shape
        ]

    for i, (first_name, first) in enumerate(own):
        after, before = partners(first, own[i:]), partners(first, own[:i])
        for last_name, last in after + before:
            in_order = (last_name, last) in after
            yield _Block(owner, f"{first_name} and {last_name}", first, last, in_order=in_order)
        for last_name, last in partners(first, beside) if path and not after + before else ():
            neighbours = (owner, owners[last]) if last in owners else (owner,)
            yield _Block(parent, f"{name}.{first_name} and {last_name}", first, last, neighbours)


def _patch_dense(model: nn.Module, path: str, owner: nn.Module) -> Iterator[Row]:
    children = list(owner.children())
    if any(isinstance(child, _First) for child in children):
        yield Row(path, _name(owner), "already patched", False)
        return
    acts = {child: _form(child) for child in children if _may_be_activation(child)}
    # Without an activation in sight, as where it is a function: attention is full of [K -> K -> K].
    blocks = [
        block for block in _blocks(model, path, owner) if acts or len(set(_matrix(block.first).shape)) == 2
    ]
    if not blocks:
        return
    for act, form in acts.items():
        if form and not _watched(act):
            act.__class__ = _class(type(act), _Activation, form)
    used: set[nn.Module] = set()
    reasons = []
    for block in blocks:
        if block.first in used or block.last in used:
            continue
        obstacle = _obstacle(block)
        form, why = (None, obstacle) if obstacle else _try(block, list(filter(None, acts.values())))
        if form:
            used |= {block.first, block.last}
            for module in block.neighbours:
                if not isinstance(module, _Patched):
                    module.__class__ = _class(type(module), _Neighbour)
            yield Row(path, _name(owner), f"ffn, {form}: {block.names}{why}", True)
        elif why:
            reasons.append(why)
    if not used:
        for act in acts:
            if isinstance(act, _Activation):
                act.__class__ = act._key[0]
        unknown = [_name(act) for act, form in acts.items() if not form]
        if unknown:
            reasons = [f"the operator has no activation that computes what {', '.join(unknown)} does"]
        if reasons:
            yield _not_patched(path, owner, reasons[0])


def _may_be_activation(module: nn.Module) -> bool:
    passing = (nn.Identity, nn.modules.dropout._DropoutNd)
    owns = [*module.children(), *module.parameters(), *module.buffers()]
    return not (owns or isinstance(module, (*passing, _Patched)))


def _obstacle(block: _Block) -> str:
    for linear in (block.first, block.last):
        weight = linear.weight
        if isinstance(linear, _Patched) or _watched(linear) or hasattr(linear, "parametrizations"):
            return f"{block.names} are no plain layers (one has hooks, a parametrization or another partner)"
        if weight.dtype not in _DTYPES or type(weight) is not nn.Parameter:
            return (
                f"its weights are {type(weight).__name__} of {weight.dtype}, not float32, float16 or bfloat16"
            )
        if weight.device.type not in ("cpu", "meta"):
            return f"its weights are on {weight.device}, and it would run on the CPU only"
    return ""


def _try(block: _Block, forms: list[str]) -> tuple[str | None, str]:
    """Patches both layers if the block is seen to fuse them: the activation and a remark; else None, why not.

    A block that does not run alone is patched when it has one of the operator's activations, `forms`: if it
    does anything else with it, it computes what it did before.
    """
    first, last = block.first, block.last
    with _trial(block.scope):
        inputs, why = _inputs(block)
    if inputs is None and not (forms and block.in_order):
        return None, ""
    first.__class__ = _class(type(first), _First)
    last.__class__ = _class(type(last), _Last)
    if inputs is None:
        return forms[0], f" (not tried: alone it raises {why})"
    asked: list[tuple[str, str | None]] = []
    first._deferred = type("_Tried", (_Deferred,), {"asked": asked})
    try:
        with _trial(block.scope):
            block.scope.forward(*inputs)
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


@contextmanager
def _trial(scope: nn.Module) -> Iterator[None]:
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


def _inputs(block: _Block) -> tuple[tuple[Any, ...] | None, str]:
    """Arguments that the block runs on, made up from the width of its first layer; or None, and why not."""
    weight = _matrix(block.first)
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
                block.scope.forward(*inputs)
                return inputs, ""
            except Exception as error:
                why = why or f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None, why


# --- Experts ---


def _switch(experts: Any, one_hot: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    # A row of zeros is a token beyond its expert's capacity; ids of E are skipped.
    return torch.where(one_hot.bool().any(-1), one_hot.argmax(-1), experts.num_experts), weights


def _nllb(experts: Any, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    # transformers 5.23 passes the router's mask for ids: each token has E slots, its first choice goes to
    # expert 1 and everything else to expert 0. We compute what it computes.
    return ids, weights * (1 - experts.moe_token_dropout)


# Class -> how ids and weights, [T, top_k], come from what its forward is given. patch compares both forwards.
_ROUTING = {"SwitchTransformersExperts": _switch, "NllbMoeExperts": _nllb}


class _Experts(_Patched):
    """Experts in modules of their own, expert_0 to expert_{E - 1}, that become one call of the operator."""

    _attributes = ("_form", "_names", "_types")
    _form: str
    _names: tuple[str, ...]  # of first layer, second layer and activation in each expert
    _types: tuple[type, ...]  # of an expert and these three
    num_experts: int

    def forward(self, hidden_states: Tensor, selected: Tensor, weights: Tensor) -> Tensor:
        # Gradients belong to E separate parameters, and tracing sees no addresses.
        fused = not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling())
        stacks = self._stacks(hidden_states) if fused else None
        if stacks is None:
            return super().forward(hidden_states, selected, weights)
        weight1, weight2, bias1, bias2 = stacks
        ids, weights = _ROUTING[_name(self)](self, selected, weights)
        # What has no weight needs no expert: NLLB's router gives all but two of a token's E slots none.
        ids = ids.masked_fill(weights == 0, self.num_experts)
        return torch.ops.ffn.moe(
            hidden_states, ids, weights.float(), weight1.mT, weight2.mT, self._form, bias1=bias1, bias2=bias2
        )

    def _stacks(self, x: Tensor) -> tuple[Any, ...] | None:
        """weight1, weight2 (as nn.Linear has them), bias1 and bias2 of all experts; None when the operator
        cannot take them."""
        experts = self._each()
        if not experts or not all(_fits(experts[0][i], x) for i in (1, 2)):
            return None
        stacks = []
        for name in ("weight", "bias"):
            for i in (1, 2):
                parameters = [getattr(expert[i], name) for expert in experts]
                stack = _stack(parameters)
                if stack is None and any(p is not None for p in parameters):
                    return None
                stacks.append(stack if name == "weight" else operand_bias(stack))
        return tuple(stacks)

    def _each(self) -> list[tuple[Any, ...]]:
        """Each expert with its layers and activation; nothing when one is not as it was, or is watched."""
        found = []
        for e in range(self.num_experts):
            expert: Any = self._modules[f"expert_{e}"]
            parts = (expert, *(expert._modules.get(name) for name in self._names))
            if tuple(map(type, parts)) != self._types or any(map(_watched, parts)):
                return []
            found.append(parts)
        return found


def _stack(parameters: list[Any]) -> Tensor | None:
    """All parameters as one tensor, whose parts they become if they are not yet; None if they are not alike.

    They are from patch on, until .to(), deepcopy, load_state_dict(assign=True) or an assigned .data gives
    some of them memory of their own. So nothing is remembered, and each call looks where they are.
    """
    first, last = parameters[0], parameters[-1]
    if first is None:
        return None
    size, start = first.numel() * first.element_size(), first.data_ptr()
    together = first.untyped_storage().data_ptr() == last.untyped_storage().data_ptr()
    for i, p in enumerate(parameters):
        if p is None or (p.shape, p.dtype, p.device) != (first.shape, first.dtype, first.device):
            return None
        together = together and p.data_ptr() == start + i * size and p.is_contiguous()
    if not together:
        with torch.inference_mode(False):  # what is made inside it could not be trained afterwards
            stack = torch.stack([p.detach() for p in parameters])
            for p, part in zip(parameters, stack, strict=True):
                p.data = part
        return stack
    return first.as_strided((len(parameters), *first.shape), (first.numel(), *first.stride()))


def _patch_experts(path: str, module: Any) -> Row:
    expert = module["expert_0"]
    linears = [(name, child) for name, child in expert.named_children() if _is_linear(child)]
    acts = [(name, child) for name, child in expert.named_children() if _may_be_activation(child)]
    if len(linears) != 2 or len(acts) != 1:
        return _not_patched(path, module, "its experts are not two linear layers and an activation")
    (first_name, first), (last_name, last), (act_name, act) = *linears, *acts
    form = _form(act)
    if form is None:
        return _not_patched(
            path, module, f"the operator has no activation that computes what {_name(act)} does"
        )
    obstacle = _obstacle(_Block(expert, f"{first_name} and {last_name}", first, last))
    if obstacle:
        return _not_patched(path, module, obstacle)
    base = type(module)
    module.__class__ = _class(
        base, _Experts, form, (first_name, last_name, act_name), tuple(map(type, (expert, first, last, act)))
    )
    weight = first.weight
    if weight.is_meta:  # nothing to compare
        return Row(
            path, base.__name__, f"moe, {form}: {module.num_experts} experts (not tried: on meta)", True
        )
    with _trial(module):
        given = _sample(module, weight)
        try:
            expected, y = base.forward(module, *given), module.forward(*given)
            # Rounding moves y by few eps; experts, weights or slots mixed up, by as much as y itself.
            same = (y - expected).norm() <= weight.new_tensor(
                torch.finfo(y.dtype).eps
            ).sqrt() * expected.norm()
            difference = (
                ""
                if same and module._stacks(given[0])
                else "it computes something else than transformers 5.23's"
            )
        except Exception as error:
            difference = f"it raises {type(error).__name__} ({error})"
    if difference:
        module.__class__ = base
        return _not_patched(path, module, difference)
    return Row(path, base.__name__, f"moe, {form}: {module.num_experts} experts", True)


def _sample(experts: Any, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What routers of both kinds give for few tokens, one of which no expert gets."""
    E, T = experts.num_experts, 5
    x = torch.linspace(-1, 1, T * like.shape[1], device=like.device).to(like.dtype).reshape(T, -1)
    mask = F.one_hot(torch.arange(T, device=like.device) % E, E)
    mask[-1] = 0
    probabilities = torch.linspace(0.1, 1, T * E, device=like.device).to(like.dtype).reshape(T, E)
    if type(experts)._key[0].__name__ == "NllbMoeExperts":
        return x, mask, probabilities
    return x, mask[:, None], probabilities[:, :1]
