# SPDX-License-Identifier: Apache-2.0
"""Small dense blocks, and code that only looks like one.

test_patch.py patches them, test_patched.py uses them afterwards.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp(activation: nn.Module, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16, bias=bias), activation, nn.Linear(16, 8, bias=bias)).eval()


class Inline(nn.Module):
    """fc1, an activation and fc2 amid code that `body` is."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor]):
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.act, self.fc2 = nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)
        self.dropout = nn.Dropout(0.5)
        self.body = body
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def twice(m: Any, x: Tensor) -> Tensor:
    return m.fc2(m.act(m.act(m.fc1(x)) - 0.1))


def used_beside(m: Any, x: Tensor) -> Tensor:
    h = m.act(m.fc1(x))
    return m.fc2(h) * h.mean()


def in_place(m: Any, x: Tensor) -> Tensor:
    h = m.act(m.fc1(x))
    h += 1
    return m.fc2(h)


def method_in_place(m: Any, x: Tensor) -> Tensor:
    h = m.fc1(x)
    h.mul_(2)
    return m.fc2(m.act(h))


def written_through(m: Any, x: Tensor) -> Tensor:
    h = m.act(m.fc1(x))
    h[..., :4] = 0
    return m.fc2(h)


def out_of(m: Any, x: Tensor) -> Tensor:
    h = m.act(m.fc1(x))
    torch.mul(h, 3, out=h.data)
    return m.fc2(h)


def x_changes(m: Any, x: Tensor) -> Tensor:
    x = x.clone()
    h = m.act(m.fc1(x))
    x += 1
    return m.fc2(h) + x


def x_changes_early(m: Any, x: Tensor) -> Tensor:
    x = x.clone()
    h = m.fc1(x)
    x += 1
    return m.fc2(m.act(h)) + x


def keeps(m: Any, x: Tensor) -> Tensor:
    m.kept = m.act(m.fc1(x))
    return m.fc2(m.kept)


def branches(m: Any, x: Tensor) -> Tensor:
    h = m.act(m.fc1(x))
    return m.fc2(h) if h.sum() > 0 else m.fc2(-h)


TRAPS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "activation twice": twice,
    "twice in a row": lambda m, x: m.fc2(m.act(m.act(m.fc1(x)))),
    "sum between": lambda m, x: m.fc2(m.act(m.fc1(x)) + 1),
    "sum from the left": lambda m, x: m.fc2(1 + m.act(m.fc1(x))),
    "minus": lambda m, x: m.fc2(-m.act(m.fc1(x))),
    "gate": lambda m, x: m.fc2(m.act(m.fc1(x)) * m.fc1(x)),
    "power": lambda m, x: m.fc2(m.act(m.fc1(x)) ** 2),
    "slice": lambda m, x: m.fc2(m.act(m.fc1(x))[..., :16].flip(-1)),
    "no activation": lambda m, x: m.fc2(m.fc1(x)),
    "before it": lambda m, x: m.fc2(m.act(m.fc1(x) * 2)),
    "concatenation": lambda m, x: m.fc2(torch.cat([m.act(m.fc1(x))] * 2, -1)[..., 8:24]),
    "used beside": used_beside,
    "in place": in_place,
    "a method in place": method_in_place,
    "written through": written_through,
    "out=": out_of,
    "branches": branches,
    "x changes": x_changes,
    "x changes early": x_changes_early,
    "active dropout": lambda m, x: m.fc2(F.dropout(m.act(m.fc1(x)), 0.5, training=True)),
    "another input": lambda m, x: m.fc2(m.act(m.fc1(x)) * 0 + x.repeat(1, 2)),
    "functional": lambda m, x: F.linear(m.act(m.fc1(x)), m.fc2.weight) + m.fc2.bias,
    "numpy": lambda m, x: m.fc2(torch.as_tensor(np.asarray(m.act(m.fc1(x)).detach()))),
    "comparison": lambda m, x: m.fc2((m.act(m.fc1(x)) > 0.1).float()),
    "backwards": lambda m, x: m.fc1(m.act(m.fc2(x.repeat(1, 2)))).narrow(-1, 0, 8),
}
# Python tells a stand-in from a tensor, so only the trial can see these.
SEEN_BY_TRIAL: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "asks for the type": lambda m, x: m.fc2(h * 3 if isinstance(h := m.act(m.fc1(x)), Tensor) else h),
    "asks torch for it": lambda m, x: m.fc2(h * 3 if torch.is_tensor(h := m.act(m.fc1(x))) else h),
    "keeps it": keeps,
}


def outcome(model: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(3)
    return model(x)
