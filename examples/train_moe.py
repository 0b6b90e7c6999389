# SPDX-License-Identifier: Apache-2.0
"""Trains a small byte-level language model with mixture-of-experts blocks, with ffn_ops.MoE and then with
the same block in plain PyTorch, from the same seed: the losses are the same, step by step.

    python examples/train_moe.py [STEPS]

The text is the documentation that comes with Python: pydoc's topics and the standard library's docstrings.
tests/test_train_moe.py runs the first steps.
"""

import argparse
import ast
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ffn_ops import MoE
from ffn_ops.activation import activate

HIDDEN, HEADS, LAYERS = 128, 4, 2
EXPERTS, TOP_K, INTERMEDIATE = 8, 2, 256
CONTEXT, BATCH = 64, 16
BALANCE = 0.01  # of the load-balancing loss beside the language model's
LEARNING_RATE = 1e-3


def text() -> bytes:
    """The documentation, in an order that is the same everywhere."""
    from pydoc_data.topics import topics

    parts = [topics[name] for name in sorted(topics)]
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        tree = ast.parse(path.read_bytes())
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
        parts += filter(None, (ast.get_docstring(n) for n in ast.walk(tree) if isinstance(n, documented)))
    return "\n\n".join(parts).encode()


class PlainMoE(MoE):
    """The experts as PyTorch users write them by hand: a loop over the experts."""

    def experts(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for e in range(self.num_experts):
            token, slot = torch.where(topk_ids == e)
            h = activate(x[token] @ self.weight1[e], self.activation)
            y = y.index_add(0, token, h @ self.weight2[e] * topk_weights[token, slot, None])
        return y


class Block(nn.Module):
    def __init__(self, moe: type[MoE]) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.moe = moe(HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, activation="swiglu", renormalize=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attention = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attention.transpose(1, 2).flatten(-2))
        h = self.norm2(x)
        return x + self.moe(h), self.balance(h.flatten(0, 1))

    def balance(self, h: Tensor) -> Tensor:
        """1 when the experts share the tokens evenly, more when not (Switch Transformers, section 2.2)."""
        odds = self.moe.gate(h).softmax(-1)
        chosen = F.one_hot(odds.topk(TOP_K).indices, EXPERTS).sum(1).to(odds.dtype)
        return EXPERTS * (odds.mean(0) * chosen.mean(0) / TOP_K).sum()


class LanguageModel(nn.Module):
    def __init__(self, moe: type[MoE]) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, HIDDEN), nn.Embedding(CONTEXT, HIDDEN)
        self.blocks = nn.ModuleList(Block(moe) for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 256)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.bytes(tokens) + self.places(torch.arange(tokens.shape[1]))
        balance = x.new_zeros(())
        for block in self.blocks:
            x, uneven = block(x)
            balance = balance + uneven / LAYERS
        return self.head(self.norm(x)), balance


def batches(data: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    while True:
        starts = torch.randint(len(data) - CONTEXT - 1, (BATCH,), generator=generator)
        rows = torch.stack([data[start : start + CONTEXT + 1] for start in starts]).long()
        yield rows[:, :-1], rows[:, 1:]


def train(
    moe: type[MoE],
    steps: int,
    dtype: torch.dtype = torch.float32,
    each: Callable[[int, float], None] | None = None,
) -> list[float]:
    """The language model's loss at each step."""
    torch.manual_seed(0)
    model = LanguageModel(moe).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    losses = []
    stream = batches(torch.frombuffer(bytearray(text()), dtype=torch.uint8))
    for step, (tokens, following) in zip(range(steps), stream, strict=False):
        logits, balance = model(tokens)
        loss = F.cross_entropy(logits.flatten(0, 1), following.flatten())
        optimizer.zero_grad()
        (loss + BALANCE * balance).backward()
        optimizer.step()
        losses.append(loss.item())
        if each is not None:
            each(step, losses[-1])
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("steps", nargs="?", type=int, default=200, help="200 unless given")
    steps = parser.parse_args().steps
    found, seconds = [], []
    for name, moe in (("plain PyTorch", PlainMoE), ("ffn_ops.MoE", MoE)):
        start = time.perf_counter()

        def show(step: int, loss: float, name: str = name) -> None:
            if step % 20 == 0:
                print(f"{name}, step {step}: {loss / 0.6931:.3f} bits a byte", flush=True)

        found.append(train(moe, steps, each=show))
        seconds.append(time.perf_counter() - start)
    apart = max(abs(a - b) for a, b in zip(*found, strict=True))
    times = f"{seconds[0]:.1f} s with plain PyTorch, {seconds[1]:.1f} s with ffn_ops"
    print(f"{steps} steps: losses at most {apart:.1e} apart; {times}")


if __name__ == "__main__":
    main()
