// SPDX-License-Identifier: Apache-2.0
// The left operands of both products as a segment stores them (Left in kernels.h): written by whoever makes
// them (ffn-inl.h), read as float32 or as tiles by the multiplications. Built on vec-inl.h.
#pragma once

#include "cpu/kernels.h"
#include "cpu/vec-inl.h"

namespace ffn::cpu {
namespace {

constexpr int64_t kTileRowBytes = 64;

// Columns of a block, which is one tile's 64 bytes or kKBlock floats; by their logarithm, since nobody should
// divide for each vector.
constexpr int kLogKBlock = 8;
static_assert(kKBlock == 1 << kLogKBlock, "kLogKBlock is the logarithm of kKBlock");
constexpr int LogBlockColumns(Left left) { return IsFloat(left) ? kLogKBlock : left == Left::kInt8 ? 6 : 5; }
constexpr int64_t BlockColumns(Left left) { return int64_t{1} << LogBlockColumns(left); }

// A segment's part of a product's left operand.
struct LeftRows {
  Left left;
  int64_t K, rows;
  char* data;

  LeftRows(const Product& product, const Segment& segment)
      : left(segment.left),
        K(product.K),
        rows(segment.rows),
        data(product.a + segment.row * product.row_bytes) {}

  int64_t Blocks() const { return (K + BlockColumns(left) - 1) / BlockColumns(left); }
  // Of a plane: kSplit has two.
  int64_t PlaneBytes() const { return Blocks() * rows * BlockColumns(left) * ItemBytes(); }
  int64_t ItemBytes() const { return IsFloat(left) ? 4 : left == Left::kInt8 ? 1 : 2; }

  char* At(int64_t row, int64_t k) const {
    if (left == Left::kInt16) k = PlaceInPairs(k);
    const int log = LogBlockColumns(left);
    return data + ((((k >> log) * rows + row) << log) + (k & (BlockColumns(left) - 1))) * ItemBytes();
  }

  // kLanes columns from k, a multiple of kLanes. What they are rounded to, `left` holds exactly.
  void Put(int64_t row, int64_t k, F32 value) const {
    char* const at = At(row, k);
    if (IsFloat(left)) return Store(at, value);
    if (left == Left::kBf16 || left == Left::kBf16Exact) return StoreAs(reinterpret_cast<BFloat*>(at), value);
    if (left == Left::kFp16) return StoreAs(reinterpret_cast<Half*>(at), value);
    if (left == Left::kInt8) return StoreBytes(at, __builtin_convertvector(value, I32));
    if (left == Left::kInt16) {
      value = InPairs(value, std::make_integer_sequence<int, kLanes>());
      return Store(at, __builtin_convertvector(__builtin_convertvector(value, I32), I16));
    }
    const F32 high = Round(Rounding::kBf16, value);
    const F32 rest = value - high;
    StoreAs(reinterpret_cast<BFloat*>(at), high);
    // Of an infinity or a NaN nothing is left.
    StoreAs(reinterpret_cast<BFloat*>(at + PlaneBytes()), rest == rest ? rest : F32{});
  }

  // Of integers nobody asks for that.
  F32 Get(int64_t row, int64_t k) const {
    const char* const at = At(row, k);
    switch (left) {
      case Left::kFloat:
      case Left::kFloatExact:
        return Load<F32>(at);
      case Left::kFp16:
        return LoadFloats(reinterpret_cast<const Half*>(at));
      case Left::kBf16:
      case Left::kBf16Exact:
        return LoadFloats(reinterpret_cast<const BFloat*>(at));
      case Left::kSplit:
        return LoadFloats(reinterpret_cast<const BFloat*>(at)) +
               LoadFloats(reinterpret_cast<const BFloat*>(at + PlaneBytes()));
      case Left::kInt8:
      case Left::kInt16:
        break;
    }
    __builtin_unreachable();
  }

  // Tiles multiply whole blocks, where 0 times a NaN that lay there before would not be 0.
  void ZeroBeyondK(int64_t row) const {
    const int64_t end = Blocks() * BlockColumns(left);
    if (IsFloat(left) || end == K) return;
    int64_t k = K;
    for (; left == Left::kInt16 && k % 4 != 0; ++k) Store(At(row, k), int16_t{0});
    if (k == end) return;
    const auto bytes = static_cast<size_t>((end - k) * ItemBytes());
    __builtin_memset(At(row, k), 0, bytes);
    if (left == Left::kSplit) __builtin_memset(At(row, k) + PlaneBytes(), 0, bytes);
  }
};

}  // namespace
}  // namespace ffn::cpu
