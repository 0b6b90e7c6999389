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

constexpr bool kAsksForRows = true;  // of the left operand's next block, for which it needs room as well

// What the instructions need while they are in use.
using Multiplication = TileSession;

// What `blocks` blocks of rows ask for in `steps` steps each, by equal shares: each line that is on its way
// takes one of the places that tiles from the second-level cache need, too.
struct Asks {
  Ahead ahead;
  int64_t each;  // lines a step

  Asks(const Ahead& all, int64_t blocks, int64_t steps)
      : ahead(all.Shared(blocks, all.lines)), each((ahead.share + steps - 1) / steps) {}
};

// kRowTiles x 2 tiles of c (float32 or int32) = `from` + `steps` steps of a and a panel. kNear: the panel is
// in a cache already. kPasses: 1, or 2 with the left operand's rest as well, which is `plane` bytes behind
// it, or 3 with the panel's rest, too, times the left operand without its own. Step by step, so that sums
// wait in registers for all of them.
template <bool kInt, int kPasses, int kRowTiles, bool kNear>
inline __attribute__((always_inline)) void MultiplyBlock(const char* a, int64_t a_step, int64_t plane,
                                                         const char* panel, int64_t steps, Asking panels,
                                                         int64_t panel_lines, Asking rows, int64_t row_lines,
                                                         const char* from, int64_t from_stride, char* c,
                                                         int64_t c_stride) {
  constexpr int64_t kColumnBytes = kTileHeight * 4, kPanelRow = kPackedColumns * 4;
  const auto each = [&](auto use) __attribute__((always_inline)) {
    Unrolled<kRowTiles>([&](auto i) __attribute__((always_inline)) {
      Unrolled<2>([&](auto j) __attribute__((always_inline)) { use(i, j); });
    });
  };
  each([&](auto i, auto j) {
    LoadTile<2 * i + j>(from + i * kTileHeight * from_stride + j * kColumnBytes, from_stride);
  });
  [[maybe_unused]] Asking rest_rows = {rows.at + plane, rows.line, rows.last + plane};
  for (int64_t s = 0; s < steps; ++s, a += a_step, panel += kStepBytes) {
    if constexpr (!kNear) {
      for (int64_t line = 0; line < kStepBytes; line += 64) AskFor(panel + line);
    }
    panels.Next(panel_lines);
    rows.Next(row_lines);
    if constexpr (kPasses > 1) rest_rows.Next(row_lines);
    const auto load_rows = [&](const char* from) __attribute__((always_inline)) {
      LoadTile<4>(from, kTileRowBytes);
      if constexpr (kRowTiles > 1) LoadTile<5>(from + kTileHeight * kTileRowBytes, kTileRowBytes);
    };
    const auto load_panel = [&](const char* from) __attribute__((always_inline)) {
      LoadTile<6>(from, kPanelRow);
      LoadTile<7>(from + kColumnBytes, kPanelRow);
    };
    const auto multiply = [&](auto i, auto j) { MultiplyTiles<kInt, i, j>(); };
    load_panel(panel);
    if constexpr (kPasses > 1) {
      load_rows(a + plane);
      each(multiply);
    }
    load_rows(a);
    each(multiply);
    if constexpr (kPasses > 2) {
      load_panel(panel + kRestBytes);
      each(multiply);
    }
  }
  each([&](auto i, auto j) {
    StoreTile<2 * i + j>(c + i * kTileHeight * c_stride + j * kColumnBytes, c_stride);
  });
}

// c[left.rows][stride] += `steps` steps of the left operand times panels of T, in kPasses (MultiplyBlock).
// c need not be cleared where `begins` is not null: its sums begin with nothing. Up to 15 rows beyond the
// last are written too.
template <typename T, int kPasses = 1>
void MultiplyPlane(const char* a, const LeftRows& left, const Panels& panels, int64_t steps, int64_t columns,
                   const Ahead& ahead, float* c, int64_t stride, const uint32_t* begins) {
  constexpr bool kInt = std::is_same_v<T, int8_t>;
  const int64_t a_step = left.rows * kTileRowBytes, plane = kPasses > 1 ? left.PlaneBytes() : 0;
  const int64_t blocks = (left.rows + 2 * kTileHeight - 1) / (2 * kTileHeight);
  const Asks panels_asked(blocks > 1 ? ahead : Ahead{}, blocks, steps);
  const Asks rows_asked(RowsAfter(a, left, steps, columns), blocks, steps);
  for (int64_t n = 0; n < columns; n += kPackedColumns) {
    const char* const panel = panels.data + n / kPackedColumns * panels.bytes;
    for (int64_t r = 0; r < left.rows; r += 2 * kTileHeight) {
      const int64_t block = r / (2 * kTileHeight);
      char* const to = reinterpret_cast<char*>(c + r * stride + n);
      const auto multiply = [&](auto tiles, auto near) __attribute__((always_inline)) {
        MultiplyBlock<kInt, kPasses, tiles, near>(
            a + r * kTileRowBytes, a_step, plane, panel, steps, panels_asked.ahead.From(n, block, panel),
            panels_asked.each, rows_asked.ahead.From(n, block, a), rows_asked.each,
            begins ? reinterpret_cast<const char*>(begins) : to, begins ? 0 : stride * 4, to, stride * 4);
      };
      const bool both = left.rows - r > kTileHeight;
      if (blocks > 1) {
        both ? multiply(std::integral_constant<int, 2>(), std::true_type())
             : multiply(std::integral_constant<int, 1>(), std::true_type());
      } else {
        both ? multiply(std::integral_constant<int, 2>(), std::false_type())
             : multiply(std::integral_constant<int, 1>(), std::false_type());
      }
    }
  }
}

// A row of sums of nothing, which whatever is added leaves as it is (Clear in gemm-inl.h).
template <bool kInt>
struct alignas(64) NoSums {
  uint32_t bits[kPackedColumns];
  constexpr NoSums() : bits() {
    for (uint32_t& sum : bits) sum = kInt ? 0 : 0x80000000;
  }
};

// What the sums of every row begin with.
inline const uint32_t* BeginningsOf(const LeftRows& left, const Segment&, TaskScratch*) {
  static constexpr NoSums<true> kInts;
  static constexpr NoSums<false> kFloats;
  return left.left == Left::kInt8 ? kInts.bits : kFloats.bits;
}

// Where MultiplyPlane does not begin the sums.
inline void BeginSums(const Wave& wave, const LeftRows& left, const Columns& columns, const uint32_t*,
                      float* tile) {
  Clear(wave, columns, (left.rows + kTileHeight - 1) / kTileHeight * kTileHeight, tile);
}

}  // namespace
}  // namespace ffn::cpu
