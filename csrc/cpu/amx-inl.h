// SPDX-License-Identifier: Apache-2.0
// What narrow-inl.h multiplies with on Intel's tiles (tiles-inl.h): blocks of up to 2 x 2 tiles of sums.
#pragma once

#include "cpu/gemm-inl.h"
#include "cpu/kernels.h"
#include "cpu/left-inl.h"
#include "cpu/packed-inl.h"
#include "cpu/tiles-inl.h"
#include "cpu/vec-inl.h"

namespace ffn::cpu {
namespace {

// The steps of a tile along k: 32 bf16 or 64 int8.
constexpr int64_t kStepBytes = kTileHeight * kPackedColumns * 4;  // of a panel

// How often a step asks for what comes next: four blocks of rows then ask for as much as a panel has.
constexpr int64_t kAsksEach = 4;

// What the instructions need while they are in use.
using Multiplication = TileSession;

// kRowTiles x kColumnTiles tiles of c (float32 or int32), at most 2 x 2, += `steps` steps of a and a panel.
template <bool kInt, int kRowTiles, int kColumnTiles>
void MultiplyBlock(const char* a, int64_t a_step, const char* panel, int64_t steps, Asking ahead, char* c,
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
    for (int64_t line = 0; line < kStepBytes; line += 64) AskFor(panel + line);
    for (int64_t times = 0; times < kAsksEach; ++times) ahead.Next();
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

// c[left.rows][stride] += `steps` steps of a plane of the left operand times panels of T. Up to 15 rows
// beyond the last are written too.
template <typename T>
void MultiplyPlane(const char* a, const LeftRows& left, const Panels& panels, int64_t steps, int64_t columns,
                   const Ahead& ahead, float* c, int64_t stride) {
  constexpr bool kInt = std::is_same_v<T, int8_t>;
  const int64_t a_step = left.rows * kTileRowBytes;
  // Each block of rows asks for as much as it can.
  const Ahead asked =
      (left.rows > 2 * kTileHeight ? ahead : Ahead{}).Shared(1, steps * kAsksEach * Asking::kLinesEach);
  for (int64_t n = 0; n < columns; n += kPackedColumns) {
    const char* const panel = panels.data + n / kPackedColumns * panels.bytes;
    for (int64_t r = 0; r < left.rows; r += 2 * kTileHeight) {
      (left.rows - r > kTileHeight ? MultiplyBlock<kInt, 2, 2>
                                   : MultiplyBlock<kInt, 1, 2>)(a + r * kTileRowBytes, a_step, panel, steps,
                                                                asked.From(n, r / (2 * kTileHeight), panel),
                                                                reinterpret_cast<char*>(c + r * stride + n),
                                                                stride * 4);
    }
  }
}

// The tile that the products are added to.
inline void BeginSums(const Wave& wave, const LeftRows& left, const Columns& columns, float* tile) {
  Clear(wave, columns, (left.rows + kTileHeight - 1) / kTileHeight * kTileHeight, tile);
}

}  // namespace
}  // namespace ffn::cpu
