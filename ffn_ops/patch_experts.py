# SPDX-License-Identifier: Apache-2.0
"""Experts of Switch and NLLB-MoE, without a hook in transformers, through torch.ops.ffn.moe; for patch.py.

Their parameters become parts of one tensor and stay the same objects. Torch only; what dense blocks need too
is in patched.py, the operator in op.py.
"""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ffn_ops.op import operand_bias
from ffn_ops.patched import (
    Patched,
    Row,
    fits,
    form_of,
    is_linear,
    may_be_activation,
    name_of,
    not_patched,
    obstacle_of,
    patched_class,
    same_result,
    trial,
    watched,
)


def _switch(experts: Any, one_hot: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    # A row of zeros is a token beyond its expert's capacity; ids of E are skipped.
    chosen, ids = one_hot.max(-1)
    return ids.masked_fill_(chosen == 0, experts.num_experts), weights


def _nllb(experts: Any, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    # transformers 5.23 passes the router's mask for ids: each token has E slots, its first choice goes to
    # expert 1 and everything else to expert 0. We compute what it computes. What has no weight needs no
    # expert: the router gives all but two of the slots none.
    return ids.masked_fill(weights == 0, experts.num_experts), weights * (1 - experts.moe_token_dropout)


# Class -> how ids and weights, [T, top_k], come from what its forward is given. patch compares both forwards.
ROUTING = {"SwitchTransformersExperts": _switch, "NllbMoeExperts": _nllb}


class Experts(Patched):
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
        ids, weights = ROUTING[name_of(self)](self, selected, weights)
        return torch.ops.ffn.moe(
            hidden_states, ids, weights.float(), weight1.mT, weight2.mT, self._form, bias1=bias1, bias2=bias2
        )

    def _stacks(self, x: Tensor) -> tuple[Any, ...] | None:
        """weight1, weight2 (as nn.Linear has them), bias1 and bias2 of all experts; None when the operator
        cannot take them."""
        experts = self._each()
        if not experts or not all(fits(experts[0][i], x) for i in (1, 2)):
            return None
        stacks = []
        for name in ("weight", "bias"):
            for i in (1, 2):
                parameters = [expert[i]._parameters.get(name) for expert in experts]
                stack = _stack(parameters)
                if stack is None and any(p is not None for p in parameters):
                    return None
                stacks.append(stack if name == "weight" else operand_bias(stack))
        return tuple(stacks)

    def _each(self) -> list[tuple[Any, ...]]:
        """Each expert with its layers and activation; nothing when one is not as it was, or is watched."""
        first, last, act = self._names
        found: list[tuple[Any, ...]] = []
        for e in range(self.num_experts):
            expert: Any = self._modules[f"expert_{e}"]
            layers = expert._modules
            parts = (expert, layers.get(first), layers.get(last), layers.get(act))
            if tuple(map(type, parts)) != self._types:
                return []
            found.append(parts)
        return [] if watched(*itertools.chain.from_iterable(found)) else found


def _stack(parameters: list[Any]) -> Tensor | None:
    """All parameters as one tensor, whose parts they become if they are not yet; None if they are not alike.

    They are from patch on, until .to(), deepcopy, load_state_dict(assign=True) or an assigned .data gives
    some of them memory of their own. So nothing is remembered, and each call looks where they are.
    """
    first, last = parameters[0], parameters[-1]
    if first is None:
        return None
    shape, dtype, device = first.shape, first.dtype, first.device
    size, at = first.numel() * first.element_size(), first.data_ptr()
    together = first.untyped_storage().data_ptr() == last.untyped_storage().data_ptr()
    for p in parameters:
        if p is None or p.shape != shape or p.dtype != dtype or p.device != device:
            return None
        together = together and p.data_ptr() == at and p.is_contiguous()
        at += size
    if not together and any(p.is_shared() for p in parameters):
        return None  # with other processes, which must go on seeing the same memory
    if not together:
        # What is made in inference mode could not be trained, and parameters that were take nothing else.
        with torch.inference_mode(first.is_inference()):
            stack = torch.stack([p.detach() for p in parameters])
            for p, part in zip(parameters, stack, strict=True):
                p.data = part
        return stack
    return first.as_strided((len(parameters), *first.shape), (first.numel(), *first.stride()))


def patch_experts(path: str, module: Any) -> Row:
    if "forward" in vars(module):
        return not_patched(path, module, "its forward has been replaced, as hooks of a kind do")
    expert = module["expert_0"]
    linears = [(name, child) for name, child in expert.named_children() if is_linear(child)]
    acts = [(name, child) for name, child in expert.named_children() if may_be_activation(child)]
    if len(linears) != 2 or len(acts) != 1:
        return not_patched(path, module, "its experts are not two linear layers and an activation")
    (first_name, first), (last_name, last), (act_name, act) = *linears, *acts
    form = form_of(act)
    if form is None:
        return not_patched(
            path, module, f"the operator has no activation that computes what {name_of(act)} does"
        )
    obstacle = obstacle_of(f"{first_name} and {last_name}", first, last)
    if obstacle:
        return not_patched(path, module, obstacle)
    base = type(module)
    module.__class__ = patched_class(
        base, Experts, form, (first_name, last_name, act_name), tuple(map(type, (expert, first, last, act)))
    )
    weight = first.weight
    if weight.is_meta:  # nothing to compare
        return Row(
            path, base.__name__, f"moe, {form}: {module.num_experts} experts (not tried: on meta)", True
        )
    with trial(module):
        given = _sample(module, weight)
        try:
            expected, y = base.forward(module, *given), module.forward(*given)
            same = same_result(y, expected)
            difference = (
                ""
                if same and module._stacks(given[0])
                else "it computes something else than transformers 5.23's"
            )
        except Exception as error:
            difference = f"it raises {type(error).__name__} ({error})"
    if difference:
        module.__class__ = base
        return not_patched(path, module, difference)
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
