# SPDX-License-Identifier: Apache-2.0
"""OpenVINO (pip install openvino==2026.4.1), which has threads of its own; see peers.py."""

import importlib.util
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.cases import Case, Product
from benchmarks.peers import Call, Peer, linear_weights, only

PRECISIONS = {"float32": "f32", "fp16": "f16", "bf16": "bf16", "w8a16": "f16", "w8a16_bf16": "bf16"}


class OpenVino(Peer):
    """Two MatMuls, with float or int8 weights. It gets x in float32 and leaves y so, which is a favour."""

    name = "openvino"
    kinds = ("dense",)
    process = "openvino"
    quick = False
    packs = True

    def available(self) -> str | None:
        return None if importlib.util.find_spec("openvino") else "openvino is not installed"

    def refuses(self, case: Case) -> str | None:
        grouped = "has no groups" if case.mode.group else None
        return only(case, modes=" ".join(PRECISIONS), activations="gelu relu silu") or grouped

    @staticmethod
    def _has(precision: str) -> bool:
        import openvino

        capable = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        return precision.upper().replace("F", "FP").replace("BFP", "BF") in capable

    def make(self, case: Case) -> Call:
        import openvino
        from openvino import opset13 as ops

        precision = PRECISIONS[case.mode.row.name]
        if case.mode.row.weight != "int8" and not self._has(precision):
            raise RuntimeError(f"OpenVINO has no {case.mode.row.name} on this CPU")
        x = ops.parameter([case.M, case.shape.K1], np.float32)
        h = self._linear(ops, x, case.weights.first)
        activations = {
            "gelu": lambda v: ops.gelu(v, "tanh"),
            "relu": ops.relu,
            "silu": ops.swish,
        }
        y = self._linear(ops, activations[case.shape.activation](h), case.weights.second)
        options = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": precision if self._has(precision) else "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # x stays as it is
        }
        request = (
            openvino.Core().compile_model(openvino.Model([y], [x]), "CPU", options).create_infer_request()
        )
        request.set_input_tensor(openvino.Tensor(case.x.float().numpy()))
        result = torch.from_numpy(request.get_output_tensor().data)

        def call() -> Tensor:
            request.infer()
            return result

        return call

    @staticmethod
    def _linear(ops: Any, x: Any, product: Product) -> Any:
        weight = linear_weights(product)
        if product.scale is None:
            constant = ops.constant(weight.float().numpy())
        else:
            integers = ops.convert(ops.constant(weight.numpy()), np.float32)
            constant = ops.multiply(integers, ops.constant(product.scale.float().unsqueeze(1).numpy()))
        y = ops.matmul(x, constant, transpose_a=False, transpose_b=True)
        return y if product.bias is None else ops.add(y, ops.constant(product.bias.numpy()))


PEERS = (OpenVino,)
