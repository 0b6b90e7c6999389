// SPDX-License-Identifier: Apache-2.0
// What narrow-inl.h multiplies with where there are no tiles: dot products (vec-inl.h) of int8 and, on some
// CPUs, of bf16, over panels as they are stored. The sums are in registers, int32 or float32.
#pragma once

#include "cpu/gemm-inl.h"
#include "cpu/kernels.h"
#include "cpu/left-inl.h"
#include "cpu/packed-inl.h"
#include "cpu/vec-inl.h"

namespace ffn::cpu {
namespace {

#if defined(FFN_DOT_BF16)
constexpr bool kMultipliesBf16 = true;
#else
constexpr bool kMultipliesBf16 = false;
#endif
constexpr bool kSplitsFp16 = false;  // three passes are not faster than one of float32

// Rows of a tile. Where a register holds a row's words, it has to be free beside the sums.
constexpr int kDotRows = std::is_pointer_v<Words> ? kManyRows : 4;

// A step along k is 64 bytes of a row, and so many of a panel.
constexpr int64_t kStepWords = 16;
constexpr int64_t kStepBytes = kStepWords * kPackedColumns * 4;

// What the instructions need while they are in use: nothing.
struct Multiplication {
  ~Multiplication() {}
};

// Rows and columns of a left operand and of panels, from the first of their steps.
struct DotRange {
  const char* a;   // row 0
  int64_t a_step;  // from one step to the next
  int64_t steps;   // what is beyond K in the last one meets zeros of the left operand
  Panels panels;
  float* tile;
  int64_t tile_stride;
  Ahead ahead;
};

// Loops over rows and vectors are unrolled by hand: GCC else leaves the sums in memory.
template <typename Sum, int kRows, int kVectors>
void DotTile(const DotRange& range, int64_t row, int64_t column) {
  float* const tile = range.tile + row * range.tile_stride + column;
  const char* panels[kVectors];
  Sum sum[kRows][kVectors];
  const auto each_sum = [&](auto use) __attribute__((always_inline)) {
    Unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
      Unrolled<kVectors>([&](auto v) __attribute__((always_inline)) {
        use(sum[r][v], tile + r * range.tile_stride + v * kLanes);
      });
    });
  };
  Unrolled<kVectors>([&](auto v) { panels[v] = range.panels.At<int8_t>(0, column + v * kLanes); });
  each_sum([](Sum& one, const float* at) __attribute__((always_inline)) { one = Load<Sum>(at); });
  const char* a = range.a + row * kTileRowBytes;
  const char* ahead = range.ahead.From(column, row / kRows, range.steps * (kStepWords / kWords), panels[0]);
  for (int64_t s = 0; s < range.steps; ++s, a += range.a_step) {
    for (int64_t word = 0; word < kStepWords; word += kWords) {
      ahead = Ahead::Ask(ahead);
      Words x[kRows];
      Unrolled<kRows>([&](auto r) { x[r] = LoadWords(a + r * kTileRowBytes + word * 4); });
      Unrolled<kWords>([&](auto i) __attribute__((always_inline)) {
        U32 w[kVectors];
        Unrolled<kVectors>([&](auto v) __attribute__((always_inline)) {
          w[v] = Weights<Sum>(Load<U32>(panels[v]));
          if constexpr (v * kLanes * 4 % 64 == 0) __builtin_prefetch(panels[v] + kPrefetchBytes);
          panels[v] += kPackedColumns * 4;
        });
        Unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
          Unrolled<kVectors>([&](auto v) __attribute__((always_inline)) {
            sum[r][v] = MultiplyWord<i>(sum[r][v], w[v], x[r]);
          });
        });
      });
    }
  }
  each_sum([](const Sum& one, float* at) __attribute__((always_inline)) { Store(at, one); });
}

// c[left.rows][stride] += `steps` steps of a plane of the left operand times panels.
template <bool kInt>
void MultiplyPlane(const char* a, const LeftRows& left, const Panels& panels, int64_t steps, int64_t columns,
                   const Ahead& ahead, float* c, int64_t stride) {
  const DotRange range = {a, left.rows * kTileRowBytes, steps, panels, c, stride, ahead};
  ForEachTile<kDotRows>(left.rows, columns, [&](auto rows, auto vectors, int64_t row, int64_t column) {
    if constexpr (kInt) {
      DotTile<I32, rows, vectors>(range, row, column);
    } else if constexpr (kMultipliesBf16) {
      DotTile<F32, rows, vectors>(range, row, column);
    }
  });
}

// What kWordOffset adds to the sums of a row, whose steps begin at `a`.
inline uint32_t OffsetOf(const char* a, int64_t a_step, int64_t steps) {
  if constexpr (kWordOffset == 0) return 0;
  I32 sums = {};
  for (int64_t s = 0; s < steps; ++s, a += a_step) {
    for (int64_t i = 0; i < kTileRowBytes; i += sizeof(I32)) {
      sums = DotProduct(sums, SetBits(0x01010101), Load<I32>(a + i));
    }
  }
  uint32_t sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += static_cast<uint32_t>(sums[lane]);
  return sum * kWordOffset;
}

// The tile that the products are added to.
inline void BeginSums(const Wave& wave, const LeftRows& left, const Columns& columns, float* tile) {
  if (left.left != Left::kInt8) return Clear(wave, columns, left.rows, tile);
  const int64_t stride = TileStride(columns.columns);
  for (int64_t r = 0; r < left.rows; ++r) {
    const U32 begin = SetBits(0 - OffsetOf(left.At(r, 0), left.rows * kTileRowBytes, left.Blocks()));
    for (int64_t n = 0; n < stride; n += kLanes) Store(tile + r * stride + n, begin);
  }
}

}  // namespace
}  // namespace ffn::cpu
