# SPDX-License-Identifier: Apache-2.0
"""ffn_ops.hf on every experts class that transformers decorates, each by itself, and what it refuses.

test_hf_packed.py is about pack_, test_hf_models.py has whole models.
"""

import re
import subprocess
import sys
from typing import Any

import pytest
import torch
import transformers
from experts import (
    CLASSES,
    INNER,
    UNFUSED,
    Calls,
    E,
    H,
    K,
    T,
    any_experts,
    assert_close,
    assert_within,
    eager,
    exact_and_bound,
    experts,
    inputs,
)
from torch import Tensor, nn
from transformers.activations import ACT2CLS

from ffn_ops import hf
from ffn_ops.contract import ContractError

pytestmark = pytest.mark.cpu_only
each_class = pytest.mark.parametrize("name", CLASSES)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
few = pytest.mark.parametrize("name", ["MixtralExperts", "GptOssExperts", "NemotronHExperts", "AriaExperts"])


def test_every_decorated_class_is_found():
    assert len(CLASSES) > 1
    if transformers.__version__ == "5.23.0":
        assert len(CLASSES) == 65 and set(CLASSES) >= UNFUSED


@each_dtype
@each_class
@torch.no_grad()
def test_it_agrees_with_eager(name: str, dtype: torch.dtype):
    module, call = experts(name, dtype), inputs(dtype)
    with Calls() as calls:
        y = module(*call)
    assert calls == ({"grouped_mm": 2} if name in UNFUSED else {"moe": 1})
    assert (y.dtype, y.shape) == (dtype, (T, H))
    assert_close(y, module, *call)


@few
@torch.no_grad()
def test_float16(name: str):
    module, call = experts(name, torch.float16), inputs(torch.float16)
    assert_close(module(*call), module, *call)


@each_dtype
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_gate", [False, True])
@torch.no_grad()
def test_every_combination_of_flags(has_gate: bool, has_bias: bool, is_transposed: bool, dtype: torch.dtype):
    """Most have no class in transformers yet."""
    flags = {"has_gate": has_gate, "has_bias": has_bias, "is_transposed": is_transposed}
    module, call = any_experts(**flags).to(dtype), inputs(dtype)
    with Calls() as calls:
        y = module(*call)
    assert calls == {"moe": 1}
    exact = exact_and_bound(module, *call)
    assert_within(y, *exact)
    hf.pack_(module)
    assert_within(module(*call), *exact)


@each_class
@torch.no_grad()
def test_sentinels_of_expert_parallelism_contribute_nothing(name: str):
    module, (x, ids, weights) = experts(name), inputs()
    module._is_expert_parallel = True
    off_rank = torch.rand(ids.shape) < 0.5
    off_rank[0] = True
    weights = weights.masked_fill(off_rank, 0)
    expected = module(x, ids, weights)
    for sentinel in (E, E + 3):
        assert torch.equal(module(x, ids.masked_fill(off_rank, sentinel), weights), expected)


@torch.no_grad()
def test_an_id_of_num_experts_stands_for_no_expert():
    """As in eager, also without expert parallelism: Zaya's router uses it to skip."""
    module, (x, ids, weights) = experts("ZayaExperts"), inputs()
    ids[1] = ids[2, 0] = E
    assert not module(x, ids, weights)[1].any()
    torch.testing.assert_close(module(x, ids, weights), eager(module, x, ids, weights))


@pytest.mark.parametrize("act", sorted(set(ACT2CLS) - {"prelu", "xielu"}))  # those two have parameters
@pytest.mark.parametrize("name", ["MixtralExperts", "NemotronHExperts"])
@torch.no_grad()
def test_every_activation(name: str, act: str):
    module, call = experts(name, hidden_act=act, mlp_hidden_act=act), inputs()
    with Calls() as calls:
        y = module(*call)
    tanh = ("gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python_tanh")
    known = ("silu", "swish", "relu", *tanh)
    if name == "NemotronHExperts":
        known = (*known, "relu2", "gelu", "gelu_python", "quick_gelu")
    assert calls == ({"moe": 1} if act in known else {"grouped_mm": 2})
    assert_close(y, module, *call)


def test_somebody_who_watches_the_activation_sees_it():
    module, call, seen = experts("MixtralExperts"), inputs(), []
    module.act_fn.register_forward_hook(lambda *event: seen.append(event))
    module(*call)
    assert seen


@torch.no_grad()
def test_routing_weights_are_not_rounded():
    """bfloat16 experts with float32 routing weights: rounding those would move y by 2**-9 of itself."""
    module, (x, ids, weights) = experts("MixtralExperts", torch.bfloat16), inputs(torch.bfloat16)
    unit = torch.full_like(weights, 1 + 2.0**-9)
    small = module(x, ids, unit)
    with Calls():
        large = module(x, ids, unit.bfloat16())
    assert not torch.equal(small, large)
    double = module(x, ids, unit.double())
    assert torch.equal(small, double)


@few
def test_it_trains(name: str):
    module, (x, ids, weights) = experts(name), inputs()

    def gradients(forward: Any) -> list[Tensor]:
        leaves = [x.clone().requires_grad_(), weights.clone().requires_grad_(), *module.parameters()]
        return list(torch.autograd.grad((forward(leaves[0], ids, leaves[1]) ** 2).sum(), leaves))

    for ours, theirs in zip(gradients(module), gradients(lambda *call: eager(module, *call)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


def test_updates_of_plain_weights_are_seen():
    module, call = experts("MixtralExperts"), inputs()
    before = module(*call)
    with torch.no_grad():
        module.down_proj.mul_(2)
    torch.testing.assert_close(module(*call), 2 * before)
    module.load_state_dict(
        dict.fromkeys(module.state_dict(), torch.zeros(1)) | experts("MixtralExperts").state_dict()
    )
    assert torch.equal(module(*call), before)


@pytest.mark.parametrize("name", ["MixtralExperts", "GptOssExperts"])
@pytest.mark.parametrize("pack", [False, True])
@torch.no_grad()
def test_it_compiles_in_one_graph(name: str, pack: bool):
    module = experts(name)
    if pack:
        hf.pack_(module)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for rows in (T, 3, 1):
        assert torch.equal(compiled(*inputs(rows=rows)), module(*inputs(rows=rows)))


def test_one_token_and_none():
    for name in ("MixtralExperts", "GptOssExperts"):
        module = experts(name)
        assert module(*inputs(rows=1)).shape == (1, H) and module(*inputs(rows=0)).shape == (0, H)


# What the operators do not compute


def falls_back(module: nn.Module, why: str, dtype: torch.dtype = torch.float32) -> None:
    hf._warned.clear()
    call = inputs(dtype)
    with pytest.warns(UserWarning, match=re.escape(why)) as caught, Calls() as calls:
        y = module(*call)
        module(*call)
    assert len(caught) == 1 and not calls
    assert torch.equal(y, eager(module, *call))


def test_float64_runs_eager_with_one_warning():
    why = "MixtralExperts runs its eager implementation: its gate_up_proj is torch.float64, but"
    falls_back(experts("MixtralExperts", torch.float64), why, torch.float64)


def test_interleaved_columns_of_a_default_gate_are_not_guessed():
    module = experts("MixtralExperts")
    module.is_concatenated = False
    falls_back(module, "interleaved, but its _apply_gate takes them as halves")


def test_a_flag_of_a_later_version_is_not_guessed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(hf._UNKNOWN_FLAGS, "has_second_gate", False)
    module, call = experts("MixtralExperts"), inputs()
    with Calls() as calls:
        module(*call)
    assert calls == {"moe": 1}
    module.has_second_gate = True
    falls_back(module, "it has has_second_gate=True, which ffn_ops does not know")


def test_the_installed_version_has_no_flag_that_we_do_not_know():
    assert not hf._UNKNOWN_FLAGS


def test_fp8_experts_have_the_implementation_too():
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS

    assert ALL_FP8_EXPERTS_FUNCTIONS.get_interface("ffn_ops", None) is hf.experts_forward
    module = experts("MixtralExperts")
    module.gate_up_proj = nn.Parameter(module.gate_up_proj.to(torch.float8_e4m3fn), requires_grad=False)
    assert "its gate_up_proj is torch.float8_e4m3fn" in str(hf._why_eager(module, torch.bfloat16))


BAD = {
    "MixtralExperts.gate_up_proj has shape [4, 32, 32], but num_experts is 5": {"num_experts": 5},
    "MixtralExperts.down_proj has shape [3, 32, 16], but num_experts is 4": {
        "down_proj": nn.Parameter(torch.zeros(3, H, INNER))
    },
    "hidden_states has a last dimension of 31, MixtralExperts.gate_up_proj takes 32 and down_proj gives 32": {
        "x": torch.zeros(T, H - 1)
    },
    "hidden_states has a last dimension of 32, MixtralExperts.gate_up_proj takes 32 and down_proj gives 31": {
        "down_proj": nn.Parameter(torch.zeros(E, H - 1, INNER))
    },
    "weight1 has N1 = 32 columns and weight2 K2 = 15 rows, but 'swiglu' needs N1 = 2 * K2": {
        "down_proj": nn.Parameter(torch.zeros(E, H, INNER - 1))
    },
    "MixtralExperts.gate_up_proj is on meta and hidden_states on cpu, but all tensors of a call": {
        "gate_up_proj": nn.Parameter(torch.zeros(E, 2 * INNER, H, device="meta"))
    },
    "hidden_states has shape [6, 32], top_k_index [6, 2] and top_k_weights [6, 3], but they must be": {
        "weights": torch.zeros(T, 3)
    },
    "hidden_states has shape [2, 3, 32], top_k_index [6, 2] and top_k_weights [6, 2], but they must be": {
        "x": torch.zeros(2, 3, H)
    },
    "top_k_index holds -1, but experts are numbered from 0": {"ids": torch.full((T, K), -1)},
    "top_k_index holds 5, but MixtralExperts has 4 experts, and 4 stands for none": {
        "ids": torch.full((T, K), 5)
    },
}


@pytest.mark.parametrize("sentence", BAD)
def test_bad_input_is_named(sentence: str):
    module = experts("MixtralExperts")
    call = dict(zip(("x", "ids", "weights"), inputs(), strict=True))
    for name, value in BAD[sentence].items():
        if name in call:
            call[name] = value
        else:
            setattr(module, name, value)
    with pytest.raises((ContractError, RuntimeError)) as refused:
        module(*call.values())
    assert str(refused.value).startswith(sentence)
    assert str(refused.value).endswith(")")  # the fix


# Without transformers


STUBS = {
    "transformers is not installed, but ffn_ops.hf is an experts implementation of it "
    "(pip install 'ffn-ops[hf]')": "sys.modules['transformers'] = None",
    "transformers is 4.57.0, but ffn_ops.hf needs transformers.integrations.moe as it is in 5.7 to 5.23 "
    "(pip install 'ffn-ops[hf]'; ": "old = type(sys)('transformers'); old.__version__ = '4.57.0'; "
    "old.__path__ = []; sys.modules['transformers'] = old",
    "transformers is 5.0.0, but ffn_ops.hf needs transformers.integrations.moe as it is in 5.7 to 5.23 "
    "(pip install 'ffn-ops[hf]'; KeyError('is_concatenated'))": "import transformers; "
    "from transformers.integrations import moe; transformers.__version__ = '5.0.0'; "
    "del moe.use_experts_implementation.__kwdefaults__['is_concatenated']",
}


@pytest.mark.parametrize("sentence", STUBS)
def test_transformers_missing_or_too_old(sentence: str):
    code = (
        f"import sys; {STUBS[sentence]}\n"
        "import ffn_ops\n"
        "try:\n    import ffn_ops.hf\n"
        "except ImportError as error:\n    print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.startswith(sentence)
