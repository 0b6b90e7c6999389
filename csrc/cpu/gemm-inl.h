// SPDX-License-Identifier: Apache-2.0
// The multiplication: a tile of sums, float32 or int32, from rows of a and panels of W. One float32 loop
// serves every mode. Used by ffn-inl.h; built on unpack-inl.h.
//
// What makes a row's bits independent of everything else: each sum is one chain of fused multiply-adds over
// ascending k, begun at the tile and put back into it, whatever the tile's rows, the block of k, or the
// columns of the task are.
#pragma once

#include "cpu/kernels.h"
#include "cpu/unpack-inl.h"
#include "cpu/vec-inl.h"

namespace ffn::cpu {
namespace {

// kRows x kPanelColumns sums += kRows rows of a (kKBlock apart) times one panel. int8 products are exact in
// float32 for `depth` <= kKBlock (see kernels.h); with kInt they are added to an int32 tile, wrapping around.
template <int kRows, bool kInt>
void MultiplyTile(const float* a, const float* panel, int64_t depth, float* tile, int64_t tile_stride) {
  F32 sum[kRows][kPanelVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kPanelVectors; ++v) {
      sum[r][v] = kInt ? F32{} : Load<F32>(tile + r * tile_stride + v * kLanes);
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    F32 w[kPanelVectors];
    for (int v = 0; v < kPanelVectors; ++v) w[v] = Load<F32>(panel + k * kPanelColumns + v * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const F32 x = Set(a[r * kKBlock + k]);
      for (int v = 0; v < kPanelVectors; ++v) sum[r][v] = Fma(x, w[v], sum[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kPanelVectors; ++v) {
      float* to = tile + r * tile_stride + v * kLanes;
      if constexpr (kInt) {
        Store(to, Load<U32>(to) + (U32) __builtin_convertvector(sum[r][v], I32));
      } else {
        Store(to, sum[r][v]);
      }
    }
  }
}

using MultiplyTileFunction = void (*)(const float*, const float*, int64_t, float*, int64_t);
// By the rows of the tile, and whether its sums are int32.
constexpr MultiplyTileFunction kMultiplyTile[2][kTileRows] = {
    {MultiplyTile<1, false>, MultiplyTile<2, false>, MultiplyTile<3, false>, MultiplyTile<4, false>,
     MultiplyTile<5, false>, MultiplyTile<6, false>},
    {MultiplyTile<1, true>, MultiplyTile<2, true>, MultiplyTile<3, true>, MultiplyTile<4, true>,
     MultiplyTile<5, true>, MultiplyTile<6, true>}};

// Between the rows of a task's tile. A power of two times kMinColumns.
inline int64_t TileStride(int64_t columns) {
  int64_t stride = kMinColumns;
  while (stride < columns) stride *= 2;
  return stride;
}

// tile[segment.rows][TileStride(columns)] = the segment's rows of product.a times columns [column, column +
// columns) of W.
inline void Multiply(const Wave& wave, const Product& product, const Segment& segment, int64_t column,
                     int64_t columns, float* tile, TaskScratch* scratch) {
  const int64_t tile_stride = TileStride(columns);
  const bool quant = wave.steps.quant;
  // -0 is what adding leaves everything as it is: with K == 0 a bias of -0 stays -0. As int32 it must be 0.
  const F32 zero = quant ? F32{} : Set(-0.0f);
  for (int64_t i = 0; i < segment.rows * tile_stride; i += kLanes) Store(tile + i, zero);

  const int64_t depth = kPanelSize / tile_stride;  // divides kKBlock
  for (int64_t k = 0; k < product.K; k += depth) {
    const int64_t rows = product.K - k < depth ? product.K - k : depth;
    UnpackBlock(*wave.problem, product, {segment.expert, k, rows, column, columns}, scratch);
    const float* a = product.a + (k / kKBlock * wave.rows + segment.row) * kKBlock + k % kKBlock;
    for (int64_t n = 0; n < columns; n += kPanelColumns) {
      for (int64_t r = 0; r < segment.rows; r += kTileRows) {
        const int64_t count = segment.rows - r < kTileRows ? segment.rows - r : kTileRows;
        kMultiplyTile[quant][count - 1](a + r * kKBlock, scratch->panel + n * rows, rows,
                                        tile + r * tile_stride + n, tile_stride);
      }
    }
  }
}

}  // namespace
}  // namespace ffn::cpu
