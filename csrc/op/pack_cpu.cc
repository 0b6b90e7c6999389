// SPDX-License-Identifier: Apache-2.0
// Weights as they lie in torch's memory, plain and prepacked, and the operators that ffn_ops/packing.py makes
// prepack() and unpack() of. The layout is cpu/packed.h's.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <stdexcept>

#include "cpu/problem.h"
#include "op/call.h"

namespace ffn::op {
namespace {

// What a block of E experts like `weight`, a [K, N], begins with.
cpu::PackedHeader HeaderFor(const Tensor& weight, int64_t E) {
  CheckPlacement("weight", weight, weight.device());
  if (weight.dim() != 2) {
    throw std::runtime_error("weight of an expert is of rank " + std::to_string(weight.dim()) +
                             ", but it must be [K, N] (pass the weight of one product)");
  }
  const contract::Spec spec = DescribeWeight("weight", weight);
  switch (spec.dtype) {
    case contract::DType::kFloat32:
    case contract::DType::kFloat16:
    case contract::DType::kBfloat16:
    case contract::DType::kInt8:
    case contract::DType::kInt4:
      return cpu::HeaderOf(cpu::FromContract(spec.dtype), E, spec.shape[0], spec.shape[1]);
    default:
      throw std::runtime_error(
          "weight has a dtype that no mode has, but it must be float32, float16, bfloat16, int8, or int4 "
          "packed in uint8 or int32 (convert or quantize it)");
  }
}

cpu::PackedHeader BlockHeader(const Tensor& block) {
  CheckPlacement("block", block, block.device());
  const std::optional<cpu::PackedHeader> header = PackedHeaderOf("block", block);
  if (!header)
    throw std::runtime_error("block is no packed weight, but it must be one (make it with prepack)");
  return *header;
}

void RunOnTorchThreads(void*, int64_t count, void (*body)(void*, int64_t), void* context) {
  torch::stable::parallel_for(0, count, 1, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(context, i);
  });
}

}  // namespace

ScalarType ToTorch(cpu::DType dtype) {
  switch (dtype) {
    case cpu::DType::kFloat32:
      return ScalarType::Float;
    case cpu::DType::kFloat16:
      return ScalarType::Half;
    case cpu::DType::kBFloat16:
      return ScalarType::BFloat16;
    case cpu::DType::kInt8:
      return ScalarType::Char;
    default:
      return ScalarType::Byte;
  }
}

cpu::ParallelFor TorchThreads() { return {torch::stable::get_num_threads(), nullptr, &RunOnTorchThreads, 0}; }

std::optional<cpu::Weight> WeightInPlace(const Tensor& tensor, cpu::DType dtype) {
  const int64_t rank = tensor.dim();
  const int64_t row_stride = tensor.stride(rank - 2), col_stride = tensor.stride(rank - 1);
  if (dtype == cpu::DType::kInt4 || (row_stride != 1 && col_stride != 1)) return std::nullopt;
  cpu::Weight weight;
  weight.data = tensor.const_data_ptr();
  weight.expert_stride = rank == 3 ? tensor.stride(0) : 0;
  weight.row_stride = row_stride;
  weight.col_stride = col_stride;
  return weight;
}

Tensor NewTensor(const char* what, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t elements = 1, stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);
    elements *= sizes[i];
  }
  return Allocate(what, elements, [&] {
    AtenTensorHandle tensor = nullptr;
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                 torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
                                 aoti_torch_device_type_cpu(), 0, &tensor));
    return Tensor(tensor);
  });
}

const void* DenseData(const char* name, const Tensor& tensor, std::vector<Tensor>& kept) {
  const void* data = tensor.const_data_ptr();
  const bool aligned =
      reinterpret_cast<uintptr_t>(data) % tensor.element_size() == 0;  // frombuffer need not be
  if (tensor.is_contiguous() && aligned) return data;
  kept.push_back(Allocate(name, tensor.numel(), [&] {
    return tensor.is_contiguous() ? torch::stable::clone(tensor) : torch::stable::contiguous(tensor);
  }));
  return kept.back().const_data_ptr();
}

cpu::Weight WeightOf(const char* name, const Tensor& tensor, cpu::DType dtype, int64_t K, int64_t N,
                     std::vector<Tensor>& kept) {
  if (const std::optional<cpu::PackedHeader> header = PackedHeaderOf(name, tensor)) {
    return cpu::PackedWeight(*header, tensor.const_data_ptr());
  }
  if (const std::optional<cpu::Weight> weight = WeightInPlace(tensor, dtype)) return *weight;
  return {DenseData(name, tensor, kept), K * N, N, 1};
}

Tensor NewBlock(Tensor weight, int64_t E) {
  const cpu::PackedHeader header = HeaderFor(weight, E);
  const int64_t bytes = cpu::PackedBytes(header);
  if (bytes < 0) throw std::runtime_error("weight is larger than any memory (check its shape)");
  Tensor block = NewTensor("the packed weight", {bytes}, ScalarType::Byte);
  cpu::BeginBlock(header, block.mutable_data_ptr());
  return block;
}

void PackExpert(Tensor block, Tensor weight, int64_t expert) {
  const cpu::PackedHeader header = BlockHeader(block);
  const cpu::PackedHeader own = HeaderFor(weight, header.E);
  if (own.dtype != header.dtype || own.K != header.K || own.N != header.N || expert < 0 ||
      expert >= std::max<int64_t>(header.E, 1)) {
    throw std::runtime_error(
        "weight of expert " + std::to_string(expert) +
        " differs from the first one in dtype or shape, but all experts must have the same");
  }
  std::optional<cpu::Weight> from = WeightInPlace(weight, header.dtype);
  Tensor dense = weight;
  if (!from) {
    dense = torch::stable::contiguous(weight);
    from = cpu::Weight{dense.const_data_ptr(), 0, header.N, 1};
  }
  cpu::PackExpert(header, *from, expert, TorchThreads(), block.mutable_data_ptr());
}

Tensor Unpack(Tensor block) {
  const cpu::PackedHeader header = BlockHeader(block);
  const int64_t columns = header.dtype == cpu::DType::kInt4 ? header.N / 2 : header.N;
  std::vector<int64_t> shape = {header.K, columns};
  if (header.E > 0) shape.insert(shape.begin(), header.E);
  Tensor weight = NewTensor("the weight", shape, ToTorch(header.dtype));
  cpu::Unpack(header, block.const_data_ptr(), TorchThreads(), weight.mutable_data_ptr());
  return weight;
}

}  // namespace ffn::op
