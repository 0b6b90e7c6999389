# SPDX-License-Identifier: Apache-2.0
"""What users get wrong beyond the contract's tables: values, devices, layouts, targets. A sentence, never a
crash. With `pytest --device npu` on emulated NPU tensors.

Broken contract rules are test_contract.py's affair.
"""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from strategies import DEVICE

import ffn_ops
from ffn_ops import ContractError

op = torch.ops.ffn.ffn


def on_device(*shape: int) -> torch.Tensor:
    """Ones, of a dtype that every target takes."""
    return torch.ones(*shape).half().to(DEVICE)


def experts(tokens: list[int], M: int = 6, **options: object) -> torch.Tensor:
    E = len(tokens)
    return op(
        torch.ones(M, 4), torch.ones(E, 4, 8), torch.ones(E, 8, 4), "relu", torch.tensor(tokens), **options
    )


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    ("tokens", "index", "sentence"),
    [
        ([3, -1, 4], False, "expert_tokens[1] is -1, but a count of rows cannot be negative"),
        ([3, 5, 4], False, "expert_tokens[1] is 5, but then experts own more than the M = 6 rows of x"),
        ([3, 2, 0], False, "expert_tokens covers 5 rows, but x has M = 6"),
        (
            [2**63 - 1, 2**63 - 1, 1],
            False,
            "expert_tokens[0] is 9223372036854775807, but then experts own more",
        ),
        ([1, 2**63 - 1, 1], False, "expert_tokens[1] is 9223372036854775807, but then experts own more"),
        ([-(2**63), 6, 0], False, "expert_tokens[0] is -9223372036854775808, but a count of rows"),
        ([4, 2, 6], True, "expert_tokens[1] is 2, but end rows start at 0 and cannot decrease"),
        ([-1, 2, 6], True, "expert_tokens[0] is -1, but end rows start at 0 and cannot decrease"),
        ([1, 2, 7], True, "expert_tokens[2] is 7, but then experts own more than the M = 6 rows of x"),
        ([1, 2, 5], True, "expert_tokens covers 5 rows, but x has M = 6"),
    ],
)
def test_token_values_that_do_not_fit_are_refused(tokens: list[int], index: bool, sentence: str):
    with pytest.raises(RuntimeError) as refused:
        experts(tokens, tokens_index_flag=index)
    assert str(refused.value).startswith(sentence)
    weights = torch.ones(3, 4, 8), torch.ones(3, 8, 4)
    with pytest.raises(ContractError) as refused:
        ffn_ops.ffn(torch.ones(6, 4), *weights, "relu", tokens, tokens_index_flag=index)
    assert str(refused.value).startswith(sentence)
    explanation = ffn_ops.explain(torch.ones(6, 4), *weights, "relu", tokens, tokens_index_flag=index)
    assert explanation.violations[0].text.startswith(sentence)


@pytest.mark.parametrize("tokens", [[1.5, 4.5], ["3", "3"], [2**64, 1], [None, 6]])
def test_token_lists_hold_integers(tokens: list[object]):
    with pytest.raises(ContractError, match="it must hold int64 numbers"):
        ffn_ops.ffn(on_device(6, 4), on_device(2, 4, 8), on_device(2, 8, 4), "relu", tokens)


@pytest.mark.parametrize("name", ["weight1", "weight2", "bias1", "out"])
def test_tensors_on_another_device_than_x_are_refused(name: str):
    tensors = {"x": on_device(6, 4), "weight1": on_device(4, 8), "weight2": on_device(8, 4),
               "bias1": on_device(8), "out": on_device(6, 4)}  # fmt: skip
    tensors[name] = tensors[name].to("meta")
    overload = op.out if name == "out" else op.default
    if name != "out":
        del tensors["out"]
    with pytest.raises(RuntimeError, match=rf"{name} is on .* and x on {DEVICE}.*\(move one of them"):
        overload(**tensors, activation="relu")


@pytest.mark.cpu_only
def test_sparse_tensors_are_refused():
    with pytest.raises(RuntimeError, match=r"[Ss]parse"):
        op(torch.ones(6, 4).to_sparse(), torch.ones(4, 8), torch.ones(8, 4), "relu")
    with pytest.raises(RuntimeError, match=r"[Ss]parse|strided"):
        op(torch.ones(6, 4), torch.ones(4, 8).to_sparse(), torch.ones(8, 4), "relu")


@pytest.mark.parametrize("name", ["x", "weight1", "bias2", "out"])
def test_tensors_whose_storage_was_freed_are_refused(name: str):
    tensors = {"x": on_device(6, 4), "weight1": on_device(4, 8), "weight2": on_device(8, 4),
               "bias2": on_device(4), "out": on_device(6, 4)}  # fmt: skip
    tensors[name].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=rf"{name} reaches to byte \d+, but its storage holds 0"):
        op.out(**tensors, activation="relu")


@pytest.mark.cpu_only
def test_misaligned_tensors_are_right():
    def misaligned(tensor: torch.Tensor) -> torch.Tensor:
        memory = bytearray(tensor.numel() * tensor.element_size() + 1)
        copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=1)
        return copy.copy_(tensor.flatten()).view(tensor.shape)

    generator = torch.Generator().manual_seed(5)
    tensors = {
        "x": torch.randint(-128, 128, (6, 4), dtype=torch.int8, generator=generator),
        "weight1": torch.randint(-128, 128, (2, 4, 8), dtype=torch.int8, generator=generator),
        "weight2": torch.randint(-128, 128, (2, 8, 4), dtype=torch.int8, generator=generator),
        "expert_tokens": torch.tensor([2, 4]), "scale": torch.ones(2), "offset": torch.zeros(2),
        "deq_scale1": torch.full((2, 8), 1e-4), "deq_scale2": torch.full((2, 4), 1e-4),
        "bias1": torch.arange(16, dtype=torch.int32).view(2, 8),
    }  # fmt: skip
    shifted = {name: misaligned(tensor) for name, tensor in tensors.items()}
    assert torch.equal(op(**shifted, activation="gelu"), op(**tensors, activation="gelu"))


def test_out_that_overlaps_itself_is_refused():
    x, w1, w2 = on_device(6, 4), on_device(4, 8), on_device(8, 4)
    for overlapping in (on_device(99).as_strided((6, 4), (1, 1)), on_device(4).expand(6, 4)):
        with pytest.raises(RuntimeError, match="out has several elements in one memory location"):
            op(x, w1, w2, "relu", out=overlapping)
    op(x[:0], w1, w2, "relu", out=on_device(1).expand(0, 4))


def test_shapes_whose_products_overflow_are_refused_without_a_crash():
    for shape in ((2**62, 2**62), (2**40, 2**40), (2**63 - 1, 2)):
        with pytest.raises(ContractError):
            ffn_ops.contract.resolve(
                {"x": ffn_ops.contract.Spec("float32", (*shape, 4)),
                 "weight1": ffn_ops.contract.Spec("float32", (4, 8)),
                 "weight2": ffn_ops.contract.Spec("float32", (8, 4))},
                "relu",
            )  # fmt: skip
    with pytest.raises(RuntimeError, match=r"K1|x has shape"):
        op(on_device(1, 1).expand(2**40, 2**20), on_device(4, 8), on_device(8, 4), "relu")


@pytest.mark.cpu_only
def test_an_answer_that_no_memory_holds_is_refused():
    with pytest.raises(RuntimeError, match=r"^y needs memory for 1152921504606846976 elements"):
        op(torch.zeros(()).expand(2**58, 4), torch.ones(4, 8), torch.ones(8, 4), "relu")


def test_nan_and_infinity_pass_as_the_formula_says():
    w = torch.eye(4).half().to(DEVICE)
    rows = torch.tensor([[torch.nan, 1, 1, 1], [torch.inf, 1, 1, 1], [-torch.inf, 1, 1, 1], [1, 1, 1, 1]])
    x = rows.half().to(DEVICE)
    y = op(x, w, w, "relu").float().cpu()
    assert y[0].isnan().all()  # nan * 0 in every column
    assert y[1, 0].isnan() or y[1, 0] == torch.inf
    assert y[3].equal(torch.ones(4))
    assert op(x[:1], w, w, "relu").cpu().isnan().all()


def test_arguments_of_other_kinds_are_refused():
    x, w = on_device(6, 4), on_device(4, 4)
    with pytest.raises(RuntimeError):
        op(x, w, w, 3)
    with pytest.raises((RuntimeError, TypeError)):
        op(x, w, None, "relu")
    for activation in (None, torch.nn.GELU()):
        with pytest.raises(ContractError, match="a string"):
            ffn_ops.ffn(x, w, w, activation)
    with pytest.raises(ContractError, match=r"x is a list"):
        ffn_ops.ffn([1.0], w, w, "relu")
    for junk in ("x", 5, ("float16", None), None):
        with pytest.raises((ContractError, KeyError)):
            ffn_ops.explain(junk, w, w, "relu")
    with pytest.raises(ContractError, match="x has dtype 'fp16', but the names are float32"):
        ffn_ops.explain(("fp16", (6, 4)), w, w, "relu")
    with pytest.raises(ContractError, match="sizes are whole numbers from 0"):
        ffn_ops.explain(("float16", (-6, 4)), w, w, "relu")
    with pytest.raises(RuntimeError, match=r"(?i)unknown keyword|unexpected"):
        op(x, w, w, "relu", bias3=w)


@pytest.mark.cpu_only
def test_a_target_holds_within_its_block_and_its_thread_only():
    x, w = torch.ones(6, 4), torch.ones(4, 4)
    seen = []
    with ffn_ops.target("ascend910b"):
        with pytest.raises(RuntimeError, match="mode float32 runs on the cpu target only"):
            op(x, w, w, "relu")
        thread = threading.Thread(target=lambda: seen.append(ffn_ops.current_target()))
        thread.start()
        thread.join()
        with ffn_ops.target("cpu"):
            op(x, w, w, "relu")
        assert ffn_ops.current_target() == "ascend910b"
        with pytest.raises(ZeroDivisionError), ffn_ops.target("ascend310p"):
            raise ZeroDivisionError
        assert ffn_ops.current_target() == "ascend910b"
    op(x, w, w, "relu")
    assert seen == ["cpu"] and ffn_ops.current_target() == "cpu"
    with (
        pytest.raises(ContractError, match="target is 'ascend999', but it must be one of"),
        ffn_ops.target("ascend999"),
    ):
        pass
    with pytest.raises(ContractError, match="target is 'ascend999'"):
        ffn_ops.explain(x, w, w, "relu", target="ascend999")


@pytest.mark.cpu_only
def test_a_target_changes_what_is_legal_and_no_number():
    x, w = torch.randn(6, 4).half(), torch.randn(4, 4).half()
    expected = op(x, w, w, "gelu")
    with ffn_ops.target("ascend910b"):
        assert torch.equal(op(x, w, w, "gelu"), expected)


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("FFN_OPS_TARGET", "ascend310p", "mode float32 runs on the cpu target only"),
        (
            "FFN_OPS_TARGET",
            "abacus",
            "FFN_OPS_TARGET is 'abacus', but the targets are cpu, ascend910b, ascend310p",
        ),
        ("FFN_OPS_ISA", "mmx", "FFN_OPS_ISA is mmx, but"),
    ],
)
def test_environment_variables_are_obeyed_or_refused(variable: str, value: str, sentence: str):
    code = "import torch, ffn_ops; w = torch.ones(4, 4); torch.ops.ffn.ffn(w, w, w, 'relu')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                         env={**os.environ, variable: value})  # fmt: skip
    assert run.returncode == 1 and sentence in run.stderr, run.stderr


def test_explain_answers_for_pairs_arrays_and_any_target():
    explanation = ffn_ops.explain(
        (torch.float16, (32, 1024)), ("int4", (1024, 4096)), ("int4", (4096, 1024)), "gelu",
        antiquant_scale1=("float16", (8, 4096)), antiquant_offset1=("float16", (8, 4096)),
        antiquant_scale2=("float16", (32, 1024)), antiquant_offset2=("float16", (32, 1024)),
        target="ascend910b",
    )  # fmt: skip
    assert explanation.ok and explanation.mode == "w4a16" and explanation.route == "fused"
    # contract section f: ws1 + ws2 (16-bit each), W1 and W2 expanded, sync, 16 MiB, rounded.
    expected = 2 * 32 * 4096 * 2 + 2 * 2 * 2 * 1024 * 4096 + 20 * 2 * 32 + 2**24
    assert explanation.workspace == (expected + 32 + 511) // 512 * 512
    packed = ffn_ops.explain(
        ("float16", (32, 1024)), (torch.int32, (1024, 512)), (torch.uint8, (4096, 512)), "gelu",
        antiquant_scale1=np.ones((4096,), np.float16), antiquant_offset1=torch.ones(4096).half(),
        antiquant_scale2=np.ones((1024,), np.float16), antiquant_offset2=("float16", (1024,)),
    )  # fmt: skip
    assert packed.ok and packed.plan.dims["N1"] == 4096 and packed.workspace is None
    three = ffn_ops.explain(
        ("float16", (4, 8)), ("float16", (8, 12)), ("float32", (16, 8)), "mish", target="ascend310p"
    )
    assert [violation.rule for violation in three.violations] == ["activation", "weight2-dtype"]
    assert not three.ok and three.route is None and "rule weight2-dtype" in str(three)


def test_npu_ffn_has_torch_npus_signature_and_meaning():
    import inspect

    parameters = inspect.signature(ffn_ops.npu_ffn).parameters
    assert list(parameters)[:6] == [
        "x",
        "weight1",
        "weight2",
        "activation",
        "expert_tokens",
        "expert_tokens_index",
    ]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is None for p in list(parameters.values())[4:])
    shapes = (6, 4), (2, 4, 8), (2, 8, 4)
    x, w1, w2 = (torch.randn(*shape).half().to(DEVICE) for shape in shapes)

    def equals(y: torch.Tensor, other: torch.Tensor) -> bool:
        return torch.equal(y.cpu(), other.cpu())

    tokens = torch.tensor([2, 4], device=DEVICE)
    counts = ffn_ops.npu_ffn(x, w1, w2, "gelu", expert_tokens=[2, 4])
    assert equals(counts, ffn_ops.npu_ffn(x, w1, w2, "gelu", expert_tokens=[], expert_tokens_index=[2, 6]))
    assert equals(counts, op(x, w1, w2, "gelu", tokens, inner_precise=0))
    high_performance = ffn_ops.npu_ffn(x, w1, w2, "gelu", expert_tokens=[2, 4], inner_precise=1)
    assert equals(high_performance, op(x, w1, w2, "gelu", tokens, inner_precise=1))
    assert equals(counts, ffn_ops.npu_ffn(x, w1, w2, "gelu", expert_tokens=tokens))
    with pytest.raises(ContractError, match="exclude each other"):
        ffn_ops.npu_ffn(x, w1, w2, "gelu", expert_tokens=[2, 4], expert_tokens_index=[2, 6])
    # output_dtype counts only beside deq_scale1.
    assert ffn_ops.npu_ffn(x, w1[0], w2[0], "gelu", output_dtype=torch.bfloat16).dtype == torch.float16
    # GLU needs inner_precise 1 on the NPU, and None means 0 there. On an NPU, `target` changes nothing.
    with ffn_ops.target("ascend910b"), pytest.raises(ContractError, match="inner_precise is 0"):
        ffn_ops.npu_ffn(x, w1[0], w2[0, :4], "swiglu")


@pytest.mark.cpu_only
def test_npu_ffn_takes_scales_with_a_leading_one_as_torch_npus_tests_pass_them():
    rng = np.random.default_rng(3)
    x = torch.from_numpy(rng.integers(-128, 127, (32, 16), dtype=np.int8))
    w1 = torch.from_numpy(rng.integers(-128, 127, (16, 24), dtype=np.int8))
    w2 = torch.from_numpy(rng.integers(-128, 127, (24, 16), dtype=np.int8))
    deq1 = torch.from_numpy(rng.uniform(0.01, 0.05, (1, 24)).astype(np.float32))
    deq2 = torch.from_numpy(rng.uniform(0.01, 0.05, (1, 16)).astype(np.float32))
    packed = {
        "deq_scale1": ffn_ops.packing.pack_deq_scale(deq1),
        "deq_scale2": ffn_ops.packing.pack_deq_scale(deq2),
    }
    one = {"scale": torch.ones(1), "offset": torch.zeros(1)}
    y = ffn_ops.npu_ffn(x, w1, w2, "relu", **one, **packed, inner_precise=1)
    flat = {name: tensor.flatten() for name, tensor in packed.items()}
    assert torch.equal(y, ffn_ops.npu_ffn(x, w1, w2, "relu", **one, **flat, inner_precise=1))
    with ffn_ops.target("ascend910b"), pytest.raises(ContractError, match="deq_scale1 has shape"):
        ffn_ops.npu_ffn(x, w1, w2, "relu", **one, **packed, inner_precise=1)
    half = {
        f"antiquant_{kind}{i}": torch.full((1, n), 0.5).half()
        for kind in ("scale", "offset")
        for i, n in ((1, 24), (2, 16))
    }
    y = ffn_ops.npu_ffn(x.half() / 64, w1, w2, "silu", **half, inner_precise=1, output_dtype=torch.float16)
    assert y.dtype == torch.float16 and y.shape == x.shape
