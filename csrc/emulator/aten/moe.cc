// SPDX-License-Identifier: Apache-2.0
// See moe.h. The order of rows: "row order" numbers choice j of token i as i * K + j, "column order" as j * N
// + i.
#include "emulator/aten/moe.h"

#include <ATen/ops/_unique2.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/bincount.h>
#include <ATen/ops/bitwise_right_shift.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/div.h>
#include <ATen/ops/full.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/nonzero.h>
#include <ATen/ops/repeat_interleave.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/silu_backward.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <limits>

namespace emulator::moe {
namespace {

// What the device leaves unwritten: visible, like the pattern in fresh device memory.
at::Tensor Unwritten(at::IntArrayRef shape, at::ScalarType type) {
  const bool floating = c10::isFloatingType(type);
  return at::full(shape, floating ? at::Scalar(std::numeric_limits<double>::quiet_NaN()) : at::Scalar(-5),
                  at::TensorOptions().dtype(type));
}

// The k largest of the last axis and where they are; equal ones keep their order.
Two StableTopK(const at::Tensor& x, int64_t k) {
  const auto [values, indices] = at::sort(x, /*stable=*/true, -1, /*descending=*/true);
  return {values.narrow(-1, 0, k), indices.narrow(-1, 0, k)};
}

// A finished token gets expert E, one past the last.
at::Tensor ExpertIdx(const at::Tensor& indices, const at::Tensor& x, const Maybe& finished) {
  if (!finished) return indices;
  return indices.masked_fill(finished->unsqueeze(-1), x.size(-1));
}

// Of a float32, what the device's scales keep: sign, exponent, and 10 bits of the fraction.
constexpr int64_t kUpper19 = 0xffffe000;

at::Tensor ToInt8(const at::Tensor& values) { return values.round().clamp(-128, 127).to(at::kChar); }

}  // namespace

Three GatingTopKSoftmax(const at::Tensor& x, const Maybe& finished, int64_t k) {
  const auto [y, indices] = StableTopK(at::softmax(x.to(at::kFloat), -1).to(x.scalar_type()), k);
  const int64_t n = x.numel() / x.size(-1);
  const at::Tensor row_idx = at::arange(n * k).reshape({k, n}).t().reshape(indices.sizes());
  return {y, ExpertIdx(indices, x, finished), row_idx};
}

Three GatingTopKSoftmaxV2(const at::Tensor& x, const Maybe& finished, int64_t k, int64_t renorm,
                          bool softmax) {
  if (renorm == 1) {
    const auto [top, indices] = StableTopK(x, k);
    return {at::softmax(top.to(at::kFloat), -1), ExpertIdx(indices, x, finished), at::Tensor()};
  }
  const at::Tensor all = at::softmax(x.to(at::kFloat), -1);
  const auto [y, indices] = StableTopK(all.to(x.scalar_type()), k);
  return {y, ExpertIdx(indices, x, finished), softmax ? all : at::Tensor()};
}

Three InitRouting(const at::Tensor& x, const at::Tensor& row_idx, const at::Tensor& expert_idx,
                  int64_t active_num) {
  const int64_t n = x.size(0), k = expert_idx.size(1);
  const auto [experts, order] = at::sort(expert_idx.flatten(), /*stable=*/true, 0, /*descending=*/false);
  const at::Tensor rows = row_idx.flatten().to(at::kLong).index_select(0, order);
  const at::Tensor expanded_row_idx = at::zeros_like(rows).scatter(0, rows, at::arange(n * k));
  const at::Tensor tokens = n > 0 ? rows.remainder(n) : rows;
  return {x.index_select(0, tokens.narrow(0, 0, std::min(n, active_num) * k)), expanded_row_idx, experts};
}

Four InitRoutingV2(const at::Tensor& x, const at::Tensor& expert_idx, int64_t active_num, int64_t capacity,
                   int64_t experts, int64_t drop_pad, int64_t tokens, bool before) {
  // V2 numbers the kinds of counts from 1, and knows its number of experts only when it needs it.
  const bool counted = drop_pad == 1 ? before : tokens != 0;
  const int64_t type = !counted ? -1 : drop_pad == 0 && tokens == 1 ? 0 : 1;
  const int64_t last = experts > 0 ? experts : std::numeric_limits<int32_t>::max();
  auto [expanded_x, row_idx, counts, scale] =
      InitRoutingV3(x, expert_idx, std::nullopt, std::nullopt,
                    {active_num, capacity, experts, drop_pad, type, -1, {0, last}, 0});
  if (drop_pad == 1) return {expanded_x, row_idx, at::Tensor(), counts};
  return {expanded_x, row_idx, counts, at::Tensor()};
}

Four InitRoutingV3(const at::Tensor& x, const at::Tensor& expert_idx, const Maybe& scale, const Maybe& offset,
                   const Routing& routing) {
  TORCH_CHECK(routing.active_range.size() == 2, "active_expert_range has ", routing.active_range.size(),
              " values, but must have 2");
  TORCH_CHECK(-1 <= routing.quant_mode && routing.quant_mode <= 1, "quant_mode ", routing.quant_mode,
              " is not emulated (use -1, 0 or 1)");
  const int64_t n = x.size(0), h = x.size(1), k = expert_idx.size(1), total = n * k;
  const int64_t first = routing.active_range[0], last = routing.active_range[1];

  // Active rows sorted by expert; the others come after them and count for nothing.
  const at::Tensor flat = expert_idx.flatten().to(at::kLong);
  const at::Tensor active = flat.ge(first).logical_and(flat.lt(last));
  const at::Tensor key = at::where(active, flat, at::full({}, std::numeric_limits<int64_t>::max()));
  const auto [experts, everything] = at::sort(key, /*stable=*/true, 0, /*descending=*/false);
  const int64_t available = active.sum().item<int64_t>();
  const at::Tensor order = everything.narrow(0, 0, available), sorted = experts.narrow(0, 0, available);

  at::Tensor counts, tokens;
  if (routing.tokens_type >= 0 || routing.drop_pad == 1) {
    counts = at::bincount(sorted - first, std::nullopt, last - first);
  }
  if (routing.tokens_type == 0) tokens = counts.cumsum(0);
  if (routing.tokens_type == 1) tokens = counts;
  if (routing.tokens_type == 2) {
    const at::Tensor some = at::nonzero(counts).flatten();
    tokens = Unwritten({routing.experts, 2}, at::kLong);
    tokens.narrow(0, 0, some.numel()).copy_(at::stack({some + first, counts.index_select(0, some)}, 1));
    if (some.numel() < routing.experts) tokens[some.numel()].zero_();
  }

  // slot[p]: where the p-th of the sorted rows goes in expanded_x, -1 for nowhere.
  const bool padded = routing.drop_pad == 1;
  at::Tensor slot = at::arange(available);
  int64_t rows = total;
  if (padded) {
    const at::Tensor within = slot - (counts.cumsum(0) - counts).index_select(0, sorted - first);
    slot = at::where(within.lt(routing.capacity), sorted * routing.capacity + within,
                     at::full({}, -1, at::kLong));
    rows = routing.experts * routing.capacity;
  } else if (routing.active_num > 0) {
    rows = std::min(routing.active_num, total);
  }
  const at::Tensor kept = slot.ge(0).logical_and(slot.lt(rows));
  const at::Tensor to = slot.masked_select(kept);
  const at::Tensor tokens_of = k > 0 ? order.masked_select(kept).floor_divide(k) : to;

  at::Tensor from = x.index_select(0, tokens_of), row_scale;
  if (routing.quant_mode == -1 && scale) row_scale = scale->flatten().index_select(0, tokens_of);
  if (routing.quant_mode == 0) {
    TORCH_CHECK(scale && offset, "quant_mode is 0, but scale and offset must be given then");
    from = ToInt8(from.to(at::kFloat) * *scale + *offset);
  }
  if (routing.quant_mode == 1) {
    Maybe smooth = scale;
    if (scale && scale->size(0) > 1) smooth = scale->index_select(0, sorted.masked_select(kept) - first);
    at::Tensor none;
    std::tie(from, row_scale, none) =
        DynamicQuant(smooth ? from.to(at::kFloat) * *smooth : from, {}, {}, true);
  }
  at::Tensor expanded_x =
      padded ? at::zeros({rows, h}, from.options()) : Unwritten({rows, h}, from.scalar_type());
  expanded_x.index_copy_(0, to, from);
  if (padded) expanded_x = expanded_x.reshape({routing.experts, routing.capacity, h});
  at::Tensor expanded_scale;
  if (row_scale.defined()) {
    expanded_scale = padded ? at::zeros({rows}) : Unwritten({rows}, at::kFloat);
    expanded_scale.index_copy_(0, to, row_scale);
  }

  at::Tensor row_idx;
  if (routing.row_idx_type == 0) {
    row_idx = at::full({total}, -1, at::kLong).scatter(0, order, slot);
  } else {
    row_idx = Unwritten({total}, at::kLong);
    row_idx.narrow(0, 0, available).copy_(order);
  }
  return {expanded_x, row_idx, tokens, expanded_scale};
}

at::Tensor ComputeExpertTokens(const at::Tensor& sorted, int64_t experts) {
  return at::searchsorted(sorted, at::arange(experts, sorted.options()), /*out_int32=*/false, /*right=*/true);
}

at::Tensor FinalizeRouting(const at::Tensor& rows, const at::Tensor& indices, const Maybe& skip1,
                           const Maybe& skip2, const Maybe& bias, const Maybe& scales, const Maybe& experts,
                           int64_t mode, int64_t k) {
  // bfloat16 rounds once at the end, the others after each step.
  const at::ScalarType type = rows.scalar_type() == at::kBFloat16 ? at::kFloat : rows.scalar_type();
  const int64_t h = rows.size(-1);
  if (scales) k = scales->size(1);
  const int64_t n = indices.numel() / k;
  const at::Tensor flat = rows.reshape({-1, h}).to(type);
  const at::Tensor index =
      indices.to(at::kLong).reshape(mode >= 2 ? at::IntArrayRef({n, k}) : at::IntArrayRef({k, n}));
  at::Tensor out = at::zeros({n, h}, at::TensorOptions().dtype(type));
  if (skip1) out = skip1->to(type);
  if (skip2) out = out + skip2->to(type);
  for (int64_t j = 0; j < k; ++j) {
    const at::Tensor from = index.select(mode >= 2 ? 1 : 0, j), dropped = from.lt(0).unsqueeze(-1);
    at::Tensor row = flat.index_select(0, from.clamp_min(0));
    // Modes 0 and 2 leave a dropped row undefined: it shows as NaN.
    row = row.masked_fill(dropped, mode % 2 == 1 ? 0 : std::numeric_limits<double>::quiet_NaN());
    if (bias) row = row + bias->to(type).index_select(0, experts.value().select(1, j).to(at::kLong));
    if (scales) row = row * scales->to(type).narrow(1, j, 1);
    out = out + row;
  }
  return out;
}

namespace {

// Ends of the groups' rows, whatever way group_list says it; groups that a list of pairs leaves out are
// empty.
std::vector<std::pair<int64_t, int64_t>> GroupRows(const Grouped& call, int64_t groups) {
  std::vector<std::pair<int64_t, int64_t>> ranges(static_cast<size_t>(groups));
  const at::Tensor list = call.group_list.value().to(at::kLong).reshape({call.group_list->size(0), -1});
  TORCH_CHECK(list.size(0) <= 1024, "group_list has ", list.size(0), " groups, but 1024 are the most");
  int64_t start = 0;
  for (int64_t i = 0; i < list.size(0); ++i) {
    const int64_t value = list[i][-1].item<int64_t>();
    const int64_t group = call.list_type == 2 ? list[i][0].item<int64_t>() : i;
    const int64_t end = call.list_type == 0 ? value : start + value;
    TORCH_CHECK(group >= 0 && group < groups && end >= start, "group_list has ", value, " at ", i,
                ", but groups must follow each other");
    if (end > start || call.list_type != 2) ranges[static_cast<size_t>(group)] = {start, end};
    start = end;
  }
  return ranges;
}

// A parameter of one group: a row of the first tensor where one tensor holds all groups, else a tensor of its
// own.
at::Tensor OfGroup(const Grouped& call, const Tensors& list, size_t group) {
  if (list.empty() || !list[0].defined()) return {};
  if (!call.Stacked()) return list.at(group);
  TORCH_CHECK(list[0].dim() >= 2, "a parameter has shape ", list[0].sizes(),
              ", but the one for all groups has the groups first");
  return list[0][static_cast<int64_t>(group)];
}

at::Tensor Activate(const at::Tensor& y, int64_t activation) {
  switch (activation) {
    case 0:
      return y;
    case 1:
      return y.relu();
    case 2:
      return at::gelu(y, "tanh");
    case 4:
      return y * at::sigmoid(y * 1.702);
    case 5:
      return at::silu(y);
    default:
      TORCH_CHECK(false, "act_type ", activation, " is not emulated (use 0, 1, 2, 4 or 5)");
  }
}

// A scale as a number, or as 64 bits whose low half is a float32 (npu_trans_quant_param), of which the device
// reads the upper 19.
at::Tensor Unpacked(const at::Tensor& scale) {
  if (scale.scalar_type() != at::kLong && scale.scalar_type() != at::kUInt64) return scale.to(at::kFloat);
  return scale.view(at::kLong).bitwise_and(kUpper19).to(at::kInt).view(at::kFloat);
}

// Eight int4 in each int32, the lowest bits first.
at::Tensor UnpackedInt4(const at::Tensor& packed) {
  const at::Tensor shifts = at::arange(0, 32, 4, at::kInt);
  const at::Tensor nibbles = at::bitwise_right_shift(packed.unsqueeze(-1), shifts).bitwise_and(15);
  return (nibbles.bitwise_xor(8) - 8).flatten(-2);  // 8 to 15 stand for -8 to -1
}

// (w + offset) * scale in x's dtype, rounded as FFN does it (contract e.5): float16 at each step, bfloat16 at
// the end. scale and offset are one row, or one for each of G groups of rows.
at::Tensor Dequantised(const Grouped& call, const at::Tensor& weight, size_t group, at::ScalarType x_type) {
  const at::Tensor scale = OfGroup(call, call.antiquant_scale, group);
  TORCH_CHECK(scale.defined(), "weight is ", weight.scalar_type(), ", but antiquant_scale is missing");
  const bool int4 = weight.scalar_type() == at::kInt;
  TORCH_CHECK(int4 || scale.dim() == 1, "antiquant_scale has groups along K, which only int4 weights take");
  const at::Tensor w = int4 ? UnpackedInt4(weight) : weight;
  const at::ScalarType type = x_type == at::kHalf ? at::kHalf : at::kFloat;
  const auto for_each_row = [&](const at::Tensor& parameter) {
    const at::Tensor rows = parameter.to(type).reshape({-1, w.size(1)});
    TORCH_CHECK(w.size(0) % rows.size(0) == 0, "K is ", w.size(0), ", but has ", rows.size(0), " groups");
    return at::repeat_interleave(rows, w.size(0) / rows.size(0), 0);
  };
  at::Tensor values = w.to(type);
  if (const at::Tensor offset = OfGroup(call, call.antiquant_offset, group); offset.defined()) {
    values = values + for_each_row(offset);
  }
  return (values * for_each_row(scale)).to(x_type);
}

// int8 by int8: exact until the scales.
at::Tensor QuantisedProduct(const Grouped& call, const at::Tensor& x, const at::Tensor& weight, size_t group,
                            const at::Tensor& per_token) {
  TORCH_CHECK(weight.scalar_type() == at::kChar, "x is int8 and weight ", weight.scalar_type(),
              ", which is not emulated (use int8)");
  const at::Tensor bias = OfGroup(call, call.bias, group), scale = OfGroup(call, call.scale, group);
  const at::ScalarType type = call.y[0].scalar_type();
  TORCH_CHECK(!OfGroup(call, call.offset, group).defined() && type != at::kChar,
              "results in int8 are not emulated");
  TORCH_CHECK(scale.defined() == (type != at::kInt) && (scale.defined() || !per_token.defined()),
              "x is int8 and y ", type, ", but y is int32 without scales, and only then");
  at::Tensor y = x.to(at::kDouble).matmul(weight.to(at::kDouble));
  const bool integral = bias.defined() && bias.scalar_type() == at::kInt;
  if (integral) y = y + bias;
  if (!scale.defined()) return y;
  y = y.to(at::kFloat) * Unpacked(scale);
  if (per_token.defined()) y = y * per_token.unsqueeze(-1);
  return bias.defined() && !integral ? y + bias.to(at::kFloat) : y;
}

at::Tensor MatmulOfGroup(const Grouped& call, const at::Tensor& x, const at::Tensor& weight, size_t group,
                         const at::Tensor& per_token) {
  if (x.scalar_type() == at::kChar) {
    return Activate(QuantisedProduct(call, x, weight, group, per_token), call.activation);
  }
  TORCH_CHECK(call.activation == 0, "act_type is ", call.activation, ", but x must be int8 for that");
  const bool floating = c10::isFloatingType(weight.scalar_type());
  const at::Tensor w = floating ? weight : Dequantised(call, weight, group, x.scalar_type());
  const at::Tensor y = x.to(at::kFloat).matmul(w.to(at::kFloat)), bias = OfGroup(call, call.bias, group);
  return bias.defined() ? y + bias.to(at::kFloat) : y;
}

}  // namespace

bool Grouped::Stacked() const { return weight.size() == 1 && weight[0].dim() == 3; }

std::tuple<Tensors, Tensors, Tensors> GroupedMatmul(const Grouped& call) {
  const bool stacked = call.Stacked();
  const auto groups = static_cast<int64_t>(stacked ? static_cast<size_t>(call.weight[0].size(0))
                                                   : std::max(call.weight.size(), call.x.size()));
  const bool ranged = call.group_list && call.group_list->numel() > 0 && call.x.size() == 1;
  const auto weight = [&](size_t group) {
    return stacked ? call.weight[0][static_cast<int64_t>(group)] : call.weight[group];
  };
  if (call.group_type == 2) {
    TORCH_CHECK(ranged && call.y.size() == 1, "group_type is 2, but it needs one x, one y and a group_list");
    const int64_t parts = call.group_list->size(0);
    Tensors y;
    for (const auto& [start, end] : GroupRows(call, parts)) {
      y.push_back(MatmulOfGroup(call, call.x[0].slice(1, start, end), call.weight[0].slice(0, start, end),
                                y.size(), {}));
    }
    return {{at::stack(y)}, {}, {}};
  }
  TORCH_CHECK(call.group_type == 0 || call.group_type == -1, "group_type ", call.group_type,
              " is not emulated");
  Tensors results;
  const at::Tensor per_token = call.per_token_scale.empty() ? at::Tensor() : call.per_token_scale[0];
  const auto ranges = ranged ? GroupRows(call, groups) : std::vector<std::pair<int64_t, int64_t>>();
  for (size_t group = 0; group < static_cast<size_t>(groups); ++group) {
    at::Tensor x = ranged ? call.x[0].slice(0, ranges[group].first, ranges[group].second) : call.x[group];
    const at::Tensor rows = !per_token.defined() ? at::Tensor()
                            : ranged ? per_token.slice(0, ranges[group].first, ranges[group].second)
                                     : call.per_token_scale[group];
    results.push_back(MatmulOfGroup(call, x, weight(group), group, rows));
  }
  if (call.y.size() > 1 || !ranged) return {call.y.size() > 1 ? results : Tensors{at::cat(results)}, {}, {}};
  at::Tensor y = Unwritten(call.y[0].sizes(), call.y[0].scalar_type());  // rows of no group stay as they were
  for (size_t group = 0; group < results.size(); ++group) {
    y.slice(0, ranges[group].first, ranges[group].second).copy_(results[group]);
  }
  return {{y}, {}, {}};
}

at::Tensor SwiGlu(const at::Tensor& x, int64_t dim) {
  const auto halves = x.to(at::kFloat).chunk(2, dim);
  return at::silu(halves[0]) * halves[1];
}

at::Tensor SwiGluGrad(const at::Tensor& grad, const at::Tensor& x, int64_t dim) {
  const auto halves = x.to(at::kFloat).chunk(2, dim);
  const at::Tensor g = grad.to(at::kFloat);
  return at::cat({at::silu_backward(g * halves[1], halves[0]), g * at::silu(halves[0])}, dim);
}

at::Tensor TransQuantParam(const at::Tensor& scale, const Maybe& offset) {
  // Bits 0 to 31: the scale as float32, its lower 13 bits unused. 37 to 45: the offset, in two's complement
  // of 9 bits. 46: always set.
  at::Tensor bits = scale.contiguous().view(at::kInt).to(at::kLong).bitwise_and(kUpper19);
  bits = bits.bitwise_or(at::Scalar(int64_t{1} << 46));
  if (!offset) return bits;
  const at::Tensor shift = offset->round().clamp(-256, 255).to(at::kLong).bitwise_and(0x1ff);
  return bits.bitwise_or(shift * (int64_t{1} << 37));
}

Three DynamicQuant(const at::Tensor& x, const Maybe& smooth, const Maybe& group_index, bool symmetric) {
  at::Tensor values = x.to(at::kFloat);
  if (smooth && group_index) {
    // group_index holds the groups' ends, and row r of smooth belongs to group r.
    const at::Tensor rows = values.reshape({-1, values.size(-1)});
    const at::Tensor group =
        at::searchsorted(group_index->to(at::kLong), at::arange(rows.size(0)), false, true);
    values = (rows * smooth->to(at::kFloat).index_select(0, group)).reshape(values.sizes());
  } else if (smooth) {
    values = values * smooth->to(at::kFloat);
  }
  if (symmetric) {
    const at::Tensor scale = values.abs().amax(-1) / 127;
    return {ToInt8((values / scale.unsqueeze(-1)).nan_to_num(0)), scale, at::Tensor()};
  }
  const at::Tensor top = values.amax(-1), scale = (top - values.amin(-1)) / 255, offset = 127 - top / scale;
  return {ToInt8(values / scale.unsqueeze(-1) + offset.unsqueeze(-1)), scale, offset};
}

Two RmsNorm(const at::Tensor& x, const at::Tensor& gamma, double eps) {
  std::vector<int64_t> axes;
  for (int64_t axis = x.dim() - gamma.dim(); axis < x.dim(); ++axis) axes.push_back(axis);
  const at::Tensor values = x.to(at::kFloat), rstd = (values.square().mean(axes, true) + eps).rsqrt();
  return {values * rstd * gamma.to(at::kFloat), rstd};
}

namespace {

std::optional<c10::string_view> Rounding(int32_t mode) {
  if (mode == 0) return std::nullopt;
  return mode == 1 ? "trunc" : "floor";
}

}  // namespace

at::Tensor Divide(const at::Tensor& self, const at::Tensor& other, int32_t mode) {
  return at::div(self, other, Rounding(mode));
}

at::Tensor Divide(const at::Tensor& self, const at::Scalar& other, int32_t mode) {
  return at::div(self, other, Rounding(mode));
}

at::Tensor Scatter(const at::Tensor& self, int64_t dim, const at::Tensor& index, const at::Tensor& source,
                   int64_t reduce) {
  if (reduce == 0) return self.scatter(dim, index, source);
  return self.scatter(dim, index, source, reduce == 1 ? "add" : "multiply");
}

Three Unique(const at::Tensor& self, bool inverse, bool counts) {
  const auto [values, to, times] = at::_unique2(self, /*sorted=*/true, inverse, counts);
  return {values, inverse ? to : at::Tensor(), counts ? times : at::Tensor()};
}

std::array<bool, 3> Mask3(const std::vector<uint8_t>& mask) {
  TORCH_CHECK(mask.size() == 3, "the mask has ", mask.size(), " values, but must have 3");
  return {mask[0] != 0, mask[1] != 0, mask[2] != 0};
}

}  // namespace emulator::moe
