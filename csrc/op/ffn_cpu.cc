// SPDX-License-Identifier: Apache-2.0
// torch.ops.ffn.ffn and ffn.moe on the CPU: contract, then the values that say which rows go to which expert,
// then a cpu::Problem over the tensors' memory, run on torch's threads. Called by library.cc; the kernels are
// behind cpu/ffn.h.
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "cpu/problem.h"
#include "op/call.h"

namespace ffn::op {
namespace {

using contract::Operand;

template <typename From, typename To>
void Convert(const void* from, int64_t count, void* to) {
  std::copy_n(static_cast<const From*>(from), count, static_cast<To*>(to));
}

// Dense tensors that a Problem points into; they live as long as the call.
class DenseTensors {
 public:
  explicit DenseTensors(const Arguments& arguments) : arguments_(arguments) {}

  // The operand's elements in row-major order, or null when it is absent.
  const void* Data(Operand name) {
    if (!arguments_.operands[name]) return nullptr;
    return DenseData(contract::kOperandNames[name], *arguments_.operands[name], kept_);
  }

  // The same as elements of `dtype`, which holds them exactly: topk_ids as int64, topk_weights as float32.
  // (torch's conversion goes through the dispatcher: 2 us more, and 20 where its code is not in a cache.)
  const void* Data(Operand name, ScalarType dtype) {
    const Tensor& tensor = arguments_.operand(name);
    const void* const from = Data(name);
    if (tensor.scalar_type() == dtype) return from;
    kept_.push_back(NewTensor(contract::kOperandNames[name], tensor.sizes(), dtype));
    void* const to = kept_.back().mutable_data_ptr();
    switch (tensor.scalar_type()) {
      case ScalarType::Int:
        Convert<int32_t, int64_t>(from, tensor.numel(), to);
        break;
      case ScalarType::Half:
        Convert<torch::headeronly::Half, float>(from, tensor.numel(), to);
        break;
      default:  // the contract has no other
        Convert<torch::headeronly::BFloat16, float>(from, tensor.numel(), to);
    }
    return to;
  }

  void Fill(cpu::Channels& channels, Operand bias, Operand deq_scale, Operand antiquant_scale,
            Operand antiquant_offset) {
    channels.bias = Data(bias);
    channels.deq_scale = Data(deq_scale);
    channels.antiquant_scale = Data(antiquant_scale);
    channels.antiquant_offset = Data(antiquant_offset);
  }

  cpu::Weight Weight(Operand name, cpu::DType dtype, int64_t K, int64_t N) {
    return WeightOf(contract::kOperandNames[name], arguments_.operand(name), dtype, K, N, kept_);
  }

 private:
  const Arguments& arguments_;
  std::vector<Tensor> kept_;
};

// The call's plan, and what the contract saw of it.
struct Checked {
  explicit Checked(const Arguments& arguments) {
    CheckPlacement(arguments);
    call = Describe(arguments);
    const std::string broken = contract::Resolve(call, CurrentTarget(), &plan);
    if (!broken.empty()) throw std::runtime_error(broken);
  }

  contract::Call call;
  contract::Plan plan;
};

void PointAtOperands(cpu::Problem& problem, DenseTensors& dense) {
  problem.x = dense.Data(contract::kXOperand);
  problem.weight1 = dense.Weight(contract::kWeight1Operand, problem.weight_dtype, problem.K1, problem.N1);
  problem.weight2 = dense.Weight(contract::kWeight2Operand, problem.weight_dtype, problem.K2, problem.N2);
  problem.scale = static_cast<const float*>(dense.Data(contract::kScaleOperand));
  problem.offset = static_cast<const float*>(dense.Data(contract::kOffsetOperand));
  dense.Fill(problem.channels1, contract::kBias1Operand, contract::kDeqScale1Operand,
             contract::kAntiquantScale1Operand, contract::kAntiquantOffset1Operand);
  dense.Fill(problem.channels2, contract::kBias2Operand, contract::kDeqScale2Operand,
             contract::kAntiquantScale2Operand, contract::kAntiquantOffset2Operand);
}

Tensor NewY(const Arguments& arguments, const cpu::Problem& problem) {
  return NewTensor("y", arguments.operand(contract::kXOperand).sizes(),  // N2 == K1
                   ToTorch(problem.y_dtype));
}

void CheckExpertIds(const int64_t* ids, int64_t count) {
  const int64_t* const negative = std::find_if(ids, ids + count, [](int64_t id) { return id < 0; });
  if (negative == ids + count) return;
  throw std::runtime_error("topk_ids holds " + std::to_string(*negative) +
                           ", but experts are numbered from 0 (an id of E or more is one to skip)");
}

}  // namespace

Tensor FfnCpu(const Arguments& arguments) {
  const Checked checked(arguments);
  const int64_t* facts = checked.plan.facts;
  DenseTensors dense(arguments);

  std::vector<int64_t> row_ends;
  if (facts[contract::kExpertsFact] != 0) {
    const auto* tokens = static_cast<const int64_t*>(dense.Data(contract::kExpertTokensOperand));
    const std::string broken = contract::RowEnds(tokens, facts[contract::kEFact], facts[contract::kMFact],
                                                 arguments.tokens_index_flag, &row_ends);
    if (!broken.empty()) throw std::runtime_error(broken);
  } else {
    row_ends = {facts[contract::kMFact]};
  }

  cpu::Problem problem = cpu::ProblemOf(checked.call, checked.plan);
  problem.row_ends = row_ends.data();
  const std::optional<Tensor>& out = arguments.operands[contract::kOutOperand];
  const bool in_place = out && CanWriteInto(*out, arguments);
  Tensor y = in_place ? *out : NewY(arguments, problem);
  problem.y = y.mutable_data_ptr();
  PointAtOperands(problem, dense);
  RunInTorch([&](const cpu::ParallelFor& parallel) { cpu::RunFfn(problem, parallel); },
             [&](const cpu::ParallelFor& parallel) { return cpu::ScratchBytes(problem, parallel); });
  if (out && !in_place) {
    Tensor target = *out;
    torch::stable::copy_(target, y);
  }
  return out ? *out : y;
}

Tensor MoeCpu(const Arguments& arguments, bool activate_left) {
  const Checked checked(arguments);
  DenseTensors dense(arguments);
  cpu::Routing routing;
  routing.top_k = checked.plan.facts[contract::kTopKFact];
  routing.ids = static_cast<const int64_t*>(dense.Data(contract::kTopkIdsOperand, ScalarType::Long));
  routing.weights = static_cast<const float*>(dense.Data(contract::kTopkWeightsOperand, ScalarType::Float));
  CheckExpertIds(routing.ids, arguments.operand(contract::kTopkIdsOperand).numel());

  cpu::Problem problem = cpu::ProblemOf(checked.call, checked.plan);
  problem.activate_left = activate_left;
  Tensor y = NewY(arguments, problem);
  problem.y = y.mutable_data_ptr();
  PointAtOperands(problem, dense);
  RunInTorch(
      [&](const cpu::ParallelFor& parallel) { cpu::RunMoe(problem, routing, parallel); },
      [&](const cpu::ParallelFor& parallel) { return cpu::MoeScratchBytes(problem, routing, parallel); });
  return y;
}

}  // namespace ffn::op
