// SPDX-License-Identifier: Apache-2.0
// Intel's tiles (AMX): eight registers of 16 rows by 64 bytes, and their dot products. FFN_AMX is the hardware;
// FFN_AMX_MODEL the same in plain C++, by which the kernels over it (amx-inl.h) are tested where no CPU has it.
#pragma once

#include "cpu/vec-inl.h"

#if defined(FFN_AMX)
#include <immintrin.h>
#endif

namespace ffn::cpu {
namespace {

constexpr int64_t kTileRowBytes = 64;
constexpr int64_t kTileHeight = 16;

#if defined(FFN_AMX)

// All tiles at full size, for as long as it lives: a thread that holds tiles is slow to switch.
class TileSession {
 public:
  TileSession() {
    struct alignas(64) Config {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }
  ~TileSession() { _tile_release(); }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;
};

// The instructions name registers, so each number is a case of its own.
#define FFN_EACH_TILE(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7)

template <int kTile>
inline void LoadTile(const void* from, int64_t stride) {
#define FFN_LOAD(tile) \
  if constexpr (kTile == tile) _tile_loadd(tile, from, stride);
  FFN_EACH_TILE(FFN_LOAD)
#undef FFN_LOAD
}
template <int kTile>
inline void StoreTile(void* to, int64_t stride) {
#define FFN_STORE(tile) \
  if constexpr (kTile == tile) _tile_stored(tile, to, stride);
  FFN_EACH_TILE(FFN_STORE)
#undef FFN_STORE
}
#undef FFN_EACH_TILE

// c(2 i + j) += a(4 + i) b(6 + j): pairs of bf16 into float32, or quads of int8 into int32.
template <bool kInt, int i, int j>
inline void MultiplyTiles() {
#define FFN_MULTIPLY(c, a, b)       \
  if constexpr (2 * i + j == c) {   \
    if constexpr (kInt) {           \
      _tile_dpbssd(c, a, b);        \
    } else {                        \
      _tile_dpbf16ps(c, a, b);      \
    }                               \
  }
  FFN_MULTIPLY(0, 4, 6)
  FFN_MULTIPLY(1, 4, 7)
  FFN_MULTIPLY(2, 5, 6)
  FFN_MULTIPLY(3, 5, 7)
#undef FFN_MULTIPLY
}

#else

thread_local char model_tiles[8][kTileHeight][kTileRowBytes];

class TileSession {
 public:
  TileSession() { __builtin_memset(model_tiles, 0, sizeof(model_tiles)); }
};

template <int kTile>
inline void LoadTile(const void* from, int64_t stride) {
  for (int64_t r = 0; r < kTileHeight; ++r) {
    __builtin_memcpy(model_tiles[kTile][r], static_cast<const char*>(from) + r * stride, kTileRowBytes);
  }
}
template <int kTile>
inline void StoreTile(void* to, int64_t stride) {
  for (int64_t r = 0; r < kTileHeight; ++r) {
    __builtin_memcpy(static_cast<char*>(to) + r * stride, model_tiles[kTile][r], kTileRowBytes);
  }
}
inline float PairHalf(const char* row, int64_t index) {
  uint16_t bits;
  __builtin_memcpy(&bits, row + 2 * index, 2);
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  __builtin_memcpy(&value, &wide, 4);
  return value;
}

// The sums of even and of odd rows are separate until the end, as Intel's manual writes TDPBF16PS.
template <bool kInt, int i, int j>
inline void MultiplyTiles() {
  constexpr int kC = 2 * i + j, kA = 4 + i, kB = 6 + j;
  for (int64_t m = 0; m < kTileHeight; ++m) {
    const char* const a = model_tiles[kA][m];
    for (int64_t n = 0; n < 16; ++n) {
      char* const c = model_tiles[kC][m] + 4 * n;
      if constexpr (kInt) {
        uint32_t sum;
        __builtin_memcpy(&sum, c, 4);
        for (int64_t k = 0; k < 64; ++k) {
          const int product = static_cast<int8_t>(a[k]) * static_cast<int8_t>(model_tiles[kB][k / 4][4 * n + k % 4]);
          sum += static_cast<uint32_t>(product);
        }
        __builtin_memcpy(c, &sum, 4);
      } else {
        float even = 0, odd = 0, sum;
        for (int64_t k = 0; k < 16; ++k) {
          const char* const b = model_tiles[kB][k];
          even += PairHalf(a, 2 * k) * PairHalf(b, 2 * n);
          odd += PairHalf(a, 2 * k + 1) * PairHalf(b, 2 * n + 1);
        }
        __builtin_memcpy(&sum, c, 4);
        sum += even + odd;
        __builtin_memcpy(c, &sum, 4);
      }
    }
  }
}

#endif

}  // namespace
}  // namespace ffn::cpu
