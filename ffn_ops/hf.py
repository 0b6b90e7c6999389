# SPDX-License-Identifier: Apache-2.0
"""Hugging Face: the experts implementation "ffn_ops" of transformers, and pack_ for models that use it.

Importing it registers the implementation: from_pretrained(..., experts_implementation="ffn_ops"), or
model.set_experts_implementation("ffn_ops"). torch.ops.ffn.moe and grouped_mm compute, packing.py packs.
"""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ffn_ops.contract import ContractError
from ffn_ops.moe import combine, permute
from ffn_ops.op import operand_bias
from ffn_ops.packing import FLOATS, prepack, unpack

NAME = "ffn_ops"
_INSTALL = "pip install 'ffn-ops[hf]'"

try:
    import transformers
except ImportError as error:
    raise ImportError(
        f"transformers is not installed, but ffn_ops.hf is an experts implementation of it ({_INSTALL})"
    ) from error
try:
    import transformers.activations as hf_act
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
    from transformers.integrations.moe import (
        ExpertsInterface,
        _default_apply_gate,
        use_experts_implementation,
    )

    # Models take names that others register from 5.7 on, which is also the first with this flag.
    _FLAGS: dict[str, Any] = dict(use_experts_implementation.__kwdefaults__ or {})
    _FLAGS["is_concatenated"]
except (ImportError, KeyError) as error:
    raise ImportError(
        f"transformers is {transformers.__version__}, but ffn_ops.hf needs transformers.integrations.moe as "
        f"it is in 5.7 to 5.23 ({_INSTALL}; {error!r})"
    ) from error

# The decorator's flags that a later version has, with their defaults: experts with another value do what we
# know nothing of.
_UNKNOWN_FLAGS = {
    flag: default
    for flag, default in _FLAGS.items()
    if flag not in ("experts_interface", "has_gate", "has_bias", "has_post_expert_norm", "is_concatenated",
                    "is_transposed")
}  # fmt: skip

# Our names of what act_fn may be: by class, or the function itself.
_ACTIVATIONS: dict[Any, str] = {
    hf_act.SiLUActivation: "silu",
    nn.SiLU: "silu",
    F.silu: "silu",
    hf_act.GELUTanh: "gelu",
    hf_act.NewGELUActivation: "gelu",
    hf_act.FastGELUActivation: "gelu",
    hf_act.AccurateGELUActivation: "gelu",
    hf_act.GELUActivation: "gelu_erf",
    F.gelu: "gelu_erf",
    hf_act.QuickGELUActivation: "fastgelu",
    nn.ReLU: "relu",
    F.relu: "relu",
    hf_act.ReLUSquaredActivation: "relu2",
}
_GLU = {"silu": "swiglu", "gelu": "geglu", "relu": "reglu"}


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What a decorated experts module computes: the experts of each token, weighted and added.

    hidden_states: [T, H] in float32, float16 or bfloat16, as the weights. top_k_index: [T, k] int64 or int32;
    an id of num_experts stands for no expert, and so do all above where expert parallelism marks other ranks'
    experts by them. top_k_weights: [T, k]. Returns [T, H] in the dtype of hidden_states: the sum over k in
    float32, rounded once. Experts that the operators cannot compute run their eager implementation, which
    one warning says. Raises ContractError for tensors that do not fit each other.
    """
    weight = getattr(self, _names(self)[0], None)
    if type(weight) is PackedWeight and weight.dtype != hidden_states.dtype:
        if not torch.is_autocast_enabled("cpu"):
            raise ContractError(
                f"hidden_states is {hidden_states.dtype}, but {weight.label} is packed in {weight.dtype} "
                "(cast hidden_states, or the model by .to(dtype), which packs it again)"
            )
        y = experts_forward(self, hidden_states.to(weight.dtype), top_k_index, top_k_weights)
        return y.to(hidden_states.dtype)
    why_not = _why_eager(self, hidden_states.dtype)
    if why_not:
        return _eager(self, why_not, hidden_states, top_k_index, top_k_weights)
    names = _names(self)
    up, down = (getattr(self, name) for name in names)
    _check(self, hidden_states, top_k_index, top_k_weights, up, down)
    if top_k_weights.dtype not in FLOATS:
        top_k_weights = top_k_weights.float()
    biases: list[Any] = [getattr(self, f"{name}_bias") for name in names] if self.has_bias else [None, None]
    weight1, weight2 = _operand(self, up), _operand(self, down)
    activation = _activation(self)
    if activation is None:
        columns = 2 if self.is_transposed else 1
        rows, expert_tokens, order = permute(hidden_states, top_k_index, self.num_experts)
        inner = torch.ops.ffn.grouped_mm(rows, weight1, expert_tokens, biases[0], N=up.shape[columns])
        inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
        y = torch.ops.ffn.grouped_mm(inner, weight2, expert_tokens, biases[1], N=down.shape[columns])
        if _has_norm(self):
            y = self.post_expert_norm(y)
        return combine(y, top_k_weights, order)
    return torch.ops.ffn.moe(
        hidden_states, top_k_index, top_k_weights, weight1, weight2, activation, *map(operand_bias, biases),
        activate_left=True,
    )  # fmt: skip


def _has_norm(experts: Any) -> bool:
    return getattr(experts, "has_post_expert_norm", False)  # early versions have none


def _names(experts: Any) -> tuple[str, str]:
    return ("gate_up_proj" if experts.has_gate else "up_proj"), "down_proj"


def _activation(experts: Any) -> str | None:
    """The activation of ffn.moe, or None: two products around the module's own."""
    if _has_norm(experts):
        return None
    gated = experts.has_gate
    if gated and not _has_default_gate(experts):
        return None
    act = experts.act_fn
    if isinstance(act, nn.Module):
        if act._forward_hooks or act._forward_pre_hooks or "forward" in act.__dict__:
            return None  # somebody looks at it, or has replaced it
        if type(act) is nn.GELU:
            name = "gelu" if act.approximate == "tanh" else "gelu_erf"
        else:
            name = _ACTIVATIONS.get(type(act), "")
    else:
        name = _ACTIVATIONS.get(act, "")
    return (_GLU.get(name) if gated else name) or None


def _has_default_gate(experts: Any) -> bool:
    return type(experts)._apply_gate is _default_apply_gate and "_apply_gate" not in experts.__dict__


def _why_eager(experts: Any, dtype: torch.dtype) -> str | None:
    """Why the operators cannot compute these experts for hidden states of `dtype`, if so."""
    for flag, default in _UNKNOWN_FLAGS.items():
        if getattr(experts, flag, default) != default:
            return f"it has {flag}={getattr(experts, flag)}, which ffn_ops does not know"
    if not experts.is_concatenated and experts.has_gate and _has_default_gate(experts):
        return "its gate and up columns are interleaved, but its _apply_gate takes them as halves"
    for name in _names(experts):
        weight = getattr(experts, name, None)
        if weight is None:
            return f"it has no {name}"
        if weight.dtype not in FLOATS:
            return (
                f"its {name} is {weight.dtype}, but the operators take float32, float16 or bfloat16 (cast it)"
            )
        if weight.dtype != dtype:
            return (
                f"its {name} is {weight.dtype} and hidden_states {dtype}, but the operators take one dtype "
                "(cast one of them)"
            )
        if type(weight) is not PackedWeight and is_traceable_wrapper_subclass(weight):
            return f"its {name} is a {type(weight).__name__}, which the operators cannot read"
    return None


_warned: set[str] = set()


def _eager(experts: Any, why: str, *arguments: Tensor) -> Tensor:
    text = f"{type(experts).__name__} runs its eager implementation: {why}"
    if text not in _warned:
        _warned.add(text)
        warnings.warn(text, stacklevel=2)
    return type(experts).forward.__wrapped__(experts, *arguments)


def _operand(experts: Any, weight: Tensor) -> Tensor:
    """The operators' [E, K, N], in the weight's own memory."""
    if type(weight) is PackedWeight:
        return weight.block
    return weight if experts.is_transposed else weight.transpose(1, 2)


def _check(experts: Any, x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> None:
    """What the operators would say in their own terms, in the model's."""
    E = experts.num_experts
    up_name, owner = _names(experts)[0], type(experts).__name__
    for name, weight in ((up_name, up), ("down_proj", down)):
        if weight.dim() != 3 or weight.shape[0] != E:
            raise ContractError(
                f"{owner}.{name} has shape {list(weight.shape)}, but num_experts is {E} and it must be "
                "[num_experts, ...] of three dimensions (load weights that belong to this config)"
            )
        if weight.device != x.device:
            raise ContractError(
                f"{owner}.{name} is on {weight.device} and hidden_states on {x.device}, but all tensors of a "
                "call must be on one device (move one of them there)"
            )
    if experts.is_transposed:
        H, y_size = up.shape[1], down.shape[2]
    else:
        H, y_size = up.shape[2], down.shape[1]
    if x.shape[-1] != H or y_size != H:
        raise ContractError(
            f"hidden_states has a last dimension of {x.shape[-1]}, {owner}.{up_name} takes {H} and down_proj "
            f"gives {y_size}, but the three must be equal (check which model these weights belong to)"
        )
    if x.dim() != 2 or ids.dim() != 2 or ids.shape != weights.shape or ids.shape[0] != x.shape[0]:
        raise ContractError(
            f"hidden_states has shape {list(x.shape)}, top_k_index {list(ids.shape)} and top_k_weights "
            f"{list(weights.shape)}, but they must be [T, H], [T, k] and [T, k] (flatten the tokens, and "
            "pass the router's two results)"
        )
    if ids.device.type != "cpu" or torch.compiler.is_compiling() or ids.numel() == 0:
        return  # no host reads a device's values; where that is left to the operators, they look
    least, most = (int(bound) for bound in ids.aminmax())
    if least < 0:
        raise ContractError(
            f"top_k_index holds {least}, but experts are numbered from 0 (mark slots without an expert by "
            f"num_experts = {E})"
        )
    # Before 5.20 nothing says whether ids above num_experts are sentinels of expert parallelism.
    if most > E and not getattr(experts, "_is_expert_parallel", True):
        raise ContractError(
            f"top_k_index holds {most}, but {owner} has {E} experts, and {E} stands for none (check the "
            "router's number of experts)"
        )


class PackedWeight(Tensor):
    """What `pack_` puts in a parameter's place: its shape and dtype, and as its only memory `block`, which
    ffn_ops.prepack made of it. Nothing but the experts implementation "ffn_ops" reads it; everything else
    that asks for its values, or writes them, is refused by name. `unpacked()` gives the original tensor.
    """

    block: Tensor
    label: str  # the parameter's full name, for errors
    is_transposed: bool

    # Methods that never reach __torch_dispatch__ are overridden below; without this each read of .shape
    # would come through Python.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls, block: Tensor, shape: Sequence[int], dtype: torch.dtype, label: str, is_transposed: bool
    ) -> "PackedWeight":
        with torch.inference_mode(False):  # detach() of a tensor that belongs to the mode would fail
            self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=block.device)
        self.block, self.label, self.is_transposed = block, label, is_transposed
        return self

    def __init__(self, *arguments: Any) -> None:
        super().__init__()

    def _like(self, block: Tensor) -> "PackedWeight":
        return PackedWeight(block, self.shape, self.dtype, self.label, self.is_transposed)

    def unpacked(self) -> Tensor:
        """The tensor that was packed: the same bits, contiguous in its own layout."""
        weight = unpack(self.block)
        return weight if self.is_transposed else weight.transpose(1, 2).contiguous()

    def repack(self, weight: Tensor) -> None:
        """Packs `weight`, of this shape and any float dtype, into the memory of this one, by expert."""
        for expert, matrix in enumerate(_matrices(weight, self.is_transposed)):
            torch.ops.ffn.pack_expert(self.block, matrix.to(self.device, self.dtype), expert)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        aten, kwargs = torch.ops.aten, kwargs or {}
        self = next((arg for arg in args if isinstance(arg, cls)), None)
        if self is not None and func in (aten.detach.default, aten.alias.default):
            return self._like(self.block)
        if self is not None and func is aten.clone.default:
            return self._like(self.block.clone())
        if self is not None and func is aten._to_copy.default:
            return self._converted(kwargs.get("device"), kwargs.get("dtype"))
        if self is not None and func.overloadpacket is aten.to:  # in inference mode nothing makes it _to_copy
            given = {
                argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)
            }
            given |= kwargs
            like = given.get("other", self)
            device, dtype = given.get("device") or like.device, given.get("dtype") or like.dtype
            same = (torch.device(device), dtype) == (self.device, self.dtype)
            return self if same and not given.get("copy") else self._converted(device, dtype)
        if func is aten._has_compatible_shallow_copy_type.default:
            return False  # nn.Module shall make a new parameter, as outside inference mode
        if func is aten.copy_.default and args[0] is args[1]:
            return args[0]  # load_state_dict, after _repack_state
        if self is None:  # inside a list
            raise ContractError(
                f'{func} has a packed weight among its arguments, but only experts_implementation="{NAME}" '
                "reads packed weights (unpack it with .unpacked())"
            )
        if func._schema.is_mutable and self is args[0]:
            raise ContractError(self._read_only(f"{func} writes to it"))
        raise ContractError(
            f"{self.label} is packed, and {func} asks for its values, but only "
            f'experts_implementation="{NAME}" reads packed weights (set that, or read its .unpacked())'
        )

    def _read_only(self, what: str) -> str:
        return (
            f"{self.label} is packed, and {what}, but packed weights are for inference only "
            "(train a model without pack_; new values come in by load_state_dict, which packs them)"
        )

    def _converted(self, device: torch.device | None, dtype: torch.dtype | None) -> "PackedWeight":
        if device is not None and torch.device(device).type != "cpu":
            raise ContractError(
                f"{self.label} is packed for the CPU's kernels, but it was to move to {device} "
                "(move the model first, and pack_ models on the CPU only)"
            )
        dtype = dtype or self.dtype
        if dtype not in FLOATS:
            raise ContractError(
                f"{self.label} is packed, but it was to become {dtype}, and the operators take float32, "
                "float16 or bfloat16 (cast to one of these)"
            )
        matrices = [matrix.to(dtype) for matrix in _matrices(self.unpacked(), self.is_transposed)]
        return PackedWeight(prepack(matrices), self.shape, dtype, self.label, self.is_transposed)

    @property
    def requires_grad(self) -> bool:
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, mode: bool = True) -> "PackedWeight":
        if mode:
            raise ContractError(self._read_only("requires_grad was to be set"))
        return self

    def share_memory_(self) -> "PackedWeight":
        self.block.share_memory_()
        return self

    def is_shared(self) -> bool:
        return self.block.is_shared()

    def data_ptr(self) -> int:
        raise ContractError(
            f"{self.label} is packed, and has no address (read its .unpacked(), or its .block)"
        )

    def _no_values(self, *arguments: Any) -> Any:
        raise ContractError(
            f"{self.label} is packed, and has no values to read or write one by one (read its .unpacked())"
        )

    apply_ = map_ = map2_ = numpy = tolist = _no_values  # type: ignore[assignment]

    def __dlpack__(self, **options: Any) -> Any:
        raise ContractError(f"{self.label} is packed, and DLPack cannot hand it on (hand on its .unpacked())")

    @property
    def data(self) -> "PackedWeight":
        return self.detach()  # type: ignore[return-value]

    @data.setter
    def data(self, value: Tensor) -> None:
        raise ContractError(self._read_only("its data was to be replaced"))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PackedWeight({self.label}, {list(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            memo[id(self)] = _parameter(self._like(self.block.clone()))
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _load, (self.block, tuple(self.shape), self.dtype, self.label, self.is_transposed)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["block"], (self.dtype, self.label, self.is_transposed)

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], context: Any, size: Any, stride: Any
    ) -> "PackedWeight":
        return PackedWeight(inner["block"], size, *context)


def _parameter(weight: PackedWeight) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)


def _load(*arguments: Any) -> nn.Parameter:
    return _parameter(PackedWeight(*arguments))


def _matrices(weight: Tensor, is_transposed: bool) -> list[Tensor]:
    """Each expert's [K, N], a view."""
    return list(weight if is_transposed else weight.transpose(1, 2))


class Packed(NamedTuple):
    """What `pack_` did."""

    packed: list[str]  # full names of parameters
    skipped: dict[str, str]  # full names of experts modules, and why


@torch.inference_mode(False)  # else the packed weights could be used in that mode only
@torch.no_grad()
def pack_(model: nn.Module) -> Packed:
    """Replaces the weights of the model's experts by prepacked ones, in place, for inference on the CPU.

    One parameter after the other is packed and then freed, so the most that exists twice is one parameter of
    one layer. Afterwards state_dict and save_pretrained still give the original tensors, load_state_dict
    takes them and packs them again, and so does .to(dtype); gradients and direct writes are refused, and so
    is every other experts implementation. deepcopy and pickle keep weights packed; biases stay as they are.

    Raises ContractError when the model has no experts, or experts whose implementation is another one. Those
    that the operators cannot compute, or that are not on the CPU, are skipped.
    """
    if not isinstance(model, nn.Module):
        raise ContractError(
            f"model is a {type(model).__name__}, but it must be a torch.nn.Module (pass the model itself)"
        )
    experts = {name: module for name, module in model.named_modules() if _is_experts(module)}
    if not experts:
        raise ContractError(
            f"{type(model).__name__} has no experts that an experts_implementation reaches, so there is "
            "nothing to pack (an ffn_ops.MoE has a pack_ of its own, and Switch and NLLB-MoE go through "
            "ffn_ops.patch)"
        )
    for name, module in experts.items():
        chosen = getattr(module.config, "_experts_implementation", None)
        if chosen != NAME:
            raise ContractError(
                f'{name or type(module).__name__} has experts_implementation="{chosen}", but only "{NAME}" '
                f'reads packed weights (call model.set_experts_implementation("{NAME}") first)'
            )
    report = Packed([], {})
    owners: dict[int, list[tuple[str, Any, str]]] = {}  # layers may share a parameter
    for prefix, module in experts.items():
        why_not = _why_not_packed(module)
        if why_not:
            report.skipped[prefix] = why_not
            continue
        _add_hooks(module)
        for name in _names(module):
            owners.setdefault(id(getattr(module, name)), []).append((prefix, module, name))
    for places in owners.values():
        prefix, module, name = places[0]
        label = f"{prefix}.{name}".lstrip(".")
        weight = getattr(module, name)
        if type(weight) is not PackedWeight:
            block = prepack(_matrices(weight, module.is_transposed))
            weight = _parameter(PackedWeight(block, weight.shape, weight.dtype, label, module.is_transposed))
            for _, owner, attribute in places:
                owner._parameters[attribute] = weight
        report.packed.append(label)
    return report


def _why_not_packed(experts: Any) -> str | None:
    weights: list[Any] = [getattr(experts, name, None) for name in _names(experts)]
    why_not = _why_eager(experts, torch.float32 if weights[0] is None else weights[0].dtype)
    if why_not:
        return why_not
    for weight in weights:
        if weight.device.type != "cpu":
            return f"its weights are on {weight.device}, and only the CPU's kernels read packed ones"
    return None


def _is_experts(module: Any) -> bool:
    """Whether transformers' decorator made this module."""
    return hasattr(module, "_apply_gate") and hasattr(module, "is_transposed") and hasattr(module, "config")


def _add_hooks(module: nn.Module) -> None:
    if _unpack_state not in module._state_dict_hooks.values():
        module.register_state_dict_post_hook(_unpack_state)
        module.register_load_state_dict_pre_hook(_repack_state)


def _packed_of(module: Any, prefix: str) -> list[tuple[str, PackedWeight]]:
    return [(prefix + name, p) for name, p in module._parameters.items() if type(p) is PackedWeight]


def _unpack_state(module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    for key, weight in _packed_of(module, prefix):
        if key in state_dict:
            state_dict[key] = weight.unpacked()


def _repack_state(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool,
    missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
) -> None:  # fmt: skip
    for key, weight in _packed_of(module, prefix):
        loaded = state_dict.get(key)
        if isinstance(loaded, Tensor) and loaded.shape == weight.shape:
            weight.repack(loaded.unpacked() if isinstance(loaded, PackedWeight) else loaded)
            state_dict[key] = (
                weight  # nn.Module copies it onto itself; other shapes it refuses in its own words
            )


ExpertsInterface.register(NAME, experts_forward)
# fp8 experts have an interface of their own, where an unknown name is a KeyError. They run eager.
type(ALL_FP8_EXPERTS_FUNCTIONS).register(NAME, experts_forward)
