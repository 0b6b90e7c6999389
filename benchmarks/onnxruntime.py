# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime (pip install onnxruntime==1.31.1 onnx), which has threads of its own; see peers.py.

Its operators for CPUs take float32 x and give float32 y; for half precision the cell's x is converted
before the time counts, which is a favour.
"""

import importlib.util
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case, Product
from benchmarks.peers import Call, Peer, only
from ffn_ops.contract import GLU

BLOCK = 128  # of rows that share a scale, where the cell has one for a whole column
DOMAIN = "com.microsoft"


class OnnxRuntime(Peer):
    process = "onnxruntime"
    quick = False
    packs = True

    def available(self) -> str | None:
        for package in ("onnxruntime", "onnx"):
            if importlib.util.find_spec(package) is None:
                return f"{package} is not installed"
        return None

    def model(self, case: Case) -> tuple[list[Any], dict[str, Tensor]]:
        """The nodes, the last of which gives "y", and the weights that they name."""
        raise NotImplementedError

    def inputs(self, case: Case) -> dict[str, Tensor]:
        return {"x": case.x.float()}

    def make(self, case: Case) -> Call:
        inputs = {name: t.numpy() for name, t in self.inputs(case).items()}
        session, _ = case.weights.kept(self.name, lambda: self.session(case))
        return lambda: torch.from_numpy(session.run(None, inputs)[0])

    def session(self, case: Case) -> tuple[Any, Any]:
        """For any M, and what it refers to. Weights stay outside the model, which has a limit of 2 GB."""
        import onnxruntime
        from onnx import TensorProto, helper

        nodes, weights = self.model(case)
        types = {torch.float32: TensorProto.FLOAT, torch.uint8: TensorProto.UINT8}
        outside = []
        for name, weight in weights.items():
            outside.append(TensorProto(name=name, data_type=types[weight.dtype], dims=weight.shape,
                                       data_location=TensorProto.EXTERNAL))  # fmt: skip
            outside[-1].external_data.add(key="location", value=name)
        ends = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["M", t.shape[1]])
            for name, t in self.inputs(case).items()
        ]
        y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["M", case.shape.K1])
        graph = helper.make_graph(nodes, "block", ends, [y], outside)
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(weight.numpy()) for weight in weights.values()]
        options.add_external_initializers(list(weights), values)
        providers = ["CPUExecutionProvider"]
        return onnxruntime.InferenceSession(model, options, providers=providers), values


class MatMulNBits(OnnxRuntime):
    """Two weight-only products, with float32 x."""

    name = "onnxruntime MatMulNBits"
    kinds = ("dense",)
    accuracy_level = 1

    def refuses(self, case: Case) -> str | None:
        return only(case, modes="w8a16 w8a16_bf16 w4a16 w4a16_bf16", activations="gelu relu")

    def model(self, case: Case) -> tuple[list[Any], dict[str, Tensor]]:
        from onnx import helper

        activation, domain = {"gelu": ("FastGelu", DOMAIN), "relu": ("Relu", "")}[case.shape.activation]
        nodes, weights = [], {}
        for i, (source, result) in enumerate((("x", "a"), ("h", "y")), 1):
            product = (case.weights.first, case.weights.second)[i - 1]
            K, N = product.values.shape
            operands = {f"{name}{i}": t for name, t in quantized(product, case).items()}
            if product.bias is not None:
                operands[f"bias{i}"] = product.bias
            names = [f"{name}{i}" for name in ("w", "scales", "zeros")]
            names += [] if product.bias is None else ["", f"bias{i}"]
            weights |= operands
            nodes.append(helper.make_node("MatMulNBits", [source, *names], [result], domain=DOMAIN, K=K, N=N,
                                          bits=bits(case), block_size=case.mode.group or BLOCK,
                                          accuracy_level=self.accuracy_level))  # fmt: skip
        nodes.insert(1, helper.make_node(activation, ["a"], ["h"], domain=domain))
        return nodes, weights


class MatMulNBitsInt8(MatMulNBits):
    """The same with x in int8, scaled by block."""

    name = "onnxruntime MatMulNBits, int8 x"
    accuracy_level = 4
    quantizes_rows = True
    other_numerics = True


class Moe(OnnxRuntime):
    """It takes logits, and their softmax over the chosen experts is the routing's weight."""

    name = "onnxruntime MoE"
    kinds = ("moe",)

    def refuses(self, case: Case) -> str | None:
        return only(case, modes="float32", activations="swiglu relu silu", bias=False)

    def model(self, case: Case) -> tuple[list[Any], dict[str, Tensor]]:
        from onnx import helper

        first, second = case.weights.first.values, case.weights.second.values
        weights = {"w1": interleaved(first, case).mT.contiguous(), "w2": second.mT.contiguous()}
        names = ["x", "chosen", "w1", "", "w2"]
        return [helper.make_node("MoE", names, ["y"], domain=DOMAIN, **attributes(case))], weights

    def inputs(self, case: Case) -> dict[str, Tensor]:
        assert case.routing is not None
        return {"x": case.x, "chosen": chosen(case, -1e9, case.routing.weights.log())}


class QMoe(OnnxRuntime):
    """It chooses by one operand and weights by another, which are the same here."""

    name = "onnxruntime QMoE"
    kinds = ("moe",)
    modes = "w4a16 w4a16_bf16"

    def refuses(self, case: Case) -> str | None:
        return only(case, modes=self.modes, activations="swiglu relu silu", bias=False)

    def model(self, case: Case) -> tuple[list[Any], dict[str, Tensor]]:
        from onnx import helper

        weights: dict[str, Tensor] = {}
        gates = Product(*(None if t is None else interleaved(t, case) for t in case.weights.first))
        for i, product in enumerate((gates, case.weights.second), 1):
            experts = [quantized(Product(*(None if t is None else t[e] for t in product)), case)
                       for e in range(case.shape.E)]  # fmt: skip
            for name in experts[0]:
                weights[f"{name}{i}"] = torch.stack([expert[name] for expert in experts])
            weights[f"w{i}"] = weights[f"w{i}"].flatten(2)
        names = [
            "x",
            "chosen",
            "w1",
            "scales1",
            "-",
            "w2",
            "scales2",
            "-",
            "-",
            "-",
            "-",
            "zeros1",
            "zeros2",
            "-",
            "chosen",
        ]
        node = helper.make_node("QMoE", [name.strip("-") for name in names], ["y"], domain=DOMAIN,
                                expert_weight_bits=bits(case), block_size=case.mode.group or BLOCK,
                                **attributes(case))  # fmt: skip
        return [node], weights

    def inputs(self, case: Case) -> dict[str, Tensor]:
        assert case.routing is not None
        return {"x": case.x.float(), "chosen": chosen(case, 0.0, case.routing.weights)}


class QMoeInt8(QMoe):
    """Its 8-bit weights are multiplied with int8 x."""

    name = "onnxruntime QMoE, int8 x"
    modes = "w8a16 w8a16_bf16"
    quantizes_rows = True
    other_numerics = True


def chosen(case: Case, others: float, values: Tensor) -> Tensor:
    """[M, E]: `values` for the experts that a row visits."""
    return torch.full((case.M, case.shape.E), others).scatter_(1, case.routing.ids, values)


def attributes(case: Case) -> dict[str, Any]:
    """Of MoE and QMoE alike; without alpha and beta its swiglu is another one."""
    gated = {"swiglu_fusion": 1, "activation_alpha": 1.0, "activation_beta": 0.0}
    return {"k": case.shape.top_k, "activation_type": case.shape.activation, "normalize_routing_weights": 1,
            **(gated if case.shape.activation in GLU else {})}  # fmt: skip


def interleaved(weight: Tensor, case: Case) -> Tensor:
    """The columns of a GLU's first weight as gate, up, gate, up, where the operator has all of up first."""
    if case.shape.activation not in GLU:
        return weight
    up, gate = weight.chunk(2, -1)
    return torch.stack((gate, up), -1).flatten(-2)


def bits(case: Case) -> int:
    return 4 if case.mode.row.weight == "int4" else 8


def quantized(product: Product, case: Case) -> dict[str, Tensor]:
    """It multiplies by (unsigned value - zero) * scale, in blocks along K; two int4 in a byte, low bits
    first."""
    K, N = product.values.shape
    half = 1 << bits(case) - 1
    blocks = K // (case.mode.group or BLOCK)
    scales, offsets = (t.float().reshape(-1, N).mT.expand(N, blocks).contiguous()
                       for t in (product.scale, product.offset))  # fmt: skip
    zeros = (half - offsets).to(torch.uint8)
    values = (product.values.mT.to(torch.int16) + half).to(torch.uint8)
    if bits(case) == 4:
        values, zeros = (pairs(t) for t in (values, zeros))
    return {"w": values.reshape(N, blocks, -1).contiguous(), "scales": scales, "zeros": zeros.contiguous()}


def pairs(nibbles: Tensor) -> Tensor:
    if nibbles.shape[-1] % 2:
        nibbles = torch.nn.functional.pad(nibbles, (0, 1))
    return nibbles[..., ::2] | nibbles[..., 1::2] << 4


PEERS = (MatMulNBits, MatMulNBitsInt8, Moe, QMoe, QMoeInt8)
