// SPDX-License-Identifier: Apache-2.0
// The tasks of a call for one instruction set: rows of x to float32, the first product with its activation,
// the second product, and for ffn.moe the sum over a token's experts. ffn.cc and moe.cc run them through the
// Kernels table; isa_*.cc include this file, each compiled with its own flags, and name the table.
// docs/numerics.md lists the roundings.
#pragma once

#include "cpu/activation-inl.h"
#include "cpu/gemm-inl.h"
#include "cpu/kernels.h"
#include "cpu/left-inl.h"
#include "cpu/packed-inl.h"
#include "cpu/vec-inl.h"
#if FFN_AMX || FFN_DOT
#include "cpu/narrow-inl.h"
#endif

namespace ffn::cpu {
namespace {

template <typename T>
void LoadRows(const void* x, int64_t from, const LeftRows& left, int64_t row) {
  const T* const data = static_cast<const T*>(x) + from * left.K;
  for (int64_t k = 0; k < left.K; k += kLanes) left.Put(row, k, LoadFloats(data + k, left.K - k));
  left.ZeroBeyondK(row);
}

void LoadRows(const Wave& wave, const Segment& segment, int64_t row, int64_t rows) {
  const LeftRows left(wave.first, segment);
  const Assignment* const assignments = wave.problem->assignments;
  const void* const x = wave.problem->x;
  for (int64_t r = row; r < row + rows; ++r) {
    const int64_t in_call = wave.first_row + segment.row + r;
    const int64_t from = assignments == nullptr ? in_call : assignments[in_call].token;
    switch (wave.problem->x_dtype) {
      case DType::kFloat32:
        LoadRows<float>(x, from, left, r);
        break;
      case DType::kFloat16:
        LoadRows<Half>(x, from, left, r);
        break;
      case DType::kBFloat16:
        LoadRows<BFloat>(x, from, left, r);
        break;
      default:
        LoadRows<int8_t>(x, from, left, r);
    }
  }
}

// The 32 bits that are a deq_scale's float32. bf16 stands in the upper half of one and is never cut.
inline void LoadDeqScale(const Wave& wave, const void* data, int64_t index, int64_t count, float* row) {
  if (wave.problem->deq_dtype == DType::kBFloat16) return LoadRow<BFloat>(data, index, count, row);
  const size_t item = wave.problem->deq_dtype == DType::kFloat32 ? 4 : 8;
  for (int64_t j = 0; j < count; ++j) {
    uint32_t bits;  // the low half of 64
    __builtin_memcpy(&bits, static_cast<const char*>(data) + static_cast<size_t>(index + j) * item, 4);
    bits &= wave.steps.deq_scale_mask;
    __builtin_memcpy(row + j, &bits, 4);
  }
}

// What is stored per output channel, for the columns of a task. An absent bias is zeros.
inline void LoadChannels(const Wave& wave, const Product& product, int64_t expert, const Columns& columns,
                         float* bias, float* deq_scale) {
  const Channels& channels = *product.channels;
  const int64_t index = expert * product.N + columns.column;
  if (channels.bias == nullptr) {
    __builtin_memset(bias, 0, static_cast<size_t>((columns.columns + kLanes - 1) / kLanes * kLanes) * 4);
  } else if (wave.steps.quant) {
    __builtin_memcpy(bias, static_cast<const int32_t*>(channels.bias) + index,
                     static_cast<size_t>(columns.columns) * 4);
  } else {
    LoadRow(wave.problem->bias_dtype, channels.bias, index, columns.columns, bias);
  }
  if (wave.steps.quant) LoadDeqScale(wave, channels.deq_scale, index, columns.columns, deq_scale);
}

// How segments store their left operands, and what multiplies those that are not floats.
#if FFN_AMX || FFN_DOT
constexpr auto LeftOf = NarrowLeftOf;
#else
constexpr auto LeftOf = FloatLeftOf;
constexpr auto MultiplyNarrow = Multiply;
#endif

bool ReadsPlainRows(const Weight& weight, DType dtype, const Segment& segment) {
  if (segment.rows > kFewRows) return false;
#if FFN_DOT
  if (dtype == DType::kBFloat16 && ReadsPlain<BFloat>(weight, segment.left)) return true;
  if (dtype == DType::kInt8 && ReadsPlain<int8_t>(weight, segment.left)) return true;
#endif
  return FloatsReadPlain(weight, dtype, segment.left, segment.rows);
}

inline void MultiplySegment(const Wave& wave, const Product& product, const Segment& segment,
                            const Columns& columns, float* tile, TaskScratch* scratch) {
  (IsFloat(segment.left) ? Multiply : MultiplyNarrow)(wave, product, segment, columns, tile, scratch);
}

// kLanes results of a product from their sums: with the bias, which wraps around in int32, and dequantised.
inline F32 Result(bool quant, const float* sums, const float* bias, const float* deq_scale) {
  if (!quant) return LoadFloats(sums) + LoadFloats(bias);
  return IntToFloat((I32)(Load<U32>(sums) + Load<U32>(bias))) * LoadFloats(deq_scale);
}

// The step Q of contract.md section e.4, from a value already rounded to fp16; the int8 stays a float.
inline F32 Quantize(F32 value, F32 scale, F32 offset) {
  const F32 scaled = Round(Rounding::kFp16, value * scale);
  F32 q = Round(Rounding::kFp16, scaled + offset);
  q = q == q ? q : F32{};
  q = Min(Max(q, Set(-128.0f)), Set(127.0f));
  const F32 to_integer = Set(0x1.8p23f);  // rounds to an integer, ties to even
  return (q + to_integer) - to_integer;
}

// Columns of row `row` of the intermediate, from values as the activation left them. A loop of its own: the
// steps of a vector wait for each other, and those of the next ones can run meanwhile if they are not far.
// (W8A8 with gelu and K1 = 384: 1.06 times as fast as in the activation's loop; Zen 4.)
void PutRow(const LeftRows& left, const Steps& steps, int64_t row, int64_t column, int64_t columns,
            const float* values, const float* scale, F32 offset) {
  const Rounding rounding = steps.hidden;
  if (steps.quant) {
    for (int64_t n = 0; n < columns; n += kLanes) {
      left.Put(row, column + n,
               Quantize(Round(rounding, Load<F32>(values + n)), Load<F32>(scale + n), offset));
    }
  } else {
    for (int64_t n = 0; n < columns; n += kLanes) {
      left.Put(row, column + n, Round(rounding, Load<F32>(values + n)));
    }
  }
}

void FirstProduct(const Wave& wave, const Segment& segment, int64_t column, int64_t columns,
                  TaskScratch* scratch) {
  const Problem& problem = *wave.problem;
  const Steps& steps = wave.steps;
  const int64_t hidden = wave.second.K;
  int64_t stride = 0;
  float* tiles[2] = {};  // at the first column of this task
  for (int half = 0; half <= (steps.glu ? 1 : 0); ++half) {
    // The right half of a GLU may begin inside a panel; then the panel is computed from its first column.
    const int64_t first = half * hidden + column, skipped = first % kPackedColumns;
    const Columns all = {first - skipped, columns + skipped};
    float* const tile = scratch->tile + half * (kTileSize / 2);
    MultiplySegment(wave, wave.first, segment, all, tile, scratch);
    LoadChannels(wave, wave.first, segment.expert, {first, columns}, scratch->bias[half],
                 scratch->deq_scale[half]);
    stride = TileStride(all.columns);
    tiles[half] = tile + skipped;
  }
  F32 offset = {};
  if (steps.quant) {
    offset = Round(Rounding::kFp16, Set(problem.offset[segment.expert]));
    if (problem.per_channel_scale) {
      LoadRow<float>(problem.scale, segment.expert * hidden + column, columns, scratch->scale);
    }
    for (int64_t n = 0; n < columns; n += kLanes) {
      const F32 scale =
          problem.per_channel_scale ? LoadFloats(scratch->scale + n) : Set(problem.scale[segment.expert]);
      Store(scratch->scale + n, Round(Rounding::kFp16, scale));
    }
  }
  const LeftRows left(wave.second, segment);
  const int gate = problem.activate_left ? 0 : 1;  // the half that the activation is for
  WithActivation(problem.activation, [&](auto activate) {
    for (int64_t r = 0; r < segment.rows; ++r) {
      float* const row = tiles[0] + r * stride;  // of which each vector is read before
      for (int64_t n = 0; n < columns; n += kLanes) {
        const auto sums = [&](int half) {
          const float* const at = tiles[half] + r * stride + n;
          return Round(steps.first,
                       Result(steps.quant, at, scratch->bias[half] + n, scratch->deq_scale[half] + n));
        };
        Store(row + n, steps.glu ? sums(1 - gate) * activate(sums(gate)) : activate(sums(0)));
      }
      PutRow(left, steps, r, column, columns, row, scratch->scale, offset);
      if (column + columns == hidden) left.ZeroBeyondK(r);
    }
  });
}

// Rounds and stores `count` of kLanes results. There is one NaN: which operand's bits survive an addition
// depends on the instruction a compiler picks.
template <typename T>
inline void StoreResult(Rounding rounding, F32 value, void* y, int64_t index, int64_t count) {
  value = value == value ? value : FromBits(SetBits(0x7fc00000));
  value = Round(rounding, value);
  T* to = static_cast<T*>(y) + index;
  if (count >= kLanes) return StoreAs(to, value);
  T buffer[kLanes];
  StoreAs(buffer, value);
  __builtin_memcpy(to, buffer, static_cast<size_t>(count) * sizeof(T));
}

inline void StoreResult(DType dtype, Rounding rounding, F32 value, void* y, int64_t index, int64_t count) {
  switch (dtype) {
    case DType::kFloat32:
      return StoreResult<float>(rounding, value, y, index, count);
    case DType::kFloat16:
      return StoreResult<Half>(rounding, value, y, index, count);
    default:
      return StoreResult<BFloat>(rounding, value, y, index, count);
  }
}

void SecondProduct(const Wave& wave, const Segment& segment, int64_t column, int64_t columns,
                   TaskScratch* scratch) {
  const Problem& problem = *wave.problem;
  const Steps& steps = wave.steps;
  const int64_t stride = TileStride(columns);
  LoadChannels(wave, wave.second, segment.expert, {column, columns}, scratch->bias[0], scratch->deq_scale[0]);
  MultiplySegment(wave, wave.second, segment, {column, columns}, scratch->tile, scratch);
  for (int64_t r = 0; r < segment.rows; ++r) {
    const int64_t row = wave.first_row + segment.row + r;
    for (int64_t n = 0; n < columns; n += kLanes) {
      const F32 value = Result(steps.quant, scratch->tile + r * stride + n, scratch->bias[0] + n,
                               scratch->deq_scale[0] + n);
      if (problem.assignments == nullptr) {
        StoreResult(problem.y_dtype, steps.y, value, problem.y, row * wave.second.N + column + n,
                    columns - n);
      } else {
        const Assignment& assignment = problem.assignments[row];
        StoreResult<float>(Rounding::kNone, value * Set(assignment.weight), problem.y,
                           assignment.slot * wave.second.N + column + n, columns - n);
      }
    }
  }
}

void Combine(const Combination& combination, int64_t token, int64_t tokens) {
  const int64_t top_k = combination.top_k, N = combination.N;
  const Rounding rounding = combination.y_dtype == DType::kBFloat16 ? Rounding::kBf16 : Rounding::kNone;
  for (int64_t t = token; t < token + tokens; ++t) {
    for (int64_t n = 0; n < N; n += kLanes) {
      F32 sum = {};
      for (int64_t slot = t * top_k; slot < (t + 1) * top_k; ++slot) {
        if (combination.present[slot]) sum = sum + LoadFloats(combination.results + slot * N + n, N - n);
      }
      StoreResult(combination.y_dtype, rounding, sum, combination.y, t * N + n, N - n);
    }
  }
}

}  // namespace
}  // namespace ffn::cpu
