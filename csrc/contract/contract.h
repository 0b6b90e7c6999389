// SPDX-License-Identifier: Apache-2.0
// Evaluates the contract in C++: the twin of resolve(), violations() and row_ends() in ffn_ops/contract.py,
// over the tables that the build emits from there (contract.inc). csrc/op asks it before every call,
// csrc/python for the tests that hold both evaluations to the same verdict in the same words. Knows neither
// torch nor Python.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace ffn::contract {

#include "contract.inc"

// A size that a call does not determine, such as N1 when weight1 has one dimension. Rules that need it are
// passed over.
inline constexpr int64_t kUnknown = INT64_MIN;

// What the contract sees of a tensor. Sizes are in elements, for int4 too.
struct Spec {
  bool given = false;
  DType dtype = DType::kOther;
  std::vector<int64_t> shape;
};

// One call as its caller wrote it. output_dtype is an operand without shape.
struct Call {
  Spec operands[kOperandCount];
  std::string activation;
  std::optional<int64_t> inner_precise;
};

// A checked call. Facts hold the sizes and codes; kEFact is 0 without experts, kModeFact indexes kModes.
struct Plan {
  Route route = kCpuRoute;
  int64_t facts[kFactCount] = {};
};

struct Violation {
  const char* rule;
  std::string text;
};

// Every rule of `route` that the call breaks, in table order.
std::vector<Violation> Violations(const Call& call, Route route, Target target);

// Fills `plan` and returns an empty string when a route of `target` takes the call. Else returns the sentence
// of a violated rule: of those that the routes violate first, the last in the table (contract.py's
// `nearest`).
std::string Resolve(const Call& call, Target target, Plan* plan);

// The end row of each expert, from the values of expert_tokens (contract section d). Returns an empty string,
// or the sentence that says why the values do not fit M rows.
std::string RowEnds(const int64_t* expert_tokens, int64_t E, int64_t M, bool tokens_index_flag,
                    std::vector<int64_t>* ends);

// The target that name stands for, or nothing.
std::optional<Target> FindTarget(const std::string& name);

// The dtype that `mode` takes for `operand`; only for columns of one dtype, such as y.
DType OnlyDType(int64_t mode, Operand operand);

}  // namespace ffn::contract
