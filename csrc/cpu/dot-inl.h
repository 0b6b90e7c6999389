// SPDX-License-Identifier: Apache-2.0
// The multiplication of int8 by int8 with dot products (vec-inl.h): panels are read as they are stored, for
// few rows and for many, and the sums are int32 from the first to the last. Takes the place of gemm-inl.h's
// for segments whose left operands are stored as int8. Used by ffn-inl.h.
#pragma once

#include "cpu/gemm-inl.h"
#include "cpu/kernels.h"
#include "cpu/left-inl.h"
#include "cpu/packed-inl.h"
#include "cpu/vec-inl.h"

namespace ffn::cpu {
namespace {

inline Left DotLeftOf(const Problem& problem, int64_t) {
  return problem.x_dtype == DType::kInt8 ? Left::kInt8 : Left::kFloat;
}

// Rows of a tile. Where a register holds a row's quads, it has to be free beside the sums.
constexpr int kDotRows = std::is_pointer_v<Quads> ? kManyRows : 4;

constexpr int64_t kDotBlock = BlockColumns(Left::kInt8);

// Rows of W, and of a strip of a task's columns.
struct DotRange {
  const char* a;   // row 0 of the segment, at the first of the rows of W, with which a block begins
  int64_t a_step;  // from one block to the next
  int64_t rows;    // those beyond K meet zeros of the left operand
  Panels panels;   // at the first row
  float* tile;
  int64_t tile_stride;
};

template <int kRows, int kVectors>
void DotTile(const DotRange& range, int64_t row, int64_t column) {
  float* const tile = range.tile + row * range.tile_stride + column;
  const char* panels[kVectors];
  I32 sum[kRows][kVectors];
  for (int v = 0; v < kVectors; ++v) {
    panels[v] = range.panels.At<int8_t>(0, column + v * kLanes);
    for (int r = 0; r < kRows; ++r) sum[r][v] = Load<I32>(tile + r * range.tile_stride + v * kLanes);
  }
  for (int64_t k = 0; k < range.rows; k += 4 * kQuads) {
    const char* const a = range.a + k / kDotBlock * range.a_step + row * kDotBlock + k % kDotBlock;
    Quads x[kRows];
    for (int r = 0; r < kRows; ++r) x[r] = LoadQuads(a + r * kDotBlock);
    Unrolled<kQuads>([&](auto quad) __attribute__((always_inline)) {
      U32 w[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        w[v] = Weights(Load<U32>(panels[v]));
        if (v * kLanes * 4 % 64 == 0) __builtin_prefetch(panels[v] + kPrefetchBytes);
        panels[v] += kGroupBytes<int8_t>;
      }
      for (int r = 0; r < kRows; ++r) {
        for (int v = 0; v < kVectors; ++v) sum[r][v] = MultiplyQuads<quad>(sum[r][v], w[v], x[r]);
      }
    });
  }
  for (int v = 0; v < kVectors; ++v) {
    for (int r = 0; r < kRows; ++r) Store(tile + r * range.tile_stride + v * kLanes, sum[r][v]);
  }
}

// What kQuadOffset adds to the sums of a row, whose blocks begin at `a`.
inline uint32_t OffsetOf(const char* a, int64_t a_step, int64_t K) {
  if constexpr (kQuadOffset == 0) return 0;
  I32 sums = {};
  for (int64_t k = 0; k < K; k += kDotBlock, a += a_step) {
    for (int64_t i = 0; i < kDotBlock; i += sizeof(I32)) {
      sums = DotProduct(sums, SetBits(0x01010101), Load<I32>(a + i));
    }
  }
  uint32_t sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += static_cast<uint32_t>(sums[lane]);
  return sum * kQuadOffset;
}

// As Multiply, for a segment whose left operands are stored as int8.
inline void DotMultiply(const Wave&, const Product& product, const Segment& segment, const Columns& columns,
                        float* tile, TaskScratch* scratch) {
  const LeftRows left(product, segment);
  const int64_t stride = TileStride(columns.columns), a_step = left.rows * kDotBlock;
  for (int64_t r = 0; r < left.rows; ++r) {
    const U32 begin = SetBits(0 - OffsetOf(left.At(r, 0), a_step, left.K));
    for (int64_t n = 0; n < stride; n += kLanes) Store(tile + r * stride + n, begin);
  }
  // Many rows take strips of columns, whose panels stay near while the rows go by.
  const int64_t width = left.rows > kDotRows && columns.columns > kMinColumns ? kMinColumns : columns.columns;
  const int64_t most = static_cast<int64_t>(sizeof(scratch->packed)) / TileStride(width);
  const int64_t depth = most < kKBlock ? most : kKBlock;
  for (int64_t block = 0; block < product.K; block += depth) {
    const int64_t rows = product.K - block < depth ? product.K - block : depth;
    for (int64_t n = 0; n < columns.columns; n += width) {
      const int64_t strip = columns.columns - n < width ? columns.columns - n : width;
      const Panels panels =
          PanelsOf<int8_t>(*product.weight, DType::kInt8, product.K,
                           {segment.expert, block, rows, columns.column + n, strip}, depth, scratch);
      const DotRange range = {left.At(0, block), a_step, rows, panels, tile + n, stride};
      ForEachTile<kDotRows>(left.rows, strip, [&](auto tile_rows, auto vectors, int64_t row, int64_t column) {
        DotTile<tile_rows, vectors>(range, row, column);
      });
    }
  }
}

}  // namespace
}  // namespace ffn::cpu
