# SPDX-License-Identifier: Apache-2.0
"""The texts are in step with the code: links, the code of the README, and its table of modes."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from ffn_ops import contract

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert "://" in link or (page.parent / link).exists(), f"{page.name} links to {link}"


def test_every_page_of_docs_is_linked_from_the_readme_or_the_architecture() -> None:
    index = README + (ROOT / "docs" / "architecture.md").read_text()
    linked = {Path(link).name for link in re.findall(r"\]\(([^)#]+)", index)}
    assert {page.name for page in ROOT.glob("docs/*.md")} <= linked


def test_files_that_the_architecture_names_exist() -> None:
    names = re.findall(
        r"`((?:csrc|ffn_ops|tests)/[\w./-]+\.\w+)`", (ROOT / "docs" / "architecture.md").read_text()
    )
    assert names
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_the_readme_has_the_contracts_table_of_modes() -> None:
    assert contract.modes_table() in README, "run `python ffn_ops/contract.py` and paste it"


def test_the_page_on_experts_has_the_contracts_table_of_routes() -> None:
    page = (ROOT / "docs" / "moe.md").read_text()
    assert contract.routes_table() in page, "run `python ffn_ops/contract.py` and paste it"


def test_the_code_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)
    assert "mode float32" in capsys.readouterr().out
    assert names["y"].shape == names["x"].shape  # type: ignore[attr-defined]


class Expert(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate = torch.nn.Linear(6, 10, bias=False), torch.nn.Linear(6, 10, bias=False)
        self.down = torch.nn.Linear(10, 6, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x) * torch.nn.functional.silu(self.gate(x)))


class ByHand(torch.nn.Module):
    """A mixture of experts as people write it."""

    top_k = 2

    def __init__(self) -> None:
        super().__init__()
        self.gate = torch.nn.Linear(6, 4, bias=False)
        self.experts = torch.nn.ModuleList(Expert() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = self.gate(x).softmax(-1).topk(self.top_k)
        weights = weights / weights.sum(-1, keepdim=True)
        y = torch.zeros_like(x)
        for t, (row, chosen, shares) in enumerate(zip(x, ids, weights, strict=True)):
            for e, share in zip(chosen, shares, strict=True):
                y[t] += share * self.experts[e](row)
        return y


def test_five_lines_replace_a_block_that_was_written_by_hand() -> None:
    page = (ROOT / "docs" / "moe.md").read_text()
    layer, replacement = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)[:2]
    names: dict[str, Any] = {}
    exec(layer, names)
    assert names["y"].shape == (4, 16, 512)
    assert len(replacement.strip().splitlines()) == 5
    old = ByHand()
    names |= {"old": old, "H": 6, "I": 10}
    exec(replacement, names)
    x = torch.randn(9, 6)
    with torch.no_grad():
        torch.testing.assert_close(names["new"](x), old(x))
