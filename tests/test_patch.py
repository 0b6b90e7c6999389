# SPDX-License-Identifier: Apache-2.0
"""ffn_ops/patch.py: what becomes of models of many families, of blocks that only look like one, and of all
that users do with a model afterwards.

Two things make a patched model right, and each has its own proof. What flows where: with the operators
replaced by the steps that they stand for, the model gives its own bits. What the operators answer: each call
that a model makes is held to tolerance.py's bound.
"""

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from native import KERNELS
from strategies import to_numpy
from tolerance import assert_close, assert_moe_close
from torch import Tensor, nn

from ffn_ops import ContractError, _native, patch_dense, patched
from ffn_ops.activation import FORMULAS
from ffn_ops.patch import patch, unpatch

hf = pytest.importorskip("transformers")
pytestmark = [pytest.mark.cpu_only, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TEXT = {"vocab_size": 50, **SIZES}
IMAGE = {"image_size": 16, "patch_size": 8, **SIZES}
SEQ2SEQ = {"vocab_size": 50, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64,
           "encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 64,
           "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}  # fmt: skip
T5 = {"vocab_size": 50, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2,
      "decoder_start_token_id": 0}  # fmt: skip
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2}
GPT2 = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 2, **SPECIAL}
DISTIL = {"vocab_size": 50, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}
# Family -> config class and its arguments, the activation, the number of blocks.
FAMILIES: dict[str, tuple[str, dict[str, Any], str, int]] = {
    "Bert": ("BertConfig", TEXT, "gelu_erf", 2),
    "Roberta": ("RobertaConfig", TEXT, "gelu_erf", 2),
    "Electra": ("ElectraConfig", {"embedding_size": 16, **TEXT}, "gelu_erf", 2),
    "Deberta": ("DebertaConfig", TEXT, "gelu_erf", 2),
    "Albert": ("AlbertConfig", {"embedding_size": 16, **TEXT}, "gelu", 1),
    "DistilBert": ("DistilBertConfig", DISTIL, "gelu_erf", 2),
    "ViT": ("ViTConfig", IMAGE, "gelu_erf", 2),
    "CLIPVision": ("CLIPVisionConfig", IMAGE, "fastgelu", 2),
    "T5": ("T5Config", T5, "relu", 4),
    "GPT2": ("GPT2Config", GPT2, "gelu", 2),
    "OPT": ("OPTConfig", {"ffn_dim": 64, "word_embed_proj_dim": 32, **TEXT}, "relu", 2),
    "Bart": ("BartConfig", SEQ2SEQ, "gelu_erf", 2),
    "Whisper": ("WhisperConfig", {"num_mel_bins": 8, "max_source_positions": 10, **SEQ2SEQ}, "gelu_erf", 2),
    "Phi": ("PhiConfig", {**TEXT, **SPECIAL}, "gelu", 2),
    "Bloom": ("BloomConfig", {"vocab_size": 50, "hidden_size": 32, "n_layer": 2, "n_head": 2}, "gelu", 2),
    "Nemotron": ("NemotronConfig", {"num_key_value_heads": 2, **TEXT}, "relu2", 2),
}  # fmt: skip
each_family = pytest.mark.parametrize("family", FAMILIES)
some_families = pytest.mark.parametrize("family", ["Bert", "ViT", "T5", "GPT2", "OPT"])


def make(family: str, **changes: Any) -> nn.Module:
    config, arguments, *_ = FAMILIES[family]
    torch.manual_seed(0)
    model = getattr(hf, f"{family}Model")(getattr(hf, config)(**arguments, **changes)).eval()
    for parameter in model.parameters():  # biases too; Switch's own start at 1e-2
        parameter.data.add_(0.1 * torch.randn(parameter.shape))
    return model


def inputs(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 50, (2, 5), generator=generator)
    if model.main_input_name == "input_ids":
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    else:
        shape = (2, 3, 16, 16) if model.main_input_name == "pixel_values" else (2, 8, 20)
        given = {model.main_input_name: torch.randn(shape, generator=generator).to(model.dtype)}
    return {**given, "decoder_input_ids": ids} if model.config.is_encoder_decoder else given


def run(model: nn.Module) -> Tensor:
    return model(**inputs(model))[0]


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


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Many tiny products: threads would only wait for each other where other processes run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """Every call of torch.ops.ffn.ffn and ffn.moe: its arguments, by position and by name, and y."""
    made: list[tuple[Any, ...]] = []

    def recording(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            y = op(*args, **kwargs)
            made.append((args, kwargs, y))
            return y

        return call

    for name in ("ffn", "moe"):
        monkeypatch.setattr(torch.ops.ffn, name, recording(getattr(torch.ops.ffn, name)))
    yield made


def arrays(args: Any, kwargs: Any) -> tuple[list[Any], dict[str, Any]]:
    def array(value: Any) -> Any:
        return to_numpy(value.detach()) if isinstance(value, Tensor) else value

    return [array(value) for value in args], {name: array(value) for name, value in kwargs.items()}


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


@pytest.mark.parametrize("change", [patch, unpatch])
def test_only_modules_are_taken(change: Any):
    wanted = r"model is a dict, but it must be a torch\.nn\.Module \(pass the model itself\)"
    with pytest.raises(ContractError, match=wanted):
        change({})


# --- Experts ---

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
    monkeypatch.setattr(patched, "DTYPES", (torch.float64,))
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
