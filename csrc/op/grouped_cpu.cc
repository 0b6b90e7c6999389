// SPDX-License-Identifier: Apache-2.0
// torch.ops.ffn.grouped_mm and grouped_outer on the CPU: one product of each expert with its own rows, and
// what the gradient of its weight is. For what lies around ffn.moe: activations that it does not know, and
// its backward (ffn_ops/gradient.py). Registered by library.cc; the products are the second one of
// cpu/ffn.h's RunFfn.
#include <torch/csrc/stable/ops.h>

#include <cstring>
#include <stdexcept>

#include "cpu/memory.h"
#include "cpu/problem.h"
#include "op/call.h"

namespace ffn::op {
namespace {

void Require(bool holds, const std::string& sentence) {
  if (!holds) throw std::runtime_error(sentence);
}

std::string Brackets(const std::vector<int64_t>& sizes) {
  std::string text;
  for (const int64_t size : sizes) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "[" + text + "]";
}

std::string ShapeOf(const Tensor& tensor) { return Brackets({tensor.sizes().begin(), tensor.sizes().end()}); }

const char* NameOf(contract::DType dtype) { return contract::kDTypeNames[static_cast<int>(dtype)]; }

cpu::DType FloatOf(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return cpu::DType::kFloat32;
    case ScalarType::Half:
      return cpu::DType::kFloat16;
    case ScalarType::BFloat16:
      return cpu::DType::kBFloat16;
    default:
      throw std::runtime_error(std::string("x is ") + NameOf(DTypeOf(x.scalar_type())) +
                               ", but it must be float32, float16 or bfloat16 (cast it)");
  }
}

void RequireDtypeOf(const Tensor& x, const char* name, contract::DType dtype, bool or_float32 = false) {
  const contract::DType wanted = DTypeOf(x.scalar_type()),
                        other = or_float32 ? contract::DType::kFloat32 : wanted;
  Require(dtype == wanted || dtype == other, std::string(name) + " is " + NameOf(dtype) + ", but beside " +
                                                 NameOf(wanted) + " x it must be " + NameOf(wanted) +
                                                 (other != wanted ? " or float32" : "") + " (cast it)");
}

void RequireRows(const Tensor& x) {
  Require(x.dim() == 2, "x has shape " + ShapeOf(x) + ", but it must be [M, K] (flatten the leading sizes)");
}

// The end row of each expert, and the total behind them.
std::vector<int64_t> RowEnds(const Tensor& expert_tokens, int64_t E, int64_t M, std::vector<Tensor>& kept) {
  Require(expert_tokens.scalar_type() == ScalarType::Long, std::string("expert_tokens is ") +
                                                               NameOf(DTypeOf(expert_tokens.scalar_type())) +
                                                               ", but it must be int64 (cast it)");
  Require(expert_tokens.dim() == 1 && (E < 0 || expert_tokens.size(0) == E),
          "expert_tokens has shape " + ShapeOf(expert_tokens) + ", but it must be [E]" +
              (E < 0 ? "" : " = " + Brackets({E})) + " (one count for each expert)");
  const auto* counts = static_cast<const int64_t*>(DenseData("expert_tokens", expert_tokens, kept));
  std::vector<int64_t> ends;
  int64_t end = 0;
  for (int64_t e = 0; e < expert_tokens.size(0); ++e) {
    Require(counts[e] >= 0 && counts[e] <= M - end,
            "expert_tokens[" + std::to_string(e) + "] is " + std::to_string(counts[e]) +
                ", but counts are not negative and add up to at most the M = " + std::to_string(M) +
                " rows of x (check the routing)");
    end += counts[e];
    ends.push_back(end);
  }
  return ends;
}

void RunOneProduct(const cpu::Problem& problem) {
  RunInTorch([&](const cpu::ParallelFor& parallel) { cpu::RunFfn(problem, parallel); },
             [&](const cpu::ParallelFor& parallel) { return cpu::ScratchBytes(problem, parallel); });
}

}  // namespace

Tensor GroupedMm(Tensor x, Tensor weight, Tensor expert_tokens, std::optional<Tensor> bias,
                 std::optional<int64_t> wanted_N) {
  CheckPlacement("x", x, x.device());
  CheckPlacement("weight", weight, x.device());
  CheckPlacement("expert_tokens", expert_tokens, x.device());
  if (bias) CheckPlacement("bias", *bias, x.device());
  cpu::Problem problem;
  problem.second_only = true;
  std::vector<Tensor> kept;
  problem.x_dtype = problem.y_dtype = FloatOf(x);
  RequireRows(x);
  const contract::Spec spec = DescribeWeight("weight", weight);
  Require(spec.shape.size() == 3 && spec.shape[1] == x.size(1),
          "weight has shape " + Brackets(spec.shape) + ", but it must be [E, K, N] with x's K = " +
              std::to_string(x.size(1)) + " (nn.Linear's goes in transposed)");
  RequireDtypeOf(x, "weight", spec.dtype);
  const int64_t M = x.size(0), E = spec.shape[0], K = spec.shape[1], N = spec.shape[2];
  Require(!wanted_N || *wanted_N == N, "N is " + std::to_string(wanted_N.value_or(N)) +
                                           ", but weight has N = " + std::to_string(N) +
                                           " columns (leave it out, or correct it)");
  const std::vector<int64_t> row_ends = RowEnds(expert_tokens, E, M, kept);
  problem.weight_dtype = problem.x_dtype;
  problem.M = row_ends.empty() ? 0 : row_ends.back();
  problem.K1 = problem.K2 = K;
  problem.N2 = N;
  problem.E = E;
  problem.row_ends = row_ends.data();
  problem.x = DenseData("x", x, kept);
  problem.weight2 = WeightOf("weight", weight, problem.weight_dtype, K, N, kept);
  if (bias) {
    RequireDtypeOf(x, "bias", DTypeOf(bias->scalar_type()), true);
    problem.bias_dtype = bias->scalar_type() == ScalarType::Float ? cpu::DType::kFloat32 : problem.x_dtype;
    Require(bias->dim() == 2 && bias->size(0) == E && bias->size(1) == N,
            "bias has shape " + ShapeOf(*bias) + ", but it must be [E, N] = " + Brackets({E, N}) +
                " (one row for each expert)");
    problem.channels2.bias = DenseData("bias", *bias, kept);
  }
  Tensor y = NewTensor("y", {M, N}, x.scalar_type());
  problem.y = y.mutable_data_ptr();
  const size_t row = static_cast<size_t>(N) * x.element_size();
  if (y.numel() > 0) {  // or there may be no memory to point at
    std::memset(static_cast<char*>(problem.y) + static_cast<size_t>(problem.M) * row, 0,
                static_cast<size_t>(M - problem.M) * row);
  }
  RunOneProduct(problem);
  return y;
}

Tensor GroupedOuter(Tensor x, Tensor grad, Tensor expert_tokens) {
  CheckPlacement("x", x, x.device());
  CheckPlacement("grad", grad, x.device());
  CheckPlacement("expert_tokens", expert_tokens, x.device());
  cpu::Problem problem;
  problem.second_only = true;
  std::vector<Tensor> kept;
  problem.x_dtype = problem.weight_dtype = problem.y_dtype = FloatOf(x);
  RequireRows(x);
  Require(grad.dim() == 2 && grad.size(0) == x.size(0),
          "grad has shape " + ShapeOf(grad) + ", but it must be [M, N] with x's M = " +
              std::to_string(x.size(0)) + " (rows belong together)");
  RequireDtypeOf(x, "grad", DTypeOf(grad.scalar_type()));
  const int64_t M = x.size(0), K = x.size(1), N = grad.size(1);
  const std::vector<int64_t> row_ends = RowEnds(expert_tokens, -1, M, kept);
  const auto E = static_cast<int64_t>(row_ends.size());
  const auto bytes = static_cast<int64_t>(x.element_size());
  Tensor y = NewTensor("y", {E, K, N}, x.scalar_type());
  if (y.numel() == 0) return y;
  // As large as the weights, and new in each step: of small pages the system's clearing takes half the time.
  cpu::AskForHugePages(y.mutable_data_ptr(), static_cast<size_t>(E * K * N * bytes));
  const auto* const rows = static_cast<const char*>(DenseData("grad", grad, kept));
  problem.M = K;
  problem.N2 = N;
  const int64_t all_rows = K;
  problem.row_ends = &all_rows;
  int64_t begin = 0;
  for (int64_t e = 0; e < E; ++e) {
    const int64_t count = row_ends[static_cast<size_t>(e)] - begin;
    problem.y = static_cast<char*>(y.mutable_data_ptr()) + e * K * N * bytes;
    if (count == 0) {
      std::memset(problem.y, 0, static_cast<size_t>(K * N * bytes));
      continue;
    }
    Tensor part = torch::stable::narrow(x, 0, begin, count);
    const Tensor left = torch::stable::contiguous(torch::stable::transpose(part, 0, 1));
    problem.x = left.const_data_ptr();
    problem.K1 = problem.K2 = count;
    problem.weight2 = {rows + begin * N * bytes, 0, N, 1};
    RunOneProduct(problem);
    begin += count;
  }
  return y;
}

}  // namespace ffn::op
