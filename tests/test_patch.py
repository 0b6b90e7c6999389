# SPDX-License-Identifier: Apache-2.0
"""ffn_ops/patch.py: what becomes of models of many families, and of blocks that only look like one.
test_patched.py has what users do with a model afterwards.

Two things make a patched model right, and each has its own proof. What flows where: with the operators
replaced by the steps that they stand for, the model gives its own bits. What the operators answer: each call
that a model makes is held to tolerance.py's bound.
"""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from blocks import SEEN_BY_TRIAL, TRAPS, Inline, mlp, outcome
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


@pytest.mark.parametrize("change", [patch, unpatch])
def test_only_modules_are_taken(change: Any):
    wanted = r"model is a dict, but it must be a torch\.nn\.Module \(pass the model itself\)"
    with pytest.raises(ContractError, match=wanted):
        change({})
