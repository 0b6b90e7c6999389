# SPDX-License-Identifier: Apache-2.0
"""ffn_ops.hf in whole text models of transformers, from tiny random configs and without a network.

Each is compared with its own eager experts, forward and `generate`. test_hf.py has the experts by themselves.
"""

import re
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from experts import CLASSES
from torch import nn
from transformers.integrations.moe import ExpertsInterface

from ffn_ops import hf

pytestmark = pytest.mark.cpu_only

# What a config is given if it has a field of the name.
TINY: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4,
    "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "n_shared_experts": 1, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "qk_head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MULTI_HEAD = {"num_key_value_heads": 4}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}

# Causal language models, and what their configs need beyond TINY.
CAUSAL: dict[str, dict[str, Any]] = {
    "Afmoe": {},
    "AriaText": {},
    "AXK1": MULTI_HEAD,
    "AXK2": MULTI_HEAD,
    "BailingHybrid": MULTI_HEAD | LINEAR,
    "Beam": {"mlp_layer_types": ["dense", "sparse"]},
    "Cohere2Moe": {},
    "DeepseekV2": MULTI_HEAD,
    "DeepseekV3": MULTI_HEAD,
    "DeepseekV32": MULTI_HEAD,
    "DeepseekV4": {},
    "Dots1": {},
    "Dots3Note": MULTI_HEAD,
    "Ernie4_5_Moe": {},
    "ExaoneMoe": {},
    "FlexOlmo": {},
    "Flint": {"mlp_only_layers": []},
    "Gemma4": {
        "enable_moe_block": True, "top_k_experts": 2, "vocab_size_per_layer_input": 96, "global_head_dim": 8,
    },
    "Glm4Moe": {},
    "Glm4MoeLite": MULTI_HEAD,
    "GlmMoeDsa": MULTI_HEAD,
    "GptOss": {},
    "GraniteMoe": {},
    "GraniteMoeHybrid": {"mamba_n_heads": 8, "layer_types": ["mamba", "attention"]},
    "GraniteMoeSWA": {},
    "GraniteMoeShared": {},
    "HYV3": {},
    "HYV4": {},
    "HunYuanMoEV1": {},
    "Inkling": {},
    "Inkling2": {},
    "Jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "KimiLinear": MULTI_HEAD | LINEAR,
    "Kolibri1": {},
    "Laguna": {},
    "Lfm2Moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 0},
    "Mellum": {},
    "MiMoV2Flash": {},
    "MiniMax": {},
    "MiniMaxM2": {},
    "MiniMaxM3VL": {},
    "Mistral4": MULTI_HEAD | {"head_dim": 16},
    "Mixtral": {},
    "NemotronH": {},
    "Olmoe": {},
    "Phimoe": {},
    "Qwen2Moe": {},
    "Qwen3Moe": {},
    "Qwen3Next": LINEAR,
    "Qwen3_5Moe": LINEAR,
    "Qwen4Exp": LINEAR | {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
        "indexer_compress_ratio": 2, "hc_lowrank": 8, "ngram_vocab_size_base": 64,
    },
    "SolarOpen": {},
    "Zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
# Models for images or sound too, whose text model has no head to generate with, and one that labels tokens.
FORWARD_ONLY: dict[str, dict[str, Any]] = {
    "DeepseekOcr2TextModel": {"mlp_layer_types": ["dense", "sparse"]},
    "DiffusionGemmaEncoderTextModel": {"top_k_experts": 2, "global_head_dim": 8},
    "Ernie4_5_VLMoeTextModel": {
        "moe_intermediate_size": [16, 16],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    },
    "Glm4vMoeTextModel": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
                            "mrope_section": [1, 1, 0]},
    },
    "Glm5NextTextModel": MULTI_HEAD | LINEAR | {
        "qk_rope_head_dim": 0, "qk_head_dim": 8, "mlp_layer_types": ["dense", "sparse"],
    },
    "MistralLarge4TextModel": MULTI_HEAD,
    "MuseSparkTextModel": {},
    "OpenAIPrivacyFilterForTokenClassification": {},
    "Qwen3OmniMoeTalkerModel": {"shared_expert_intermediate_size": 16},
    "Qwen3OmniMoeThinkerTextModel": {},
    "Qwen3VLMoeTextModel": {},
    "UnlimitedOcrTextModel": {},
}  # fmt: skip
NO_TOKENS = {"Qwen3OmniMoeTalkerModel"}  # it takes embeddings only
MODELS = {f"{name}ForCausalLM": values for name, values in CAUSAL.items()} | FORWARD_ONLY
# Decorated experts classes that are in none of these models, and why.
UNTESTED: dict[str, str] = {}

# A sum has at most 64 terms, in two products of two layers, and what follows them amplifies by less than 16.
TOLERANCE = 64 * 2 * 2 * 16 * 2.0**-24


@cache
def defining() -> dict[str, str]:
    """The module of each class that is defined beside decorated experts."""
    return {
        name: module
        for module in dict.fromkeys(CLASSES.values())
        for name in re.findall(
            r"^class (\w+)", Path(find_spec(module).origin).read_text(encoding="utf-8"), re.M
        )
    }


def tiny(name: str, values: dict[str, Any]) -> nn.Module:
    model_class = getattr(import_module(defining()[name]), name)
    config_class = model_class.config_class
    default = config_class()
    fields = {*default.to_dict(), *default.attribute_map}
    config = config_class(**{key: value for key, value in TINY.items() if key in fields} | values)
    torch.manual_seed(0)
    model = model_class(config).eval()
    for module in model.modules():
        if hf._is_experts(module):
            for parameter in module.parameters():  # initialized models hardly hear their experts
                nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The class names of the experts that ran through ffn_ops; going on to eager would fail as a warning."""
    calls: list[str] = []

    def counting(self: nn.Module, *call: torch.Tensor) -> torch.Tensor:
        calls.append(type(self).__name__)
        return hf.experts_forward(self, *call)

    monkeypatch.setitem(ExpertsInterface._global_mapping, hf.NAME, counting)
    return calls


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_model_computes_what_it_does_with_eager_experts(name: str, counter: list[str]):
    model = tiny(name, MODELS[name])
    ids = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(0))
    given = {"inputs_embeds": torch.randn(2, 7, 32)} if name in NO_TOKENS else {"input_ids": ids}

    def run(implementation: str) -> tuple[torch.Tensor, ...]:
        model.set_experts_implementation(implementation)
        tokens = model.generate(ids, max_new_tokens=3, do_sample=False) if name not in FORWARD_ONLY else ids
        return model(**given)[0], tokens

    expected, expected_tokens = run("eager")
    assert not counter
    y, tokens = run("ffn_ops")
    assert len(counter) >= (1 if name in FORWARD_ONLY else 1 + 3)
    assert model.get_experts_implementation()[""] == "ffn_ops"
    error = (y - expected).abs().max() / expected.abs().max()
    assert error <= TOLERANCE
    assert torch.equal(tokens, expected_tokens)
    for module in filter(hf._is_experts, model.modules()):
        for parameter in module.parameters():
            parameter.zero_()
    assert (model(**given)[0] - expected).abs().max() / expected.abs().max() > 100 * TOLERANCE  # they matter


def test_every_experts_class_is_in_a_model_or_named_with_the_reason():
    if transformers.__version__ != "5.23.0":
        pytest.skip(
            f"the tables are complete for transformers 5.23.0, and this is {transformers.__version__}"
        )
    assert len(MODELS) >= 40
    with torch.device("meta"):
        found = {
            type(module).__name__
            for name, values in MODELS.items()
            for module in tiny(name, values).modules()
            if hf._is_experts(module)
        }
    assert found.isdisjoint(UNTESTED)
    assert found | set(UNTESTED) == set(CLASSES)


@torch.no_grad()
def test_from_pretrained_and_pack_and_save_pretrained(tmp_path: Path, counter: list[str]):
    model = tiny("MixtralForCausalLM", {})
    model.save_pretrained(tmp_path / "plain")
    ids = torch.randint(3, 96, (1, 7))
    y = model(ids).logits
    load = transformers.AutoModelForCausalLM.from_pretrained
    ours = load(tmp_path / "plain", experts_implementation="ffn_ops")
    report = hf.pack_(ours)
    assert len(report.packed) == 4 and not report.skipped
    assert report.packed[0] == "model.layers.0.mlp.experts.gate_up_proj"
    torch.testing.assert_close(ours(ids).logits, y)
    assert len(counter) == 2
    assert ours.num_parameters() == model.num_parameters()
    ours.save_pretrained(tmp_path / "packed")
    saved, again = ((tmp_path / part / "model.safetensors").read_bytes() for part in ("plain", "packed"))
    assert saved == again
    with pytest.raises(ValueError, match="is packed, and requires_grad was to be set"):
        ours.requires_grad_()
    ours.set_experts_implementation("eager")
    with pytest.raises(
        ValueError, match=r"layers\.0\.mlp\.experts\.gate_up_proj is packed, and aten\.select"
    ):
        ours(ids)
