# SPDX-License-Identifier: Apache-2.0
"""Quantizers that turn float32 weights into the operator's tensors. layer.py calls them; torch only.

weights.py: int8 and int4 weights for 16-bit x (w8a16, w4a16). static.py: int8 weights and int8 x (w8a8),
calibrated.
"""

from ffn_ops.quantize.static import quantize_w8a8
from ffn_ops.quantize.weights import QuantizedWeight, quantize_int4, quantize_int8

__all__ = ["QuantizedWeight", "quantize_int4", "quantize_int8", "quantize_w8a8"]
