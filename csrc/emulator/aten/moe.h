// SPDX-License-Identifier: Apache-2.0
// The operators of operators.txt that are longer than one ATen expression: the mixture-of-experts chain
// around FFN, and a few helpers. N tokens, H hidden size, K choices per token, E experts, C capacity of an
// expert. moe.cc.
#pragma once

#include "emulator/aten/aten.h"

namespace emulator::moe {

using Maybe = std::optional<at::Tensor>;
using Two = std::tuple<at::Tensor, at::Tensor>;
using Three = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using Four = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// What a call asks of the routing, in the numbering of V3.
struct Routing {
  int64_t active_num, capacity, experts, drop_pad;
  int64_t tokens_type;  // 0 cumulative, 1 counts, 2 pairs of expert and count, -1 not asked for
  int64_t quant_mode;   // -1 none, 0 static, 1 dynamic
  std::vector<int64_t> active_range;
  int64_t row_idx_type;  // 0 gather, 1 scatter
};

Three GatingTopKSoftmax(const at::Tensor& x, const Maybe& finished, int64_t k);
Three GatingTopKSoftmaxV2(const at::Tensor& x, const Maybe& finished, int64_t k, int64_t renorm,
                          bool softmax);
Three InitRouting(const at::Tensor& x, const at::Tensor& row_idx, const at::Tensor& expert_idx,
                  int64_t active_num);
Four InitRoutingV2(const at::Tensor& x, const at::Tensor& expert_idx, int64_t active_num, int64_t capacity,
                   int64_t experts, int64_t drop_pad, int64_t tokens, bool before);
Four InitRoutingV3(const at::Tensor& x, const at::Tensor& expert_idx, const Maybe& scale, const Maybe& offset,
                   const Routing& routing);
at::Tensor ComputeExpertTokens(const at::Tensor& sorted, int64_t experts);
at::Tensor FinalizeRouting(const at::Tensor& rows, const at::Tensor& indices, const Maybe& skip1,
                           const Maybe& skip2, const Maybe& bias, const Maybe& scales, const Maybe& experts,
                           int64_t mode, int64_t k);

struct Grouped {
  Tensors x, weight, bias, scale, offset, antiquant_scale, antiquant_offset, per_token_scale;
  Maybe group_list;
  int64_t group_type, list_type, activation;
  Tensors y;

  bool Stacked() const;  // one weight of three axes, not one for each group; parameters are stacked like it
};
// The results of all groups; the other two outputs of the operator are reserved and stay empty.
std::tuple<Tensors, Tensors, Tensors> GroupedMatmul(const Grouped& call);

at::Tensor SwiGlu(const at::Tensor& x, int64_t dim);
at::Tensor SwiGluGrad(const at::Tensor& grad, const at::Tensor& x, int64_t dim);
// A scale, and an offset for requantisation, as the 64 bits that products of int8 read.
at::Tensor TransQuantParam(const at::Tensor& scale, const Maybe& offset);
// y, scale and (when not symmetric) offset, for each row of the last axis.
Three DynamicQuant(const at::Tensor& x, const Maybe& smooth, const Maybe& group_index, bool symmetric);

Two RmsNorm(const at::Tensor& x, const at::Tensor& gamma, double eps);
at::Tensor Divide(const at::Tensor& self, const at::Tensor& other,
                  int32_t mode);  // 0 true, 1 truncated, 2 floored
at::Tensor Divide(const at::Tensor& self, const at::Scalar& other, int32_t mode);
at::Tensor Scatter(const at::Tensor& self, int64_t dim, const at::Tensor& index, const at::Tensor& source,
                   int64_t reduce);  // 0 replaces, 1 adds, 2 multiplies
// Sorted values, where each element went, and how often each value occurs; what is not asked for is left out.
Three Unique(const at::Tensor& self, bool inverse, bool counts);
std::array<bool, 3> Mask3(const std::vector<uint8_t>& mask);

}  // namespace emulator::moe
