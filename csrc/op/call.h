// SPDX-License-Identifier: Apache-2.0
// One call of torch.ops.ffn.ffn or ffn.moe: its arguments, what the contract sees of them, and the current
// target. library.cc collects the arguments and registers the kernels; ffn_cpu.cc and ffn_npu.cc run a call.
#pragma once

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "contract/contract.h"
#include "cpu/packed.h"

namespace ffn::op {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Tensors stand at their position in the contract's OPERANDS, which is the order of ffn.ffn's schema;
// kOutOperand is last.
struct Arguments {
  std::optional<Tensor> operands[contract::kOutOperand + 1];
  std::string activation;
  bool tokens_index_flag = false;
  std::optional<int64_t> inner_precise;
  std::optional<ScalarType> output_dtype;

  const Tensor& operand(contract::Operand name) const { return *operands[name]; }
};

// The header of a prepacked weight: a row of uint8 on the CPU, which nothing else that is legal looks like.
// Throws std::runtime_error when it is none that this version reads, in the name of the operand `name`.
std::optional<cpu::PackedHeader> PackedHeaderOf(const char* name, const Tensor& tensor);

// What the contract sees of the weight `name`. Dtypes int32 (8 values a word) and uint8 (2 a byte) are packed
// int4, whose last size counts int4 elements; a prepacked weight is what it was packed from.
contract::Spec DescribeWeight(const char* name, const Tensor& tensor);

// What the contract sees of a call.
contract::Call Describe(const Arguments& arguments);

// kOther for what the contract has no name for.
contract::DType DTypeOf(ScalarType dtype);

// The bytes from a tensor's first element to the end of its last; none for an empty tensor.
int64_t ExtentBytes(const Tensor& tensor);

// Throws std::runtime_error unless the tensor `name` is strided, on x's device, and inside its storage.
void CheckPlacement(const std::string& name, const Tensor& tensor, const torch::stable::Device& device);
// The same for every tensor of a call.
void CheckPlacement(const Arguments& arguments);

// True when y can be written straight into `out`: dense, and apart from every input. Otherwise y is computed
// beside it and copied, which is right for any overlap. Throws std::runtime_error when elements of out share
// memory.
bool CanWriteInto(const Tensor& out, const Arguments& arguments);

// Torch's own failures come without their reason through the stable ABI, so name the one there is: memory.
template <class F>
Tensor Allocate(const char* what, int64_t elements, const F& allocate) {
  try {
    return allocate();
  } catch (const std::runtime_error&) {
    throw std::runtime_error(std::string(what) + " needs memory for " + std::to_string(elements) +
                             " elements, but torch could not allocate it (split x, or free memory)");
  }
}

// The target that calls of this thread are checked for: what ffn_ops_set_target last set here, else
// FFN_OPS_TARGET, else cpu. Throws std::runtime_error when FFN_OPS_TARGET names no target.
contract::Target CurrentTarget();

// torch.ops.ffn.ffn and ffn.out on the CPU and on an NPU. They fill operands[kOutOperand] when it is given,
// and return it or a new y.
Tensor FfnCpu(const Arguments& arguments);
Tensor FfnNpu(const Arguments& arguments);

// How a plain weight [K, N] or [E, K, N] lies in memory, when its rows or its columns are dense.
std::optional<cpu::Weight> WeightInPlace(const Tensor& tensor, cpu::DType dtype);

// How torch stores elements of these; int4 two in a byte.
ScalarType ToTorch(cpu::DType dtype);

// A new dense tensor of the CPU, its elements undefined, which is called `what` where memory is short.
// (torch's new_empty goes through the dispatcher, by name: 37 us instead of 9 where its code is not in a
// cache.)
Tensor NewTensor(const char* what, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype);

// The elements of the operand `name` in row-major order, aligned. Where that needs a copy, `kept` owns it.
const void* DenseData(const char* name, const Tensor& tensor, std::vector<Tensor>& kept);

// The weight `name`, [K, N] or [E, K, N], plain or prepacked, as the kernels read it; copied into `kept` only
// when neither its rows nor its columns are dense.
cpu::Weight WeightOf(const char* name, const Tensor& tensor, cpu::DType dtype, int64_t K, int64_t N,
                     std::vector<Tensor>& kept);

// torch's threads.
cpu::ParallelFor TorchThreads();

// Calls run(TorchThreads()), which says with std::bad_alloc that scratch_bytes(threads) cannot be had.
template <class Run, class ScratchBytes>
void RunInTorch(const Run& run, const ScratchBytes& scratch_bytes) {
  const cpu::ParallelFor parallel = TorchThreads();
  try {
    run(parallel);
  } catch (const std::bad_alloc&) {
    throw std::runtime_error("the scratch needs " + std::to_string(scratch_bytes(parallel)) +
                             " bytes, but they could not be allocated (use fewer threads, or free memory)");
  }
}

// torch.ops.ffn.moe on the CPU, which always has topk_ids and topk_weights. activate_left: a GLU is
// act(left) * right.
Tensor MoeCpu(const Arguments& arguments, bool activate_left);

// torch.ops.ffn.grouped_mm and grouped_outer on the CPU.
// wanted_N, if given, must be the weight's N: what a prepacked one has cannot be known while tracing.
Tensor GroupedMm(Tensor x, Tensor weight, Tensor expert_tokens, std::optional<Tensor> bias,
                 std::optional<int64_t> wanted_N);
Tensor GroupedOuter(Tensor x, Tensor grad, Tensor expert_tokens);

// What ffn_ops.prepack and unpack are made of. NewBlock has the header and room for weights like `weight` of
// E experts (0: dense), PackExpert packs one of them, Unpack gives all back.
Tensor NewBlock(Tensor weight, int64_t E);
void PackExpert(Tensor block, Tensor weight, int64_t expert);
Tensor Unpack(Tensor block);

}  // namespace ffn::op
