// SPDX-License-Identifier: Apache-2.0
// Intel's tiles (AMX): eight registers of 16 rows by 64 bytes, and their dot products. What is built of them
// is in amx-inl.h; tests/instructions.cc does their work where a CPU lacks them.
#pragma once

#include <immintrin.h>

#include "cpu/vec-inl.h"

namespace ffn::cpu {
namespace {

constexpr int64_t kTileHeight = 16;

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
#define FFN_MULTIPLY(c, a, b)     \
  if constexpr (2 * i + j == c) { \
    if constexpr (kInt) {         \
      _tile_dpbssd(c, a, b);      \
    } else {                      \
      _tile_dpbf16ps(c, a, b);    \
    }                             \
  }
  FFN_MULTIPLY(0, 4, 6)
  FFN_MULTIPLY(1, 4, 7)
  FFN_MULTIPLY(2, 5, 6)
  FFN_MULTIPLY(3, 5, 7)
#undef FFN_MULTIPLY
}

}  // namespace
}  // namespace ffn::cpu
