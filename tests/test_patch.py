# SPDX-License-Identifier: Apache-2.0
"""ffn_ops/patch.py: what becomes of models of many families, of blocks that only look like one, and of all
that users do with a model afterwards.

Two things make a patched model right, and each has its own proof. What flows where: with the operators
replaced by the steps that they stand for, the model gives its own bits. What the operators answer: each call
that a model makes is held to tolerance.py's bound.
"""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, T5, TEXT, arrays, hf, inputs, make, run
from native import KERNELS
from strategies import to_numpy
from tolerance import assert_close
from torch import Tensor, nn

from ffn_ops import ContractError, _native, patch_dense, patched
from ffn_ops.patch import patch, unpatch

pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

each_family = pytest.mark.parametrize("family", FAMILIES)
some_families = pytest.mark.parametrize("family", ["Bert", "ViT", "T5", "GPT2", "OPT"])


def torchs_steps(model: nn.Module) -> Callable[..., Tensor]:
    """ffn.ffn as the model's own modules compute it."""
    marked = [module for module in model.modules() if isinstance(module, patch_dense._Activation)]
    acts = {module._form: type(module)._key[0]().forward for module in marked}

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if weight.is_contiguous():  # Conv1D
            return torch.addmm(bias, x.view(-1, x.size(-1)), weight).view(*x.shape[:-1], -1)
        return F.linear(x, weight.t(), bias)

    def ffn(
        x: Tensor, weight1: Tensor, weight2: Tensor, activation: str, *, bias1: Any, bias2: Any
    ) -> Tensor:
        return linear(acts[activation](linear(x, weight1, bias1)), weight2, bias2)

    return ffn


@each_family
def test_a_model_is_fused_and_its_data_flow_as_it_was(
    family: str, calls: Any, monkeypatch: pytest.MonkeyPatch
):
    activation, blocks = FAMILIES[family][2:]
    model = make(family)
    expected = run(model)
    report = patch(model)
    assert report.changed == blocks, report
    assert all(row.outcome.startswith(f"ffn, {activation}: ") for row in report if row.changed), report
    with torch.no_grad():
        calls.clear()
        run(model)
        assert len(calls) == max(blocks, 2)  # Albert's two layers are one module
    monkeypatch.setattr(torch.ops.ffn, "ffn", torchs_steps(model))
    y = run(model)
    assert torch.equal(y, expected)
    y.square().sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    unpatch(model)
    run(model).square().sum().backward()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(parameter.grad, gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@each_family
def test_every_call_is_within_the_operators_bound_and_reads_the_parameters_in_place(
    family: str, dtype: torch.dtype, calls: Any
):
    model = make(family).to(dtype)
    patch(model)
    owned = {parameter.data_ptr() for parameter in model.parameters()}
    calls.clear()
    with torch.no_grad():
        assert run(model).isfinite().all()
    assert calls
    for args, kwargs, y in calls:
        assert y.dtype == dtype and {args[1].data_ptr(), args[2].data_ptr()} <= owned
        given, biases = arrays(args, kwargs)
        assert_close(to_numpy(y), *given, **biases, kernel=KERNELS[_native.selected_isa()])


@some_families
def test_parameters_and_their_names_are_untouched(family: str, tmp_path: Any):
    model = make(family)
    parameters, state = dict(model.named_parameters()), copy.deepcopy(model.state_dict())
    kinds = [type(module) for module in model.modules()]
    y = run(model)
    patch(model)
    assert list(model.state_dict()) == list(state)
    assert all(model.get_parameter(name) is parameter for name, parameter in parameters.items())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    model.save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path).eval()
    assert [type(module) for module in reloaded.modules()] == kinds
    assert all(torch.equal(tensor, state[name]) for name, tensor in reloaded.state_dict().items())
    unpatch(model)
    assert [type(module) for module in model.modules()] == kinds
    assert torch.equal(run(model), y)


@some_families
def test_a_state_dict_of_either_loads_into_the_other(family: str):
    plain, patched = make(family), make(family)
    patch(patched)
    for source, target in ((plain, patched), (patched, plain)):
        with torch.no_grad():
            for parameter in source.parameters():
                parameter.mul_(1.25)
            target.load_state_dict(source.state_dict())
            assert torch.equal(run(patched), run(patch_copy(plain)))


def patch_copy(model: nn.Module) -> nn.Module:
    copied = copy.deepcopy(model)
    patch(copied)
    return copied


@some_families
def test_copies_and_pickles_are_patched_and_have_weights_of_their_own(family: str):
    model = make(family)
    patch(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), torch.load(file, weights_only=False)]
    with torch.no_grad():
        y = run(model)
        for parameter in model.parameters():
            parameter.zero_()
        for copied in copies:
            assert list(map(type, copied.modules())) == list(map(type, model.modules()))
            assert torch.equal(run(copied), y)


@some_families
def test_a_patched_model_compiles_without_a_graph_break(family: str):
    model = make(family)
    patch(model)
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        # Traced in one piece, torch may take its own parts in other orders; the blocks are the operator's.
        assert torch.allclose(compiled(**inputs(model))[0], run(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_block_is_one_call(strict: bool):
    model = mlp(nn.GELU())
    patch(model)
    graph = torch.export.export(model, (torch.randn(3, 8),), strict=strict).graph
    targets = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert [target for target in targets if "permute" not in target and ".t." not in target] == [
        "ffn.ffn.default"
    ]


@some_families
def test_training_is_bit_for_bit_what_it_was(family: str, calls: Any):
    """With dropout: the original computation, in its order of random numbers."""
    models = [make(family).train(), make(family).train()]
    patch(models[1])
    assert models[1].training
    calls.clear()
    losses, steps = [], []
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(2)
        loss = run(model).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss)
        steps.append(model.state_dict())
    assert torch.equal(*losses) and not calls
    assert all(torch.equal(tensor, steps[1][name]) for name, tensor in steps[0].items())


def mlp(activation: nn.Module, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16, bias=bias), activation, nn.Linear(16, 8, bias=bias)).eval()


def integers(model: nn.Module) -> nn.Module:
    """Small whole numbers for parameters: relu's results and gradients are then exact."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-4, 5, parameter.shape))
    return model


def test_gradients_reach_the_parameters():
    model = integers(mlp(nn.ReLU()))
    x = torch.randint(-4, 5, (3, 8)).float().requires_grad_()
    gradients = []
    for step in (patch, unpatch):
        y = model(x)
        y.square().sum().backward()
        gradients.append([y, x.grad, *(parameter.grad for parameter in model.parameters())])
        x.grad = None
        model.zero_grad()
        step(model)
    assert all(map(torch.equal, *gradients))


ACTIVATIONS = {
    "relu": [nn.ReLU(), nn.ReLU(inplace=True)],
    "silu": [nn.SiLU(), nn.SiLU(inplace=True), "silu", "swish"],
    "gelu": [nn.GELU("tanh"), "gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh",
             "gelu_python_tanh"],
    "gelu_erf": [nn.GELU(), "gelu", "gelu_python"],
    "fastgelu": ["quick_gelu"],
    "relu2": ["relu2"],
    "": ["gelu_10", "mish", "relu6", "leaky_relu", "tanh", "linear", "sigmoid", "laplace", nn.Softmax(-1),
         nn.ELU(), nn.Hardswish(), nn.Softplus(), nn.PReLU(), nn.RReLU(), nn.LogSigmoid()],
}  # fmt: skip


@pytest.mark.parametrize(
    ("form", "activation"),
    [
        pytest.param(form, act, id=f"{form or 'none'}-{act}")
        for form, acts in ACTIVATIONS.items()
        for act in acts
    ],
)
def test_activations_are_known_by_what_they_compute(form: str, activation: Any, calls: Any):
    model = mlp(hf.activations.ACT2FN[activation] if isinstance(activation, str) else activation)
    x = torch.randn(5, 8)
    with torch.no_grad():
        y = model(x)
        report = patch(model)
        calls.clear()
        patched = model(x)
    name = type(model[1]).__name__.removeprefix("Patched")
    if form:
        assert report == [("", "Sequential", f"ffn, {form}: 0 and 2", True)]
        assert [call[0][3] for call in calls] == [form]
        assert (
            patched - y
        ).abs().max() < 1e-5  # the bound is tested above; here a wrong form would be 1e-3 off
    else:
        assert torch.equal(patched, y) and not calls
        why = f"the operator has no activation that computes what {name} does"
        if name != "PReLU":  # it has a parameter
            assert report == [("", "Sequential", f"not patched: {why}", False)]


class Inline(nn.Module):
    """fc1, an activation and fc2 amid code that `body` is."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor]):
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.act, self.fc2 = nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)
        self.dropout = nn.Dropout(0.5)
        self.body = body
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def twice(m: Any, x: Tensor) -> Tensor:
    return m.fc2(m.act(m.act(m.fc1(x)) - 0.1))


def used_beside(m: Any, x: Tensor) -> Tensor:
    h = m.act(m.fc1(x))
    return m.fc2(h) * h.mean()


def in_place(m: Any, x: Tensor) -> Tensor:
    h = m.act(m.fc1(x))
    h += 1
    return m.fc2(h)


def method_in_place(m: Any, x: Tensor) -> Tensor:
    h = m.fc1(x)
    h.mul_(2)
    return m.fc2(m.act(h))


def written_through(m: Any, x: Tensor) -> Tensor:
    h = m.act(m.fc1(x))
    h[..., :4] = 0
    return m.fc2(h)


def out_of(m: Any, x: Tensor) -> Tensor:
    h = m.act(m.fc1(x))
    torch.mul(h, 3, out=h.data)
    return m.fc2(h)


def x_changes(m: Any, x: Tensor) -> Tensor:
    x = x.clone()
    h = m.act(m.fc1(x))
    x += 1
    return m.fc2(h) + x


def x_changes_early(m: Any, x: Tensor) -> Tensor:
    x = x.clone()
    h = m.fc1(x)
    x += 1
    return m.fc2(m.act(h)) + x


def keeps(m: Any, x: Tensor) -> Tensor:
    m.kept = m.act(m.fc1(x))
    return m.fc2(m.kept)


def branches(m: Any, x: Tensor) -> Tensor:
    h = m.act(m.fc1(x))
    return m.fc2(h) if h.sum() > 0 else m.fc2(-h)


TRAPS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "activation twice": twice,
    "twice in a row": lambda m, x: m.fc2(m.act(m.act(m.fc1(x)))),
    "sum between": lambda m, x: m.fc2(m.act(m.fc1(x)) + 1),
    "sum from the left": lambda m, x: m.fc2(1 + m.act(m.fc1(x))),
    "minus": lambda m, x: m.fc2(-m.act(m.fc1(x))),
    "gate": lambda m, x: m.fc2(m.act(m.fc1(x)) * m.fc1(x)),
    "power": lambda m, x: m.fc2(m.act(m.fc1(x)) ** 2),
    "slice": lambda m, x: m.fc2(m.act(m.fc1(x))[..., :16].flip(-1)),
    "no activation": lambda m, x: m.fc2(m.fc1(x)),
    "before it": lambda m, x: m.fc2(m.act(m.fc1(x) * 2)),
    "concatenation": lambda m, x: m.fc2(torch.cat([m.act(m.fc1(x))] * 2, -1)[..., 8:24]),
    "used beside": used_beside,
    "in place": in_place,
    "a method in place": method_in_place,
    "written through": written_through,
    "out=": out_of,
    "branches": branches,
    "x changes": x_changes,
    "x changes early": x_changes_early,
    "active dropout": lambda m, x: m.fc2(F.dropout(m.act(m.fc1(x)), 0.5, training=True)),
    "another input": lambda m, x: m.fc2(m.act(m.fc1(x)) * 0 + x.repeat(1, 2)),
    "functional": lambda m, x: F.linear(m.act(m.fc1(x)), m.fc2.weight) + m.fc2.bias,
    "numpy": lambda m, x: m.fc2(torch.as_tensor(np.asarray(m.act(m.fc1(x)).detach()))),
    "comparison": lambda m, x: m.fc2((m.act(m.fc1(x)) > 0.1).float()),
    "backwards": lambda m, x: m.fc1(m.act(m.fc2(x.repeat(1, 2)))).narrow(-1, 0, 8),
}
each_trap = pytest.mark.parametrize("trap", TRAPS.values(), ids=list(TRAPS))
# Python tells a stand-in from a tensor, so only the trial can see these.
SEEN_BY_TRIAL: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "asks for the type": lambda m, x: m.fc2(h * 3 if isinstance(h := m.act(m.fc1(x)), Tensor) else h),
    "asks torch for it": lambda m, x: m.fc2(h * 3 if torch.is_tensor(h := m.act(m.fc1(x))) else h),
    "keeps it": keeps,
}


def outcome(model: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(3)
    return model(x)


@pytest.mark.parametrize("trap", [*TRAPS.values(), *SEEN_BY_TRIAL.values()], ids=[*TRAPS, *SEEN_BY_TRIAL])
def test_a_block_that_does_anything_else_is_not_patched(trap: Any, calls: Any):
    model, x = Inline(trap), torch.randn(3, 8)
    with torch.no_grad():
        y = outcome(model, x)
        report = patch(model)
        assert report.changed == 0 and report[0].outcome.startswith("not patched: "), report
        assert torch.equal(outcome(model, x), y)
    assert type(model.fc1) is type(model.fc2) is nn.Linear and type(model.act) is nn.ReLU


def test_a_block_that_returns_what_lies_between_is_not_patched():
    model: Any = Inline(lambda m, x: (m.fc2(h := m.act(m.fc1(x))), h))
    assert patch(model).changed == 0
    assert all(isinstance(part, Tensor) for part in model(torch.randn(3, 8)))


def test_x_may_change_where_no_trial_sees_it():
    """In inference mode, where nothing counts the writes."""

    def body(m: Any, x: Tensor) -> Tensor:
        h = m.act(m.fc1(x))
        if len(x) > 3:
            x.mul_(0.5)
        return m.fc2(h) + x

    model = Inline(body)
    with torch.inference_mode():
        expected = model(torch.ones(5, 8))
        assert patch(model).changed == 1
        torch.testing.assert_close(model(torch.ones(5, 8)), expected)


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


@each_trap
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


def test_patching_twice_changes_nothing_and_says_so():
    model = make("Bert")
    first = patch(model)
    kinds = [type(module) for module in model.modules()]
    again = patch(model)
    assert [type(module) for module in model.modules()] == kinds
    assert again.changed == 0 and [row.outcome for row in again] == ["already patched"] * len(first)
    undone = unpatch(model)
    assert undone.changed == 2 and [row[:2] for row in undone] == [row[:2] for row in first]
    assert unpatch(model) == [] and str(unpatch(model)) == "0 of 0 feed-forward blocks changed"


def test_long_stacks_pair_up():
    more = [nn.ReLU(), *mlp(nn.GELU()), nn.Dropout(0.1), nn.Linear(8, 16)]
    stack = nn.Sequential(*mlp(nn.ReLU()), *more).eval()
    x = torch.randn(2, 8)
    y = stack(x)
    assert [row.outcome for row in patch(stack)] == ["ffn, relu: 0 and 2", "ffn, gelu_erf: 4 and 6"]
    assert torch.allclose(stack(x), y, rtol=1e-5, atol=1e-6)


def test_one_module_in_two_places_is_one_block():
    block = mlp(nn.ReLU())
    model = nn.ModuleList([block, block])
    assert [row.path for row in patch(model)] == ["0"] and [row.path for row in unpatch(model)] == ["0"]


REASONS = {
    "gate": "what wi_0 gives the activation goes into mul (a gate has two weights, the operator one that "
    "holds both)",
    "hooks": "0 and 2 are no plain layers (one has hooks, a parametrization or another partner)",
    "float64": "its weights are Parameter of torch.float64, not float32, float16 or bfloat16",
    "experts": "transformers has a hook for its experts (import ffn_ops.hf and call "
    'model.set_experts_implementation("ffn_ops"))',
}


def test_the_report_says_why_not():
    hooked = mlp(nn.ReLU())
    hooked[0].register_forward_hook(lambda *given: None)
    gated = hf.T5Config(**T5, feed_forward_proj="gated-gelu")
    mixtral = hf.MixtralConfig(num_local_experts=2, num_key_value_heads=2, **TEXT)
    models = {
        "gate": hf.T5Model(gated),
        "hooks": hooked,
        "float64": mlp(nn.ReLU()).double(),
        "experts": hf.MixtralModel(mixtral),
    }
    for name, model in models.items():
        report = patch(model)
        assert {row.outcome for row in report} == {f"not patched: {REASONS[name]}"} and not report.changed
        assert not any(isinstance(module, patched.Patched) for module in model.modules())


def test_the_report_prints_equal_blocks_on_one_line():
    assert str(patch(make("T5"))) == (
        "4 of 4 feed-forward blocks changed\n"
        "    2 x encoder.block.*.layer.*.DenseReluDense (T5DenseActDense): ffn, relu: wi and wo\n"
        "    2 x decoder.block.*.layer.*.DenseReluDense (T5DenseActDense): ffn, relu: wi and wo"
    )


def test_blocks_that_do_not_run_alone_are_named():
    """DeBERTa's layer needs a mask, which patch cannot make up."""
    for row in patch(make("Deberta")):
        assert row.changed and "(not tried: alone it raises AttributeError" in row.outcome


def test_trying_leaves_no_trace():
    model = make("Bert").train()
    model.encoder.layer[0].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    patch(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_on_the_meta_device_is_patched_before_it_is_loaded():
    model = make("Bert")
    with torch.device("meta"):
        empty = hf.BertModel(model.config).eval()
    assert patch(empty).changed == 2
    empty.load_state_dict(model.state_dict(), assign=True)
    empty.embeddings = model.embeddings  # its buffers are not in the state_dict
    patch(model)
    with torch.no_grad():
        assert torch.equal(run(empty), run(model))


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


def test_a_changed_activation_computes_what_it_says_now():
    model, x = mlp(Scaled()), torch.randn(3, 8)
    assert patch(model).changed == 1
    model.eval()
    first = model(x)
    model[1].scale = 2.0
    y = model(x)
    unpatch(model)
    assert torch.equal(model(x), y) and not torch.equal(first, y)


class Scaled(nn.Module):
    scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * torch.clamp(x, min=0)


@pytest.mark.parametrize("where", [0, 2])
def test_a_layer_that_is_compiled_alone_hands_on_what_it_should(where: int):
    model, x = mlp(nn.ReLU()), torch.randn(3, 8)
    expected = model(x)
    patch(model)
    model[where].compile(backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)


def test_a_state_of_ones_own_is_pickled():
    model = mlp(Leaky())
    patch(model)
    copied = pickle.loads(pickle.dumps(model))
    x = torch.randn(3, 8)
    assert torch.equal(copied(x), model(x)) and not hasattr(copied[1], "cache")
    nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Identity())
    with pytest.raises(RuntimeError, match="parametrized"):
        pickle.dumps(model)


class Leaky(nn.ReLU):
    """An activation with something that cannot be pickled, and leaves it out."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = lambda x: x

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "cache"}


@pytest.mark.parametrize("change", [patch, unpatch])
def test_only_modules_are_taken(change: Any):
    wanted = r"model is a dict, but it must be a torch\.nn\.Module \(pass the model itself\)"
    with pytest.raises(ContractError, match=wanted):
        change({})
