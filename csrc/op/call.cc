// SPDX-License-Identifier: Apache-2.0
// From torch's tensors to the contract's view of them, and the thread's target. See call.h.
#include "op/call.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/device.h>

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <utility>

#include "cpu/problem.h"

namespace ffn::op {
namespace {

constexpr int kFromEnvironment = -1;
thread_local int thread_target = kFromEnvironment;

contract::Spec DescribeTensor(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {true, DTypeOf(tensor.scalar_type()), std::vector<int64_t>(sizes.begin(), sizes.end())};
}

// True when no two elements can share memory: the axes, by rising stride, each step over all that lie within.
bool EveryElementHasItsOwnMemory(const Tensor& out) {
  std::vector<std::pair<int64_t, int64_t>> axes;  // (stride, size)
  for (int64_t i = 0; i < out.dim(); ++i) {
    if (out.size(i) != 1) axes.emplace_back(out.stride(i), out.size(i));
  }
  std::sort(axes.begin(), axes.end());
  int64_t extent = 1;
  for (const auto& [stride, size] : axes) {
    if (stride < extent) return out.numel() == 0;
    extent = stride * (size - 1) + extent;
  }
  return true;
}

std::string DeviceName(const torch::stable::Device& device) {
  switch (device.type()) {
    case torch::headeronly::DeviceType::CPU:
      return "cpu";
    case torch::headeronly::DeviceType::PrivateUse1:
      return "npu:" + std::to_string(device.index());
    default:
      return "another kind of device";
  }
}

std::string Join(const char* const* names, int count) {
  std::string text;
  for (int i = 0; i < count; ++i) text += (i > 0 ? ", " : "") + std::string(names[i]);
  return text;
}

}  // namespace

contract::DType DTypeOf(ScalarType dtype) {
  using contract::DType;
  switch (dtype) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBfloat16;
    case ScalarType::Char:
      return DType::kInt8;
    case ScalarType::Int:
      return DType::kInt32;
    case ScalarType::Long:
      return DType::kInt64;
    case ScalarType::UInt64:
      return DType::kUint64;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Short:
      return DType::kInt16;
    case ScalarType::Byte:
      return DType::kUint8;
    case ScalarType::UInt16:
      return DType::kUint16;
    case ScalarType::UInt32:
      return DType::kUint32;
    case ScalarType::Bool:
      return DType::kBool;
    case ScalarType::ComplexHalf:
      return DType::kComplex32;
    case ScalarType::ComplexFloat:
      return DType::kComplex64;
    case ScalarType::ComplexDouble:
      return DType::kComplex128;
    default:
      return DType::kOther;
  }
}

std::optional<cpu::PackedHeader> PackedHeaderOf(const char* name, const Tensor& tensor) {
  if (tensor.dim() != 1 || tensor.scalar_type() != ScalarType::Byte) return std::nullopt;
  if (tensor.device().type() != torch::headeronly::DeviceType::CPU) {
    throw std::runtime_error(
        std::string(name) +
        " is a row of uint8, as prepacked weights are, but those are for the CPU's kernels "
        "(unpack it there with ffn_ops.unpack, and move the weight)");
  }
  if (tensor.numel() > 1 && tensor.stride(0) != 1) {
    throw std::runtime_error(
        std::string(name) +
        " is a row of uint8 with gaps, but a prepacked weight is dense (use .contiguous())");
  }
  cpu::PackedHeader header;
  const std::string broken = cpu::ReadHeader(name, tensor.const_data_ptr(), tensor.numel(), &header);
  if (!broken.empty()) throw std::runtime_error(broken);
  return header;
}

contract::Spec DescribeWeight(const char* name, const Tensor& tensor) {
  if (const std::optional<cpu::PackedHeader> header = PackedHeaderOf(name, tensor)) {
    return cpu::SpecOf(*header);
  }
  contract::Spec weight = DescribeTensor(tensor);
  const int64_t values = weight.dtype == contract::DType::kInt32   ? 8
                         : weight.dtype == contract::DType::kUint8 ? 2
                                                                   : 0;
  if (values == 0) return weight;
  weight.dtype = contract::DType::kInt4;
  if (weight.shape.empty()) return weight;
  int64_t& last = weight.shape.back();
  if (__builtin_mul_overflow(last, values, &last)) last = INT64_MAX;
  return weight;
}

contract::Call Describe(const Arguments& arguments) {
  contract::Call call;
  for (int i = 0; i <= contract::kOutOperand; ++i) {
    if (!arguments.operands[i]) continue;
    const Tensor& tensor = *arguments.operands[i];
    const bool weight = i == contract::kWeight1Operand || i == contract::kWeight2Operand;
    call.operands[i] = weight ? DescribeWeight(contract::kOperandNames[i], tensor) : DescribeTensor(tensor);
  }
  if (arguments.output_dtype) {
    call.operands[contract::kOutputDtypeOperand] = {true, DTypeOf(*arguments.output_dtype), {}};
  }
  call.activation = arguments.activation;
  call.inner_precise = arguments.inner_precise;
  return call;
}

int64_t ExtentBytes(const Tensor& tensor) {
  if (tensor.numel() == 0) return 0;
  int64_t last = 0;
  for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
  return (last + 1) * static_cast<int64_t>(tensor.element_size());
}

void CheckPlacement(const std::string& name, const Tensor& tensor, const torch::stable::Device& device) {
  int32_t layout = 0;
  aoti_torch_get_layout(tensor.get(), &layout);
  if (layout != aoti_torch_layout_strided()) {
    throw std::runtime_error(
        name + " is not strided, but the operator takes dense tensors (convert it with .to_dense())");
  }
  if (!(tensor.device() == device)) {
    throw std::runtime_error(name + " is on " + DeviceName(tensor.device()) + " and x on " +
                             DeviceName(device) +
                             ", but all tensors of a call must be on one device (move one of them there)");
  }
  int64_t storage = 0;
  aoti_torch_get_storage_size(tensor.get(), &storage);
  const int64_t end =
      tensor.storage_offset() * static_cast<int64_t>(tensor.element_size()) + ExtentBytes(tensor);
  if (tensor.numel() > 0 && end > storage) {
    throw std::runtime_error(name + " reaches to byte " + std::to_string(end) + ", but its storage holds " +
                             std::to_string(storage) +
                             " and every element must be there (allocate what was freed or resized)");
  }
}

void CheckPlacement(const Arguments& arguments) {
  const torch::stable::Device device = arguments.operand(contract::kXOperand).device();
  for (int i = 0; i <= contract::kOutOperand; ++i) {
    if (arguments.operands[i]) CheckPlacement(contract::kOperandNames[i], *arguments.operands[i], device);
  }
}

bool CanWriteInto(const Tensor& out, const Arguments& arguments) {
  if (!EveryElementHasItsOwnMemory(out)) {
    throw std::runtime_error(
        "out has several elements in one memory location, but each needs its own (pass out.clone())");
  }
  if (!out.is_contiguous()) return false;
  const auto* written = static_cast<const char*>(out.const_data_ptr());
  for (int i = 0; i < contract::kOutOperand; ++i) {
    if (!arguments.operands[i]) continue;
    const Tensor& input = *arguments.operands[i];
    const auto* read = static_cast<const char*>(input.const_data_ptr());
    if (written < read + ExtentBytes(input) && read < written + ExtentBytes(out)) return false;
  }
  return true;
}

contract::Target CurrentTarget() {
  if (thread_target != kFromEnvironment) return static_cast<contract::Target>(thread_target);
  static const char* const name = std::getenv("FFN_OPS_TARGET");  // read once
  if (name == nullptr || *name == '\0') return contract::kCpuTarget;
  const std::optional<contract::Target> target = contract::FindTarget(name);
  if (!target) {
    throw std::runtime_error("FFN_OPS_TARGET is '" + std::string(name) + "', but the targets are " +
                             Join(contract::kTargetNames, contract::kTargetCount) +
                             " (unset it, or name one of them)");
  }
  return *target;
}

}  // namespace ffn::op

// The two C functions through which ffn_ops/op.py reads and changes the calling thread's target; a target is
// its position in the contract's TARGETS, -1 the environment's choice.
extern "C" {

__attribute__((visibility("default"))) int ffn_ops_set_target(int target) {
  const int before = ffn::op::thread_target;
  ffn::op::thread_target = target;
  return before;
}

// -1 when FFN_OPS_TARGET names no target.
__attribute__((visibility("default"))) int ffn_ops_target() {
  try {
    return ffn::op::CurrentTarget();
  } catch (const std::runtime_error&) {
    return -1;
  }
}

}  // extern "C"
