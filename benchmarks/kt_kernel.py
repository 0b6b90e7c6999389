# SPDX-License-Identifier: Apache-2.0
"""ktransformers' expert kernels (pip install --no-deps kt-kernel==0.7.2), whose threads spin; see peers.py.

Only the compiled module for this CPU is loaded, by the package's own choice. Weights come in as bf16, [N, K],
gate and up apart; the quantized kind quantizes them again.
"""

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case, Product
from benchmarks.peers import Call, Peer, only

ROWS = 64  # its buffers have a multiple of them


@cache
def load() -> Any:
    spec = importlib.util.find_spec("kt_kernel")
    assert spec is not None and spec.origin is not None
    chooser = importlib.util.spec_from_file_location("chooser", Path(spec.origin).with_name("_cpu_detect.py"))
    assert chooser is not None and chooser.loader is not None
    module = importlib.util.module_from_spec(chooser)
    chooser.loader.exec_module(module)
    return module.load_extension(module.detect_cpu_features())


@cache
def pool(threads: int) -> Any:
    return load().CPUInfer(threads)


class Experts(Peer):
    kinds = ("moe",)
    process = "kt-kernel"
    quick = False
    packs = True
    mode: str
    kernels: str

    def available(self) -> str | None:
        return None if importlib.util.find_spec("kt_kernel") else "kt-kernel is not installed"

    def refuses(self, case: Case) -> str | None:
        return only(case, modes=self.mode, activations="swiglu", bias=False)

    def make(self, case: Case) -> Call:
        assert case.routing is not None
        shape, workers = case.shape, pool(torch.get_num_threads())

        def pack() -> Any:
            up, gate = bfloat16(case.weights.first).chunk(2, -1)
            down = bfloat16(case.weights.second)
            gate, up, down = (weight.mT.contiguous() for weight in (gate, up, down))
            config = load().moe.MOEConfig(shape.E, shape.top_k, shape.K1, shape.K2, 0)
            config.max_len = -(-max(*shape.m, case.M) // ROWS) * ROWS
            config.pool = workers.backend_
            config.gate_proj, config.up_proj, config.down_proj = (t.data_ptr() for t in (gate, up, down))
            moe, experts = getattr(load().moe, self.kernels)(config), torch.arange(shape.E)
            workers.submit(moe.load_weights_task(experts.data_ptr()))
            workers.sync()
            return moe

        moe = case.weights.kept(self.name, pack)
        ids, weights = (t.contiguous() for t in case.routing)
        x, y, rows = case.x.contiguous(), torch.empty_like(case.x), torch.tensor([case.M], dtype=torch.int32)
        operands = (rows.data_ptr(), shape.top_k, *(t.data_ptr() for t in (ids, weights, x, y)), False)

        def call(_: Any = (ids, weights, x, rows)) -> Tensor:  # which must live
            workers.submit(moe.forward_task(*operands))
            workers.sync()
            return y

        return call


def bfloat16(product: Product) -> Tensor:
    if product.scale is None:
        return product.values
    return (product.values * product.scale.unsqueeze(1)).bfloat16()


class Bf16(Experts):
    name = "kt-kernel bf16"
    mode = "bf16"
    kernels = "AMXBF16_MOE"


class Int8(Experts):
    """Weights by column, x and the intermediate by row."""

    name = "kt-kernel int8"
    mode = "w8a8_bf16"
    kernels = "AMXInt8_MOE"
    quantizes_rows = True


PEERS = (Bf16, Int8)
