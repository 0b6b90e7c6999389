// SPDX-License-Identifier: Apache-2.0
// Panels of weights (their layout is in packed.h), vector by vector: Panel<T> reads the layout of one dtype,
// Packer fills panels from a plain weight, and Expand turns them into float32. Used by gemm-inl.h; built on
// vec-inl.h.
#pragma once

#include "cpu/kernels.h"
#include "cpu/vec-inl.h"

namespace ffn::cpu {
namespace {

// kGroup rows of kLanes columns are one Vector: a 32-bit word for each column (fp16: 16 bits). Element gives
// row i of them as float32; Bits gives, from a plain row, what Vector holds of it in its low bits.
template <typename T>
struct Panel;

template <>
struct Panel<float> {
  static constexpr int kGroup = 1;
  using Vector = F32;
  template <int kRow>
  static inline F32 Element(Vector v) {
    return v;
  }
  static inline U32 RawBits(const float* row) { return Load<U32>(row); }
};

template <>
struct Panel<Half> {
  static constexpr int kGroup = 1;
  using Vector = U16;
  template <int kRow>
  static inline F32 Element(Vector v) {
    return HalfToFloat(v);
  }
  static inline U32 RawBits(const Half* row) { return __builtin_convertvector(Load<U16>(row), U32); }
};

template <>
struct Panel<BFloat> {
  static constexpr int kGroup = 2;
  using Vector = U32;
  template <int kRow>
  static inline F32 Element(Vector v) {
    return FromBits(kRow == 0 ? v << 16 : v & 0xffff0000);
  }
  static inline U32 RawBits(const BFloat* row) { return __builtin_convertvector(Load<U16>(row), U32); }
};

template <>
struct Panel<int8_t> {
  static constexpr int kGroup = 4;
  using Vector = U32;
  template <int kRow>
  static inline F32 Element(Vector v) {
    return IntToFloat((I32)(v << (24 - 8 * kRow)) >> 24);
  }
  static inline U32 RawBits(const int8_t* row) { return LoadBytes(row); }
};

// The same panels, where int8 are multiplied as bf16 (dot-inl.h).
struct WideInt8 {};
template <>
struct Panel<WideInt8> : Panel<int8_t> {};

template <>
struct Panel<Int4Pair> {
  static constexpr int kGroup = kNibbles;
  using Vector = U32;
  template <int kRow>
  static inline F32 Element(Vector v) {
    return SignedNibble<4 * NibbleOf(kRow)>(v);
  }
  static inline U32 RawBits(const Int4Pair* row) { return LoadNibbles(row); }
};

template <typename T>
constexpr int64_t kUnitBytes =
    static_cast<int64_t>(sizeof(typename Panel<T>::Vector)) / kLanes;  // of a column
template <typename T>
constexpr int64_t kGroupBytes = kPackedColumns * kUnitBytes<T>;

// Where the kernels find the panels of a weight: those of the columns of a task, from the task's first.
struct Panels {
  const char* data;
  int64_t bytes;  // from one panel to the next

  // Row k, a multiple of a group, of column `column`.
  template <typename T>
  const char* At(int64_t k, int64_t column) const {
    return data + column / kPackedColumns * bytes + k / Panel<T>::kGroup * kGroupBytes<T> +
           column % kPackedColumns * kUnitBytes<T>;
  }
};

template <typename T>
inline void StoreUnits(char* to, U32 bits) {
  if constexpr (kUnitBytes<T> == 2) {
    Store(to, __builtin_convertvector(bits, U16));
  } else {
    Store(to, bits);
  }
}

// The bits of the first `count` of kLanes elements of a row, then zeros.
template <typename T>
inline U32 LoadBits(const T* row, int64_t count) {
  if (count >= kLanes) return Panel<T>::RawBits(row);
  T buffer[kLanes / kPerItem<T>] = {};
  if (count > 0) __builtin_memcpy(buffer, row, static_cast<size_t>(count) / kPerItem<T> * sizeof(T));
  return Panel<T>::RawBits(buffer);
}

// What a panel has of `rows` rows, a group of them at most, and of the first `columns` of kLanes columns of a
// plain weight whose rows are `stride` items apart. All other bits are zeros.
template <typename T>
inline __attribute__((always_inline)) U32 GroupBits(const T* from, int64_t stride, int64_t rows,
                                                    int64_t columns) {
  constexpr int64_t kBits = 32 / Panel<T>::kGroup;
  U32 bits = {};
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t place = kPerItem<T> == 2 ? NibbleOf(i) : i;
    bits = bits | LoadBits(from + i * stride, columns) << static_cast<uint32_t>(place * kBits % 32);
  }
  return bits;
}

// Where a block of a weight lies.
struct Source {
  const void* data;  // element (0, 0)
  int64_t row_stride, col_stride;
  int64_t rows, columns;
  int64_t rows_left;  // of the weight from the block's first, for prefetching
};

// A plain block into panels, of which `rows` rounded up to a group are written, and all columns.
template <typename T>
struct Packer {
  static constexpr int kGroup = Panel<T>::kGroup;
  const Source& source;
  int64_t stride;  // in items, along whichever of both is not dense
  const Panels panels;

  inline const T* From() const { return static_cast<const T*>(source.data); }
  inline char* To(int64_t k, int64_t n) const { return const_cast<char*>(panels.template At<T>(k, n)); }

  void Straight() const {
    // The strip is narrow and its next row a page or more away, where no hardware prefetcher looks: ask for
    // what is needed this many bytes later (512 to 8192 were measured; a page was best).
    constexpr int64_t kBytesAhead = 4096;
    constexpr int64_t kLineElements = 64 / static_cast<int64_t>(sizeof(T)) * kPerItem<T>;
    const int64_t ahead =
        1 + kBytesAhead * kPerItem<T> / (source.columns * static_cast<int64_t>(sizeof(T)));  // rows
    for (int64_t k = 0; k < source.rows; k += kGroup) {
      const int64_t rows = source.rows - k < kGroup ? source.rows - k : kGroup;
      for (int64_t n = 0; n < source.columns; n += kLanes) {
        const T* const from = From() + k * stride + n / kPerItem<T>;
        if (n % kLineElements == 0 && k + ahead + kGroup < source.rows_left) {
          for (int64_t i = 0; i < kGroup; ++i) __builtin_prefetch(from + (ahead + i) * stride);
        }
        StoreUnits<T>(To(k, n), GroupBits(from, stride, rows, source.columns - n));
      }
    }
  }

  // A transposed weight is dense along K, where the elements of a group are neighbours already.
  void Transposed() const {
    constexpr int64_t kStep = kLanes * kGroup;
    constexpr int64_t kLineElements = 64 / static_cast<int64_t>(sizeof(T));
    for (int64_t n = 0; n < source.columns; n += kLanes) {
      for (int64_t k = 0; k < source.rows; k += kStep) {
        F32 square[kLanes];
        for (int j = 0; j < kLanes; ++j) {
          const T* const from = From() + (n + j) * stride + k;
          // The next block of the column, while this one is packed and multiplied: no hardware prefetcher
          // follows runs this short.
          for (int64_t line = 0; line < kStep; line += kLineElements) {
            if (k + source.rows + line < source.rows_left)
              __builtin_prefetch(from + source.rows + line, 0, 2);
          }
          square[j] = n + j < source.columns ? Words(from, source.rows - k) : F32{};
        }
        Transpose(square);
        for (int64_t i = 0; i < kLanes && k + i * kGroup < source.rows; ++i) {
          StoreUnits<T>(To(k + i * kGroup, n), Bits(square[i]));
        }
      }
    }
  }

  // kLanes groups of a column.
  static inline F32 Words(const T* from, int64_t count) {
    if constexpr (kGroup == 1) {
      return FromBits(LoadBits(from, count));
    } else {
      if (count >= kLanes * kGroup) return Load<F32>(from);
      T buffer[kLanes * kGroup] = {};
      __builtin_memcpy(buffer, from, static_cast<size_t>(count) * sizeof(T));
      return Load<F32>(buffer);
    }
  }

  void Fill() const {
    for (int64_t n = (source.columns + kLanes - 1) / kLanes * kLanes; n % kPackedColumns != 0; n += kLanes) {
      for (int64_t k = 0; k < source.rows; k += kGroup) StoreUnits<T>(To(k, n), U32{});
    }
  }
};

template <typename T>
inline void PackBlock(const Source& source, const Panels& panels) {
  const bool straight = source.col_stride == 1;
  const int64_t stride = straight ? source.row_stride / kPerItem<T> : source.col_stride;
  const Packer<T> packer = {source, stride, panels};
  if constexpr (kPerItem<T> == 1) {
    straight ? packer.Straight() : packer.Transposed();
  } else {
    packer.Straight();  // int4 has no other layout
  }
  packer.Fill();
}

// Calls use(T()) with the T of a weight's dtype.
template <typename Use>
inline void WithWeightType(DType dtype, const Use& use) {
  switch (dtype) {
    case DType::kFloat32:
      return use(float());
    case DType::kFloat16:
      return use(Half());
    case DType::kBFloat16:
      return use(BFloat());
    case DType::kInt8:
      return use(int8_t());
    default:
      return use(Int4Pair());
  }
}

template <typename T>
inline const T* PlainAt(const Weight& weight, int64_t expert, int64_t k, int64_t column) {
  const int64_t index = expert * weight.expert_stride + k * weight.row_stride + column * weight.col_stride;
  return static_cast<const T*>(weight.data) + index / kPerItem<T>;
}

// From one row of a plain weight to the next.
template <typename T>
inline int64_t RowBytes(const Weight& weight) {
  return weight.row_stride / kPerItem<T> * static_cast<int64_t>(sizeof(T));
}

template <typename T>
inline Source SourceOf(const Weight& weight, int64_t K, const Block& block) {
  return {PlainAt<T>(weight, block.expert, block.k, block.column),
          weight.row_stride,
          weight.col_stride,
          block.rows,
          block.columns,
          K - block.k};
}

// The panels of a block: where prepack put them, or packed into scratch, where each has room for `depth`
// rows.
template <typename T>
inline Panels PanelsOf(const Weight& weight, int64_t K, const Block& block, int64_t depth,
                       TaskScratch* scratch) {
  if (weight.packed) {
    const char* const expert = static_cast<const char*>(weight.data) + block.expert * weight.expert_stride;
    const Panels whole = {expert, weight.panel_bytes};
    return {whole.At<T>(block.k, block.column), weight.panel_bytes};
  }
  const Panels panels = {reinterpret_cast<const char*>(scratch->packed),
                         depth / Panel<T>::kGroup * kGroupBytes<T>};
  PackBlock<T>(SourceOf<T>(weight, K, block), panels);
  return panels;
}

// The Kernels entry: packs a block of a plain weight into panels, and zeros the rows that fill a panel up.
void PackColumns(const Weight& from, DType dtype, int64_t K, const Block& block, int64_t panel_bytes,
                 char* to) {
  const Panels panels = {to, panel_bytes};
  WithWeightType(dtype, [&](auto t) {
    using T = decltype(t);
    PackBlock<T>(SourceOf<T>(from, K, block), panels);
    const int64_t written = (block.rows + Panel<T>::kGroup - 1) / Panel<T>::kGroup * kGroupBytes<T>;
    for (int64_t n = 0; n < block.columns; n += kPackedColumns) {
      __builtin_memset(to + n / kPackedColumns * panel_bytes + written, 0,
                       static_cast<size_t>(panel_bytes - written));
    }
  });
}

// Rows [begin, end) of panels into panels of float32, which have `rows` rows; kScales: as (w + offset) scale,
// by the group of rows that these belong to.
template <typename T, bool kScales>
void Expand(const Panels& from, int64_t begin, int64_t end, int64_t rows, int64_t columns,
            const TaskScratch& scratch, float* to) {
  using Layout = Panel<T>;
  constexpr int kGroup = Layout::kGroup, kVectors = kPackedColumns / kLanes;
  for (int64_t n = 0; n < columns; n += kPackedColumns, to += rows * kPackedColumns) {
    F32 offset[kVectors], scale[kVectors];
    Unrolled<kScales ? kVectors : 0>([&](auto v) {
      offset[v] = Load<F32>(scratch.antiquant_offset + n + v * kLanes);
      scale[v] = Load<F32>(scratch.antiquant_scale + n + v * kLanes);
    });
    for (int64_t k = begin / kGroup * kGroup; k < end; k += kGroup) {
      const char* const panel = from.At<T>(k, n);
      const bool whole = k >= begin && k + kGroup <= end;
      AskFor(panel);
      if constexpr (kGroupBytes<T> > 64) AskFor(panel + 64);
      Unrolled<kVectors>([&](auto v) __attribute__((always_inline)) {
        const auto vector = Load<typename Layout::Vector>(panel + v * kLanes * kUnitBytes<T>);
        Unrolled<kGroup>([&](auto i) __attribute__((always_inline)) {
          if (!whole && (k + i < begin || k + i >= end)) return;
          F32 element = Layout::template Element<i>(vector);
          if constexpr (kScales) element = (element + offset[v]) * scale[v];
          Store(to + (k + i) * kPackedColumns + v * kLanes, element);
        });
      });
    }
  }
}

}  // namespace
}  // namespace ffn::cpu
