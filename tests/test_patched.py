# SPDX-License-Identifier: Apache-2.0
"""What users do with a model after `patch`: hooks, wrappers, other code around the layers, other dtypes.
test_patch.py says what makes a patched model right.
"""

import copy
import pickle
from typing import Any

import pytest
import torch
from blocks import TRAPS, Inline, mlp, outcome, used_beside, x_changes, x_changes_early
from families import make, run
from torch import Tensor, nn

from ffn_ops.patch import patch, unpatch

pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def test_global_hooks_see_tensors(calls: Any):
    model = mlp(nn.ReLU())
    patch(model)
    calls.clear()
    seen: list[type] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, y: seen.append(type(y)))
    try:
        model(torch.randn(3, 8))
    finally:
        handle.remove()
    assert set(seen) == {Tensor} and not calls
    handle = nn.modules.module.register_module_full_backward_hook(lambda m, gx, gy: None)
    try:
        model(torch.randn(3, 8, requires_grad=True))
    finally:
        handle.remove()
    assert not calls


def test_transforms_of_torch_func_and_forward_mode_work_as_before(calls: Any):
    model, x = mlp(nn.GELU()), torch.randn(3, 8)

    def tangent() -> Tensor:
        return torch.func.jvp(model, (x,), (torch.ones_like(x),))[1]

    def gradient() -> Tensor:
        return torch.func.grad(lambda x: model(x).square().sum())(x)

    expected = tangent(), gradient()
    patch(model)
    calls.clear()
    assert all(torch.equal(a, b) for a, b in zip((tangent(), gradient()), expected, strict=True))
    assert not calls


@pytest.mark.parametrize("trap", TRAPS.values(), ids=list(TRAPS))
def test_a_patched_block_that_turns_into_anything_else_computes_that(trap: Any, calls: Any):
    """Nothing rests on what the block did while it was patched."""
    model, x = Inline(trap), torch.randn(3, 8)
    with torch.no_grad():
        y = outcome(model, x)
        model.body = lambda m, x: m.fc2(m.dropout(m.act(m.fc1(x))))
        assert patch(model).changed == 1
        model.body = trap
        calls.clear()
        if trap in (x_changes, x_changes_early):
            with pytest.raises(RuntimeError, match="x of a patched feed-forward block was changed in place"):
                model(x)
        elif trap is used_beside:  # fused, and computed once more for who else asks
            assert torch.allclose(outcome(model, x), y, rtol=1e-5, atol=1e-6) and len(calls) == 1
        else:
            assert torch.equal(outcome(model, x), y) and not calls


@pytest.mark.parametrize("where", ["fc1", "act", "fc2"])
def test_hooks_see_tensors(where: str):
    model, x = Inline(lambda m, x: m.fc2(m.act(m.fc1(x)))), torch.randn(3, 8)
    patch(model)
    seen: list[Any] = []
    module = model.get_submodule(where)
    removable = [
        module.register_forward_hook(lambda module, args, y: seen.extend((*args, y))),
        module.register_forward_pre_hook(lambda module, args: seen.extend(args)),
    ]
    y = model(x)
    assert len(seen) == 3 and all(type(value) is Tensor for value in seen)
    for handle in removable:
        handle.remove()
    assert torch.allclose(model(x), y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("where", ["intermediate", "output"])
def test_hooks_of_modules_that_share_a_block_see_tensors(where: str, calls: Any):
    model = make("Bert")
    patch(model)
    seen: list[Any] = []
    module = model.encoder.layer[0].get_submodule(where)
    module.register_forward_hook(lambda module, args, y: seen.extend((*args, y)))
    calls.clear()
    run(model)
    assert seen and all(isinstance(value, Tensor) for value in seen)
    assert len(calls) == 1  # the other layer's


def test_layers_that_are_wrapped_afterwards_compute_what_the_wrapper_says():
    """As adapters do: another module in the layer's place, or another forward on it."""
    model, x = Inline(lambda m, x: m.fc2(m.act(m.fc1(x)))), torch.randn(3, 8)
    plain = copy.deepcopy(model)
    patch(model)

    class Adapter(nn.Module):
        def __init__(self, base: nn.Module):
            super().__init__()
            self.base, self.low = base, nn.Linear(8, 16, bias=False)
            nn.init.ones_(self.low.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.low(x)

    for m in (plain, model):
        m.fc1 = Adapter(m.fc1)
        m.fc2.forward = lambda h, forward=m.fc2.forward: forward(2 * h)
    assert torch.equal(model(x), plain(x))


def test_whatever_the_operator_does_not_take_is_computed_as_before(calls: Any):
    model = mlp(nn.GELU())
    plain = copy.deepcopy(model)
    patch(model)
    x = torch.randn(3, 8)
    calls.clear()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), plain(x))
    assert torch.equal(model(x[0]), plain(x[0]))  # one dimension
    assert torch.equal(model.double()(x.double()), plain.double()(x.double()))
    with pytest.raises(RuntimeError, match="dtype"):
        model(x)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        model.float()(x[:, :7])
    assert not calls
    assert model(x[:0]).shape == (0, 8)
    assert len(calls) == 1


@pytest.mark.parametrize("without", ["fc1", "act", "fc2"])
def test_gradient_modes_of_each_step_are_kept(without: str):
    def body(m: Any, x: Tensor) -> Tensor:
        for name in ("fc1", "act", "fc2"):
            with torch.set_grad_enabled(name != without):
                x = m.get_submodule(name)(x)
        return x

    seen = []
    for change in (unpatch, patch):
        model, x = Inline(lambda m, x: m.fc2(m.act(m.fc1(x)))), torch.randn(3, 8)
        change(model)
        model.body = body
        y = model(x)
        if y.requires_grad:
            y.sum().backward()
        seen.append([parameter.grad is None for parameter in model.parameters()])
    assert seen[0] == seen[1]


def test_a_class_that_came_after_ours_is_left_and_named():
    model = mlp(nn.ReLU())
    patch(model)
    model[0].__class__ = type("Sharded", (type(model[0]),), {})
    reason = "still patched: its class was changed after patch (undo that, then unpatch again)"
    assert unpatch(model)[-1] == ("0", "Sharded", reason, False)


@pytest.mark.parametrize("where", [0, 1, 2])
def test_a_forward_that_came_after_ours_is_left_and_named(where: int, calls: Any):
    """As hooks that replace forward do, and put the old one back into the instance."""
    model, x = mlp(nn.ReLU()), torch.randn(3, 8)
    expected, kind = model(x), type(model[where])
    patch(model)
    before = model[where].forward
    model[where].forward = lambda *args: before(*args)
    calls.clear()
    assert torch.equal(model(x), expected) and not calls
    reason = "still patched: its forward was changed after patch (undo that, then unpatch again)"
    assert unpatch(model)[-1] == (str(where), kind.__name__, reason, False)
    assert torch.equal(model(x), expected) and not calls
    model[where].forward = before
    unpatch(model)
    assert type(model[where]) is kind and torch.equal(model(x), expected)


class Scaled(nn.Module):
    scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * torch.clamp(x, min=0)


def test_a_changed_activation_computes_what_it_says_now():
    model, x = mlp(Scaled()), torch.randn(3, 8)
    assert patch(model).changed == 1
    model.eval()
    first = model(x)
    model[1].scale = 2.0
    y = model(x)
    unpatch(model)
    assert torch.equal(model(x), y) and not torch.equal(first, y)


@pytest.mark.parametrize("where", [0, 2])
def test_a_layer_that_is_compiled_alone_hands_on_what_it_should(where: int):
    model, x = mlp(nn.ReLU()), torch.randn(3, 8)
    expected = model(x)
    patch(model)
    model[where].compile(backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)


class Leaky(nn.ReLU):
    """An activation with something that cannot be pickled, and leaves it out."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = lambda x: x

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "cache"}


def test_a_state_of_ones_own_is_pickled():
    model = mlp(Leaky())
    patch(model)
    copied = pickle.loads(pickle.dumps(model))
    x = torch.randn(3, 8)
    assert torch.equal(copied(x), model(x)) and not hasattr(copied[1], "cache")
    nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Identity())
    with pytest.raises(RuntimeError, match="parametrized"):
        pickle.dumps(model)
