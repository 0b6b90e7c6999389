// SPDX-License-Identifier: Apache-2.0
// What the multiplications ask memory for while they multiply something else: the panels, packed or plain,
// and the rows of the left operand that are read next. Used by gemm-inl.h, narrow-inl.h, dot-inl.h and
// amx-inl.h; built on packed-inl.h and left-inl.h.
#pragma once

#include "cpu/kernels.h"
#include "cpu/left-inl.h"
#include "cpu/packed-inl.h"

namespace ffn::cpu {
namespace {

// What a tile asks for, little by little, into the second-level cache: lines from `at` to the last one, which
// it goes on asking for when it has come there.
struct Asking {
  static constexpr int64_t kLinesEach = 2;
  const char* at;
  int64_t line;  // from one line to the next, in bytes
  const char* last;

  void Next() {
    for (int64_t i = 0; i < kLinesEach; ++i, at += line) __builtin_prefetch(at, 0, 2);
    at = at < last ? at : last;
  }
  // So many lines of them.
  void Next(int64_t lines) {
    for (int64_t i = 0; i < lines; ++i, at = at < last ? at + line : last) __builtin_prefetch(at, 0, 2);
  }
};

// What will be read after the panels that are being multiplied: for each of them so many lines, `stride`
// bytes from those of the next one. A plain weight has a line in each of its rows.
struct Ahead {
  const char* data;
  int64_t stride, lines, line;
  int64_t group_lines;  // of a group of rows
  int64_t share = 0;    // of a tile, in lines
  // What follows the panel of `last_column` is elsewhere, so many bytes from `data`.
  int64_t last_column = -1, after_last = 0;

  // What belongs to rows [begin, end) of panels of T.
  template <typename T>
  Ahead Part(int64_t begin, int64_t end) const {
    const int64_t first = begin / Panel<T>::kGroup * group_lines;
    Ahead part = *this;
    part.data += first * line;
    part.lines = end / Panel<T>::kGroup * group_lines - first;
    return part;
  }

  // With equal shares for `tiles` tiles of a panel, each of which can ask for `most` lines. As many as they
  // can at once would come in bursts that memory is too slow for, and other loads would wait for them.
  Ahead Shared(int64_t tiles, int64_t most) const {
    const int64_t equal = (lines + tiles - 1) / tiles;
    Ahead shared = *this;
    shared.share = equal < most ? equal : most;
    return shared;
  }

  // From the panel of `column`, a whole number of panels further.
  Ahead Beside(int64_t column) const {
    Ahead beside = *this;
    beside.data += column / kPackedColumns * stride;
    return beside;
  }

  // With the panel of `column` for the last, and `after` read then.
  Ahead Until(int64_t column, const char* after) const {
    Ahead until = *this;
    until.last_column = column;
    until.after_last = after - data;
    return until;
  }

  // The share of tile `tile` of the panel of `column`. A tile that has nothing to ask for asks for the panel
  // that it reads itself, from `own`: so the other half comes along.
  Asking From(int64_t column, int64_t tile, const char* own) const {
    const int64_t begin = tile * share, end = begin + share < lines ? begin + share : lines;
    if (begin >= end) return {own, 64, own + kKBlock * kPackedColumns * 4};
    const char* const first = data + (column == last_column ? after_last : column / kPackedColumns * stride);
    return {first + begin * line, line, first + (end - 1) * line};
  }
};

// The part of a weight that is `below` rows below and `beside` columns beside `block`, whose panels these
// are.
template <typename T>
Ahead AheadOf(const Weight& weight, const Panels& panels, const Block& block, int64_t below, int64_t beside) {
  constexpr int64_t kGroup = Panel<T>::kGroup;
  if (weight.packed) {
    constexpr int64_t kLines = kGroupBytes<T> / 64;
    return {panels.data + below / kGroup * kGroupBytes<T> + beside / kPackedColumns * panels.bytes,
            panels.bytes, block.rows / kGroup * kLines, 64, kLines};
  }
  constexpr int64_t kBytes = kPackedColumns * static_cast<int64_t>(sizeof(T)) / kPerItem<T>;
  // Packing a transposed weight asks for what comes next itself, and rows of float32 have two lines each.
  if (weight.col_stride != 1 || kBytes > 64) return {};
  const T* const next = PlainAt<T>(weight, block.expert, block.k + below, block.column + beside);
  return {reinterpret_cast<const char*>(next), kBytes, block.rows, RowBytes<T>(weight), kGroup};
}

// What is read after `blocks` blocks of the left operand, which the panels of `columns` columns meet: as many
// of the next ones, or after the last the first ones again. Where these are all, the caches have them. Rows
// are too short for the hardware's prefetchers.
inline Ahead RowsAfter(const char* a, const LeftRows& left, int64_t blocks, int64_t columns) {
  const int64_t row_bytes = BlockColumns(left.left) * left.ItemBytes();
  const int64_t all = left.Blocks(), next = (a - left.data) / (left.rows * row_bytes) + blocks;
  if (blocks >= all) return {};
  const int64_t panels = (columns + kPackedColumns - 1) / kPackedColumns;
  const int64_t lines = (blocks * left.rows * row_bytes / 64 + panels - 1) / panels;
  return {left.data + (next < all ? next : 0) * left.rows * row_bytes, lines * 64, lines, 64, 0};
}

}  // namespace
}  // namespace ffn::cpu
