# SPDX-License-Identifier: Apache-2.0
"""`python -m ffn_ops npu-check`: what only hardware can show, in one command, with a report to send back.

Everything here has an answer that needs no tolerance: integers small enough that every product, sum and
rounding is exact, through relu or reglu. Activations with an exp are reported as a distance, times as times.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ffn_ops import doctor, packing

REPETITIONS = 20  # of a timed call; the report has their median


def main(report: Path) -> None:
    """Runs every check, prints each verdict, writes the report; SystemExit(1) when one failed."""
    facts, problems = doctor.examine(npu=True)
    emulated = facts["CANN"].startswith("emulated")
    found: dict[str, Any] = {"emulated": emulated, "doctor": facts, "problems": problems, "checks": {}}
    if not problems:
        for check in (modes, experts, activations, ordering, no_synchronisation, times):
            try:
                result = check(emulated)
            except Exception as error:
                result = {"ok": False, "error": str(error)}
            found["checks"][check.__name__] = result
            print(f"{check.__name__:20}{'ok' if result['ok'] else 'FAILED'}")
    report.write_text(json.dumps(found, indent=2) + "\n")
    for problem in problems:
        print(problem)
    if problems:
        print(f"no check ran; {report} has what was found instead")
    else:
        print(
            f"{report} is the report" + (", of an emulator: it says nothing about an NPU" if emulated else "")
        )
    if problems or not all(result["ok"] for result in found["checks"].values()):
        sys.exit(1)


def _integers(low: int, high: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact_call(mode: str, E: int = 0, M: int = 12, K: int = 16, N: int = 32) -> dict[str, Any]:
    """A call of the mode, on the CPU, of which every step is exact in every dtype involved."""
    e = (E,) if E else ()
    half = torch.bfloat16 if mode.endswith("bf16") else torch.float16
    x_dtype = torch.int8 if mode.startswith("w8a8") else half
    integer = mode.startswith("w")
    weights = [_integers(-1, 2, (*e, *shape), torch.int8 if integer else half, i)
               for i, shape in enumerate(((K, N), (N, K)))]  # fmt: skip
    call: dict[str, Any] = {"activation": "relu", "x": _integers(-1, 2, (M, K), x_dtype, 2)}
    columns = {"1": N, "2": K}
    if mode.startswith("w4"):
        weights = [packing.pack_int4(weight) for weight in weights]
    if mode.startswith("w8a8"):
        deq = torch.bfloat16 if half == torch.bfloat16 else torch.float32
        call |= {f"deq_scale{i}": torch.ones(*e, n, dtype=deq) for i, n in columns.items()}
        call |= {"scale": torch.ones(E or 1), "offset": torch.zeros(E or 1), "output_dtype": half}
    elif integer:
        call |= {f"antiquant_scale{i}": torch.ones(*e, n, dtype=half) for i, n in columns.items()}
        call |= {f"antiquant_offset{i}": torch.zeros(*e, n, dtype=half) for i, n in columns.items()}
    call |= {"weight1": weights[0], "weight2": weights[1]}
    if E:
        call["expert_tokens"] = torch.tensor([M - 2 * (E - 1) - 2 * (E > 2), *[2] * (E - 1)])
        call["expert_tokens"][-1] += M - int(call["expert_tokens"].sum())
    return call


def on_npu(call: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to("npu:0") if isinstance(value, Tensor) else value for name, value in call.items()}


def modes(emulated: bool) -> dict[str, Any]:
    """Each mode, dense and by expert, bit for bit what the CPU has."""
    results = {}
    for mode in ("fp16", "bf16", "w8a8", "w8a8_bf16", "w8a16", "w8a16_bf16", "w4a16", "w4a16_bf16"):
        for E in (0, 3):
            call = exact_call(mode, E)
            y = torch.ops.ffn.ffn(**on_npu(call)).cpu()
            results[f"{mode}, {E or 'no'} experts"] = torch.equal(y, torch.ops.ffn.ffn(**call))
    left_and_right = exact_call("fp16") | {
        "activation": "reglu",
        "weight2": exact_call("fp16", N=16)["weight2"],
    }
    y = torch.ops.ffn.ffn(**on_npu(left_and_right)).cpu()
    results["reglu: left * relu(right)"] = torch.equal(y, torch.ops.ffn.ffn(**left_and_right))
    return {"ok": all(results.values()), "equal": results}


def exact_moe(half: torch.dtype, activation: str) -> dict[str, Any]:
    """A call of ffn.moe, on the CPU, of which every step is exact: integers up to 256, which bf16 holds.

    Of its four experts one gets nothing, and the ids of four skip a slot. relu takes the route `fused` of an
    NPU, reglu `grouped`.
    """
    E, M, K, N = 4, 12, 16, 16
    generator = torch.Generator().manual_seed(3)
    ids = torch.stack([torch.randperm(3, generator=generator)[:2] for _ in range(M)])
    ids[:4, 1] = E
    return {
        "x": _integers(-1, 2, (M, K), half, 0),
        "topk_ids": ids,
        "topk_weights": torch.tensor([1.0, -1.0]).repeat(M, 1),
        "weight1": _integers(-1, 2, (E, K, N if activation == "relu" else 2 * N), half, 1),
        "weight2": _integers(-1, 2, (E, N, K), half, 2),
        "activation": activation,
    }


def moe_calls() -> dict[str, dict[str, Any]]:
    return {
        f"{route}, {half}".replace("torch.", ""): exact_moe(half, activation)
        for route, activation in (("fused", "relu"), ("grouped", "reglu"))
        for half in (torch.float16, torch.bfloat16)
    }


def experts(emulated: bool) -> dict[str, Any]:
    """ffn.moe by both routes, with an empty expert and skipped ids, bit for bit what the CPU has."""
    results = {}
    for name, call in moe_calls().items():
        y = torch.ops.ffn.moe(**on_npu(call)).cpu()
        results[name] = torch.equal(y, torch.ops.ffn.moe(**call))
    return {"ok": all(results.values()), "equal": results}


def activations(emulated: bool) -> dict[str, Any]:
    """Facts: the largest distance from the CPU's answer, relative to the largest |y|."""
    distances = {}
    generator = torch.Generator().manual_seed(1)
    x, w1, w2 = (
        torch.randn(*shape, generator=generator).half() / 4 for shape in ((16, 64), (64, 128), (128, 64))
    )
    for name in ("fastgelu", "gelu", "silu"):
        for inner_precise in (0, 1):
            expected = torch.ops.ffn.ffn(x, w1, w2, name, inner_precise=inner_precise).float()
            y = (
                torch.ops.ffn.ffn(x.npu(), w1.npu(), w2.npu(), name, inner_precise=inner_precise)
                .cpu()
                .float()
            )
            distance = ((y - expected).abs().max() / expected.abs().max()).item()
            distances[f"{name}, inner_precise={inner_precise}"] = distance
    return {
        "ok": all(distance == distance for distance in distances.values()),
        "relative distance": distances,
    }


def ordering(emulated: bool) -> dict[str, Any]:
    """Operators queued before and after the call see what they should, on two streams."""
    call = on_npu(exact_call("fp16"))
    expected = torch.ops.ffn.ffn(**call).cpu()
    x, wrong = call["x"], 0
    for stream in (torch.npu.current_stream(), torch.npu.Stream()):
        torch.npu.synchronize()
        with torch.npu.stream(stream):
            for _ in range(20):
                changed = (x + 1) - 1
                y = torch.ops.ffn.ffn(**{**call, "x": changed})
                changed.zero_()
                z = y + 0
                y.zero_()
                wrong += not torch.equal(z.cpu(), expected)
    return {"ok": wrong == 0, "wrong of 40": wrong}


def no_synchronisation(emulated: bool) -> dict[str, Any]:
    """Calls with expert_tokens, or ids, on the device return while work queued before them still runs."""
    calls: dict[str, Callable[[], Tensor]] = {
        "ffn": partial(torch.ops.ffn.ffn, **on_npu(exact_call("fp16", 3)))
    }
    calls |= {
        f"moe, {name}": partial(torch.ops.ffn.moe, **on_npu(call)) for name, call in moe_calls().items()
    }
    size = 256 if emulated else 4096
    a = torch.ones(size, size).half().npu()

    def work() -> None:
        for _ in range(50):
            torch.mm(a, a)

    results = {}
    for name, call in calls.items():
        call()
        work()
        torch.npu.synchronize()
        work()
        begin = time.perf_counter()
        call()
        returned = time.perf_counter() - begin
        running = not torch.npu.current_stream().query()
        torch.npu.synchronize()
        finished = time.perf_counter() - begin
        results[name] = {"running": running, "returned after s": returned, "finished after s": finished}
    return {"ok": all(result["running"] for result in results.values()), "calls": results}


def _unfused(x: Tensor, weight1: Tensor, weight2: Tensor) -> Tensor:
    return torch.mm(torch.relu(torch.mm(x, weight1)), weight2)


def times(emulated: bool) -> dict[str, Any]:
    """Facts: median seconds of the fused call, torch_npu's npu_ffn, and the three operators it replaces."""
    import torch_npu

    sizes = [(1, 64, 128)] if emulated else [(M, 1024, 4096) for M in (1, 16, 128, 1024)]
    results = {}
    for M, K, N in sizes:
        x, w1, w2 = (torch.ones(*shape).half().npu() / K for shape in ((M, K), (K, N), (N, K)))
        calls: dict[str, Callable[[], Tensor]] = {
            "ffn": partial(torch.ops.ffn.ffn, x, w1, w2, "relu"),
            "npu_ffn": partial(torch_npu.npu_ffn, x, w1, w2, "relu"),
            "unfused": partial(_unfused, x, w1, w2),
        }
        results[f"M={M} K={K} N={N}"] = {name: _median(function) for name, function in calls.items()}
    return {"ok": True, "seconds": results}


def _median(function: Callable[[], Tensor]) -> float:
    function()
    seconds = []
    for _ in range(REPETITIONS):
        torch.npu.synchronize()
        begin = time.perf_counter()
        function()
        torch.npu.synchronize()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)
