# SPDX-License-Identifier: Apache-2.0
"""ffn_ops.hf.pack_: the same results, the original state_dict, and everything else refused by name."""

import copy
import io
import weakref
from functools import partial

import pytest
import torch
from experts import CLASSES, INNER, E, H, assert_within, eager, exact_and_bound, experts, inputs
from torch import Tensor, nn

import ffn_ops
from ffn_ops import hf
from ffn_ops.contract import ContractError
from ffn_ops.packing import prepack

pytestmark = pytest.mark.cpu_only
each_class = pytest.mark.parametrize("name", CLASSES)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
few = pytest.mark.parametrize("name", ["MixtralExperts", "GptOssExperts", "NemotronHExperts", "AriaExperts"])


def packed(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    module = experts(name, dtype)
    assert len(hf.pack_(module).packed) == 2
    return module


def same(state: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Names, order, dtypes, layouts and bits."""
    return list(state) == list(other) and all(
        (a.dtype, a.stride()) == (b.dtype, b.stride()) and torch.equal(a, b)
        for a, b in zip(state.values(), other.values(), strict=True)
    )


@each_dtype
@each_class
@torch.no_grad()
def test_packed_weights_compute_the_same_and_give_the_original_back(name: str, dtype: torch.dtype):
    plain, call = experts(name, dtype), inputs(dtype)
    module = packed(name, dtype)
    assert_within(module(*call), *exact_and_bound(plain, *call))
    assert same(module.state_dict(), plain.state_dict())
    shapes = [(n, p.shape, p.dtype, p.device) for n, p in plain.named_parameters()]
    assert [(n, p.shape, p.dtype, p.device) for n, p in module.named_parameters()] == shapes


@few
@torch.no_grad()
def test_load_state_dict_packs_again(name: str):
    module, call = packed(name), inputs()
    other = experts(name)
    for parameter in other.parameters():
        parameter.mul_(1.25)
    for assign in (False, True):
        blocks = [p.block.data_ptr() for p in module.parameters() if isinstance(p, hf.PackedWeight)]
        module.load_state_dict(other.state_dict(), assign=assign)
        assert same(module.state_dict(), other.state_dict())
        assert blocks == [p.block.data_ptr() for p in module.parameters() if isinstance(p, hf.PackedWeight)]
        torch.testing.assert_close(module(*call), other(*call))
        for parameter in other.parameters():
            parameter.mul_(0.5)
    module.load_state_dict({key: value.bfloat16() for key, value in other.state_dict().items()})
    torch.testing.assert_close(module(*call), other.bfloat16().float()(*call))
    wrong = other.state_dict() | {"down_proj": torch.zeros(1, H, INNER)}
    with pytest.raises(RuntimeError, match="size mismatch for down_proj: copying a param with shape"):
        module.load_state_dict(wrong)
    wrong.pop("down_proj")
    with pytest.raises(RuntimeError, match=r"Missing key.*down_proj"):
        module.load_state_dict(wrong)


@few
@torch.no_grad()
def test_copies_and_casts_stay_packed(name: str):
    module, call = packed(name), inputs()
    y = module(*call)
    twin = copy.deepcopy(module)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    loaded = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    for other in (twin, loaded):
        assert torch.equal(other(*call), y) and same(other.state_dict(), module.state_dict())
        assert isinstance(other.down_proj, hf.PackedWeight)
        assert other.down_proj.block.data_ptr() != module.down_proj.block.data_ptr()
    twin.load_state_dict(
        dict.fromkeys(twin.state_dict()) | {k: v * 0 for k, v in module.state_dict().items()}
    )
    assert torch.equal(module(*call), y)
    module.bfloat16()
    expected = experts(name).bfloat16()
    assert same(module.state_dict(), expected.state_dict()) and isinstance(module.down_proj, hf.PackedWeight)
    call = inputs(torch.bfloat16)
    assert torch.equal(module(*call), packed(name, torch.bfloat16)(*call))


INFERENCE = ", but packed weights are for inference only"
ONLY = ', but only experts_implementation="ffn_ops" reads packed weights'
REFUSED = {
    f"down_proj is packed, and requires_grad was to be set{INFERENCE}": [
        lambda m: m.requires_grad_(), lambda m: setattr(m.down_proj, "requires_grad", True),
    ],
    f"down_proj is packed, and aten.mul_.Tensor writes to it{INFERENCE}": [lambda m: m.down_proj.mul_(2)],
    f"down_proj is packed, and aten.copy_.default writes to it{INFERENCE}": [
        lambda m: m.down_proj.data.copy_(torch.zeros(E, H, INNER)),
        lambda m: m.down_proj.copy_(torch.zeros(E, H, INNER)),
    ],
    f"down_proj is packed, and its data was to be replaced{INFERENCE}": [
        lambda m: setattr(m.down_proj, "data", torch.zeros(E, H, INNER)),
    ],
    f"down_proj is packed, and aten.select.int asks for its values{ONLY}": [lambda m: m.down_proj[0].zero_()],
    f"gate_up_proj is packed, and aten.select.int asks for its values{ONLY}": [lambda m: eager(m, *inputs())],
    f"aten.stack.default has a packed weight among its arguments{ONLY}": [
        lambda m: torch.stack([m.down_proj]),
    ],
    "gate_up_proj is packed for the CPU's kernels, but it was to move to meta": [lambda m: m.to("meta")],
    "gate_up_proj is packed, but it was to become torch.float64": [lambda m: m.double()],
}  # fmt: skip


@pytest.mark.parametrize("sentence", REFUSED)
@torch.no_grad()
def test_a_packed_weight_refuses_by_name(sentence: str):
    module = packed("MixtralExperts")
    if "down_proj" in sentence:
        del module.gate_up_proj
    before = module.state_dict()
    for action in REFUSED[sentence]:
        with pytest.raises(ContractError) as refused:
            action(module)
        assert str(refused.value).startswith(sentence) and str(refused.value).endswith(")")
        assert same(module.state_dict(), before)
    repr(module.down_proj)


def test_pack_says_what_it_cannot_pack():
    with pytest.raises(ContractError, match="Linear has no experts that an experts_implementation reaches"):
        hf.pack_(nn.Linear(2, 2))
    module = experts("MixtralExperts")
    module.config._experts_implementation = "grouped_mm"
    with pytest.raises(ContractError, match='experts_implementation="grouped_mm", but only "ffn_ops" reads'):
        hf.pack_(nn.ModuleList([module]))
    mixed = nn.ModuleDict(
        {"wide": experts("MixtralExperts", torch.float64), "ours": experts("GptOssExperts")}
        | {"away": experts("AriaExperts").to("meta")}
    )
    report = hf.pack_(mixed)
    assert report.packed == ["ours.gate_up_proj", "ours.down_proj"]
    assert "float64" in report.skipped["wide"] and "are on meta" in report.skipped["away"]
    assert hf.pack_(mixed) == report  # again, with nothing left to do


@torch.no_grad()
def test_layers_that_share_a_weight_share_its_packed_form():
    first, second, call = experts("MixtralExperts"), experts("MixtralExperts"), inputs()
    second.down_proj = first.down_proj
    y = second(*call)
    report = hf.pack_(nn.ModuleList([first, second]))
    assert first.down_proj is second.down_proj and len(report.packed) == 3
    torch.testing.assert_close(second(*call), y)


def test_packed_in_inference_mode_and_used_outside():
    module, call = experts("MixtralExperts"), inputs()
    with torch.inference_mode():
        hf.pack_(module)
        assert same(module.state_dict(), experts("MixtralExperts").state_dict())
        module(*call)
    x = call[0].requires_grad_()
    with pytest.raises(RuntimeError, match="ffn has no gradient beside integer or prepacked weights"):
        module(x, *call[1:]).sum().backward()


def test_originals_are_freed_one_after_the_other(monkeypatch: pytest.MonkeyPatch):
    layers = nn.ModuleList([experts("MixtralExperts"), experts("GptOssExperts")])
    weights = [weakref.ref(p) for p in layers.parameters() if p.dim() == 3]
    alive: list[int] = []

    def watched(matrices: list[Tensor]) -> Tensor:
        assert isinstance(matrices, list)  # views, so that prepack copies one expert at a time
        alive.append(sum(weight() is not None for weight in weights))
        return prepack(matrices)

    monkeypatch.setattr(hf, "prepack", watched)
    hf.pack_(layers)
    assert alive == [4, 3, 2, 1] and not any(weight() is not None for weight in weights)


@torch.no_grad()
def test_a_new_parameter_takes_a_packed_ones_place():
    module, call = packed("MixtralExperts"), inputs()
    y = module(*call)
    module.down_proj = nn.Parameter(module.down_proj.unpacked() * 2)
    torch.testing.assert_close(module(*call), 2 * y)


@torch.no_grad()
def test_inference_mode_casts_as_elsewhere():
    module = packed("MixtralExperts")
    with torch.inference_mode():
        same_module = module.to("cpu").float()
        assert same_module(*inputs()).isfinite().all()
        assert module.bfloat16()(*inputs(torch.bfloat16)).dtype == torch.bfloat16


def test_memory_is_shared_and_addresses_are_refused():
    module = packed("MixtralExperts").share_memory()
    weight = next(p for p in module.parameters() if isinstance(p, hf.PackedWeight))
    assert weight.is_shared() and weight.block.is_shared()
    each = partial(weight.apply_, float)
    for read in (weight.data_ptr, weight.__dlpack__, weight.numpy, weight.tolist, each):
        with pytest.raises(ContractError, match="is packed, and"):
            read()


@torch.no_grad()
def test_hidden_states_of_another_dtype():
    module, (x, ids, weights) = packed("MixtralExperts"), inputs()
    with pytest.raises(ContractError, match=r"hidden_states is torch.bfloat16, but .* is packed in"):
        module(x.bfloat16(), ids, weights)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x.bfloat16(), ids, weights)
    assert torch.equal(y, module(x.bfloat16().float(), ids, weights).bfloat16())


@torch.no_grad()
def test_a_packed_models_parameters_load_into_another():
    module, other = packed("MixtralExperts"), packed("MixtralExperts")
    other.load_state_dict({n: p * 2 for n, p in experts("MixtralExperts").named_parameters()})
    module.load_state_dict(dict(other.named_parameters()))
    assert same(module.state_dict(), other.state_dict())


def test_what_is_no_model_of_transformers_is_sent_elsewhere():
    with pytest.raises(ContractError, match="model is a str, but it must be a"):
        hf.pack_("a/path")
    with pytest.raises(ContractError, match=r"an ffn_ops.MoE has a pack_ of its own"):
        hf.pack_(ffn_ops.MoE(8, 8, 4, 2))
