// SPDX-License-Identifier: Apache-2.0
// See problem.h.
#include "cpu/problem.h"

#include <stdexcept>

namespace ffn::cpu {

DType FromContract(contract::DType dtype) {
  switch (dtype) {
    case contract::DType::kFloat32:
      return DType::kFloat32;
    case contract::DType::kFloat16:
      return DType::kFloat16;
    case contract::DType::kBfloat16:
      return DType::kBFloat16;
    case contract::DType::kInt8:
      return DType::kInt8;
    case contract::DType::kInt4:
      return DType::kInt4;
    case contract::DType::kInt32:
      return DType::kInt32;
    case contract::DType::kInt64:
      return DType::kInt64;
    case contract::DType::kUint64:
      return DType::kUInt64;
    default:
      throw std::logic_error("a mode of the contract has a dtype that the CPU kernels lack");
  }
}

namespace {

contract::DType ToContract(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return contract::DType::kFloat32;
    case DType::kFloat16:
      return contract::DType::kFloat16;
    case DType::kBFloat16:
      return contract::DType::kBfloat16;
    case DType::kInt8:
      return contract::DType::kInt8;
    default:
      return contract::DType::kInt4;
  }
}

}  // namespace

Problem ProblemOf(const contract::Call& call, const contract::Plan& plan) {
  const int64_t* facts = plan.facts;
  const int64_t mode = facts[contract::kModeFact];
  Problem problem;
  problem.x_dtype = FromContract(call.operands[contract::kXOperand].dtype);
  problem.weight_dtype = FromContract(call.operands[contract::kWeight1Operand].dtype);
  problem.y_dtype = FromContract(contract::OnlyDType(mode, contract::kOutOperand));
  problem.bias_dtype = FromContract(contract::OnlyDType(mode, contract::kBias1Operand));
  const contract::Spec& deq_scale = call.operands[contract::kDeqScale1Operand];
  if (deq_scale.given) problem.deq_dtype = FromContract(deq_scale.dtype);
  problem.activation = static_cast<Activation>(facts[contract::kActivationFact]);  // in the contract's order
  problem.high_precision = facts[contract::kInnerPreciseFact] == 0;
  problem.per_channel_scale = facts[contract::kPerChannelFact] != 0;
  problem.M = facts[contract::kMFact];
  problem.K1 = facts[contract::kK1Fact];
  problem.N1 = facts[contract::kN1Fact];
  problem.K2 = facts[contract::kK2Fact];
  problem.N2 = facts[contract::kN2Fact];
  problem.E = facts[contract::kExpertsFact] != 0 ? facts[contract::kEFact] : 1;
  if (facts[contract::kPerGroupFact] != 0) {
    problem.channels1.G = facts[contract::kG1Fact];
    problem.channels2.G = facts[contract::kG2Fact];
  }
  return problem;
}

contract::Spec SpecOf(const PackedHeader& header) {
  contract::Spec spec = {true, ToContract(header.dtype), {header.K, header.N}};
  if (header.E > 0) spec.shape.insert(spec.shape.begin(), header.E);
  return spec;
}

}  // namespace ffn::cpu
