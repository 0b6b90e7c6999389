# SPDX-License-Identifier: Apache-2.0
"""Small models of many families of Hugging Face, their inputs, and what their calls of the operators were.

test_patch.py, test_patched.py and test_patch_experts.py patch them.
"""

from typing import Any

import pytest
import torch
from strategies import to_numpy
from torch import Tensor, nn

hf = pytest.importorskip("transformers")

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


def arrays(args: Any, kwargs: Any) -> tuple[list[Any], dict[str, Any]]:
    def array(value: Any) -> Any:
        return to_numpy(value.detach()) if isinstance(value, Tensor) else value

    return [array(value) for value in args], {name: array(value) for name, value in kwargs.items()}
