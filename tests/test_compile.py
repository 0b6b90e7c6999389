# SPDX-License-Identifier: Apache-2.0
"""Tracing: opcheck on every mode, torch.compile with dynamic shapes, torch.export, fake tensors.

On the CPU with inductor; with `pytest --device npu`, where torch_npu has no inductor, with aot_eager.
"""

import pytest
import torch
from strategies import DEVICE, TARGET, Call, to_numpy
from torch._subclasses import FakeTensorMode

import ffn_ops
from ffn_ops.contract import GLU, MODES, OPERANDS, TARGETS, Spec

op = torch.ops.ffn.ffn
BACKEND = "inductor" if DEVICE == "cpu" else "aot_eager"


def full_call(mode_name: str, experts: bool, glu: bool, M: int = 6) -> Call:
    """A call of this mode with every operand it takes."""
    mode = next(mode for mode in MODES if mode.name == mode_name)
    E = (2,) if experts else ()
    N1 = 32 if glu else 16
    columns = {"1": N1, "2": 8}
    shapes = {"x": (M, 8), "weight1": (*E, 8, N1), "weight2": (*E, 16, 8), "expert_tokens": E,
              "scale": E or (1,), "offset": E or (1,)}  # fmt: skip
    specs = {}
    for name, operand in OPERANDS.items():
        dtypes = getattr(mode, operand.column).split()
        if (
            dtypes
            and name not in ("topk_ids", "topk_weights", "out")
            and (experts or name != "expert_tokens")
        ):
            shape = () if name == "output_dtype" else shapes.get(name) or (*E, columns[name[-1]])
            specs[name] = Spec(dtypes[0] if dtypes[0] != "uint64" else "int64", shape)
    return Call(specs, GLU[1] if glu else "gelu", tokens=(M // 2, M - M // 2) if experts else ())


EVERY_MODE = [
    pytest.param(mode.name, experts, glu, id=f"{mode.name}{'-experts' * experts}{'-glu' * glu}")
    for mode in MODES
    if TARGETS[TARGET][0] in mode.routes.split()
    for experts in (False, True)
    for glu in (False, True)
    if not full_call(mode.name, experts, glu).violations()
]


@pytest.mark.parametrize(("mode", "experts", "glu"), EVERY_MODE)
def test_opcheck(mode: str, experts: bool, glu: bool):
    call = full_call(mode, experts, glu)
    tensors, options = call.tensors(call.arrays(0)), call.options()
    x, w1, w2 = (tensors.pop(name) for name in ("x", "weight1", "weight2"))
    arguments = (x, w1, w2, call.activation)
    torch.library.opcheck(op.default, arguments, {**tensors, **options})
    out = op(*arguments, **tensors, **options)
    torch.library.opcheck(op.out, arguments, {**tensors, **options, "out": torch.empty_like(out)})


@pytest.mark.parametrize(("mode", "experts", "glu"), EVERY_MODE)
def test_compile_with_dynamic_shapes(mode: str, experts: bool, glu: bool):
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True, backend=BACKEND)
    def compiled(tensors, activation, options):
        return op(**tensors, activation=activation, **options).float() + 1

    for M in (6, 10):
        call = full_call(mode, experts, glu, M)
        tensors, options = call.tensors(call.arrays(M)), call.options()
        y = compiled(tensors, call.activation, options)
        assert torch.equal(y, op(**tensors, activation=call.activation, **options).float() + 1)
    # A third M runs what the second compiled: nothing was specialised on it.
    call = full_call(mode, experts, glu, 14)
    tensors = call.tensors(call.arrays(14))
    with torch.compiler.set_stance("fail_on_recompile"):
        assert compiled(tensors, call.activation, call.options()).shape == (14, 8)


def test_compile_of_the_python_level_and_of_out():
    torch._dynamo.reset()
    x, w1, w2 = (torch.randn(*shape).half().to(DEVICE) for shape in ((6, 8), (2, 8, 16), (2, 16, 8)))
    python = torch.compile(
        lambda x: ffn_ops.ffn(x, w1, w2, "relu", [2, 4]) * 2, fullgraph=True, dynamic=True, backend=BACKEND
    )
    assert torch.equal(python(x), op(x, w1, w2, "relu", torch.tensor([2, 4], device=DEVICE)) * 2)

    @torch.compile(fullgraph=True, dynamic=True, backend=BACKEND)
    def into(x, out):
        op.out(x, w1[0], w2[0], "relu", out=out)
        return out + 1

    out = torch.empty_like(x)
    expected = op(x, w1[0], w2[0], "relu")
    assert torch.equal(into(x, out), expected + 1) and torch.equal(out, expected)
    npu = torch.compile(
        lambda x: ffn_ops.npu_ffn(x, w1, w2, "gelu", expert_tokens=[2, 4]),
        fullgraph=True,
        dynamic=True,
        backend=BACKEND,
    )
    assert torch.equal(npu(x), ffn_ops.npu_ffn(x, w1, w2, "gelu", expert_tokens=[2, 4]))


def test_a_call_that_is_refused_is_refused_while_tracing():
    torch._dynamo.reset()
    bad = torch.compile(lambda x, w: op(x, w, w, "gelu"), fullgraph=True, dynamic=True, backend=BACKEND)
    with pytest.raises(Exception, match="x has shape"):
        bad(torch.ones(6, 5).half().to(DEVICE), torch.ones(4, 4).half().to(DEVICE))


@pytest.mark.parametrize(("mode", "experts", "glu"), EVERY_MODE)
def test_export_with_a_dynamic_number_of_rows(mode: str, experts: bool, glu: bool):
    class Block(torch.nn.Module):
        def __init__(self, call: Call):
            super().__init__()
            self.activation, self.options = call.activation, call.options()
            for name, tensor in call.tensors(call.arrays(0)).items():
                if name not in ("x", "expert_tokens"):
                    self.register_buffer(name, tensor)

        def forward(self, x, expert_tokens=None):
            return op(
                x,
                activation=self.activation,
                expert_tokens=expert_tokens,
                **dict(self.named_buffers()),
                **self.options,
            )

    def inputs(M: int) -> tuple[torch.Tensor, ...]:
        tensors = call.tensors(full_call(mode, experts, glu, M).arrays(M))
        return tuple(tensors[name] for name in ("x", "expert_tokens") if name in tensors)

    call = full_call(mode, experts, glu)
    block = Block(call)
    rows = {0: torch.export.Dim("M", min=1, max=4096)}
    program = torch.export.export(block, inputs(6), dynamic_shapes=(rows, None)[: 1 + experts])
    for M in (6, 17, 1):
        assert torch.equal(program.module()(*inputs(M)), block(*inputs(M)))


@pytest.mark.cpu_only
@pytest.mark.parametrize("mode", [mode.name for mode in MODES])
def test_export_of_the_module(mode: str):
    torch.manual_seed(0)
    fc1, fc2 = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)
    calibration = [torch.randn(20, 8)] if mode.startswith("w8a8") else None
    block = ffn_ops.FFN.from_linear(fc1, fc2, "gelu", mode, calibration=calibration)
    rows = {0: torch.export.Dim("M", min=1, max=4096)}
    program = torch.export.export(block, (torch.randn(6, 8),), dynamic_shapes=(rows,))
    x = torch.randn(9, 8)
    assert torch.equal(program.module()(x), block(x))


@pytest.mark.parametrize(("mode", "experts", "glu"), EVERY_MODE)
def test_fake_tensors_have_the_real_shape_and_dtype(mode: str, experts: bool, glu: bool):
    call = full_call(mode, experts, glu)
    tensors, options = call.tensors(call.arrays(0)), call.options()
    y = op(**tensors, activation=call.activation, **options)
    with FakeTensorMode() as fake_mode:
        fake = {name: fake_mode.from_tensor(tensor) for name, tensor in tensors.items()}
        shadow = op(**fake, activation=call.activation, **options)
    assert (shadow.shape, shadow.dtype, shadow.stride()) == (y.shape, y.dtype, y.stride())
    assert to_numpy(y).shape == tuple(shadow.shape)
