# SPDX-License-Identifier: Apache-2.0
"""The experts classes that transformers decorates, each as a small module by itself, and their exact results.

test_hf.py and test_hf_packed.py run them; the truth is a class's own eager forward in float64.
"""

import copy
import itertools
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.moe import use_experts_implementation

E, H, INNER, T, K = 4, 32, 16, 6, 2
DECORATED = re.compile(r"^@use_experts_implementation[^\n]*\nclass (\w+)\(", re.M)
CLASSES = {
    name: f"transformers.models.{path.parent.name}.{path.stem}"
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py"))
    for name in DECORATED.findall(path.read_text(encoding="utf-8"))
}
# Their gates are no operator's, so two products run around them; so they do around a norm.
OWN_GATES = {
    "BeamExperts", "DeepseekV4Experts", "Glm5NextTextExperts", "GptOssExperts", "HYV4Experts",
    "Inkling2Experts", "MiniMaxM3VLExperts", "OpenAIPrivacyFilterExperts",
}  # fmt: skip
UNFUSED = OWN_GATES | {"MuseSparkExperts"}


class Config:
    """Answers what an experts class asks of its config, by the name of the question."""

    _experts_implementation = "ffn_ops"

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "moe_latent_size":
            return None
        if name in ("hidden_act", "hidden_activation", "mlp_hidden_act"):
            return "relu2" if name == "mlp_hidden_act" else "silu"
        if "limit" in name or "softcap" in name:
            return 0.5  # low enough for some values to meet it
        if "eps" in name:
            return 1e-6
        if "alpha" in name:
            return 1.702
        if name.endswith("hidden_size"):
            return H
        if name.endswith("size"):
            return INNER
        return E


def experts(name: str, dtype: torch.dtype = torch.float32, **values: Any) -> nn.Module:
    module = getattr(import_module(CLASSES[name]), name)(Config(**values)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module.to(dtype)


def any_experts(has_gate: bool, has_bias: bool, is_transposed: bool) -> nn.Module:
    """Experts with these flags, whose eager forward goes token by token."""
    up = "gate_up_proj" if has_gate else "up_proj"
    columns = 2 * INNER if has_gate else INNER

    class AnyExperts(nn.Module):
        def __init__(self, config: Config) -> None:
            super().__init__()
            self.num_experts, self.act_fn = E, nn.SiLU()
            for name, K1, N1 in ((up, H, columns), ("down_proj", INNER, H)):
                shape = (E, K1, N1) if is_transposed else (E, N1, K1)
                self.register_parameter(name, nn.Parameter(torch.randn(shape) * 0.3))
                if has_bias:
                    self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(E, N1)))

        def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            y = torch.zeros_like(x)
            for token, slot in itertools.product(range(T), range(K)):
                h = self.product(up, x[token], ids[token, slot])
                h = self._apply_gate(h) if has_gate else self.act_fn(h)
                y[token] += weights[token, slot] * self.product("down_proj", h, ids[token, slot])
            return y

        def product(self, name: str, row: Tensor, expert: Tensor) -> Tensor:
            weight = getattr(self, name)[expert]
            row = row @ (weight if is_transposed else weight.t())
            return row + getattr(self, f"{name}_bias")[expert] if has_bias else row

    decorate = use_experts_implementation(has_gate=has_gate, has_bias=has_bias, is_transposed=is_transposed)
    torch.manual_seed(0)
    return decorate(AnyExperts)(Config())


def inputs(dtype: torch.dtype = torch.float32, rows: int = T) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, H, generator=generator).to(dtype)
    ids = torch.rand(rows, E, generator=generator).argsort(-1)[:, :K]
    return x, ids, torch.rand(rows, K, generator=generator)


class Calls(TorchDispatchMode):
    """Counts the operators of ffn_ops that run."""

    def __enter__(self) -> dict[str, int]:
        self.counts: dict[str, int] = {}
        super().__enter__()
        return self.counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "ffn":
            self.counts[func._opname] = self.counts.get(func._opname, 0) + 1
        return func(*args, **(kwargs or {}))


def eager(module: nn.Module, *call: Tensor) -> Tensor:
    return type(module).forward.__wrapped__(module, *call)


def exact_and_bound(module: nn.Module, x: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The eager result in float64, and how far from it one of ours in the module's dtype may be.

    To first order: a sum's rounding errors are at most its length in units of float32 of the sum of absolute
    values; a gate is at most eight steps, whose errors count as errors of its inputs (by its derivatives) or
    of its result. ffn.moe takes all steps in float32 but the rounding of the second product's input, except
    in float16; between two products everything is rounded to the dtype. Doubled for what is beyond first
    order. Some classes compute in float32 whatever they are given: the truth then has errors too, those of
    the bound for float32.
    """
    wide, fine, coarse = copy.deepcopy(module).double(), 2.0**-24, torch.finfo(x.dtype).eps / 2
    truth = eager(wide, x.double(), ids, weights.double())
    step = coarse if type(module).__name__ in UNFUSED or x.dtype == torch.float16 else fine
    bound = torch.zeros_like(truth)
    for slot in range(ids.shape[-1]):
        weight = weights[:, slot, None].double()
        y, error = _slot(wide, x.double(), ids[:, slot], step, coarse)
        again = _slot(wide, x.double(), ids[:, slot], fine, fine)[1]
        bound += weight * (2 * error + again + (coarse + (K + 2) * fine) * y.abs())
    return truth, bound


@torch.enable_grad()
def _slot(m: nn.Module, x: Tensor, ids: Tensor, step: float, coarse: float) -> tuple[Tensor, Tensor]:
    """y of one expert for each row, before its weight, and the bound of its error."""
    (w1, b1), (w2, b2) = (
        _expert(m, name, ids) for name in ("gate_up_proj" if m.has_gate else "up_proj", "down_proj")
    )
    h = (_product(x, w1) + b1).requires_grad_()
    g = (m._apply_gate(h) if m.has_gate else m.act_fn(h)).double()
    (slope,) = torch.autograd.grad(g.sum(), h)  # each of h has its own of g
    h, g = h.detach(), g.detach()

    def through_gate(error: Tensor) -> Tensor:
        error = slope.abs() * error
        if not m.has_gate:
            return error
        left, right = error.chunk(2, -1) if m.is_concatenated else (error[:, ::2], error[:, 1::2])
        return left + right

    dh = (H + 5) * 2.0**-24 * (_product(x.abs(), w1.abs()) + b1.abs()) + step * h.abs()
    dg = through_gate(dh) + 8 * step * (through_gate(1 + h.abs()) + g.abs()) + coarse * g.abs()
    y = _product(g, w2) + b2
    dy = _product(dg, w2.abs()) + (INNER + 5) * 2.0**-24 * (_product(g.abs(), w2.abs()) + b2.abs())
    dy += step * y.abs()
    if m.has_post_expert_norm:
        slopes = torch.stack([torch.autograd.functional.jacobian(m.post_expert_norm, row) for row in y])
        y = m.post_expert_norm(y)
        dy = _product(dy, slopes.mT.abs()) + 8 * step * y.abs()
    return y.detach(), dy.detach()


def _expert(m: nn.Module, name: str, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The weight [T, K, N] and bias of each row's expert."""
    weight = getattr(m, name).detach()[ids]
    bias = getattr(m, f"{name}_bias").detach()[ids] if m.has_bias else weight.new_zeros(1)
    return (weight if m.is_transposed else weight.mT), bias


def _product(rows: Tensor, matrices: Tensor) -> Tensor:
    return (rows[:, None] @ matrices)[:, 0]


def assert_within(y: Tensor, truth: Tensor, bound: Tensor) -> None:
    error = (y.double() - truth).abs()
    assert (error <= bound).all(), f"{(error / bound).max():.3g} times the bound"


def assert_close(y: Tensor, module: nn.Module, *call: Tensor) -> None:
    assert_within(y, *exact_and_bound(module, *call))
