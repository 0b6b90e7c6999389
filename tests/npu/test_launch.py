# SPDX-License-Identifier: Apache-2.0
"""The order of launches: with torch_npu's queue in each of its modes, on side streams, from many threads.

A wrong order can be right by luck, so launches and tasks are slowed down: emulator.slow().
"""

import pytest
from process import run

# Queue operators around ours, on a stream, and compare with the same on the CPU.
ORDER = """
torch.manual_seed(0)
weight1, weight2 = torch.randn(16, 32).half() / 4, torch.randn(32, 16).half() / 6
w1, w2 = weight1.npu(), weight2.npu()
x = torch.randn(6, 16).half()
streams = [torch.npu.current_stream(), torch.npu.Stream()]
for stream in streams:
    stream.wait_stream(torch.npu.current_stream())
    with torch.npu.stream(stream), emulator.slow(launch_us=3000, task_us=2000):
        a = x.npu()
        for i in range(5):
            a = a * 0.5 + 1
            a = op(a, w1, w2, "relu")
            a = a - 0.25
        stream.synchronize()
    b = x
    for i in range(5):
        b = op(b * 0.5 + 1, weight1, weight2, "relu") - 0.25
    assert torch.allclose(a.cpu().float(), b.float(), rtol=2**-6, atol=2**-6), (a.cpu() - b).abs().max()
print("in order")
"""

MODES = [
    {"TASK_QUEUE_ENABLE": "0"},
    {"TASK_QUEUE_ENABLE": "1"},
    {"TASK_QUEUE_ENABLE": "2"},
    {"TASK_QUEUE_ENABLE": "1", "PER_STREAM_QUEUE": "1"},
]


@pytest.mark.parametrize("environment", MODES, ids=lambda e: "-".join(e.values()))
def test_calls_run_in_order_with_other_operators(environment: dict[str, str]):
    done = run(ORDER, operators=True, **environment)
    assert done.stdout.endswith("in order\n"), done.stdout + done.stderr[-2000:]


def test_a_launch_through_the_queue_does_not_wait_for_the_device():
    done = run(
        """
import time
x, weight1, weight2 = operands()
op(x, weight1[0], weight2[0], "gelu"); torch.npu.synchronize()
with emulator.slow(task_us=200000):
    before = emulator.counters()
    y = op(x, weight1[0], weight2[0], "gelu")
    event = torch.npu.Event(); event.record()
    print("ready at once:", event.query())
torch.npu.synchronize()
print("ready at last:", event.query())
"""
    )
    assert done.stdout.splitlines()[-2:] == ["ready at once: False", "ready at last: True"], done.stderr


def test_the_drained_handle_is_right_too():
    """The other launch, for a torch_npu whose queue's entry point is not found: phase 2 on the handle of
    the stream. ffn_ops.aclnn uses it always."""
    program = ORDER.replace(
        'a = op(a, w1, w2, "relu")',
        'y = torch.empty_like(a); aclnn.prepare(a, w1, w2, "relu", out=y).run(); a = y',
    )
    done = run("from ffn_ops import aclnn\n" + program, operators=True)
    assert done.stdout.endswith("in order\n"), done.stdout + done.stderr[-2000:]


def test_eight_threads_on_four_streams():
    done = run(
        """
from concurrent.futures import ThreadPoolExecutor
x, weight1, weight2 = operands()
tokens = [torch.tensor(t).npu() for t in ([2, 0, 4], [6, 0, 0], [0, 1, 5], [1, 2, 3])]
expected = [op(*on_cpu(x, weight1, weight2), "gelu", t.cpu()) for t in tokens]
streams = [torch.npu.Stream() for _ in range(4)]
torch.npu.synchronize()

def work(i):
    with torch.npu.stream(streams[i % 4]):
        ys = [op(x, weight1, weight2, "gelu", tokens[(i + j) % 4]) for j in range(40)]
        streams[i % 4].synchronize()
        return all(close(y, expected[(i + j) % 4]) for j, y in enumerate(ys))

with ThreadPoolExecutor(8) as pool:
    print(all(pool.map(work, range(8))))
"""
    )
    assert done.stdout.endswith("True\n"), done.stdout + done.stderr[-2000:]
