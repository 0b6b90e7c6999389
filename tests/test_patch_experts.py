# SPDX-License-Identifier: Apache-2.0
"""ffn_ops/patch_experts.py: Switch and NLLB-MoE, whose experts have no hook, and all that users do with them
afterwards. test_patch.py has the dense blocks, and says what makes a patched model right."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import SEQ2SEQ, T5, arrays, hf, inputs, make, run
from native import KERNELS
from strategies import to_numpy
from tolerance import assert_moe_close
from torch import Tensor, nn

from ffn_ops import _native, patched
from ffn_ops.activation import FORMULAS
from ffn_ops.patch import patch, unpatch

pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

SWITCH = {**T5, "num_decoder_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1,
          "num_experts": 4, "expert_capacity": 1}  # fmt: skip
NLLB = {**SEQ2SEQ, "encoder_layers": 2, "decoder_layers": 2, "num_experts": 4, "encoder_sparse_step": 2,
        "decoder_sparse_step": 2, "expert_capacity": 6}  # fmt: skip
each_moe = pytest.mark.parametrize("family", ["SwitchTransformers", "NllbMoe"])


def make_moe(family: str) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(hf, f"{family}Config")(**(NLLB if family == "NllbMoe" else SWITCH))
    model = getattr(hf, f"{family}ForConditionalGeneration")(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn(parameter.shape))
    return model


def containers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "expert_0")]


def routed(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """What the model's router gives its experts for x."""
    sparse: Any = next(module for module in model.modules() if hasattr(module, "experts"))
    seen: list[tuple[Tensor, ...]] = []
    handle = sparse.experts.register_forward_pre_hook(lambda module, args: seen.append(args))
    sparse(x)
    handle.remove()
    return seen[0]


def loop(x: Tensor, ids: Tensor, weights: Tensor, w1: Tensor, w2: Tensor, form: str, **biases: Any) -> Tensor:
    """ffn.moe in x's dtype."""
    y = torch.zeros_like(x)
    for t in range(len(x)):
        for slot, e in enumerate(ids[t].tolist()):
            if e < len(w1):
                b1, b2 = (0 if bias is None else bias[e] for bias in (biases["bias1"], biases["bias2"]))
                h = FORMULAS[form].value(x[t] @ w1[e] + b1)
                y[t] += weights[t, slot].to(x.dtype) * (h @ w2[e] + b2)
    return y


@each_moe
def test_experts_are_one_call_with_what_the_router_chose(family: str, monkeypatch: pytest.MonkeyPatch):
    """In float64, and with weights that are exact in float32, which they pass through."""
    model = make_moe(family).double()
    x, selected, weights = routed(model, torch.randn(2, 7, 32).double())
    weights = weights.float().double()
    monkeypatch.setattr(patched, "FLOATS", (torch.float64,))
    monkeypatch.setattr(torch.ops.ffn, "moe", loop)
    container = containers(model)[0]
    if family == "NllbMoe":
        container.moe_token_dropout = 0.5
    with torch.no_grad():
        expected = container(x, selected, weights)
        report = patch(model)
        assert [row.outcome for row in report if "Experts" in row.module] == ["moe, relu: 4 experts"] * 2
        y = container(x, selected, weights)
    # Sums of at most 64 terms, in another order: some units of 2**-53.
    assert (y - expected).abs().max() <= 2**-40 * expected.abs().max()
    lost = (expected == 0).all(-1)
    assert torch.equal((y == 0).all(-1), lost)
    assert lost.any() or family == "NllbMoe"  # tokens beyond their expert's capacity


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_moe
def test_experts_are_within_the_operators_bound(family: str, dtype: torch.dtype, calls: Any):
    model = make_moe(family).to(dtype)
    patch(model)
    calls.clear()
    with torch.no_grad():
        run(model)
    moes = [call for call in calls if len(call[0]) == 6]
    assert len(moes) == 2
    for args, kwargs, y in moes:
        operands, biases = arrays(args, kwargs)
        assert_moe_close(to_numpy(y), *operands, **biases, kernel=KERNELS[_native.selected_isa()])


@each_moe
def test_a_patched_mixture_generates_the_same_and_saves_the_original_format(family: str, tmp_path: Any):
    model: Any = make_moe(family)
    state = copy.deepcopy(model.state_dict())
    parameters = dict(model.named_parameters())
    ids = inputs(model)["input_ids"]
    with torch.no_grad():
        expected = model.generate(input_ids=ids, max_new_tokens=6)
        patch(model)
        assert torch.equal(model.generate(input_ids=ids, max_new_tokens=6), expected)
    assert all(model.get_parameter(name) is parameter for name, parameter in parameters.items())
    model.save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path)
    for name, tensor in reloaded.state_dict().items():
        assert torch.equal(tensor, state[name])
    saved = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    unique = sum({parameter.data_ptr(): parameter.nbytes for parameter in model.parameters()}.values())
    assert unique <= saved < unique + 20_000  # each expert once, and a header
    unpatch(model)
    assert not any(isinstance(module, patched.Patched) for module in model.modules())


def replace_data(model: Any) -> Any:
    for container in containers(model):
        for parameter in container.expert_1.parameters():
            parameter.data = parameter.data.clone() * 2
    return model


def replace_parameter(model: Any) -> Any:
    for container in containers(model):
        linear = next(module for module in container.expert_1.modules() if isinstance(module, nn.Linear))
        linear.weight = nn.Parameter(linear.weight.detach() * 2)
    return model


def reload(model: Any) -> Any:
    model.load_state_dict({name: 1.5 * tensor for name, tensor in model.state_dict().items()})
    return model


def assign(model: Any) -> Any:
    # Not the experts' own memory: state_dict gives the parameters themselves.
    state = {name: tensor * 1.5 for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    return model


def train(model: Any) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    torch.manual_seed(4)
    run(model.train()).sin().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model.eval()


def hook(model: Any) -> Any:
    for container in containers(model):
        container.expert_1.register_forward_hook(lambda module, args, y: 2 * y)
    return model


def cast(model: Any) -> Any:
    return model.bfloat16().float()


CHANGES = [replace_data, replace_parameter, reload, assign, train, hook, copy.deepcopy, cast]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@each_moe
def test_experts_follow_their_parameters_wherever_they_go(family: str, change: Any, calls: Any):
    """patch makes them views of one memory, and this is what takes them out of it."""
    plain, patched = make_moe(family), make_moe(family)
    patch(patched)
    with torch.no_grad():
        run(patched)
        run(plain)  # NLLB's router keeps the capacity of its last call
    plain, patched = change(plain), change(patched)
    calls.clear()
    with torch.inference_mode():
        for _ in range(2):
            assert torch.allclose(run(patched), run(plain), rtol=1e-4, atol=1e-4)
    # With a hook on one expert the loop of before runs; and all others are one call again.
    assert len([call for call in calls if len(call[0]) == 6]) == (0 if change is hook else 4)
    train(patched)  # memory that was made in inference mode can still be trained


@each_moe
def test_experts_train_as_before(family: str, calls: Any):
    models = [make_moe(family), make_moe(family)]
    patch(models[1])
    calls.clear()
    for model in models:
        train(model)
    assert not calls
    for name, tensor in models[0].state_dict().items():
        assert torch.equal(tensor, models[1].state_dict()[name])


@pytest.mark.parametrize("make", [lambda: make("Bert"), lambda: make_moe("SwitchTransformers")])
def test_a_model_that_was_made_in_inference_mode_is_patched_too(make: Any, calls: Any):
    with torch.inference_mode():
        model = make()
        expected = run(model)
    assert patch(model).changed
    calls.clear()
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            # Sums of at most 64 terms in another order, a few layers deep.
            torch.testing.assert_close(run(model), expected, rtol=2**-18, atol=2**-18)
    assert calls


def test_experts_in_shared_memory_stay_there():
    model = make_moe("SwitchTransformers").share_memory()
    ids = inputs(model)
    with torch.no_grad():
        expected = model(**ids)[0]
        report = patch(model)
        assert not any(row.changed for row in report if "Experts" in row.module)
        assert all(p.is_shared() for p in model.parameters())
        torch.testing.assert_close(model(**ids)[0], expected)


def test_an_infinite_expert_without_weight_is_not_asked():
    container = containers(make_moe("NllbMoe"))[0]
    patch(container)
    container.expert_0.fc2.bias.data.fill_(torch.inf)
    mask, weights = F.one_hot(torch.ones(3, dtype=torch.long), 4), torch.zeros(3, 4)
    weights[:, 1] = 0.5
    with torch.no_grad():
        assert container(torch.randn(3, 32), mask, weights).isfinite().all()


def test_experts_whose_forward_was_replaced_are_not_patched():
    container = containers(make_moe("SwitchTransformers"))[0]
    before = container.forward
    container.forward = lambda *given: before(*given)
    assert patch(container)[0].outcome == (
        "not patched: its forward has been replaced, as hooks of a kind do"
    )


def test_experts_that_compute_something_else_are_not_patched():
    """As those of another version of transformers might."""
    container = containers(make_moe("SwitchTransformers"))[0]
    other = type(container)
    forward = {"forward": lambda self, *given: 2 * other.forward(self, *given)}
    changed = type(other.__name__, (other,), forward)
    container.__class__ = changed
    report = patch(container)
    assert report[0].outcome == "not patched: it computes something else than transformers 5.23's"
    assert type(container) is changed
