// SPDX-License-Identifier: Apache-2.0
// What the driver (ffn.cc) and the kernels of one instruction set (ffn-inl.h, instantiated by isa_*.cc)
// share: the description of a wave of rows, a worker's scratch, and the table of entry points. Plain data
// only. An inline function here would be compiled for AVX-512 in one translation unit and for the baseline in
// another, and the linker would keep either.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/ffn.h"

namespace ffn::cpu {

// Rows of a segment's left operands are stored in blocks of columns, kKBlock of them as float32: element
// (row, k) is at ((k / kKBlock) * rows + row) * kKBlock + k % kKBlock. A tile of rows then reads neighbouring
// memory, whatever K is (with a row stride of K floats, the rows of a tile fall into the same few cache sets
// when K is a power of two). 256 int8 products also fit a float32 exactly: |a * b| <= 2^14, so every partial
// sum is an integer <= 2^22.
constexpr int64_t kKBlock = 256;
// Rows of a wave. More amortise the reading and the unpacking of W better; how many of them fit the caches is
// for ffn.cc to say.
constexpr int64_t kMaxRows = 512;
// Columns of a task: a multiple of kMinColumns (which every panel width divides). More of them read the left
// operand less often, and a [K, N] weight in longer runs. Those of many rows are taken in strips of
// kMinColumns, whose panels stay near while the rows go by.
constexpr int64_t kMinColumns = 64;
constexpr int64_t kMaxColumns = 512;
// Of a task that reads few rows' plain weight as it lies: by long runs, which the hardware's prefetchers
// follow.
constexpr int64_t kMaxPlainColumns = 4096;
constexpr int64_t kTileCells = 1 << 17;  // of both halves of a GLU, kMaxRows * kMinColumns each at least
constexpr int64_t kTilePadding = 16;     // behind each row of more than kMinColumns
constexpr int64_t kTileSize = kTileCells + 2 * kMaxRows * kTilePadding;
constexpr int64_t kPanelSize = kKBlock * kMinColumns;
// Up to so many rows multiply weights as they are stored; for more, panels are expanded to float32 first.
constexpr int64_t kFewRows = 4;
// How a float32 is rounded to a narrower format; "HalfAway" rounds ties away from zero, the others to even.
enum class Rounding : uint8_t { kNone, kFp16, kFp16HalfAway, kBf16, kBf16HalfAway };

// The steps of contract.md section e by which the modes differ.
struct Steps {
  bool glu;
  bool quant;       // w8a8: int32 sums, dequantisation, and Q before the second product
  Rounding first;   // of the first product, after its bias or dequantisation
  Rounding hidden;  // of the activation's result; for quant before Q
  Rounding y;
  uint32_t deq_scale_mask;  // bits of a 32-bit deq_scale that count
};

// How a segment's left operands are stored: as above, or for tiles (amx-inl.h) in blocks of one tile's 64
// bytes, bf16, fp16 as the sum of two bf16 (a plane of the high parts, a plane of the rest), or int8, which
// dot products (dot-inl.h) take as well as bf16 and fp16. Beside kFloatExact and kBf16Exact integer weights
// stay exact, and sums are scaled instead. kInt16 is int8 for what multiplies no narrower integers.
enum class Left : uint8_t { kFloat, kFloatExact, kFp16, kBf16, kBf16Exact, kSplit, kInt8, kInt16 };
constexpr bool IsFloat(Left left) { return left == Left::kFloat || left == Left::kFloatExact; }

// Bytes of a column in a row of a left operand; fp16 as a sum has it twice.
constexpr int64_t LeftBytes(Left left) {
  return IsFloat(left) || left == Left::kSplit ? 4 : left == Left::kInt8 ? 1 : 2;
}

constexpr int64_t kSlackBytes = 2048;  // 15 rows of a tile's 64 bytes, rounded up

// One of the two products: a [rows, K] times the weight of an expert [K, N].
struct Product {
  int64_t K, N;
  // The left operands, so many bytes for each row, and kSlackBytes behind them, which tiles may read. The
  // second product's are the first one's result.
  char* a;
  int64_t row_bytes;
  const Weight* weight;
  const Channels* channels;
};

// Rows [first_row, first_row + rows) of x on their way through both products.
struct Wave {
  const Problem* problem;
  Steps steps;
  int64_t first_row, rows;
  int64_t cache_bytes;  // the second-level cache of a thread
  Product first, second;
};

// The rows of one expert in a wave; `row` counts from the wave's first.
struct Segment {
  int64_t expert, row, rows;
  Left left;
  int64_t first_task, task_columns;  // of the product at hand: the driver's

  int64_t End() const { return row + rows; }
};

// Part of a weight.
struct Block {
  int64_t expert, k, rows, column, columns;
};

// One worker's scratch. Where a task has fewer columns than an array holds, it is a prefix that is used.
struct alignas(64) TaskScratch {
  float tile[kTileSize];  // sums [segment rows, columns] as float32 or int32; a GLU's right half is in the
                          // second half
  float group[kMaxRows * kMinColumns];  // sums of one antiquant group
  float packed[kPanelSize];             // panels of a plain weight, packed for this task
  float panel[kPanelSize];              // panels as float32, or as pairs of bf16
  float bias[2][kMaxPlainColumns];      // float32 or int32
  float deq_scale[2][kMaxPlainColumns];
  float scale[kMaxPlainColumns];
  float antiquant_offset[kMaxColumns];
  float antiquant_scale[kMaxColumns];
  float sums[kKBlock / 32 * kMaxRows];  // of the left operand: by row, for each group of a block
  float row[kKBlock];                   // of the left operand as float32
  uint32_t begins[kMaxRows];            // what the sums of a segment's rows begin with, as bits
  const Segment* begins_of;             // the segment; the driver sets null before each product
};

// In TaskScratch::panel, from pairs of bf16 to those that rounding left over.
constexpr int64_t kRestBytes = kPanelSize * 2;

// Tokens whose experts' results are summed: slot s of token t is row t * top_k + s of `results`, and counts
// when `present` says so.
struct Combination {
  const float* results;  // [tokens * top_k, N]
  const uint8_t* present;
  int64_t top_k, N;
  DType y_dtype;
  void* y;  // [tokens, N]
};

// The entry points of one instruction set. A task covers columns [column, column + columns) of one segment.
struct Kernels {
  const char* name;
  // How the segments of an expert that has `rows` rows in this call store their left operands.
  Left (*left_of)(const Problem& problem, int64_t rows);
  // Whether a segment reads a weight as it lies, row by row, so that a task's columns should be many.
  bool (*reads_plain_rows)(const Weight& weight, DType dtype, const Segment& segment);
  // Rows [row, row + rows) of a segment, from x into the first product's left operand.
  void (*load_rows)(const Wave& wave, const Segment& segment, int64_t row, int64_t rows);
  void (*first_product)(const Wave& wave, const Segment& segment, int64_t column, int64_t columns,
                        TaskScratch* scratch);
  void (*second_product)(const Wave& wave, const Segment& segment, int64_t column, int64_t columns,
                         TaskScratch* scratch);
  // Packs a block of a plain weight [.., K, ..] of `dtype` into panels from `to`.
  void (*pack)(const Weight& from, DType dtype, int64_t K, const Block& block, int64_t panel_bytes, char* to);
  void (*combine)(const Combination& combination, int64_t token, int64_t tokens);
};

extern const Kernels kGenericKernels;
extern const Kernels kNeonKernels;  // aarch64 only, as the next
extern const Kernels kNeonFhmKernels;
extern const Kernels kNeonI8mmKernels;
extern const Kernels kAvx2Kernels;  // x86-64 only, as the next
extern const Kernels kAvx2VnniKernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512VnniKernels;
extern const Kernels kAvx512Bf16Kernels;
extern const Kernels kAmxKernels;

// Whether this CPU has Intel's tiles for bf16 and int8, and the operating system lets the process use them.
bool MayUseTiles();

// Those named `isa`, or the selected ones for null. Throws std::runtime_error for what cannot run here
// (isa.cc).
const Kernels& KernelsOf(const char* isa);

}  // namespace ffn::cpu
