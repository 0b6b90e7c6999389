# SPDX-License-Identifier: Apache-2.0
"""torch.ops.ffn.ffn on emulated NPU tensors: devices, streams, layouts, what it never does, and its errors.

Numbers in every mode are test_op.py's affair (`--device npu`); launching is test_launch.py's, failures are
test_faults.py's.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch_npu
from operands import close, on_cpu, op, operands
from process import ROOT, run
from torch._subclasses.fake_tensor import FakeTensorMode

import ffn_ops
from ffn_ops import emulator


def test_it_neither_waits_for_the_device_nor_reads_from_it():
    x, weight1, weight2 = operands()
    tokens = torch.tensor([2, 0, 4]).npu()
    op(x, weight1, weight2, "gelu", tokens)  # allocates what the second call reuses
    torch.npu.synchronize()
    before = emulator.counters()
    y = op(x, weight1, weight2, "gelu", tokens)
    during = emulator.counters()
    for name in ("synchronizations", "device_to_host_copies", "host_to_device_copies", "allocations"):
        assert during[name] == before[name], name
    torch.npu.synchronize()
    assert emulator.counters()["launches"] == before["launches"] + 1
    assert close(y, op(*on_cpu(x, weight1, weight2), "gelu", tokens.cpu()))


@pytest.mark.parametrize("index", [False, True])
def test_rows_that_no_expert_owns_are_zero(index: bool):
    x, weight1, weight2 = operands(M=7)
    tokens = torch.tensor([2, 2, 5] if index else [2, 0, 3]).npu()
    out = torch.full_like(x, 7)
    op(x, weight1, weight2, "relu", tokens, tokens_index_flag=index, out=out)
    fresh = op(x, weight1, weight2, "relu", tokens, tokens_index_flag=index)
    for y in (out, fresh):
        assert close(y[:5], op(x[:5].cpu(), *on_cpu(weight1, weight2), "relu", torch.tensor([2, 0, 3])))
        assert (y[5:].cpu() == 0).all()


@pytest.mark.parametrize("shape", [(2, 3, 16), (1, 2, 3, 16), (1, 2, 1, 3, 16), (1, 1, 1, 2, 1, 1, 3, 16)])
def test_x_may_have_up_to_eight_dimensions(shape: tuple[int, ...]):
    x, weight1, weight2 = operands()
    y = op(x.view(shape), weight1[0], weight2[0], "silu")
    assert y.shape == shape
    assert close(y.view(6, 16), op(*on_cpu(x, weight1[0], weight2[0]), "silu"))


def test_transposed_and_sliced_tensors_are_made_dense():
    x, weight1, weight2 = operands()
    tokens = torch.tensor([9, 1, 9, 5, 9, 0]).npu()[1::2]
    expected = op(*on_cpu(x, weight1, weight2), "gelu", tokens.cpu())
    y = op(x, weight1.mT.contiguous().mT, weight2.mT.contiguous().mT, "gelu", tokens)
    assert close(y, expected)
    wide = torch.zeros(6, 32).half().npu()
    wide[:, ::2] = x
    assert close(op(wide[:, ::2], weight1, weight2, "gelu", tokens), expected)
    shifted = torch.cat([x[:1], x])[1:]  # dense, with an offset
    assert close(op(shifted, weight1, weight2, "gelu", tokens), expected)


def test_256_experts_most_of_them_empty_and_no_more():
    x, weight1, weight2 = operands(M=5, K=4, N=8, E=256)
    tokens = torch.zeros(256, dtype=torch.int64)
    tokens[[0, 100, 255]] = torch.tensor([1, 3, 1])
    y = op(x, weight1, weight2, "gelu", tokens.npu())
    assert close(y, op(*on_cpu(x, weight1, weight2), "gelu", tokens))
    x, weight1, weight2 = operands(M=5, K=4, N=8, E=257)
    with pytest.raises(RuntimeError, match="256"):
        op(x, weight1, weight2, "gelu", torch.zeros(257, dtype=torch.int64).npu())


@pytest.mark.parametrize("kind", [torch.uint8, torch.int32])
def test_int4_weights_become_int4_tensors(kind: torch.dtype):
    torch.manual_seed(1)
    x = torch.randn(3, 8).half()
    weight1, weight2 = (torch.randint(0, 256, size, dtype=torch.uint8) for size in ((8, 8), (16, 4)))
    weights = [weight.view(kind) for weight in (weight1, weight2)]
    scales = [torch.rand(n).half() / 50 for n in (16, 8)]
    offsets = [torch.randint(-3, 4, (n,)).half() for n in (16, 8)]
    names = ("antiquant_scale1", "antiquant_scale2", "antiquant_offset1", "antiquant_offset2")
    options = dict(zip(names, scales + offsets, strict=True))
    y = op(x.npu(), *(w.npu() for w in weights), "relu", **{k: v.npu() for k, v in options.items()})
    assert close(y, op(x, *weights, "relu", **options))


def test_an_empty_x_gives_an_empty_y():
    x, weight1, weight2 = operands(M=0)
    y = op(x, weight1, weight2, "gelu", torch.zeros(3, dtype=torch.int64).npu())
    assert (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device)


def test_a_call_runs_where_x_is_and_the_current_device_stays():
    x, weight1, weight2 = operands(device="npu:1")
    assert torch.npu.current_device() == 0
    y = op(x, weight1, weight2, "gelu", torch.tensor([6, 0, 0]).to("npu:1"))
    assert y.device == torch.device("npu:1") and torch.npu.current_device() == 0
    assert close(y, op(*on_cpu(x, weight1, weight2), "gelu", torch.tensor([6, 0, 0])))
    with pytest.raises(RuntimeError, match=r"^weight1 is on npu:0 and x on npu:1, but"):
        op(x, weight1.to("npu:0"), weight2, "gelu", torch.tensor([6, 0, 0]).to("npu:1"))


@pytest.mark.parametrize("name", ["x", "weight1", "weight2", "out"])
def test_private_formats_are_refused(name: str):
    tensors = {
        name: torch.ones(32, 32, dtype=torch.half).npu() for name in ("x", "weight1", "weight2", "out")
    }
    tensors[name] = torch_npu.empty_with_format((32, 32), dtype=torch.half, device="npu", acl_format=29)
    with pytest.raises(RuntimeError, match=rf"^{name} is in the private format 29, but"):
        torch.ops.ffn.ffn.out(**tensors, activation="gelu")


def test_a_call_runs_on_the_current_stream():
    x, weight1, weight2 = operands()
    side = torch.npu.Stream()
    with emulator.slow(task_us=2000), torch.npu.stream(side):
        y = op(x, weight1[0], weight2[0], "gelu")
        done = side.record_event()
    done.synchronize()
    assert close(y, op(*on_cpu(x, weight1[0], weight2[0]), "gelu"))


@pytest.mark.parametrize("alias", ["dense", "wide", "x"])
def test_out_is_written_whatever_its_memory(alias: str):
    x, weight1, weight2 = operands()
    expected = op(*on_cpu(x, weight1[0], weight2[0]), "gelu")
    wide = torch.full((6, 16, 2), 7.0).half().npu()
    out = {"dense": torch.empty_like(x), "wide": wide[..., 0], "x": x}[alias]
    assert op(x, weight1[0], weight2[0], "gelu", out=out) is None
    assert close(out, expected)
    assert (wide[..., 1].cpu() == 7).all()


def test_the_contract_speaks_before_the_vendor():
    x, weight1, weight2 = operands()
    with emulator.trace() as calls:
        with pytest.raises(RuntimeError, match=r"^x is float32 and weight1 is float16"):
            op(x.cpu().float().npu(), weight1[0], weight2[0], "gelu")
        with pytest.raises(RuntimeError, match="'swiglu'"):
            op(x, weight1, weight2, "swiglu", torch.tensor([6, 0, 0]).npu())
    assert not [name for name in calls if "FFN" in name]


def test_fake_tensors_and_explain_follow_the_device():
    with FakeTensorMode():
        sizes = ((4, 8), (8, 16), (16, 8))
        x, weight1, weight2 = (torch.empty(size, dtype=torch.float16, device="npu") for size in sizes)
        y = op(x, weight1, weight2, "gelu")
        assert (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device)
        with pytest.raises(RuntimeError, match="mode float32 runs on the cpu target only"):
            op(x.float(), weight1.float(), weight2.float(), "gelu")


def test_opcheck():
    x, weight1, weight2 = operands()
    tokens = torch.tensor([2, 0, 4]).npu()
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic", "test_autograd_registration")
    result = torch.library.opcheck(op.default, (x, weight1, weight2, "gelu", tokens), test_utils=checks)
    assert result == dict.fromkeys(checks, "SUCCESS")


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_with_aot_eager(dynamic: bool):
    x, weight1, weight2 = operands()

    def block(x: torch.Tensor) -> torch.Tensor:
        return op(x + 1, weight1[0], weight2[0], "gelu") * 2

    compiled = torch.compile(block, backend="aot_eager", dynamic=dynamic, fullgraph=True)
    for M in (6, 4):
        assert torch.equal(compiled(x[:M]).cpu(), block(x[:M]).cpu())


def test_check_tokens_reads_and_refuses_them():
    program = (
        "x, weight1, weight2 = operands()\n"
        "op(x, weight1, weight2, 'gelu', torch.tensor([2, 0, 3]).npu())\n"
        "torch.npu.synchronize(); print('ran')"
    )
    assert "ran" in run(program).stdout
    refused = run(program, FFN_OPS_CHECK_TOKENS="1")
    assert "expert_tokens" in refused.stderr and "ran" not in refused.stdout
    fitting = program.replace("3]", "4]")
    assert "ran" in run(fitting, FFN_OPS_CHECK_TOKENS="1").stdout


@pytest.mark.parametrize(
    ("soc", "sentence"),
    [("Ascend310P3", "ascend310p"), ("Ascend950PR_9599", "x is on Ascend950PR_9599, but aclnnFFNV3 is for")],
)
def test_the_soc_decides_what_is_legal(soc: str, sentence: str):
    program = "x, w1, w2 = operands()\nop(x, w1, w2, 'gelu', torch.tensor([2, 0, 4]).npu())"
    assert sentence in run(program, soc=soc, operators=True).stderr


def test_without_the_operator_every_path_is_listed(tmp_path: Path):
    (tmp_path / "vendors").mkdir()
    (tmp_path / "vendors" / "config.ini").write_text("load_priority=first,second\n")
    program = "import ffn_ops._native as n\nn.aclnn_library()"
    missing = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={
            **os.environ,
            "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
            "ASCEND_CUSTOM_OPP_PATH": "/one:/two",
            "ASCEND_OPP_PATH": str(tmp_path),
        },
    ).stderr
    found = [
        missing.index(path)
        for path in (
            "/one/op_api/lib/libcust_opapi.so",
            "/two/op_api/lib/libcust_opapi.so",
            f"{tmp_path}/vendors/first/op_api",
            f"{tmp_path}/vendors/second/op_api",
            "libopapi.so (",
            "libopapi_transformer.so (",
        )
    ]
    assert found == sorted(found) and "aclnnFFNV3" in missing and "install CANN 8" in missing


def test_npu_ffn_takes_lists_as_torch_npus_does():
    x, weight1, weight2 = operands()
    y = ffn_ops.npu_ffn(x, weight1, weight2, "gelu", expert_tokens=[2, 0, 4])
    assert close(y, op(*on_cpu(x, weight1, weight2), "gelu", torch.tensor([2, 0, 4])))
