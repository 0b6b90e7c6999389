# SPDX-License-Identifier: Apache-2.0
"""A mixture-of-experts block: route -> permute -> ffn -> combine, and MoE, the layer made of them.

torch.ops.ffn.moe is the last three in one operator; permute and combine are for what it does not do: keeping
activations for a backward pass, and activations that it does not know. docs/moe.md has the picture.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ffn_ops import contract
from ffn_ops.activation import GATES, activate
from ffn_ops.contract import ContractError
from ffn_ops.op import broken_ids, check_moe, holds_values, operand_bias
from ffn_ops.packing import FLOATS, Packable, is_packed, packed_float

ROUTERS = ("softmax", "topk_softmax", "sigmoid", "top1")
CLAMPED_SWIGLU = "swiglu_clamped"
ACTIVATIONS = (*contract.ACTIVATIONS, CLAMPED_SWIGLU)


class Routing(NamedTuple):
    ids: Tensor  # [M, top_k], the experts of each token, best first
    weights: Tensor  # [M, top_k], float32 on the CPU


class Load(NamedTuple):
    """How the tokens of a batch fall on the experts."""

    tokens: Tensor  # [E] int64
    imbalance: float  # of the fullest expert to the mean: 1 is even, E is all on one


def route(
    logits: Tensor,
    top_k: int,
    router: str = "softmax",
    *,
    renormalize: bool = False,
    correction_bias: Tensor | None = None,
    n_group: int = 1,
    topk_group: int = 1,
    scaling: float = 1.0,
) -> Routing:
    """The top_k experts of each token and their weights, from router logits [M, E].

    router: "softmax" over all experts, then the top_k largest (Mixtral, Qwen); "topk_softmax", softmax over
    the top_k largest logits (GPT-OSS); "sigmoid", whose choice adds correction_bias [E] and is limited to the
    topk_group best of n_group groups of experts, each as good as its two best (DeepSeek-V3); "top1", softmax
    with top_k = 1 (Switch). renormalize makes the weights of a token add up to 1 (softmax, sigmoid); scaling
    multiplies them. All in float32. Raises ContractError on the CPU for logits that no weight follows from,
    NaN and, before a softmax, an infinity as a token's largest; a device's are not read.
    """
    if not isinstance(logits, Tensor) or logits.dim() == 0:
        what = "have shape []" if isinstance(logits, Tensor) else f"are a {type(logits).__name__}"
        raise ContractError(f"logits {what}, but they must be a tensor [..., E] (pass the router's output)")
    _check_routing(logits.shape[-1], top_k, router, n_group, topk_group)
    _check_number("scaling", scaling)
    if not logits.is_floating_point():
        raise ContractError(
            f"logits are {logits.dtype}, but a router gives floating-point ones (cast them, or pass logits "
            "rather than ids)"
        )
    if correction_bias is not None and router != "sigmoid":
        raise ContractError(
            f"correction_bias is given, but router {router} has none (leave it out, or use sigmoid)"
        )
    if correction_bias is not None and correction_bias.shape != logits.shape[-1:]:
        raise ContractError(
            f"correction_bias has shape {list(correction_bias.shape)}, but it must be [E] = "
            f"{list(logits.shape[-1:])} (give each expert one number)"
        )
    if not torch.compiler.is_compiling() and holds_values(logits):
        _check_values(logits, correction_bias, router)
    if logits.device.type == "npu" and not logits.requires_grad and router != "sigmoid":
        import torch_npu

        # In logits' dtype there, and ties choose the lower expert.
        if router == "topk_softmax":
            found = torch_npu.npu_moe_gating_top_k_softmax_v2(logits, k=top_k, renorm=1)
        else:
            found = torch_npu.npu_moe_gating_top_k_softmax(logits, None, top_k)
        weights, ids = found[0].float(), found[1]
    elif router == "topk_softmax":
        largest, ids = logits.float().topk(top_k, dim=-1)
        weights = largest.softmax(-1)
    elif router == "sigmoid":
        scores = logits.float().sigmoid()
        choice = scores if correction_bias is None else scores + correction_bias
        if n_group > 1:
            groups = choice.unflatten(-1, (n_group, -1))
            best = (
                groups.topk(min(2, groups.shape[-1]), dim=-1).values.sum(-1).topk(topk_group, dim=-1).indices
            )
            chosen = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter(-1, best, True)
            choice = groups.masked_fill(~chosen.unsqueeze(-1), -torch.inf).flatten(-2)
        ids = choice.topk(top_k, dim=-1).indices
        weights = scores.gather(-1, ids)
    else:
        weights, ids = logits.float().softmax(-1).topk(top_k, dim=-1)
    if renormalize:
        weights = weights / (
            weights.sum(-1, keepdim=True) + 1e-20
        )  # as DeepSeek-V3, whose scores may all be 0
    return Routing(ids, weights if scaling == 1 else weights * scaling)


def permute(x: Tensor, topk_ids: Tensor, E: int) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens x [M, H] sorted by their experts topk_ids [M, top_k]: rows [M * top_k, H], how many of them
    each expert has [E], and their order: row i is slot order[i] % top_k of token order[i] // top_k. Rows of
    ids from E on are last and count nowhere.
    """
    ids = topk_ids.reshape(-1).long()
    # An NPU sorts integers on its slow core, and the numbers of experts are exact as floats.
    order = (ids.clamp(max=E).float() if ids.device.type == "npu" else ids).argsort(stable=True)
    counts = torch.zeros(E + 1, dtype=torch.int64, device=x.device)
    counts = counts.scatter_add(0, ids.clamp(max=E), torch.ones_like(ids))
    return x[order // max(topk_ids.shape[-1], 1)], counts[:E], order


def restore(rows: Tensor, order: Tensor) -> Tensor:
    """Rows as they were before permute: slot by slot, token by token."""
    return torch.empty_like(rows).index_copy(0, order, rows)


def combine(rows: Tensor, topk_weights: Tensor, order: Tensor) -> Tensor:
    """y [M, H]: each token's rows, weighted by topk_weights [M, top_k] and added in float32, rounded once."""
    M, top_k = topk_weights.shape
    y = restore(rows, order).float().reshape(M, top_k, rows.shape[-1]) * topk_weights.float().unsqueeze(-1)
    return y.sum(1).to(rows.dtype)


def load_statistics(topk_ids: Tensor, E: int) -> Load:
    """Tokens of each of E experts, by the ids of a Routing, and how uneven they are. Waits for the device."""
    if not isinstance(topk_ids, Tensor) or topk_ids.dtype not in (torch.int64, torch.int32):
        kind = topk_ids.dtype if isinstance(topk_ids, Tensor) else type(topk_ids).__name__
        raise ContractError(
            f"topk_ids is {kind}, but it must be an int64 or int32 tensor (pass the ids of a Routing)"
        )
    ids = topk_ids.reshape(-1)
    _check_size("E", E, 1)
    broken = broken_ids(ids)
    if broken:
        raise ContractError(broken)
    tokens = ids[ids < E].bincount(minlength=E)
    total = int(tokens.sum())
    return Load(tokens, float(tokens.max()) * E / total if total else 1.0)


def clamped_swiglu(x: Tensor, alpha: float = 1.702, limit: float = 7.0) -> Tensor:
    """GPT-OSS's GLU of x's halves, in the operator's order [up | gate]: with both held to `limit` (the gate
    only from above), (up + 1) * gate * sigmoid(alpha * gate)."""
    up, gate = x.chunk(2, dim=-1)
    gate = gate.clamp(max=limit)
    return (up.clamp(-limit, limit) + 1) * (gate * torch.sigmoid(alpha * gate))


class MoE(Packable):
    """y = sum over a token's top_k experts of weight * (act(x W1 + b1) W2 + b2), plus the shared experts.

    Parameters: gate.weight [E, hidden_size]; weight1 [E, hidden_size, N1] and weight2 [E, intermediate_size,
    hidden_size], where N1 is 2 * intermediate_size for GLU activations, whose halves are the operator's
    [up | gate] (packing.swap_glu_halves exchanges Hugging Face's), and else intermediate_size; bias1 and
    bias2 with `bias`; shared_weight1 and shared_weight2, with a leading 1, of a block as wide as
    `shared_experts` experts; correction_bias [E], a buffer, for the router "sigmoid".

    activation: one of ACTIVATIONS; alpha and limit are "swiglu_clamped"'s. router, renormalize, n_group,
    topk_group and scaling: see `route`. recompute: a backward pass computes the activations again, from x
    alone, instead of keeping them. Runs and trains on the CPU in float32, float16 and bfloat16, and on NPUs
    in the latter two.
    """

    packed_names = ("weight1", "weight2", "shared_weight1", "shared_weight2")
    weight1: Tensor
    weight2: Tensor
    bias1: Tensor | None
    bias2: Tensor | None
    shared_weight1: Tensor | None
    shared_weight2: Tensor | None
    correction_bias: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        *,
        activation: str = "swiglu",
        bias: bool = False,
        router: str = "softmax",
        renormalize: bool = False,
        n_group: int = 1,
        topk_group: int = 1,
        scaling: float = 1.0,
        shared_experts: int = 0,
        alpha: float = 1.702,
        limit: float = 7.0,
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size, least in (
            ("hidden_size", hidden_size, 1),
            ("intermediate_size", intermediate_size, 1),
            ("num_experts", num_experts, 1),
            ("shared_experts", shared_experts, 0),
        ):
            _check_size(name, size, least)
        for name, number in (("scaling", scaling), ("alpha", alpha), ("limit", limit)):
            _check_number(name, number)
        if limit < 0:
            raise ContractError(f"limit is {limit}, but it must be 0 or more (give what bounds both sides)")
        if dtype is not None and dtype not in FLOATS:
            raise ContractError(
                f"dtype is {dtype!r}, but it must be torch.float32, torch.float16 or torch.bfloat16 (choose "
                "one)"
            )
        if activation not in ACTIVATIONS:
            raise ContractError(
                f"activation is {activation!r}, but it must be one of {', '.join(ACTIVATIONS)} (name one)"
            )
        _check_routing(num_experts, top_k, router, n_group, topk_group)
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.num_experts, self.top_k, self.shared_experts = num_experts, top_k, shared_experts
        self.activation, self.alpha, self.limit = activation, alpha, limit
        self.router, self.renormalize, self.scaling = router, renormalize, scaling
        self.n_group, self.topk_group, self.recompute = n_group, topk_group, recompute
        E, K2 = num_experts, intermediate_size
        self._halves = glu = 2 if activation in (*GATES, CLAMPED_SWIGLU) else 1

        def parameter(*sizes: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*sizes, device=device, dtype=dtype))

        self.gate = nn.Linear(hidden_size, E, bias=False, device=device, dtype=dtype)
        self.weight1, self.weight2 = parameter(E, hidden_size, glu * K2), parameter(E, K2, hidden_size)
        self.bias1 = parameter(E, glu * K2) if bias else None
        self.bias2 = parameter(E, hidden_size) if bias else None
        wide = shared_experts * K2
        self.shared_weight1 = parameter(1, hidden_size, glu * wide) if wide else None
        self.shared_weight2 = parameter(1, wide, hidden_size) if wide else None
        corrected = torch.zeros(E, device=device) if router == "sigmoid" else None
        self.register_buffer("correction_bias", corrected)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform up to 1 / sqrt(K), as nn.Linear; biases are 0, the correction too."""
        self.gate.reset_parameters()
        if self.correction_bias is not None:
            self.correction_bias.zero_()
        for name, parameter in self.named_parameters(recurse=False):
            if name.startswith("bias"):
                parameter.zero_()
            else:
                bound = parameter.shape[-2] ** -0.5
                parameter.uniform_(-bound, bound)

    def route(self, x: Tensor) -> Routing:
        """The experts of tokens x [M, hidden_size]."""
        return route(
            self.gate(x), self.top_k, self.router, renormalize=self.renormalize, scaling=self.scaling,
            correction_bias=self.correction_bias, n_group=self.n_group, topk_group=self.topk_group,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden_size], in the parameters' dtype; returns its shape and dtype."""
        if not isinstance(x, Tensor):
            raise ContractError(f"x is a {type(x).__name__}, but this MoE takes a tensor (pass one)")
        if x.shape[-1:] != (self.hidden_size,):
            raise ContractError(
                f"x has shape {tuple(x.shape)}, but this MoE takes a last dimension of hidden_size = "
                f"{self.hidden_size} (check which block it replaces)"
            )
        # A gate of another kind may cast.
        if type(self.gate) is nn.Linear and x.dtype != self.gate.weight.dtype and not _is_autocast(x):
            raise ContractError(
                f"x is {x.dtype} and the parameters are {self.gate.weight.dtype}, but a MoE takes x in their "
                "dtype (cast one of them, or use torch.autocast)"
            )
        tokens = x.reshape(-1, self.hidden_size)
        y = self.experts(tokens, *self.route(tokens))
        if self.shared_weight1 is not None and self.shared_weight2 is not None:
            tokens, *pair = _autocast(tokens, self.shared_weight1, self.shared_weight2)
            everyone = torch.full((1,), tokens.shape[0], device=x.device)
            # With experts aclnnFFNV3 has only these, and a single one counts too.
            known = x.device.type != "npu" or self.activation in contract.VENDOR_ACTIVATIONS[:4]
            if known and self._fuses(x):
                y = y + torch.ops.ffn.ffn(tokens, *pair, self.activation, everyone)
            else:
                y = y + self._unfused(tokens, everyone, pair[0], pair[1], wide=self.shared_experts)
        return y.reshape(x.shape)

    def experts(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """The routed part alone, for tokens x [..., hidden_size] and ids and weights [..., top_k]: ids from
        num_experts on are skipped. Raises RuntimeError for what torch.ops.ffn.moe refuses."""
        x, weight1, weight2, *biases = _autocast(x, self.weight1, self.weight2, self.bias1, self.bias2)
        bias1, bias2 = map(operand_bias, biases)
        if self._fuses(x, topk_weights):
            return torch.ops.ffn.moe(
                x, topk_ids, topk_weights, weight1, weight2, self.activation, bias1, bias2
            )
        # With gradients and without, and for a clamped gate as for others, the same calls are legal.
        check_moe(
            "swiglu" if self.activation == CLAMPED_SWIGLU else self.activation, x=x, topk_ids=topk_ids,
            topk_weights=topk_weights, weight1=weight1, weight2=weight2, bias1=bias1, bias2=bias2,
        )  # fmt: skip
        ids, weights = topk_ids.flatten(0, -2), topk_weights.flatten(0, -2)
        rows, expert_tokens, order = permute(x.flatten(0, -2), ids, self.num_experts)
        rows = self._unfused(rows, expert_tokens, weight1, weight2, bias1, bias2)
        return combine(rows, weights, order).reshape(x.shape)

    def _apply(self, fn: Any, recurse: bool = True) -> "MoE":
        exact = self.correction_bias
        super()._apply(fn, recurse)
        moved = self.correction_bias
        if exact is not None and moved is not None and moved.dtype != exact.dtype:
            self.correction_bias = exact.to(moved.device)  # rounded it would choose other experts
        return self

    def _fuses(self, *inputs: Tensor) -> bool:
        """Whether one operator computes a block: when it knows the activation, and nothing is to be kept."""
        tensors = (*inputs, *self.parameters())
        keeps = torch.is_grad_enabled() and not self.recompute and any(t.requires_grad for t in tensors)
        return self.activation != CLAMPED_SWIGLU and not keeps

    def _unfused(
        self, rows: Tensor, expert_tokens: Tensor, weight1: Tensor, weight2: Tensor,
        bias1: Tensor | None = None, bias2: Tensor | None = None, wide: int = 1,
    ) -> Tensor:  # fmt: skip
        N1 = self._halves * self.intermediate_size * wide
        h = torch.ops.ffn.grouped_mm(rows, weight1, expert_tokens, bias1, N=N1)
        if self.activation == CLAMPED_SWIGLU:
            h = clamped_swiglu(h, self.alpha, self.limit)
        else:
            h = activate(h, self.activation)
        return torch.ops.ffn.grouped_mm(h, weight2, expert_tokens, bias2, N=self.hidden_size)

    def extra_repr(self) -> str:
        text = (
            f"hidden_size={self.hidden_size}, intermediate_size={self.intermediate_size}, "
            f"num_experts={self.num_experts}, top_k={self.top_k}, activation={self.activation}, "
            f"router={self.router}"
        )
        return text + (", packed" if self.weight1.dim() == 1 else "")


def _is_autocast(x: Tensor) -> bool:
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def _autocast(x: Tensor, *weights: Any) -> tuple[Any, ...]:
    """Under autocast x and weights in its dtype, as for F.linear; packed ones stay, and x gets theirs."""
    if not _is_autocast(x):
        return x, *weights
    if is_packed(weights[0]):
        return x.to(packed_float(weights[0])), *weights
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), *(None if weight is None else weight.to(dtype) for weight in weights)


def _check_size(name: str, size: Any, least: int) -> None:
    if not isinstance(size, (int, torch.SymInt)) or isinstance(size, bool) or size < least:
        raise ContractError(f"{name} is {size!r}, but it must be an int from {least} (choose one)")


def _check_number(name: str, number: Any) -> None:
    if not isinstance(number, (int, float)) or not math.isfinite(number):
        raise ContractError(f"{name} is {number!r}, but it must be a finite number (choose one)")


def _check_values(logits: Tensor, correction_bias: Tensor | None, router: str) -> None:
    if correction_bias is not None and not bool(correction_bias.isfinite().all()):
        expert = int((~correction_bias.isfinite()).nonzero()[0, 0])
        raise ContractError(
            f"correction_bias holds {float(correction_bias[expert])} for expert {expert}, but it must be "
            "finite (look at what it was loaded from)"
        )
    if logits.numel() == 0:
        return
    largest = logits.detach().amax(-1).flatten()
    broken = largest.isnan() if router == "sigmoid" else ~largest.isfinite()
    if bool(broken.any()):
        row = int(broken.nonzero()[0, 0])
        value = "NaN" if bool(largest[row].isnan()) else f"{float(largest[row])} as the largest"
        raise ContractError(
            f"logits hold {value} for token {row}, but no expert can be chosen by it (look at the router's "
            "input)"
        )


def _check_routing(E: int, top_k: int, router: str, n_group: int, topk_group: int) -> None:
    if router not in ROUTERS:
        raise ContractError(
            f"router is {router!r}, but it must be one of {', '.join(ROUTERS)} (name one of them)"
        )
    for name, size in (("top_k", top_k), ("n_group", n_group), ("topk_group", topk_group)):
        _check_size(name, size, 1)
    if top_k > E:
        raise ContractError(f"top_k is {top_k}, but it must be from 1 to the {E} experts (choose fewer)")
    if router == "top1" and top_k != 1:
        raise ContractError(
            f"top_k is {top_k}, but router top1 has one expert a token (pass top_k=1, or softmax)"
        )
    if E % n_group or topk_group > n_group:
        raise ContractError(
            f"n_group is {n_group} and topk_group {topk_group}, but n_group must divide the {E} experts "
            "evenly and topk_group be from 1 to n_group (choose others)"
        )
    if n_group > 1 and router != "sigmoid":
        raise ContractError(
            f"n_group is {n_group}, but router {router} has no groups (leave it out, or use sigmoid)"
        )
    if top_k > E // n_group * topk_group:
        raise ContractError(
            f"top_k is {top_k}, but the {topk_group} chosen groups hold {E // n_group * topk_group} experts "
            "(choose more groups)"
        )
