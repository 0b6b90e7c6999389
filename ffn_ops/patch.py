# SPDX-License-Identifier: Apache-2.0
"""patch() and unpatch(): the feed-forward blocks of a finished model through torch.ops.ffn, in place.

A patched module is the same object with another class: parameters, names and places in the model stay. How
dense blocks are found and fused is in patch_dense.py, the experts that transformers has no hook for are in
patch_experts.py, and what both need is in patched.py.
"""

import re
from typing import Any

import torch
from torch import nn

from ffn_ops.contract import ContractError
from ffn_ops.patch_dense import First, patch_dense
from ffn_ops.patch_experts import ROUTING, Experts, patch_experts
from ffn_ops.patched import Patched, Row, name_of, not_patched


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
        if isinstance(module, Experts):
            report.append(Row(path, name_of(module), "already patched", False))
        elif type(module).__name__ in ROUTING:
            report.append(patch_experts(path, module))
        elif hasattr(module, "_apply_gate"):  # set by transformers' @use_experts_implementation
            fix = 'import ffn_ops.hf and call model.set_experts_implementation("ffn_ops")'
            report.append(not_patched(path, module, f"transformers has a hook for its experts ({fix})"))
        else:
            report.extend(patch_dense(model, path, module))
        if isinstance(module, Experts):
            within.update(module.modules())
    return report


def unpatch(model: nn.Module) -> Report:
    """Gives every module that `patch` changed its own class back. Returns a Report."""
    _check_model(model)
    report = Report()
    for path, module in list(model.named_modules()):
        if isinstance(module, Experts) or any(isinstance(child, First) for child in module.children()):
            report.append(Row(path, name_of(module), "as it was", True))
    for path, module in list(model.named_modules()):
        if not isinstance(module, Patched):
            continue
        own = vars(module).get("forward")
        if own == type(module).forward.__get__(module):  # put back by hooks that were taken off
            del module.forward
            own = None
        derived = "_key" not in vars(type(module))  # a class derived from ours
        if derived or own is not None:
            what = "class" if derived else "forward"
            reason = f"still patched: its {what} was changed after patch (undo that, then unpatch again)"
            report.append(Row(path, name_of(module), reason, False))
        else:
            module.__class__ = module._key[0]
    return report


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ContractError(
            f"model is a {type(model).__name__}, but it must be a torch.nn.Module (pass the model itself)"
        )
