// SPDX-License-Identifier: Apache-2.0
// Start here: the schemas of torch.ops.ffn.ffn and ffn.moe and the kernels behind their dispatch keys. The
// fake kernels and the autograd registration are in ffn_ops/op.py. LibTorch stable ABI only, so one binary
// serves torch 2.10 and later.
#include <torch/csrc/stable/library.h>

#include <type_traits>
#include <utility>

#include "op/call.h"

#define OPERANDS_SCHEMA                                                                             \
  "Tensor? bias1=None, Tensor? bias2=None, Tensor? scale=None, Tensor? offset=None, "               \
  "Tensor? deq_scale1=None, Tensor? deq_scale2=None, Tensor? antiquant_scale1=None, "               \
  "Tensor? antiquant_scale2=None, Tensor? antiquant_offset1=None, Tensor? antiquant_offset2=None, " \
  "*, "
#define OPTIONS_SCHEMA "int? inner_precise=None, ScalarType? output_dtype=None"
#define FFN_SCHEMA                                                                                         \
  "Tensor x, Tensor weight1, Tensor weight2, str activation, Tensor? expert_tokens=None, " OPERANDS_SCHEMA \
  "bool tokens_index_flag=False, " OPTIONS_SCHEMA
#define MOE_SCHEMA                                                                       \
  "Tensor x, Tensor topk_ids, Tensor topk_weights, Tensor weight1, Tensor weight2, str " \
  "activation, " OPERANDS_SCHEMA OPTIONS_SCHEMA ", bool activate_left=False"

namespace ffn::op {
namespace {

using OptionalTensor = std::optional<Tensor>;

// Collects the boxed arguments. Out is empty for ffn.ffn, which returns y, and one Tensor for ffn.out, which
// returns nothing (an aliased return would break opcheck and torch.compile).
template <Tensor (*Kernel)(const Arguments&), class... Out>
std::conditional_t<sizeof...(Out) == 0, Tensor, void> Ffn(
    Tensor x, Tensor weight1, Tensor weight2, std::string activation, OptionalTensor expert_tokens,
    OptionalTensor bias1, OptionalTensor bias2, OptionalTensor scale, OptionalTensor offset,
    OptionalTensor deq_scale1, OptionalTensor deq_scale2, OptionalTensor antiquant_scale1,
    OptionalTensor antiquant_scale2, OptionalTensor antiquant_offset1, OptionalTensor antiquant_offset2,
    bool tokens_index_flag, std::optional<int64_t> inner_precise, std::optional<ScalarType> output_dtype,
    Out... out) {
  const Arguments arguments{
      {std::move(x), std::move(weight1), std::move(weight2), std::move(expert_tokens), std::move(bias1),
       std::move(bias2), std::move(scale), std::move(offset), std::move(deq_scale1), std::move(deq_scale2),
       std::move(antiquant_scale1), std::move(antiquant_scale2), std::move(antiquant_offset1),
       std::move(antiquant_offset2), std::nullopt, std::nullopt, std::move(out)...},
      std::move(activation),
      tokens_index_flag,
      inner_precise,
      output_dtype};
  if constexpr (sizeof...(Out) == 0) {
    return Kernel(arguments);
  } else {
    Kernel(arguments);
  }
}

Tensor Moe(Tensor x, Tensor topk_ids, Tensor topk_weights, Tensor weight1, Tensor weight2,
           std::string activation, OptionalTensor bias1, OptionalTensor bias2, OptionalTensor scale,
           OptionalTensor offset, OptionalTensor deq_scale1, OptionalTensor deq_scale2,
           OptionalTensor antiquant_scale1, OptionalTensor antiquant_scale2, OptionalTensor antiquant_offset1,
           OptionalTensor antiquant_offset2, std::optional<int64_t> inner_precise,
           std::optional<ScalarType> output_dtype, bool activate_left) {
  return MoeCpu(
      {{std::move(x), std::move(weight1), std::move(weight2), std::nullopt, std::move(bias1),
        std::move(bias2), std::move(scale), std::move(offset), std::move(deq_scale1), std::move(deq_scale2),
        std::move(antiquant_scale1), std::move(antiquant_scale2), std::move(antiquant_offset1),
        std::move(antiquant_offset2), std::move(topk_ids), std::move(topk_weights)},
       std::move(activation),
       false,
       inner_precise,
       output_dtype},
      activate_left);
}

}  // namespace
}  // namespace ffn::op

STABLE_TORCH_LIBRARY(ffn, m) {
  m.def("ffn(" FFN_SCHEMA ") -> Tensor");
  m.def("ffn.out(" FFN_SCHEMA ", Tensor(a!) out) -> ()");
  m.def("moe(" MOE_SCHEMA ") -> Tensor");
  m.def(
      "grouped_mm(Tensor x, Tensor weight, Tensor expert_tokens, Tensor? bias=None, *, int? N=None) -> "
      "Tensor");
  m.def("grouped_outer(Tensor x, Tensor grad, Tensor expert_tokens) -> Tensor");
  m.def("new_block(Tensor weight, int E) -> Tensor");
  m.def("pack_expert(Tensor(a!) block, Tensor weight, int expert) -> ()");
  m.def("unpack(Tensor block) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ffn, CPU, m) {
  m.impl("ffn", TORCH_BOX((&ffn::op::Ffn<ffn::op::FfnCpu>)));
  m.impl("ffn.out", TORCH_BOX((&ffn::op::Ffn<ffn::op::FfnCpu, torch::stable::Tensor>)));
  m.impl("moe", TORCH_BOX(&ffn::op::Moe));
  m.impl("grouped_mm", TORCH_BOX(&ffn::op::GroupedMm));
  m.impl("grouped_outer", TORCH_BOX(&ffn::op::GroupedOuter));
  m.impl("new_block", TORCH_BOX(&ffn::op::NewBlock));
  m.impl("pack_expert", TORCH_BOX(&ffn::op::PackExpert));
  m.impl("unpack", TORCH_BOX(&ffn::op::Unpack));
}

STABLE_TORCH_LIBRARY_IMPL(ffn, PrivateUse1, m) {
  m.impl("ffn", TORCH_BOX((&ffn::op::Ffn<ffn::op::FfnNpu>)));
  m.impl("ffn.out", TORCH_BOX((&ffn::op::Ffn<ffn::op::FfnNpu, torch::stable::Tensor>)));
}
