// SPDX-License-Identifier: Apache-2.0
// What narrow-inl.h multiplies with where there are no tiles: dot products (vec-inl.h) of int8 and, on some
// CPUs, of bf16 and fp16, over panels as they are stored. The sums are in registers, int32 or float32.
#pragma once

#include "cpu/gemm-inl.h"
#include "cpu/kernels.h"
#include "cpu/left-inl.h"
#include "cpu/packed-inl.h"
#include "cpu/vec-inl.h"

namespace ffn::cpu {
namespace {

template <typename T>
constexpr bool kMultiplies = std::is_same_v<T, int8_t>   ? true
                             : std::is_same_v<T, BFloat> ? kMultipliesBf16
                             : std::is_same_v<T, Half>   ? kMultipliesFp16
                                                         : false;

// Rows of a tile. Where a register holds a row's words, it has to be free beside the sums.
constexpr int kDotRows = std::is_pointer_v<Words> ? kManyRows : 4;

// A step along k is 64 bytes of a row, and so many of a panel.
constexpr int64_t kStepWords = 16;
constexpr int64_t kStepBytes = kStepWords * kPackedColumns * 4;

constexpr bool kAsksForRows = false;  // of the left operand's next block

// What the instructions need while they are in use: nothing.
struct Multiplication {
  ~Multiplication() {}
};

// Rows and columns of a left operand and of panels, from the first of their steps.
struct DotRange {
  const char* a;   // row 0
  int64_t a_step;  // from one step to the next
  int64_t steps;   // what is beyond K in the last one meets zeros of the left operand
  Panels panels;
  float* tile;
  int64_t tile_stride;
  Ahead ahead;
  int64_t plane_bytes = 0;  // from one plane of the left operand to the next
  int64_t row_bytes = 0;    // from one row of a plain weight, which `panels.data` is then, to the next
  const uint32_t* begins = nullptr;  // of row 0 on, what sums begin with; null: the tile has them
};

// Lines that a tile can ask for on its way.
constexpr int64_t MostAsked(int64_t steps) { return steps * (kStepWords / kWords) * Asking::kLinesEach; }

// The sums of kRows rows times kVectors vectors of columns, and where their operands are. Loops over rows and
// vectors are unrolled by hand: GCC else leaves the sums in memory. kPlanes of the left operand are
// multiplied by turns. kPlain reads rows of a plain weight instead of panels.
template <typename T, int kRows, int kVectors, int kPlanes = 1, bool kPlain = false>
struct DotSums {
  using Sum = std::conditional_t<std::is_same_v<T, int8_t>, I32, F32>;
  static constexpr bool kHalves = std::is_same_v<T, Half>;
  static constexpr bool kPairsOfNibbles = std::is_same_v<T, Int4Pair>;
  static constexpr bool kPairsOfInt8 = std::is_same_v<T, WideInt8>;
  static constexpr bool kPairsOfBytes = kMultipliesInt16 && std::is_same_v<T, int8_t>;
  // Of a word of the panels.
  static constexpr int kParts = kPairsOfNibbles ? 4 : kPairsOfBytes || kPairsOfInt8 ? 2 : 1;
  static constexpr bool kMatrices = kMultipliesMatrices && !kHalves;
  // Matrices have two rows; the last one of an odd number has zeros beside it.
  static constexpr int kHeld = kMatrices ? (kRows + 1) / 2 * 2 : kRows;

  Sum sum[kHeld][kVectors];
  const char* panels[kVectors];
  const char* a;
  const int64_t plane_bytes;
  const int64_t row_bytes;
  Asking ahead;

  // At the first step of panels of `column`.
  inline __attribute__((always_inline)) DotSums(const DotRange& range, int64_t row, int64_t column,
                                                int64_t tile)
      : a(range.a + row * kTileRowBytes),
        plane_bytes(range.plane_bytes),
        row_bytes(range.row_bytes),
        ahead(range.ahead.From(column, tile, range.panels.At<T>(0, column))) {
    Unrolled<kVectors>([&](auto v) __attribute__((always_inline)) {
      const int64_t n = column + v * kLanes;
      panels[v] = kPlain ? range.panels.data + n * static_cast<int64_t>(sizeof(T)) : range.panels.At<T>(0, n);
    });
  }

  // Calls use(sum, row, vector).
  template <typename Use>
  inline __attribute__((always_inline)) void Each(const Use& use) {
    Unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
      Unrolled<kVectors>([&](auto v) __attribute__((always_inline)) { use(sum[r][v], r, v); });
    });
  }

  // Between rows of sums and matrices of them; either way it is the same exchange.
  inline __attribute__((always_inline)) void ExchangePairs() {
    if constexpr (kMatrices) {
#if FFN_MATRICES
      Unrolled<kHeld / 2>([&](auto p) __attribute__((always_inline)) {
        Unrolled<kVectors>([&](auto v) __attribute__((always_inline)) {
          const Sum upper = sum[2 * p][v], lower = sum[2 * p + 1][v];
          sum[2 * p][v] = PairsOf<0>(upper, lower);
          sum[2 * p + 1][v] = PairsOf<1>(upper, lower);
        });
      });
#endif
    }
  }

  inline __attribute__((always_inline)) void AddSteps(int64_t steps, int64_t a_step) {
    for (int64_t s = 0; s < steps; ++s, a += a_step) {
      for (int64_t word = 0; word < kStepWords; word += kWords) {
        ahead.Next();
        AddTurn(word);
      }
    }
  }

  // kWords words of each row, from one of this step.
  inline __attribute__((always_inline)) void AddTurn(int64_t word) {
    Words x[kPlanes][kHeld];
    Unrolled<kPlanes>([&](auto p) {
      const char* const plane = a + p * plane_bytes + word * 4;
      Unrolled<kHeld>([&](auto r) { x[p][r] = r < kRows ? LoadWords(plane + r * kTileRowBytes) : Words{}; });
    });
    AddWords(x);
  }

 private:
  // What one of a row's words is multiplied by.
  template <int kPart>
  static inline __attribute__((always_inline)) U32 Part(U32 stored) {
#if FFN_DOT_INTEGERS
    if constexpr (kPairsOfNibbles) return PairOfNibbles<kPart>(stored);
    if constexpr (kPairsOfInt8) return PairOfInt8<kPart>(stored);
#endif
    if constexpr (kPairsOfBytes) return PairOfBytes<kPart>(stored);
    return Weights<Sum>(stored);
  }

  // The next words of kLanes columns, as panels have them.
  inline __attribute__((always_inline)) U32 Next(int v) {
    const char* const from = panels[v];
    if constexpr (kPlain) {
      constexpr int kGroup = Panel<T>::kGroup;
      panels[v] += kGroup * row_bytes;
      return GroupBits(reinterpret_cast<const T*>(from), row_bytes / static_cast<int64_t>(sizeof(T)), kGroup,
                       kLanes);
    } else {
      if (v * kLanes * 4 % 64 == 0) {
        if constexpr (kAsksFor<kVectors>) AskFor(from);
        // Converting outruns the hardware's prefetchers (8 to 12 rows 1.2 times as fast; Zen 4).
        if constexpr ((kPairsOfNibbles || kPairsOfInt8) && kVectors <= kPanelVectors)
          __builtin_prefetch(from + 2048);
      }
      panels[v] += kPackedColumns * 4;
      return Load<U32>(from);
    }
  }

  // kWords words of each row, by what the panels have for them.
  inline __attribute__((always_inline)) void AddWords(const Words (&x)[kPlanes][kHeld]) {
#if FFN_DOT_FP16
    if constexpr (kHalves) {
      Unrolled<2 * kWords>([&](auto i) __attribute__((always_inline)) {
        AskFor(panels[0]);
        Unrolled<kVectors / 2>([&](auto j) __attribute__((always_inline)) {
          const auto w = Load<Halves>(panels[0] + j * sizeof(Halves));
          Unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
            sum[r][2 * j] = MultiplyHalf<i, false>(sum[r][2 * j], w, x[0][r]);
            sum[r][2 * j + 1] = MultiplyHalf<i, true>(sum[r][2 * j + 1], w, x[0][r]);
          });
        });
        panels[0] += kPackedColumns * 2;
      });
      return;
    }
#endif
#if FFN_MATRICES
    if constexpr (kMatrices) {
      Unrolled<kWords / 2>([&](auto i) __attribute__((always_inline)) {
        Unrolled<kVectors>([&](auto v) __attribute__((always_inline)) {
          const U32 upper = Next(v), lower = Next(v);
          const U32 left = WordsByTurns<0>(upper, lower), right = WordsByTurns<1>(upper, lower);
          Unrolled<kHeld / 2>([&](auto p) __attribute__((always_inline)) {
            const U32 rows = PairsOf<i>((U32)x[0][2 * p], (U32)x[0][2 * p + 1]);
            sum[2 * p][v] = MultiplyMatrices(sum[2 * p][v], rows, left);
            sum[2 * p + 1][v] = MultiplyMatrices(sum[2 * p + 1][v], rows, right);
          });
        });
      });
      return;
    }
#endif
    if constexpr (!kHalves && !kMatrices) {
      U32 stored[kVectors];
      Unrolled<kWords>([&](auto i) __attribute__((always_inline)) {
        U32 w[kVectors];
        Unrolled<kVectors>([&](auto v) __attribute__((always_inline)) {
          if (i % kParts == 0) stored[v] = Next(v);
          w[v] = Part<i % kParts>(stored[v]);
        });
        Unrolled<kPlanes>([&](auto p) __attribute__((always_inline)) {
          Each([&](Sum& one, auto r, auto v)
                   __attribute__((always_inline)) { one = MultiplyWord<i>(one, w[v], x[p][r]); });
        });
      });
    }
  }
};

template <typename T, int kRows, int kVectors, bool kPlain = false>
void DotTile(const DotRange& range, int64_t row, int64_t column, int64_t tile) {
  using DotSums = DotSums<T, kRows, kVectors, 1, kPlain>;
  using Sum = typename DotSums::Sum;
  float* const to = range.tile + row * range.tile_stride + column;
  DotSums sums(range, row, column, tile);
  const auto at = [&](int r, int v)
                      __attribute__((always_inline)) { return to + r * range.tile_stride + v * kLanes; };
  if (range.begins != nullptr) {
    sums.Each([&](Sum& one, int r, int) __attribute__((always_inline)) {
      if constexpr (std::is_same_v<T, int8_t>) {
        one = (Sum)SetBits(range.begins[row + r]);
      } else {
        one = Set(-0.0f);  // as begins has it, but needs no register
      }
    });
  } else {
    sums.Each([&](Sum& one, int r, int v) __attribute__((always_inline)) { one = Load<Sum>(at(r, v)); });
  }
  if constexpr (DotSums::kHeld > kRows) {
    Unrolled<kVectors>([&](auto v) { sums.sum[kRows][v] = Sum{}; });
  }
  sums.ExchangePairs();
  if constexpr (kPlain) {
    sums.AddTurn(0);
  } else {
    sums.AddSteps(range.steps, range.a_step);
  }
  sums.ExchangePairs();
  sums.Each([&](Sum& one, int r, int v) __attribute__((always_inline)) { Store(at(r, v), one); });
}

// c[left.rows][stride] += `steps` steps of a plane of the left operand times panels of T. c need not be
// cleared where `begins` says what its rows begin with.
template <typename T, int kPasses = 1>
void MultiplyPlane(const char* a, const LeftRows& left, const Panels& panels, int64_t steps, int64_t columns,
                   const Ahead& ahead, float* c, int64_t stride, const uint32_t* begins) {
  static_assert(kPasses == 1, "more are for what splits fp16");
  const int64_t tiles = (left.rows + kDotRows - 1) / kDotRows;
  DotRange range = {a,
                    left.rows * kTileRowBytes,
                    steps,
                    panels,
                    c,
                    stride,
                    tiles > 1 ? ahead.Shared(tiles, MostAsked(steps)) : Ahead{}};
  range.begins = begins;
  if constexpr (kReadsWholePanels && kMultiplies<T>) {
    // More are as fast with wide tiles, since they wait for the instructions.
    if (left.rows <= kFewRows) {
      constexpr int64_t kRun = 2;  // steps; 1 and 8 were about as fast
      const int64_t step = BlockColumns(left.left);
      ForEachWholePanel(left.rows, columns, 0, steps, kRun,
                        [&](auto rows, auto vectors, int64_t row, int64_t column, int64_t tile, int64_t begin,
                            int64_t end) {
                          DotRange run = range;
                          run.a += begin * range.a_step;
                          run.panels.data = panels.At<T>(begin * step, 0);
                          run.steps = end - begin;
                          run.begins = begin == 0 ? begins : nullptr;
                          DotTile<T, rows, vectors>(run, row, column, tile);
                        });
      return;
    }
  }
  ForEachTile<kDotRows>(left.rows, columns,
                        [&](auto rows, auto vectors, int64_t row, int64_t column, int64_t tile) {
                          if constexpr (kMultiplies<T>) DotTile<T, rows, vectors>(range, row, column, tile);
                        });
}

// Whether a plain weight is multiplied as it lies: what a single tile of rows reads once needs no packing.
template <typename T>
constexpr bool kReadsPlain = kMultiplies<T> && (std::is_same_v<T, BFloat> || std::is_same_v<T, int8_t>);
template <typename T>
inline bool ReadsPlain(const Weight& weight, Left left) {
  constexpr Left kAsItIs = std::is_same_v<T, BFloat> ? Left::kBf16
                           : kMultipliesInt16        ? Left::kInt16
                                                     : Left::kInt8;
  return kReadsPlain<T> && LiesByRows(weight) && left == kAsItIs;
}

// As MultiplyPlane, of a plain weight: a turn's rows of W are read from end to end of the columns, as in
// MultiplyPlainRows. Whole steps of whole panels.
template <typename T>
void MultiplyPlain(const LeftRows& left, const Weight& weight, const Block& block, float* c, int64_t stride) {
  const T* const from = PlainAt<T>(weight, block.expert, block.k, block.column);
  const int64_t turn = BlockColumns(left.left) * kWords / kStepWords;
  DotRange range = {};
  range.tile = c;
  range.tile_stride = stride;
  range.row_bytes = RowBytes<T>(weight);
  for (int64_t k = 0; k < block.rows; k += turn) {
    range.a = left.At(0, block.k + k);
    range.panels.data = reinterpret_cast<const char*>(from) + k * range.row_bytes;
    ForEachTile<kDotRows>(left.rows, block.columns,
                          [&](auto rows, auto vectors, int64_t row, int64_t column, int64_t tile) {
                            DotTile<T, rows, vectors, true>(range, row, column, tile);
                          });
  }
}

#if FFN_DOT_INTEGERS
// The groups of integer weights beside x of X, from the first column of a task.
template <typename X>
struct Groups {
  const X* offset;
  const X* scale;
  int64_t N;              // from one group to the next
  int64_t rows;           // of a group
  int64_t columns;        // of the task
  const float* row_sums;  // of the left operand, as SumPieces has them
  int64_t left_rows;      // from 32 rows of W to the next
};

// Rows of tiles whose sums and totals fit the registers.
constexpr int kHoldingRows = 6;

// tile += scale (sums + offset * row sums) of each piece of rows [begin, end) of W. The tile itself stays in
// registers too, where these suffice.
template <typename W, typename X, int kRows, int kVectors>
void ScaledTile(const DotRange& range, const Groups<X>& groups, int64_t begin, int64_t end, int64_t row,
                int64_t column, int64_t number) {
  constexpr bool kHolds = kRows * kVectors <= kHoldingRows * kPanelVectors;
  float* const tile = range.tile + row * range.tile_stride + column;
  const auto at = [&](int r, int v)
                      __attribute__((always_inline)) { return tile + r * range.tile_stride + v * kLanes; };
  DotSums<W, kRows, kVectors, std::is_same_v<X, Half> ? 2 : 1> sums(range, row, column, number);
  F32 total[kHolds ? kRows : 1][kVectors];
  if constexpr (kHolds) {
    sums.Each([&](F32&, int r, int v) __attribute__((always_inline)) { total[r][v] = Load<F32>(at(r, v)); });
  }
  for (int64_t k = begin; k < end;) {
    const int64_t piece_end = PieceEnd(k, end, groups.rows);
    sums.Each([&](F32& one, int, int) __attribute__((always_inline)) { one = Set(-0.0f); });
    sums.AddSteps((piece_end - k + 31) / 32, range.a_step);
    const int64_t first = k / groups.rows * groups.N + column;
    if (piece_end % groups.rows == 0) {
      // The next group's are N further, where no hardware prefetcher looks. (Asking for those of the one
      // after it, groups of 32 and a row: 1.2 times as fast; Zen 4.)
      Unrolled<(kVectors + 1) / 2>([&](auto v) __attribute__((always_inline)) {
        const int64_t line = first + 2 * groups.N + v * 64 / static_cast<int64_t>(sizeof(X));
        __builtin_prefetch(groups.offset + line);
        __builtin_prefetch(groups.scale + line);
      });
    }
    const float* const row_sums = groups.row_sums + (k - begin) / 32 * groups.left_rows + row;
    F32 offset[kVectors], scale[kVectors];
    Unrolled<kVectors>([&](auto v) __attribute__((always_inline)) {
      const int64_t n = v * kLanes;
      offset[v] = LoadFloats(groups.offset + first + n, groups.columns - column - n);
      scale[v] = LoadFloats(groups.scale + first + n, groups.columns - column - n);
    });
    sums.Each([&](F32& one, int r, int v) __attribute__((always_inline)) {
      const F32 both = Fma(Set(row_sums[r]), offset[v], one);
      if constexpr (kHolds) {
        total[r][v] = Fma(both, scale[v], total[r][v]);
      } else {
        Store(at(r, v), Fma(both, scale[v], Load<F32>(at(r, v))));
      }
    });
    k = piece_end;
  }
  if constexpr (kHolds) {
    sums.Each([&](F32&, int r, int v) __attribute__((always_inline)) { Store(at(r, v), total[r][v]); });
  }
}

// Fewer than FewestRows of X times packed or plain integers of T, for MultiplyNarrowRows.
template <typename T, typename X>
void MultiplyIntegers(const Product& product, const Segment& segment, const Columns& columns, float* tile,
                      TaskScratch* scratch) {
  using W = std::conditional_t<std::is_same_v<T, int8_t>, WideInt8, T>;
  const LeftRows left(product, segment);
  const Weight& weight = *product.weight;
  const Channels& channels = *product.channels;
  const int64_t index = segment.expert * channels.G * product.N + columns.column;
  const int64_t group_rows = product.K / channels.G, stride = TileStride(columns.columns);
  // Plain weights go through scratch, and so do the sums of the left operand's rows: one for each piece of 32
  // rows of W at least. (Shorter blocks were no faster.)
  const int64_t pieces = static_cast<int64_t>(sizeof(scratch->sums) / sizeof(float)) / left.rows;
  const int64_t depth = weight.packed ? pieces * 32 / kKBlock * kKBlock : kKBlock;
  const int64_t width = weight.packed ? columns.columns : kMinColumns;
  // Short groups of int4: 1.04 to 1.1 times as fast as higher tiles; int8, which take longer to convert, 0.9
  // times (Zen 4).
  const bool holds = std::is_same_v<T, Int4Pair> && group_rows <= 64;
  const int64_t most_rows = holds ? kHoldingRows : kDotRows;
  for (int64_t block = 0; block < product.K; block += depth) {
    const int64_t rows = product.K - block < depth ? product.K - block : depth, end = block + rows;
    SumPieces(left, block, end, group_rows, left.rows, scratch);
    for (int64_t n = 0; n < columns.columns; n += width) {
      const int64_t strip = columns.columns - n < width ? columns.columns - n : width;
      if (!weight.packed && rows % 32 != 0) __builtin_memset(scratch->packed, 0, sizeof(scratch->packed));
      const Block part = {segment.expert, block, rows, columns.column + n, strip};
      const Panels panels = PanelsOf<T>(weight, product.K, part, kKBlock, scratch);
      const int64_t tiles = (left.rows + most_rows - 1) / most_rows;
      Ahead ahead = {};
      if (tiles > 1) {
        ahead = AheadOf<T>(weight, panels, part, 0, weight.packed ? kPackedColumns : width)
                    .Shared(tiles, MostAsked((rows + 31) / 32));
      }
      const DotRange range = {
          left.At(0, block), left.rows * kTileRowBytes, 0, panels, tile + n, stride, ahead,
          left.PlaneBytes()};
      const Groups<X> groups = {static_cast<const X*>(channels.antiquant_offset) + index + n,
                                static_cast<const X*>(channels.antiquant_scale) + index + n,
                                product.N,
                                group_rows,
                                strip,
                                scratch->sums,
                                left.rows};
      // A row alone reads four panels at once (int4: 1.1 times as fast as two; Zen 4).
      constexpr int kWidest = 4 * kPanelVectors;
      int64_t c = 0;
      if (left.rows == 1) {
        for (; c + kWidest * kLanes <= strip; c += kWidest * kLanes) {
          ScaledTile<W, X, 1, kWidest>(range, groups, block, end, 0, c, 0);
        }
      }
      const auto multiply = [&](auto tile_rows, auto vectors, int64_t row, int64_t column, int64_t number) {
        ScaledTile<W, X, tile_rows, vectors>(range, groups, block, end, row, c + column, number);
      };
      if (holds) {
        ForEachTile<kHoldingRows>(left.rows, strip - c, multiply);
      } else if constexpr (std::is_same_v<T, int8_t> && std::is_same_v<X, BFloat>) {
        // More than kManyRows rows take a vector at a time: converting int8 twice costs more than reading the
        // left operand twice (1.1 times as fast; fp16, twice the products, no faster; Zen 4).
        ForEachTile<2 * kManyRows>(left.rows, strip - c, multiply);
      } else {
        ForEachTile<kDotRows>(left.rows, strip - c, multiply);
      }
    }
  }
}

#endif

// What kWordOffset adds to the sums of a row, whose steps begin at `a`.
inline uint32_t OffsetOf(const char* a, int64_t a_step, int64_t steps) {
  if constexpr (kWordOffset == 0) return 0;
  I32 sums = {};
  for (int64_t s = 0; s < steps; ++s, a += a_step) {
    for (int64_t i = 0; i < kTileRowBytes; i += sizeof(I32)) {
      sums = DotProduct(sums, SetBits(0x01010101), Load<I32>(a + i));
    }
  }
  uint32_t sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += static_cast<uint32_t>(sums[lane]);
  return sum * kWordOffset;
}

// What the sums of each row begin with. A worker's tasks of a segment share it: summing the rows again for
// each took 2 to 6 % of the time of many rows of int8 (Zen 4).
inline const uint32_t* BeginningsOf(const LeftRows& left, const Segment& segment, TaskScratch* scratch) {
  if (scratch->begins_of != &segment) {
    for (int64_t r = 0; r < left.rows; ++r) {
      uint32_t begin = left.left == Left::kInt16 ? 0 : 0x80000000;  // what is added to -0 stays as it is
      if (left.left == Left::kInt8) {
        begin = 0 - OffsetOf(left.At(r, 0), left.rows * kTileRowBytes, left.Blocks());
      }
      scratch->begins[r] = begin;
    }
    scratch->begins_of = &segment;
  }
  return scratch->begins;
}

// Where MultiplyPlane does not begin the sums.
inline void BeginSums(const Wave&, const LeftRows& left, const Columns& columns, const uint32_t* begins,
                      float* tile) {
  const int64_t stride = TileStride(columns.columns);
  for (int64_t r = 0; r < left.rows; ++r) {
    for (int64_t n = 0; n < stride; n += kLanes) Store(tile + r * stride + n, SetBits(begins[r]));
  }
}

}  // namespace
}  // namespace ffn::cpu
