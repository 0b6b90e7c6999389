// SPDX-License-Identifier: Apache-2.0
// The multiplication of left operands that are stored narrow (Left in kernels.h): bf16, int8 and, on some
// CPUs, fp16 as they are; else fp16 as the sum of two bf16, which is exact, in passes that leave out the
// product of both rests. What multiplies is tiles (amx-inl.h) or dot products (dot-inl.h), each for what it
// is good at; the rest goes through gemm-inl.h. Used by ffn-inl.h.
//
// Integer weights beside bf16 become bf16 with their scales, by the contract's own rounding; beside fp16 they
// become bf16 without them, which is exact, and the sums of each group are scaled.
//
// A row's bits are its own as in gemm-inl.h: each sum gets its products in the order of k, whatever the
// blocks are.
#pragma once

#include "cpu/gemm-inl.h"
#include "cpu/kernels.h"
#include "cpu/left-inl.h"
#include "cpu/packed-inl.h"
#if FFN_AMX
#include "cpu/amx-inl.h"
#else
#include "cpu/dot-inl.h"
#endif
#include "cpu/vec-inl.h"

namespace ffn::cpu {
namespace {

bool GroupsFitSteps(const Problem& problem) {
  const auto fits = [](const Channels& channels, int64_t K) {
    return channels.antiquant_scale == nullptr || channels.G == 1 || K / channels.G % 32 == 0;
  };
  return fits(problem.channels1, problem.K1) && fits(problem.channels2, problem.K2);
}

Left NarrowLeftOf(const Problem& problem, int64_t rows) {
  const bool few = rows < FewestRows(problem.weight_dtype);
  const Left as_float = FloatLeftOf(problem, rows);
  switch (problem.x_dtype) {
    case DType::kInt8:
      return kMultipliesInt16 ? Left::kInt16 : Left::kInt8;
    case DType::kBFloat16:
      if (!kMultipliesBf16) return as_float;
      if (problem.weight_dtype == DType::kBFloat16) return Left::kBf16;
      if (!GroupsFitSteps(problem)) return as_float;
      if (!few) return Left::kBf16;
      return kConvertsIntegers ? Left::kBf16Exact : as_float;
    case DType::kFloat16:
      if (kMultipliesFp16 && problem.weight_dtype == DType::kFloat16) return Left::kFp16;
      if (!GroupsFitSteps(problem)) return as_float;
      if (kConvertsIntegers) return few && problem.weight_dtype != DType::kFloat16 ? Left::kSplit : as_float;
      return kSplitsFp16 && !few ? Left::kSplit : as_float;
    default:
      return as_float;
  }
}

// Rows [begin, end) of panels of T, whole steps or the last ones, as pairs of bf16, [rows / 2][32][2], zeros
// up to a whole step. kWhat is done to them on the way.
enum class Expansion {
  kExact,   // integers
  kScaled,  // bf16((w + offset) scale)
  kSplit,   // what the bf16 leave goes to `rest` in the same order
};
template <typename T, Expansion kWhat>
void ExpandPairs(const Panels& from, int64_t begin, int64_t end, int64_t columns, int64_t panel_bytes,
                 const TaskScratch& scratch, char* to, char* rest) {
  using Layout = Panel<T>;
  constexpr int64_t kRows = Layout::kGroup < 2 ? 2 : Layout::kGroup;
  const int64_t filled = (end + 31) / 32 * 32;
  for (int64_t n = 0; n < columns; n += kLanes) {
    const int64_t at = n / kPackedColumns * panel_bytes + n % kPackedColumns * 4;
    const F32 offset = Load<F32>(scratch.antiquant_offset + n),
              scale = Load<F32>(scratch.antiquant_scale + n);
    for (int64_t k = begin; k < filled; k += kRows) {
      F32 w[kRows];
      Unrolled<kRows / Layout::kGroup>([&](auto g) {
        const int64_t row = k + g * Layout::kGroup;
        if (row < end) {
          const char* const at = from.At<T>(row, n);
          AskFor(at);
          const auto vector = Load<typename Layout::Vector>(at);
          Unrolled<Layout::kGroup>([&](auto i) {
            const F32 element = Layout::template Element<i>(vector);
            w[g * Layout::kGroup + i] = kWhat == Expansion::kScaled ? (element + offset) * scale : element;
          });
          // Rows that only fill a group up stay zeros.
          for (int64_t i = end - row; i < Layout::kGroup; ++i) w[g * Layout::kGroup + i] = F32{};
        } else {
          for (int i = 0; i < Layout::kGroup; ++i) w[g * Layout::kGroup + i] = F32{};
        }
      });
      for (int64_t i = 0; i < kRows; i += 2) {
        const int64_t pair = at + (k + i) / 2 * kPackedColumns * 4;
        if constexpr (kWhat == Expansion::kSplit) {
          U32 low, high;
          const F32 low_rest = RestOfHalf(w[i], &low), high_rest = RestOfHalf(w[i + 1], &high);
          Store(to + pair, low >> 16 | high);
          // The rests are bf16 already.
          Store(rest + pair, Bits(low_rest) >> 16 | (Bits(high_rest) & 0xffff0000));
        } else {
          Store(to + pair, PairOfBf16(w[i], w[i + 1]));
        }
      }
    }
  }
}

// tile += scale (sums + offset * sum of the row), for a group.
inline void AddScaled(const float* row_sums, const float* sums, int64_t rows, int64_t columns, float* tile,
                      int64_t stride, const TaskScratch& scratch) {
  const int64_t sums_stride = TileStride(columns);
  for (int64_t r = 0; r < rows; ++r) {
    const F32 row_sum = Set(row_sums[r]);
    for (int64_t j = 0; j < columns; j += kLanes) {
      const F32 both =
          Fma(row_sum, Load<F32>(scratch.antiquant_offset + j), Load<F32>(sums + r * sums_stride + j));
      float* const to = tile + r * stride + j;
      Store(to, Fma(both, Load<F32>(scratch.antiquant_scale + j), Load<F32>(to)));
    }
  }
}

template <typename T>
void MultiplyNarrowRows(const Wave& wave, const Product& product, const Segment& segment,
                        const Columns& columns, float* tile, TaskScratch* scratch) {
  constexpr bool kInteger = std::is_same_v<T, int8_t> || std::is_same_v<T, Int4Pair>;
  const bool antiquant = kMultipliesBf16 && kInteger && product.channels->antiquant_scale != nullptr;
  constexpr bool kSplit = std::is_same_v<T, Half> && kSplitsFp16;
  const bool as_it_is =
      std::is_same_v<T, BFloat> || (std::is_same_v<T, Half> && !kSplit) || (kInteger && !antiquant);
  const LeftRows left(product, segment);
#if FFN_DOT_INTEGERS
  if constexpr (kInteger) {
    if (antiquant && left.left != Left::kBf16) {
      Clear(wave, columns, left.rows, tile);
      return (left.left == Left::kSplit
                  ? MultiplyIntegers<T, Half>
                  : MultiplyIntegers<T, BFloat>)(product, segment, columns, tile, scratch);
    }
  }
#endif
  const bool scales_sums = kSplitsFp16 && antiquant && left.left == Left::kSplit;
  const Weight& weight = *product.weight;
  const int64_t stride = TileStride(columns.columns);
  const int64_t step = BlockColumns(left.left);
  const int64_t group_rows = antiquant ? product.K / product.channels->G : product.K;
  // A packed weight that is multiplied as it is needs no scratch: the left operand's part of the cache says
  // how long its blocks are, and all of the task's columns stand side by side.
  const bool in_place = weight.packed && as_it_is;
  const int64_t fits = wave.cache_bytes / 4 / (left.rows * step * left.ItemBytes()) * step;
  const int64_t cached = kAsksForRows && fits < product.K ? fits / 2 : fits;
  // Panels and their rests share the first-level cache with the rows that meet them.
  const int64_t shallow = kSplit ? kKBlock / 2 : kKBlock;
  const int64_t depth = in_place && cached > kKBlock ? cached / kKBlock * kKBlock : shallow;
  const int64_t width = in_place ? columns.columns : kMinColumns;
  const Multiplication multiplication;
  bool reads_plain = false;
#if FFN_DOT
  reads_plain = ReadsPlain<T>(weight, left.left) && left.rows <= kDotRows;
#endif
  const uint32_t* const begins = BeginningsOf(left, segment, scratch);
  const bool begun = scales_sums || reads_plain || product.K == 0;
  if (begun) BeginSums(wave, left, columns, begins, tile);
  for (int64_t block = 0; block < product.K; block += depth) {
    const int64_t rows = product.K - block < depth ? product.K - block : depth;
    const uint32_t* const begins_now = begun || block > 0 ? nullptr : begins;
    if (scales_sums) SumPieces(left, block, block + rows, group_rows, kMaxRows, scratch);
    int64_t n = 0;
#if FFN_DOT
    if constexpr (kReadsPlain<T>) {
      if (reads_plain && rows % step == 0) {
        n = columns.columns / kPackedColumns * kPackedColumns;
        MultiplyPlain<T>(left, weight, {segment.expert, block, rows, columns.column, n}, tile, stride);
      }
    }
#endif
    for (; n < columns.columns; n += width) {
      const Columns strip = {columns.column + n, columns.columns - n < width ? columns.columns - n : width};
      if (!weight.packed && rows % step != 0) {
        __builtin_memset(scratch->packed, 0, sizeof(scratch->packed));  // up to a whole step
      }
      const Block part = {segment.expert, block, rows, strip.column, strip.columns};
      const char* const a = left.At(0, block);
      float* const to = tile + n;
      const Panels panels = PanelsOf<T>(weight, product.K, part, kKBlock, scratch);
      char* const high = reinterpret_cast<char*>(scratch->panel);
      char* const rest = high + kRestBytes;
      const Panels pairs = as_it_is ? panels : Panels{high, kKBlock / 2 * kPackedColumns * 4};
      // After these panels the ones beside them are read, and after the last of the task those below the
      // first, if there are any.
      const bool beside = in_place || n + width < columns.columns;
      Ahead ahead = {};
      if (beside || block + depth < product.K) {
        ahead = AheadOf<T>(weight, panels, part, beside ? 0 : depth,
                           in_place ? kPackedColumns
                           : beside ? width
                                    : -n);
      }
      if (in_place && block + depth < product.K) {
        ahead = ahead.Until((columns.columns - 1) / kPackedColumns * kPackedColumns, panels.At<T>(depth, 0));
      }
      // Steps of pairs that scratch holds.
      [[maybe_unused]] const auto multiply = [&](auto passes, const char* a, int64_t begin, int64_t end,
                                                 const Ahead& ahead, float* to, int64_t to_stride,
                                                 const uint32_t* begins) {
        MultiplyPlane<BFloat, passes>(a, left, {high + begin / step * kStepBytes, pairs.bytes},
                                      (end - begin + step - 1) / step, strip.columns, ahead, to, to_stride,
                                      begins);
      };
      if constexpr (kInteger) {
        if (!antiquant) {
          MultiplyPlane<T>(a, left, panels, (rows + step - 1) / step, strip.columns, ahead, to, stride,
                           begins_now);
          continue;
        }
        for (int64_t begin = 0, end = 0; begin < rows; begin = end) {
          LoadGroup(wave, product, segment.expert, block + begin, strip, scratch);
          end = PieceEnd(block + begin, block + rows, group_rows) - block;
          if (!scales_sums) {
            ExpandPairs<T, Expansion::kScaled>(panels, begin, end, strip.columns, pairs.bytes, *scratch, high,
                                               nullptr);
            continue;
          }
          if constexpr (kSplitsFp16) {
            float* const sums = scratch->group;
            ExpandPairs<T, Expansion::kExact>(panels, begin, end, strip.columns, pairs.bytes, *scratch, high,
                                              nullptr);
            multiply(std::integral_constant<int, 2>(), left.At(0, block + begin), begin, end,
                     ahead.Part<T>(begin, end), sums, TileStride(strip.columns), begins);
            AddScaled(scratch->sums + begin / 32 * kMaxRows, sums, left.rows, strip.columns, to, stride,
                      *scratch);
          }
        }
        if (!scales_sums)
          multiply(std::integral_constant<int, 1>(), a, 0, rows, ahead, to, stride, begins_now);
      } else if constexpr (kSplit) {
        ExpandPairs<T, Expansion::kSplit>(panels, 0, rows, strip.columns, pairs.bytes, *scratch, high, rest);
        multiply(std::integral_constant<int, 3>(), a, 0, rows, ahead, to, stride, begins_now);
      } else {
        MultiplyPlane<T>(a, left, panels, (rows + step - 1) / step, strip.columns, ahead, to, stride,
                         begins_now);
      }
    }
  }
}

// Weights of which NarrowLeftOf ever stores the left operand narrow.
template <typename T>
constexpr bool kIsNarrow = std::is_same_v<T, int8_t> ? true
                           : std::is_same_v<T, Half> ? kMultipliesFp16 || kSplitsFp16
                                                     : kMultipliesBf16 && !std::is_same_v<T, float>;

// As Multiply, for a segment whose left operands are stored narrow.
inline void MultiplyNarrow(const Wave& wave, const Product& product, const Segment& segment,
                           const Columns& columns, float* tile, TaskScratch* scratch) {
  WithWeightType(wave.problem->weight_dtype, [&](auto t) {
    using T = decltype(t);
    if constexpr (kIsNarrow<T>) {
      MultiplyNarrowRows<T>(wave, product, segment, columns, tile, scratch);
    }
    // An infinity has no rest, and none of what is scaled after the sum may overflow before.
    if (segment.left != Left::kSplit && segment.left != Left::kBf16Exact) return;
    if constexpr (std::is_same_v<T, Half>) {
      Repeat<T, Sums::kFloat>(wave, product, segment, columns, tile, scratch);
    } else if constexpr (std::is_same_v<T, int8_t> || std::is_same_v<T, Int4Pair>) {
      Repeat<T, Sums::kExact>(wave, product, segment, columns, tile, scratch);
    }
  });
}

}  // namespace
}  // namespace ffn::cpu
