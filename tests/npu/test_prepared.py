# SPDX-License-Identifier: Apache-2.0
"""ffn_ops.aclnn.prepare: the two phases as Python sees them, and every misuse of them."""

import gc
from collections.abc import Iterator

import pytest
import torch
import torch_npu

import ffn_ops
from ffn_ops import aclnn, emulator

op = torch.ops.ffn.ffn


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    x, weight1, weight2 = (torch.randn(size).half().npu() / 4 for size in ((6, 16), (3, 16, 32), (3, 32, 16)))
    tokens = torch.tensor([2, 0, 4]).npu()
    return {"x": x, "weight1": weight1, "weight2": weight2, "expert_tokens": tokens}


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    def live() -> dict[str, int]:
        torch.npu.synchronize()
        gc.collect()
        return {name: n for name, n in emulator.counters().items() if name.startswith("live_acl") and n}

    before = live()
    yield
    assert live() == before


def y_like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def test_both_phases_give_what_the_operator_gives(tensors: dict[str, torch.Tensor]):
    y = y_like(tensors["x"])
    with aclnn.prepare(**tensors, activation="gelu", out=y) as call:
        assert call.workspace_size > 1 << 24
        call.run(torch.empty(call.workspace_size, dtype=torch.uint8, device="npu"))
    assert torch.equal(y.cpu(), op(**tensors, activation="gelu").cpu())


def test_without_a_workspace_torch_gives_one(tensors: dict[str, torch.Tensor]):
    y = y_like(tensors["x"])
    aclnn.prepare(**tensors, activation="relu", out=y).run()
    assert torch.equal(y.cpu(), op(**tensors, activation="relu").cpu())


def test_a_repeatable_call_runs_with_other_addresses(tensors: dict[str, torch.Tensor]):
    y = y_like(tensors["x"])
    call = aclnn.prepare(**tensors, activation="silu", out=y, repeatable=True)
    call.run()
    first = y.cpu()
    other_x, other_y = torch.flip(tensors["x"].cpu(), (0,)).npu(), y_like(y)
    call.set_addresses(x=other_x, out=other_y)
    call.run()
    call.run()
    call.destroy()
    assert torch.equal(y.cpu(), first)
    assert torch.equal(other_y.cpu(), op(**{**tensors, "x": other_x}, activation="silu").cpu())


@pytest.mark.parametrize("prepared_at", [0, 3])
def test_views_can_take_the_place_of_each_other(prepared_at: int, tensors: dict[str, torch.Tensor]):
    M = len(tensors["x"])
    xs = torch.randn(3 * M, tensors["x"].shape[1]).half().npu()
    ys = torch.zeros_like(xs)
    x, y = xs[prepared_at : prepared_at + M], ys[prepared_at : prepared_at + M]
    with aclnn.prepare(**{**tensors, "x": x}, activation="gelu", out=y, repeatable=True) as call:
        for begin in (2 * M, 0, M):
            call.set_addresses(x=xs[begin : begin + M], out=ys[begin : begin + M])
            call.run()
            expected = op(**{**tensors, "x": xs[begin : begin + M]}, activation="gelu")
            assert torch.equal(ys[begin : begin + M].cpu(), expected.cpu())


def test_int4_weights_are_described_in_elements():
    x = torch.randn(3, 8).half().npu()
    weight1, weight2 = (torch.randint(0, 256, size, dtype=torch.uint8).npu() for size in ((8, 8), (16, 4)))
    scale = {
        f"antiquant_{kind}{i}": torch.full((n,), value).half().npu()
        for kind, value in (("scale", 0.01), ("offset", 1.0))
        for i, n in ((1, 16), (2, 8))
    }
    y = y_like(x)
    aclnn.prepare(x, weight1, weight2, "relu", out=y, **scale).run()
    assert torch.equal(y.cpu(), op(x, weight1, weight2, "relu", **scale).cpu())


def test_a_call_runs_once(tensors: dict[str, torch.Tensor]):
    y = y_like(tensors["x"])
    call = aclnn.prepare(**tensors, activation="gelu", out=y)
    call.run()
    with pytest.raises(RuntimeError, match=r"^the call has ended: it was run or destroyed"):
        call.run()
    with pytest.raises(RuntimeError, match=r"^the call has ended already"):
        call.destroy()


def test_a_destroyed_call_does_not_run(tensors: dict[str, torch.Tensor]):
    y = y_like(tensors["x"])
    call = aclnn.prepare(**tensors, activation="gelu", out=y, repeatable=True)
    call.destroy()
    with pytest.raises(RuntimeError, match=r"^the call has ended"):
        call.run()


def test_a_short_or_foreign_workspace_is_refused(tensors: dict[str, torch.Tensor]):
    y = y_like(tensors["x"])
    call = aclnn.prepare(**tensors, activation="gelu", out=y)
    short = torch.empty(call.workspace_size - 1, dtype=torch.uint8, device="npu")
    with pytest.raises(RuntimeError, match=rf"^workspace has {short.numel()} bytes, but the call needs"):
        call.run(short)
    with pytest.raises(RuntimeError, match=r"^workspace is a int, but it must be a tensor on npu:0"):
        call.run(123)
    with pytest.raises(RuntimeError, match=r"^workspace is on cpu"):
        call.run(torch.empty(call.workspace_size, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match=r"^workspace is on npu:1"):
        call.run(torch.empty(call.workspace_size, dtype=torch.uint8, device="npu:1"))
    shrunk = torch.empty(call.workspace_size, dtype=torch.uint8, device="npu")
    shrunk.untyped_storage().resize_(16)
    with pytest.raises(RuntimeError, match=r"^workspace has 16 bytes"):
        call.run(shrunk)
    call.run()  # a refusal does not end it


@pytest.mark.parametrize("name", ["x", "weight2", "expert_tokens", "out"])
def test_a_tensor_that_was_freed_is_noticed(name: str, tensors: dict[str, torch.Tensor]):
    y = {"out": y_like(tensors["x"])}
    call = aclnn.prepare(**tensors, activation="gelu", **y)
    (tensors if name in tensors else y).pop(name)
    gc.collect()
    with pytest.raises(RuntimeError, match=rf"^{name} was freed or resized after prepare\(\)"):
        call.run()
    call.destroy()


def test_a_tensor_that_was_resized_is_noticed(tensors: dict[str, torch.Tensor]):
    y = y_like(tensors["x"])
    call = aclnn.prepare(**tensors, activation="gelu", out=y)
    tensors["x"].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"^x was freed or resized"):
        call.run()
    call.destroy()


def test_only_repeatable_calls_have_other_addresses(tensors: dict[str, torch.Tensor]):
    y = y_like(tensors["x"])
    call = aclnn.prepare(**tensors, activation="gelu", out=y)
    with pytest.raises(RuntimeError, match=r"^the call is not repeatable"):
        call.set_addresses(x=tensors["x"])
    call.run()


def test_addresses_are_of_what_was_prepared(tensors: dict[str, torch.Tensor]):
    with aclnn.prepare(**tensors, activation="gelu", out=y_like(tensors["x"]), repeatable=True) as call:
        with pytest.raises(ffn_ops.ContractError, match=r"^out shares memory with x"):
            call.set_addresses(out=tensors["x"])
        with pytest.raises(RuntimeError, match=r"^bias1 was not part of the call"):
            call.set_addresses(bias1=tensors["x"])
        with pytest.raises(
            RuntimeError, match=r"^x is torch.float16 \[5, 16\], but the call was prepared for"
        ):
            call.set_addresses(x=tensors["x"][:5])


def test_what_the_contract_forbids_never_reaches_the_vendor(tensors: dict[str, torch.Tensor]):
    with emulator.trace() as calls, pytest.raises(ffn_ops.ContractError, match="swiglu"):
        aclnn.prepare(**tensors, activation="swiglu", out=y_like(tensors["x"]))
    assert not [name for name in calls if name.startswith("aclnn")]


def test_memory_must_be_dense_and_on_the_npu(tensors: dict[str, torch.Tensor]):
    y = y_like(tensors["x"])
    with pytest.raises(ffn_ops.ContractError, match=r"^weight1 is not contiguous"):
        aclnn.prepare(**{**tensors, "weight1": tensors["weight1"].mT}, activation="gelu", out=y)
    with pytest.raises(ffn_ops.ContractError, match=r"^expert_tokens is on cpu"):
        aclnn.prepare(**{**tensors, "expert_tokens": torch.tensor([1])}, activation="gelu", out=y)
    with pytest.raises(ffn_ops.ContractError, match=r"^expert_tokens is a list, but it must be a tensor"):
        aclnn.prepare(**{**tensors, "expert_tokens": [1]}, activation="gelu", out=y)
    with pytest.raises(ffn_ops.ContractError, match=r"^x is on cpu, but prepare\(\) takes tensors of an NPU"):
        aclnn.prepare(torch.ones(2, 3), torch.ones(3, 4), torch.ones(4, 3), "gelu", out=torch.ones(2, 3))
    nz = torch_npu.empty_with_format(tensors["weight1"].shape, dtype=torch.half, device="npu", acl_format=29)
    with pytest.raises(ffn_ops.ContractError, match=r"^weight1 is in the private format 29"):
        aclnn.prepare(**{**tensors, "weight1": nz}, activation="gelu", out=y)
    with pytest.raises(ffn_ops.ContractError, match=r"^out shares memory with x"):
        aclnn.prepare(**tensors, activation="gelu", out=tensors["x"])
    with pytest.raises(ffn_ops.ContractError, match=r"^out is a NoneType, but it must be a tensor"):
        aclnn.prepare(**tensors, activation="gelu", out=None)
    with pytest.raises(ffn_ops.ContractError, match=r"^activation is 3, but it must be a string"):
        aclnn.prepare(**tensors, activation=3, out=y)
    with pytest.raises(TypeError, match=r"^bias3 is no tensor of the operator"):
        aclnn.prepare(**tensors, activation="gelu", out=y, bias3=y)
