# SPDX-License-Identifier: Apache-2.0
"""Small calls that many tests of the shim share."""

import torch

op = torch.ops.ffn.ffn


def operands(M: int = 6, K: int = 16, N: int = 32, E: int = 3, device: str = "npu") -> list[torch.Tensor]:
    """x, weight1 and weight2 in float16, by expert."""
    torch.manual_seed(0)
    return [torch.randn(size).half().div(4).to(device) for size in ((M, K), (E, K, N), (E, N, K))]


def on_cpu(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.cpu() for tensor in tensors]


def close(y: torch.Tensor, expected: torch.Tensor) -> bool:
    """Within a few float16 steps: enough to see that the right tensors were used. Numbers are held to a
    derived bound in test_op.py."""
    return torch.allclose(y.cpu().float(), expected.float(), rtol=2**-8, atol=2**-8)
