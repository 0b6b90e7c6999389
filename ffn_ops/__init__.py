# SPDX-License-Identifier: Apache-2.0
"""ffn_ops: a transformer's feed-forward block as one PyTorch operator, torch.ops.ffn.ffn.

Importing it loads the operator and imports torch, and nothing heavy beyond that.
"""

from ffn_ops import _load_torch as _load_torch  # first: it decides how torch is imported
from ffn_ops import op as op  # second: it says so when nothing is built

# isort: split
from ffn_ops import aclnn, packing
from ffn_ops.contract import ContractError
from ffn_ops.explain import Explanation, explain
from ffn_ops.layer import FFN
from ffn_ops.moe import MoE, load_statistics
from ffn_ops.op import current_target, ffn, npu_ffn, target
from ffn_ops.packing import prepack, unpack
from ffn_ops.patch import patch, unpatch

__version__ = "0.1.0"
__all__ = [
    "FFN",
    "ContractError",
    "Explanation",
    "MoE",
    "aclnn",
    "current_target",
    "explain",
    "ffn",
    "load_statistics",
    "npu_ffn",
    "packing",
    "patch",
    "prepack",
    "target",
    "unpack",
    "unpatch",
]
