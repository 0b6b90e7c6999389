// SPDX-License-Identifier: Apache-2.0
// Turns stored numbers into the float32 that gemm-inl.h multiplies: blocks of a weight into panels, with the
// antiquant modes' (w + offset) * scale on the way, rounded as contract.md section e.5 rounds it, and rows of
// anything into floats. Built on vec-inl.h.
#pragma once

#include "cpu/kernels.h"
#include "cpu/vec-inl.h"

namespace ffn::cpu {
namespace {

// Elements [index, index + count) of a stored array. Writes zeros up to the next multiple of kLanes.
template <typename T>
inline void LoadRow(const void* data, int64_t index, int64_t count, float* row) {
  const T* from = static_cast<const T*>(data) + index;
  for (int64_t j = 0; j < count; j += kLanes) Store(row + j, LoadFloats(from + j, count - j));
}

inline void LoadRow(DType dtype, const void* data, int64_t index, int64_t count, float* row) {
  switch (dtype) {
    case DType::kFloat32:
      return LoadRow<float>(data, index, count, row);
    case DType::kFloat16:
      return LoadRow<Half>(data, index, count, row);
    case DType::kBFloat16:
      return LoadRow<BFloat>(data, index, count, row);
    case DType::kInt8:
      return LoadRow<int8_t>(data, index, count, row);
    default:
      __builtin_unreachable();
  }
}

// A block [rows, columns] of a weight on its way into panels: element (k, n) goes to panel n / kPanelColumns,
// which is [panel_rows][kPanelColumns]. Columns that fill up the last panel are zeros.
// kAntiquant is the format that (w + offset) * scale is rounded to, or kNone for a weight without them.
template <typename T, Rounding kAntiquant>
struct Unpacker {
  const T* from;      // element (0, 0)
  int64_t stride;     // items from one row to the next, or from one column to the next of a transposed weight
  int64_t rows_left;  // of the weight, for prefetching
  int64_t rows, columns;
  float* panels;
  int64_t panel_rows;
  const float* offset;  // [columns] of the rows' group; read for antiquant only
  const float* scale;

  inline float* Place(int64_t k, int64_t n) const {
    return panels + (n / kPanelColumns * panel_rows + k) * kPanelColumns + n % kPanelColumns;
  }

  inline F32 Value(int64_t n, F32 w) const {
    if constexpr (kAntiquant == Rounding::kNone) return w;
    F32 sum = w + LoadFloats(offset + n);
    if constexpr (kAntiquant == Rounding::kFp16) sum = Round(Rounding::kFp16, sum);  // fp16 rounds each step
    return Round(kAntiquant, sum * LoadFloats(scale + n));
  }

  void Straight() const {
    // The strip is narrow and its next row a page or more away, where no hardware prefetcher looks: ask for
    // what is needed this many bytes later (512 to 8192 were measured; a page was best).
    constexpr int64_t kBytesAhead = 4096;
    constexpr int64_t kPanelItems = kPanelColumns / kPerItem<T>;
    constexpr int64_t kLineItems = 64 / static_cast<int64_t>(sizeof(T));
    const int64_t rows_ahead = 1 + kBytesAhead * kPerItem<T> / (columns * static_cast<int64_t>(sizeof(T)));
    for (int64_t k = 0; k < rows; ++k) {
      const T* row = from + k * stride;
      const T* ahead = k + rows_ahead < rows_left ? row + rows_ahead * stride : row;
      int64_t n = 0;
      for (; n + kPanelColumns <= columns; n += kPanelColumns) {
        for (int64_t i = 0; i < kPanelItems; i += kLineItems) __builtin_prefetch(ahead + n / kPerItem<T> + i);
        float* to = Place(k, n);
        for (int v = 0; v < kPanelColumns; v += kLanes) {
          Store(to + v, Value(n + v, LoadFloats(row + (n + v) / kPerItem<T>)));
        }
      }
      for (; n < columns; n += kLanes) {
        Store(Place(k, n), Value(n, LoadFloats(row + n / kPerItem<T>, columns - n)));
      }
    }
  }

  void Transposed() const {
    for (int64_t n = 0; n < columns; n += kLanes) {
      for (int64_t k = 0; k < rows; k += kLanes) {
        F32 square[kLanes];
        for (int j = 0; j < kLanes; ++j) {
          square[j] = n + j < columns ? LoadFloats(from + (n + j) * stride + k, rows - k) : F32{};
        }
        Transpose(square);
        const int64_t count = rows - k < kLanes ? rows - k : kLanes;
        for (int64_t i = 0; i < count; ++i) Store(Place(k + i, n), Value(n, square[i]));
      }
    }
  }

  void Fill() const {
    for (int64_t n = (columns + kLanes - 1) / kLanes * kLanes; n % kPanelColumns != 0; n += kLanes) {
      for (int64_t k = 0; k < rows; ++k) Store(Place(k, n), F32{});
    }
  }
};

// Where a block of W lies.
struct Block {
  int64_t expert, k, rows, column, columns;
};

template <typename T, Rounding kAntiquant = Rounding::kNone>
inline void Unpack(const Product& product, const Block& block, int64_t panel_row, int64_t panel_rows,
                   TaskScratch* scratch) {
  const Weight& weight = *product.weight;
  const bool straight = weight.col_stride == 1;
  const int64_t index =
      block.expert * weight.expert_stride + block.k * weight.row_stride + block.column * weight.col_stride;
  const Unpacker<T, kAntiquant> unpacker = {static_cast<const T*>(weight.data) + index / kPerItem<T>,
                                            straight ? weight.row_stride / kPerItem<T> : weight.col_stride,
                                            product.K - block.k,
                                            block.rows,
                                            block.columns,
                                            scratch->panel + panel_row * kPanelColumns,
                                            panel_rows,
                                            scratch->antiquant_offset,
                                            scratch->antiquant_scale};
  if constexpr (!std::is_same_v<T, Int4Pair>) {
    straight ? unpacker.Straight() : unpacker.Transposed();
  } else {
    unpacker.Straight();  // int4 has no other layout
  }
  unpacker.Fill();
}

template <Rounding kAntiquant>
inline void UnpackGroup(const Problem& problem, const Product& product, const Block& block, int64_t panel_row,
                        int64_t panel_rows, TaskScratch* scratch) {
  if (problem.weight_dtype == DType::kInt8) {
    Unpack<int8_t, kAntiquant>(product, block, panel_row, panel_rows, scratch);
  } else {
    Unpack<Int4Pair, kAntiquant>(product, block, panel_row, panel_rows, scratch);
  }
}

// Unpacks a block into scratch->panel, for the antiquant modes group by group.
inline void UnpackBlock(const Problem& problem, const Product& product, const Block& block,
                        TaskScratch* scratch) {
  const Channels& channels = *product.channels;
  if (channels.antiquant_scale == nullptr) {
    switch (problem.weight_dtype) {
      case DType::kFloat32:
        return Unpack<float>(product, block, 0, block.rows, scratch);
      case DType::kFloat16:
        return Unpack<Half>(product, block, 0, block.rows, scratch);
      case DType::kBFloat16:
        return Unpack<BFloat>(product, block, 0, block.rows, scratch);
      case DType::kInt8:
        return Unpack<int8_t>(product, block, 0, block.rows, scratch);
      default:
        __builtin_unreachable();
    }
  }
  const int64_t group_rows = product.K / channels.G;
  const int64_t end = block.k + block.rows;
  for (Block part = block; part.k < end; part.k += part.rows) {
    const int64_t group = part.k / group_rows;
    part.rows = (group + 1) * group_rows < end ? (group + 1) * group_rows - part.k : end - part.k;
    const int64_t channel = (block.expert * channels.G + group) * product.N + block.column;
    LoadRow(problem.x_dtype, channels.antiquant_offset, channel, block.columns, scratch->antiquant_offset);
    LoadRow(problem.x_dtype, channels.antiquant_scale, channel, block.columns, scratch->antiquant_scale);
    if (problem.x_dtype == DType::kFloat16) {
      UnpackGroup<Rounding::kFp16>(problem, product, part, part.k - block.k, block.rows, scratch);
    } else {
      UnpackGroup<Rounding::kBf16>(problem, product, part, part.k - block.k, block.rows, scratch);
    }
  }
}

}  // namespace
}  // namespace ffn::cpu
