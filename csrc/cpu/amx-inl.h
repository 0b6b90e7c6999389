// SPDX-License-Identifier: Apache-2.0
// The multiplication on tiles (tiles-inl.h): bf16 and int8 as they are; fp16 as the sum of two bf16, which is
// exact, in three passes that leave out the product of both rests; integer weights as bf16, which is exact
// too. Takes the place of gemm-inl.h's for segments whose left operands are stored for it. Used by ffn-inl.h.
//
// A row's bits are its own as there: each sum gets its products in the order of k, whatever the blocks are.
#pragma once

#include "cpu/gemm-inl.h"
#include "cpu/kernels.h"
#include "cpu/left-inl.h"
#include "cpu/packed-inl.h"
#include "cpu/tiles-inl.h"
#include "cpu/vec-inl.h"

namespace ffn::cpu {
namespace {

// Fewer rows of fp16 or of integer weights are faster without tiles: three passes over expanded panels
// against one that converts on the way. It is the one place where a row's bits depend on how many an expert
// has.
constexpr int64_t kFewestRows = 16;

// The steps of a tile along k: 32 bf16 or 64 int8.
constexpr int64_t kStepBytes = kTileHeight * kPackedColumns * 4;  // of a panel

bool GroupsFitTiles(const Problem& problem) {
  const auto fits = [](const Channels& channels, int64_t K) {
    return channels.antiquant_scale == nullptr || channels.G == 1 || K / channels.G % 32 == 0;
  };
  return fits(problem.channels1, problem.K1) && fits(problem.channels2, problem.K2);
}

Left AmxLeftOf(const Problem& problem, int64_t rows) {
  const bool few = rows < kFewestRows;
  switch (problem.x_dtype) {
    case DType::kInt8:
      return Left::kInt8;
    case DType::kBFloat16:
      if (problem.weight_dtype == DType::kBFloat16) return Left::kBf16;
      return few || !GroupsFitTiles(problem) ? Left::kFloat : Left::kBf16;
    case DType::kFloat16:
      return few || !GroupsFitTiles(problem) ? Left::kFloat : Left::kSplit;
    default:
      return Left::kFloat;
  }
}

// kRowTiles x kColumnTiles tiles of c (float32 or int32), at most 2 x 2, += `steps` steps of a and a panel.
template <bool kInt, int kRowTiles, int kColumnTiles>
void MultiplyBlock(const char* a, int64_t a_step, const char* panel, int64_t steps, char* c,
                   int64_t c_stride) {
  constexpr int64_t kColumnBytes = kTileHeight * 4, kPanelRow = kPackedColumns * 4;
  const auto each = [&](auto use) __attribute__((always_inline)) {
    use(std::integral_constant<int, 0>(), std::integral_constant<int, 0>());
    if constexpr (kColumnTiles > 1) use(std::integral_constant<int, 0>(), std::integral_constant<int, 1>());
    if constexpr (kRowTiles > 1) use(std::integral_constant<int, 1>(), std::integral_constant<int, 0>());
    if constexpr (kRowTiles > 1 && kColumnTiles > 1) {
      use(std::integral_constant<int, 1>(), std::integral_constant<int, 1>());
    }
  };
  each([&](auto i, auto j) {
    LoadTile<2 * i + j>(c + i * kTileHeight * c_stride + j * kColumnBytes, c_stride);
  });
  for (int64_t s = 0; s < steps; ++s, a += a_step, panel += kStepBytes) {
    for (int64_t line = 0; line < kStepBytes; line += 64) __builtin_prefetch(panel + kPrefetchBytes + line);
    LoadTile<4>(a, kTileRowBytes);
    if constexpr (kRowTiles > 1) LoadTile<5>(a + kTileHeight * kTileRowBytes, kTileRowBytes);
    LoadTile<6>(panel, kPanelRow);
    if constexpr (kColumnTiles > 1) LoadTile<7>(panel + kColumnBytes, kPanelRow);
    each([&](auto i, auto j) { MultiplyTiles<kInt, i, j>(); });
  }
  each([&](auto i, auto j) {
    StoreTile<2 * i + j>(c + i * kTileHeight * c_stride + j * kColumnBytes, c_stride);
  });
}

// Rows of panels of T as pairs of bf16, [steps][16][32][2], zeros up to whole steps; kSplit: what the bf16
// leave goes to `rest` in the same order.
template <typename T, bool kSplit>
void ExpandPairs(const Panels& from, int64_t rows, int64_t columns, int64_t panel_bytes, char* to,
                 char* rest) {
  using Layout = Panel<T>;
  constexpr int64_t kRows = Layout::kGroup < 2 ? 2 : Layout::kGroup;
  const int64_t filled = (rows + 31) / 32 * 32;
  for (int64_t n = 0; n < columns; n += kLanes) {
    const int64_t at = n / kPackedColumns * panel_bytes + n % kPackedColumns * 4;
    for (int64_t k = 0; k < filled; k += kRows) {
      F32 w[kRows];
      Unrolled<kRows / Layout::kGroup>([&](auto g) {
        const int64_t row = k + g * Layout::kGroup;
        if (row < rows) {
          const auto vector = Load<typename Layout::Vector>(from.At<T>(row, n));
          Unrolled<Layout::kGroup>(
              [&](auto i) { w[g * Layout::kGroup + i] = Layout::template Element<i>(vector); });
        } else {
          for (int i = 0; i < Layout::kGroup; ++i) w[g * Layout::kGroup + i] = F32{};
        }
      });
      for (int64_t i = 0; i < kRows; i += 2) {
        const F32 low = Round(Rounding::kBf16, w[i]), high = Round(Rounding::kBf16, w[i + 1]);
        const int64_t offset = at + (k + i) / 2 * kPackedColumns * 4;
        Store(to + offset, Bits(low) >> 16 | Bits(high));
        if constexpr (kSplit) {
          const F32 low_rest = w[i] - low,
                    high_rest = w[i + 1] - high;  // NaN of infinities; Repeat sees to them
          Store(rest + offset, Bits(low_rest) >> 16 | (Bits(high_rest) & 0xffff0000));
        }
      }
    }
  }
}

// c[rows][c_stride / 4 columns] += rows of a times panels, plane by plane.
template <bool kInt>
void MultiplyPlanes(const char* a, const LeftRows& left, const char* panels, int64_t panel_bytes,
                    int64_t steps, int64_t columns, float* c, int64_t stride) {
  const int64_t a_step = left.rows * kTileRowBytes;
  for (int64_t n = 0; n < columns; n += kPackedColumns) {
    const char* const panel = panels + n / kPackedColumns * panel_bytes;
    int64_t r = 0;
    for (; left.rows - r > kTileHeight; r += 2 * kTileHeight) {
      MultiplyBlock<kInt, 2, 2>(a + r * kTileRowBytes, a_step, panel, steps,
                                reinterpret_cast<char*>(c + r * stride + n), stride * 4);
    }
    if (r < left.rows) {
      MultiplyBlock<kInt, 1, 2>(a + r * kTileRowBytes, a_step, panel, steps,
                                reinterpret_cast<char*>(c + r * stride + n), stride * 4);
    }
  }
}

// The sum of a row over steps of k, for offsets.
inline float SumOfSteps(const LeftRows& left, int64_t row, int64_t begin, int64_t end, TaskScratch* scratch) {
  for (int64_t k = begin; k < end; k += kLanes) Store(scratch->row + k - begin, left.Get(row, k));
  return SumOf(scratch->row, end - begin);
}

template <typename T>
void MultiplyOnTiles(const Wave& wave, const Product& product, const Segment& segment, const Columns& columns,
                     float* tile, TaskScratch* scratch) {
  constexpr bool kQuant = std::is_same_v<T, int8_t>;  // or antiquant
  const bool antiquant = product.channels->antiquant_scale != nullptr;
  const bool as_it_is = std::is_same_v<T, BFloat> || (kQuant && !antiquant);
  const LeftRows left(product, segment);
  const Weight& weight = *product.weight;
  const int64_t stride = TileStride(columns.columns);
  const int64_t step = BlockColumns(left.left);
  const TileSession session;
  for (int64_t block = 0; block < product.K; block += kKBlock) {
    const int64_t rows = product.K - block < kKBlock ? product.K - block : kKBlock;
    for (int64_t n = 0; n < columns.columns; n += kMinColumns) {
      const Columns strip = {columns.column + n,
                             columns.columns - n < kMinColumns ? columns.columns - n : kMinColumns};
      if (!weight.packed && rows % step != 0) {
        __builtin_memset(scratch->packed, 0, sizeof(scratch->packed));  // up to a whole step
      }
      const Panels panels =
          PanelsOf<T>(weight, wave.problem->weight_dtype, product.K,
                      {segment.expert, block, rows, strip.column, strip.columns}, kKBlock, scratch);
      char* const high = reinterpret_cast<char*>(scratch->panel);
      char* const rest = high + sizeof(scratch->panel) / 2;
      Panels pairs = panels;
      if (!as_it_is) {
        pairs = {high, kKBlock / 2 * kPackedColumns * 4};
        ExpandPairs<T, std::is_same_v<T, Half>>(panels, rows, strip.columns, pairs.bytes, high, rest);
      }
      for (int64_t begin = 0, end = 0; begin < rows; begin = end) {
        const int64_t group_end = LoadGroup(wave, product, segment.expert, block + begin, strip, scratch);
        end = group_end - block < rows ? group_end - block : rows;
        const int64_t steps = (end - begin + step - 1) / step;
        const int64_t skipped = begin / step * kStepBytes;
        const char* const a = left.At(0, block + begin);
        float* const sums = antiquant ? scratch->group : tile + n;
        const int64_t sums_stride = antiquant ? kMinColumns : stride;
        if (antiquant) Clear(wave, strip, (left.rows + 15) / 16 * 16, sums);
        const auto multiply = [&](auto is_int, const char* from, const char* panel) {
          MultiplyPlanes<decltype(is_int)::value>(from, left, panel + skipped, pairs.bytes, steps,
                                                  strip.columns, sums, sums_stride);
        };
        if (as_it_is && kQuant) {
          multiply(std::true_type(), a, pairs.data);
        } else {
          multiply(std::false_type(), a, pairs.data);
          if (left.left == Left::kSplit) multiply(std::false_type(), a + left.PlaneBytes(), pairs.data);
          if (std::is_same_v<T, Half>) multiply(std::false_type(), a, rest);
        }
        if (!antiquant) continue;
        for (int64_t r = 0; r < left.rows; ++r) {
          const F32 sum_a = Set(SumOfSteps(left, r, block + begin, block + end, scratch));
          for (int64_t j = 0; j < strip.columns; j += kLanes) {
            const F32 both =
                Fma(sum_a, Load<F32>(scratch->antiquant_offset + j), Load<F32>(sums + r * sums_stride + j));
            float* const to = tile + r * stride + n + j;
            Store(to, Fma(both, Load<F32>(scratch->antiquant_scale + j), Load<F32>(to)));
          }
        }
      }
    }
  }
}

// As Multiply, for a segment whose left operands are stored for tiles.
inline void AmxMultiply(const Wave& wave, const Product& product, const Segment& segment,
                        const Columns& columns, float* tile, TaskScratch* scratch) {
  Clear(wave, columns, (segment.rows + 15) / 16 * 16, tile);
  WithWeightType(wave.problem->weight_dtype, [&](auto t) {
    using T = decltype(t);
    if constexpr (!std::is_same_v<T, float>)
      MultiplyOnTiles<T>(wave, product, segment, columns, tile, scratch);
    // An infinity has no rest, and none of what is scaled after the sum may overflow before.
    if constexpr (std::is_same_v<T, Half>) {
      Repeat<T, Sums::kFloat>(wave, product, segment, columns, tile, scratch);
    } else if constexpr (std::is_same_v<T, int8_t> || std::is_same_v<T, Int4Pair>) {
      if (product.channels->antiquant_scale != nullptr) {
        Repeat<T, Sums::kExact>(wave, product, segment, columns, tile, scratch);
      }
    }
  });
}

}  // namespace
}  // namespace ffn::cpu
