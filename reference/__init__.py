# SPDX-License-Identifier: Apache-2.0
"""What the operator's answer is, in NumPy: the contract's formulas, with their rounding steps or without any.

Independent of ffn_ops and of every compiled line. `ffn.py` is the operator, `moe.py` the expert computation
of a MoE block, `routing.py` which experts a token has, `activation.py` the activations, `rounding.py` the
conversions that are not NumPy's own.
Assumes a legal call: refusing others is the contract's task.
"""

from reference.ffn import ffn
from reference.moe import moe
from reference.routing import route

__all__ = ["ffn", "moe", "route"]
