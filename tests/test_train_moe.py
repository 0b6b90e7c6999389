# SPDX-License-Identifier: Apache-2.0
"""The first steps of examples/train_moe.py: the layer learns as the same block in plain PyTorch does."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from ffn_ops import MoE

pytestmark = pytest.mark.cpu_only
EXAMPLE = Path(__file__).parents[1] / "examples" / "train_moe.py"
STEPS = 8


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_moe", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def plain(example: ModuleType) -> tuple[list[float], float]:
    """The losses of plain PyTorch in float32, and how far they are from those in float64."""
    exact, losses = (
        example.train(example.PlainMoE, STEPS, dtype) for dtype in (torch.float64, torch.float32)
    )
    return losses, max(abs(a - b) for a, b in zip(exact, losses, strict=True))


@pytest.mark.parametrize("recompute", [False, True])
def test_the_loss_curve_is_that_of_plain_pytorch(
    example: ModuleType, plain: tuple[list[float], float], recompute: bool
):
    """Within twice that noise, since the errors of two runs add up, and a float32 of the loss. The text is
    large and the losses fall, so that there is something to learn and to compare."""

    class Layer(MoE):
        def __init__(self, *sizes: int, **options: Any) -> None:
            super().__init__(*sizes, **options, recompute=recompute)

    losses, noise = plain
    assert len(example.text()) > 1_000_000
    ours = example.train(Layer, STEPS)
    assert ours[-1] < ours[0] - 0.5
    assert max(abs(a - b) for a, b in zip(ours, losses, strict=True)) <= 2 * noise + 2**-22 * ours[0]
