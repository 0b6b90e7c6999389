# SPDX-License-Identifier: Apache-2.0
"""The two phases of aclnnFFNV3 as they are, for those who manage memory themselves (contract section g).

    with ffn_ops.aclnn.prepare(x, weight1, weight2, "gelu", out=y) as call:
        call.run(torch.empty(call.workspace_size, dtype=torch.uint8, device=x.device))

torch.ops.ffn.ffn does all of this in one call; csrc/aclnn is behind both.
"""

from collections.abc import Mapping
from types import TracebackType

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ffn_ops import _native, contract
from ffn_ops.contract import ContractError, spec_of
from ffn_ops.op import npu_target

_NAMES = (*tuple(contract.OPERANDS)[:-4], "out")
# aclDataType by torch's dtype.
_ACL = {
    torch.float32: 0,
    torch.float16: 1,
    torch.int8: 2,
    torch.int32: 3,
    torch.int64: 9,
    torch.uint64: 10,
    torch.bfloat16: 27,
}
_INT4 = 29
_DENSE_FORMATS = (0, 1, 2, 30, 47)  # aclFormat: NCHW, NHWC, ND, NCDHW, NCL
_INT4_VALUES = {torch.int32: 8, torch.uint8: 2}  # packed weights: elements in each of torch's


def prepare(
    x: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    activation: str,
    *,
    out: Tensor,
    tokens_index_flag: bool = False,
    inner_precise: int | None = None,
    output_dtype: torch.dtype | None = None,
    repeatable: bool = False,
    **optional: Tensor,
) -> "Prepared":
    """Phase 1: aclnnFFNV3GetWorkspaceSize for these tensors.

    `optional` are the operator's other tensors by name. All must be contiguous, in no private format, on one
    NPU and, in this memory, alive until the stream has run the call; `out` has x's shape and shares no memory
    with them. Rows that no expert owns keep their bytes. Raises ContractError for a call that the device's
    contract forbids, RuntimeError with the vendor's status for one that the vendor refuses.
    """
    if not isinstance(activation, str):
        raise ContractError(f"activation is {activation!r}, but it must be a string (name one)")
    needed = {"x": x, "weight1": weight1, "weight2": weight2, "out": out}
    for name, value in needed.items():
        if not isinstance(value, Tensor):
            raise ContractError(f"{name} is a {type(value).__name__}, but it must be a tensor (pass one)")
    given = {**needed, **optional}
    unknown = [name for name in given if name not in _NAMES]
    if unknown:
        raise TypeError(
            f"{unknown[0]} is no tensor of the operator (its tensors are {', '.join(_NAMES[3:-1])})"
        )
    tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
    if x.device.type != "npu":
        raise ContractError(
            f"x is on {x.device}, but prepare() takes tensors of an NPU (move all with .npu())"
        )
    for name, tensor in tensors.items():
        _check_memory(name, tensor, x.device)
    specs = {name: spec_of(name, tensor) for name, tensor in tensors.items()}
    if output_dtype is not None:
        specs["output_dtype"] = contract.Spec(str(output_dtype).removeprefix("torch."), ())
    plan = contract.resolve(specs, activation, inner_precise=inner_precise, target=npu_target())
    _check_apart({name: _Memory(tensor) for name, tensor in tensors.items()})
    with torch.accelerator.device_index(x.device.index):
        native = _native.Prepared(
            [_describe(name, tensors[name]) if name in tensors else None for name in _NAMES],
            activation,
            plan.inner_precise,
            tokens_index_flag,
        )
        if repeatable:
            native.make_repeatable()
    return Prepared(native, tensors, repeatable)


class Prepared:
    """A call whose phase 1 is done. `run` is phase 2; a repeatable one may run again, until `destroy`."""

    def __init__(self, native: "_native.Prepared", tensors: Mapping[str, Tensor], repeatable: bool) -> None:
        self._native: _native.Prepared | None = native
        self._device = tensors["x"].device
        self._specs = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
        self._memory = {name: _Memory(tensor) for name, tensor in tensors.items()}
        self.repeatable = repeatable
        self.workspace_size: int = native.workspace_size

    def run(self, workspace: Tensor | None = None) -> None:
        """Phase 2 on the current stream. `workspace` has at least workspace_size bytes, on the same device,
        until the stream has run the call; without it, torch's allocator gives one. Raises RuntimeError when
        the call has ended, when the workspace is short or elsewhere, and when a tensor was freed or
        resized."""
        native = self._live()
        if not isinstance(workspace, Tensor | None):
            raise RuntimeError(
                f"workspace is a {type(workspace).__name__}, but it must be a tensor on {self._device} "
                "(leave it out, and torch allocates one)"
            )
        for name, memory in self._memory.items():
            if not memory.unchanged():
                raise RuntimeError(
                    f"{name} was freed or resized after prepare(), but the device reads its memory "
                    "(keep it until the call has run)"
                )
        if workspace is None:
            workspace = torch.empty(self.workspace_size, dtype=torch.uint8, device=self._device)
        size = min(workspace.numel() * workspace.element_size(), workspace.untyped_storage().nbytes())
        if size < self.workspace_size:
            raise RuntimeError(
                f"workspace has {size} bytes, but the call needs {self.workspace_size} "
                "(allocate workspace_size bytes)"
            )
        if workspace.device != self._device or not workspace.is_contiguous():
            raise RuntimeError(
                f"workspace is on {workspace.device}, but it must be contiguous memory of {self._device} "
                "(allocate it there)"
            )
        for name, memory in self._memory.items():
            if memory.overlaps(_Memory(workspace)):
                raise RuntimeError(
                    f"workspace shares memory with {name}, but the call writes all of it (allocate another)"
                )
        if not self.repeatable:
            self._native = None  # phase 2 ends it, whether it succeeds or fails
        with torch.accelerator.device_index(self._device.index):
            # npu_stream waits until torch_npu's queue has launched what came before.
            stream = torch.npu.current_stream(self._device).npu_stream
            native.run(workspace.data_ptr() if size else 0, size, stream)

    def set_addresses(self, **tensors: Tensor) -> None:
        """The next run takes these tensors instead; dtypes and shapes stay. For repeatable calls."""
        native = self._live()
        if not self.repeatable:
            raise RuntimeError(
                "the call is not repeatable, but only such a call has other addresses "
                "(prepare it with repeatable=True)"
            )
        for name, tensor in tensors.items():
            if name not in self._specs:
                raise RuntimeError(
                    f"{name} was not part of the call, but only its tensors have addresses "
                    f"(they are {', '.join(self._specs)})"
                )
            _check_memory(name, tensor, self._device)
            if (tensor.dtype, tensor.shape) != self._specs[name]:
                dtype, shape = self._specs[name]
                raise RuntimeError(
                    f"{name} is {tensor.dtype} {list(tensor.shape)}, but the call was prepared for {dtype} "
                    f"{list(shape)} (prepare another call)"
                )
        memory = {**self._memory, **{name: _Memory(tensor) for name, tensor in tensors.items()}}
        _check_apart(memory)
        self._native = None  # a call with the addresses of two calls is none
        for name, tensor in tensors.items():
            native.set_address(_NAMES.index(name), tensor.data_ptr())
        self._native, self._memory = native, memory

    def destroy(self) -> None:
        """Frees the vendor's executor; the call can no longer run. Ends a one-shot call that never ran,
        too."""
        if self._native is None:
            raise RuntimeError("the call has ended already, but a handle is freed once (drop this destroy())")
        self._native = None

    def __enter__(self) -> "Prepared":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._native = None

    def _live(self) -> "_native.Prepared":
        if self._native is None:
            raise RuntimeError(
                "the call has ended: it was run or destroyed, but each runs once unless it is repeatable "
                "(prepare it again, or with repeatable=True)"
            )
        return self._native


class _Memory:
    """Notices that a tensor's storage is gone or elsewhere, without keeping it alive."""

    def __init__(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.reference = StorageWeakRef(storage)
        self.address, self.size = storage.data_ptr(), storage.nbytes()
        self.begin = tensor.data_ptr()
        self.end = self.begin + tensor.numel() * tensor.element_size()

    def overlaps(self, other: "_Memory") -> bool:
        return self.begin < other.end and other.begin < self.end

    def unchanged(self) -> bool:
        if self.reference.expired():
            return False
        storage = torch.UntypedStorage._new_with_weak_ptr(self.reference.cdata)
        return storage is not None and (storage.data_ptr(), storage.nbytes()) == (self.address, self.size)


def _check_apart(memory: Mapping[str, _Memory]) -> None:
    for name, other in memory.items():
        if name != "out" and other.overlaps(memory["out"]):
            raise ContractError(
                f"out shares memory with {name}, but the device reads that while it writes "
                "(give out memory of its own)"
            )


def _check_memory(name: str, tensor: Tensor, device: torch.device) -> None:
    if not isinstance(tensor, Tensor):
        raise ContractError(
            f"{name} is a {type(tensor).__name__}, but it must be a tensor on {device} (make one)"
        )
    if tensor.device != device:
        raise ContractError(
            f"{name} is on {tensor.device}, but all tensors of a call must be on x's NPU "
            f'(move it with {name}.to("{device}"))'
        )
    if not tensor.is_contiguous():
        raise ContractError(
            f"{name} is not contiguous, but its memory is used as it is (pass {name}.contiguous())"
        )
    if tensor.numel() > 0 and isinstance(tensor, torch._subclasses.FakeTensor):
        raise ContractError(f"{name} is a fake tensor, but the device needs its memory (pass a real one)")
    form = torch.ops.npu.get_npu_format(tensor)
    if form not in _DENSE_FORMATS:
        raise ContractError(
            f"{name} is in the private format {form}, but the operator takes dense memory "
            f"(torch_npu.npu_format_cast({name}, 2) makes it ND)"
        )


def _describe(name: str, tensor: Tensor) -> tuple[int, list[int], int, int, int]:
    values = _INT4_VALUES.get(tensor.dtype, 1) if name in ("weight1", "weight2") else 1
    shape = list(tensor.shape)
    shape[-1] *= values
    dtype = _INT4 if values > 1 else _ACL[tensor.dtype]
    # A view is described as memory of its own, so that another tensor's address can take its place.
    return dtype, shape, 0, tensor.numel() * values, tensor.data_ptr()
