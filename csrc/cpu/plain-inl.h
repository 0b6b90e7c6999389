// SPDX-License-Identifier: Apache-2.0
// Few rows times plain float weights as they lie, [K, N] by its rows or [N, K] by its columns, for
// gemm-inl.h: packing would read a weight and write it once more. Sums are the chains that gemm-inl.h
// promises. Built on packed-inl.h.
#pragma once

#include "cpu/kernels.h"
#include "cpu/left-inl.h"
#include "cpu/packed-inl.h"
#include "cpu/vec-inl.h"

namespace ffn::cpu {
namespace {

// Calls use(rows), a constant to the compiler, for 1 to kFewRows rows.
template <typename Use>
inline void WithFewRows(int64_t rows, const Use& use) {
  Unrolled<kFewRows>([&](auto i) {
    if (rows == i + 1) use(std::integral_constant<int, i + 1>());
  });
}

// Whether a weight lies row by row, [K, N].
inline bool LiesByRows(const Weight& weight) { return !weight.packed && weight.col_stride == 1; }

// Whether so many rows of float32 read a weight as it lies, row by row.
inline bool FloatsReadPlain(const Weight& weight, DType dtype, Left left, int64_t rows) {
  const bool is_float = dtype == DType::kFloat32 || dtype == DType::kFloat16 || dtype == DType::kBFloat16;
  return is_float && LiesByRows(weight) && left == Left::kFloat && rows <= kFewRows;
}

// Four rows of a [K, N] weight at a time, from end to end of a task's columns, are streams that the
// hardware's prefetchers follow, and asking for what comes next only disturbs them (Zen 3: 17 GB/s of
// float32; 11 where a tile's columns went by from row to row and were asked for). tile[kRows][columns]
// continues with rows [0, depth) of W, `stride` elements apart.
template <typename T, int kRows>
void MultiplyPlainRows(const float* a, const T* from, int64_t stride, int64_t depth, int64_t columns,
                       float* tile, int64_t tile_stride) {
  constexpr int kLine = 64 / kLanes, kRoom = kRegisters / 2 / kRows;
  constexpr int kVectors = kLine < kRoom ? kLine : kRoom;
  constexpr int64_t kTurn = 4;  // 2 and 6 were slower
  for (int64_t k = 0; k < depth; k += kTurn) {
    const int64_t rows = depth - k < kTurn ? depth - k : kTurn;
    const auto strip = [&](auto width, int64_t n, const auto& load) __attribute__((always_inline)) {
      F32 sum[kRows][width];
      const auto each = [&](const auto& use) __attribute__((always_inline)) {
        Unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
          Unrolled<width>([&](auto v) __attribute__((always_inline)) {
            use(sum[r][v], tile + r * tile_stride + n + v * kLanes);
          });
        });
      };
      each([](F32& one, const float* at) __attribute__((always_inline)) { one = Load<F32>(at); });
      for (int64_t i = k; i < k + rows; ++i) {
        F32 x[kRows];
        Unrolled<kRows>([&](auto r) __attribute__((always_inline)) { x[r] = Set(a[r * kKBlock + i]); });
        Unrolled<width>([&](auto v) __attribute__((always_inline)) {
          const F32 w = load(from + i * stride + n + v * kLanes);
          Unrolled<kRows>([&](auto r)
                              __attribute__((always_inline)) { sum[r][v] = Fma(x[r], w, sum[r][v]); });
        });
      }
      each([](F32 one, float* at) __attribute__((always_inline)) { Store(at, one); });
    };
    int64_t n = 0;
    for (; n + kVectors * kLanes <= columns; n += kVectors * kLanes) {
      strip(std::integral_constant<int, kVectors>(), n, [](const T* p) { return LoadFloats(p); });
    }
    for (; n < columns; n += kLanes) {
      strip(std::integral_constant<int, 1>(), n, [&](const T* p) { return LoadFloats(p, columns - n); });
    }
  }
}

// Of a transposed weight kLanes columns at a time, from end to end, since a column is dense and the
// hardware's prefetchers follow it. Not with wider vectors, where it was never measured (Zen 3: 1.5 to 2.4
// times as fast as packing it).
constexpr bool kReadsTransposed = kLanes <= 8;

// tile[kRows][columns] continues with rows of the left operand from `row` times columns of W, which begins at
// `from`, a column `stride` elements behind the other.
template <typename T, int kRows>
void MultiplyTransposed(const LeftRows& left, int64_t row, const T* from, int64_t stride, int64_t columns,
                        float* tile, int64_t tile_stride) {
  constexpr int kGroup = Panel<T>::kGroup;
  constexpr int64_t kStep = kLanes * kGroup, kLine = 64 / static_cast<int64_t>(sizeof(T));
  constexpr int64_t kAhead = 512 / static_cast<int64_t>(sizeof(T));  // 1 KB was as fast
  for (int64_t n = 0; n < columns; n += kLanes, from += kLanes * stride) {
    const T* column[kLanes];  // beyond the last one, it again
    Unrolled<kLanes>([&](auto j) { column[j] = from + (n + j < columns ? j : columns - n - 1) * stride; });
    F32 sum[kRows];
    Unrolled<kRows>([&](auto r) { sum[r] = Load<F32>(tile + r * tile_stride + n); });
    // `count` of the kStep rows from k.
    const auto step = [&](int64_t k, int64_t count) __attribute__((always_inline)) {
      F32 square[kLanes];
      Unrolled<kLanes>([&](auto j) __attribute__((always_inline)) {
        if constexpr (kGroup == 1) {
          square[j] = LoadFloats(column[j] + k, count);
        } else {
          square[j] = Packer<T>::Words(column[j] + k, count);
        }
      });
      Transpose(square);
      const float* const a = reinterpret_cast<const float*>(left.At(row, k));
      Unrolled<kLanes>([&](auto i) __attribute__((always_inline)) {
        Unrolled<kGroup>([&](auto g) __attribute__((always_inline)) {
          constexpr int kRow = i * kGroup + g;
          if (kRow >= count) return;
          F32 w = square[i];
          if constexpr (kGroup > 1) w = Panel<T>::template Element<g>(Bits(w));
          Unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
            sum[r] = Fma(Set(a[r * kKBlock + kRow]), w, sum[r]);
          });
        });
      });
    };
    int64_t k = 0;
    for (; k + kLine <= left.K; k += kLine) {
      const int64_t ask = k + kAhead + (k + kAhead < left.K ? 0 : kLanes * stride - left.K);
      Unrolled<kLanes>([&](auto j) __attribute__((always_inline)) { __builtin_prefetch(column[j] + ask); });
      Unrolled<kLine / kStep>([&](auto i) __attribute__((always_inline)) { step(k + i * kStep, kStep); });
    }
    for (; k < left.K; k += kStep) step(k, left.K - k < kStep ? left.K - k : kStep);
    Unrolled<kRows>([&](auto r) { Store(tile + r * tile_stride + n, sum[r]); });
  }
}

}  // namespace
}  // namespace ffn::cpu
