# SPDX-License-Identifier: Apache-2.0
"""Replaces a plain feed-forward block: float16 x beside int8 weights, in a quarter of the memory."""

import torch
from torch import nn

from ffn_ops import FFN

block = nn.Sequential(nn.Linear(512, 2048), nn.GELU(approximate="tanh"), nn.Linear(2048, 512))
ffn = FFN.from_linear(block[0], block[2], "gelu", mode="w8a16")
x = torch.randn(4, 128, 512)
with torch.no_grad():
    print(ffn)
    print("cosine similarity to the block:", torch.cosine_similarity(ffn(x), block(x), dim=-1).mean().item())
