// SPDX-License-Identifier: Apache-2.0
// The multiplication: a tile of sums, float32 or int32, from rows of a and panels of W. Few rows read the
// panels as they are stored and turn them into float32 on the way; more rows have them expanded first. Some
// plain weights are read without panels (plain-inl.h). Used by ffn-inl.h; built on ahead-inl.h and
// packed-inl.h.
//
// What makes a row's bits independent of everything else: each sum is one chain of fused multiply-adds over
// ascending k, begun at the tile and put back into it, whatever the tile's rows, the block of k, or the
// columns of the task are. For antiquant weights there is such a chain for each group within kKBlock rows.
#pragma once

#include "cpu/ahead-inl.h"
#include "cpu/kernels.h"
#include "cpu/left-inl.h"
#include "cpu/packed-inl.h"
#include "cpu/plain-inl.h"
#include "cpu/vec-inl.h"

namespace ffn::cpu {
namespace {

// What happens to the products x W of a range of k.
enum class Sums {
  kFloat,   // they continue the tile's chains
  kInt,     // exact in float32 for up to kKBlock rows (kernels.h); added to an int32 tile, wrapping around
  kScaled,  // tile += scale * (sum of x w + offset * sum of x)
  kExact,   // likewise as x ((w + offset) scale) one by one: nothing overflows that the result does not
};

// Groups of rows between one asking and the next, and in a turn of the loop over k: up to eight rows, beyond
// which turns only cost compile time.
template <typename T>
constexpr int kAskEvery = Panel<T>::kGroup < 4 ? 4 / Panel<T>::kGroup : 1;
template <typename T>
constexpr int kTurnRows = Panel<T>::kGroup * kAskEvery<T>;

// A range of k within one kKBlock, counted from the block's first row, and the columns of a task.
struct Range {
  const float* a;  // row 0 of the rows, at the block's first k; rows are kKBlock apart
  Panels panels;   // at the block's first k
  int64_t begin, end;
  // Antiquant only: of the range's group, by column, and the sum of a over the range, by row.
  const float* offset;
  const float* scale;
  const float* sums;
  float* tile;
  int64_t tile_stride;
  Ahead ahead;  // panels
  Ahead rows;   // of a

  // Lines that a tile can ask for.
  template <typename T>
  int64_t MostAsked() const {
    return (end - begin) / kTurnRows<T> * Asking::kLinesEach;
  }
  // With equal shares for `tiles` tiles of a panel, which go along k in `runs` runs.
  template <typename T>
  Range Shared(int64_t tiles, int64_t runs = 1) const {
    Range shared = *this;
    shared.ahead = ahead.Shared(tiles * runs, MostAsked<T>() / runs);
    shared.rows = rows.Shared(tiles * runs, MostAsked<T>() / runs);
    return shared;
  }
  // What tile `tile` of the panel of `column` asks for.
  template <typename T>
  Asking Asks(int64_t column, int64_t tile) const {
    return ahead.From(column, tile, panels.At<T>(begin, column));
  }
  Asking AsksRows(int64_t column, int64_t tile) const {
    return rows.From(column, tile, reinterpret_cast<const char*>(a));
  }
};

constexpr int kPanelVectors = kPackedColumns / kLanes;
// Whether few rows have tiles as wide as a panel (ForEachWholePanel), or as two, which then do not ask for
// what comes next (ForEachPair).
constexpr bool kReadsWholePanels = kPanelVectors == 4;
template <int kVectors>
constexpr bool kAsksFor = !kReadsWholePanels || kVectors <= kPanelVectors;
// Whether tiles of one panel, which convert on the way, outrun the hardware's prefetchers where those are
// relied on else (kAsks). (fp16 with 5 to 12 rows: 1.2 to 1.4 times as fast; Zen 4.)
template <typename T, int kVectors>
constexpr bool kOutruns = kLanes == 16 && kVectors <= kPanelVectors && !std::is_same_v<T, float>;

// kRows rows from `row` times kVectors * kLanes columns from `column`, which is tile `number` of its panel.
// kMany: the tile is one of many, so that the panel is in a cache already, and asks for rows too. Loops over
// rows and vectors are unrolled by hand: GCC else leaves the sums in memory.
template <typename T, Sums kSums, int kRows, int kVectors, bool kMany = false>
void MultiplyTile(const Range& range, int64_t row, int64_t column, int64_t number) {
  using Layout = Panel<T>;
  using Vector = typename Layout::Vector;
  constexpr int kGroup = Layout::kGroup;
  constexpr bool kContinues = kSums == Sums::kFloat || kSums == Sums::kExact;
  const float* const a = range.a + row * kKBlock;
  float* const tile = range.tile + row * range.tile_stride + column;
  constexpr int kPanels = kVectors > kPanelVectors ? kVectors / kPanelVectors : 1;
  const char* panels[kPanels];
  F32 sum[kRows][kVectors];
  const auto each_sum = [&](auto use) __attribute__((always_inline)) {
    Unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
      Unrolled<kVectors>([&](auto v) __attribute__((always_inline)) { use(sum[r][v], r, v); });
    });
  };
  Unrolled<kPanels>([&](auto p) __attribute__((always_inline)) {
    panels[p] = range.panels.At<T>(range.begin / kGroup * kGroup, column + p * kPackedColumns);
  });
  each_sum([&](F32& one, int r, int v) __attribute__((always_inline)) {
    one = kContinues ? Load<F32>(tile + r * range.tile_stride + v * kLanes) : F32{};
  });

  // Rows [first, last) of the group that begins with row k.
  const auto step = [&](int64_t k, int first, int last) __attribute__((always_inline)) {
    Vector w[kVectors];
    const auto load = [&](int v) __attribute__((always_inline)) {
      const char* const from = panels[v / kPanelVectors] + v % kPanelVectors * kLanes * kUnitBytes<T>;
      w[v] = Load<Vector>(from);
      if constexpr (kAsksFor<kVectors> && !kMany) AskFor<kOutruns<T, kVectors>>(from);
    };
    // Where sums and rows fill the registers, each vector is loaded when it is multiplied.
    constexpr bool kLoadsLate = kGroup == 1 && kRows <= kVectors;
    if constexpr (!kLoadsLate) Unrolled<kVectors>(load);
    Unrolled<kGroup>([&](auto i) __attribute__((always_inline)) {
      if (i < first || i >= last) return;
      const auto element = [&](int v) __attribute__((always_inline)) {
        const F32 stored = Layout::template Element<i>(w[v]);
        if constexpr (kSums != Sums::kExact) return stored;
        const int64_t n = column + v * kLanes;
        return (stored + Load<F32>(range.offset + n)) * Load<F32>(range.scale + n);
      };
      const auto x = [&](int r) __attribute__((always_inline)) { return Set(a[r * kKBlock + k + i]); };
      // All of one side are held in registers beside the sums: the side that has fewer.
      if constexpr (kRows > kVectors) {
        F32 elements[kVectors];
        Unrolled<kVectors>([&](auto v) __attribute__((always_inline)) { elements[v] = element(v); });
        Unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
          const F32 one = x(r);
          Unrolled<kVectors>(
              [&](auto v) __attribute__((always_inline)) { sum[r][v] = Fma(one, elements[v], sum[r][v]); });
        });
      } else {
        F32 xs[kRows];
        Unrolled<kRows>([&](auto r) __attribute__((always_inline)) { xs[r] = x(r); });
        Unrolled<kVectors>([&](auto v) __attribute__((always_inline)) {
          if constexpr (kLoadsLate) load(v);
          const F32 one = element(v);
          Unrolled<kRows>([&](auto r)
                              __attribute__((always_inline)) { sum[r][v] = Fma(xs[r], one, sum[r][v]); });
        });
      }
    });
    Unrolled<kPanels>([&](auto p) __attribute__((always_inline)) { panels[p] += kGroupBytes<T>; });
  };
  int64_t k = range.begin / kGroup * kGroup;
  const auto last = [&] { return static_cast<int>(range.end - k < kGroup ? range.end - k : kGroup); };
  if (k < range.begin) {
    step(k, static_cast<int>(range.begin - k), last());
    k += kGroup;
  }
  Asking ahead = range.Asks<T>(column, number);
  [[maybe_unused]] Asking rows_ahead = {};
  if constexpr (kMany) rows_ahead = range.AsksRows(column, number);
  for (; k + kTurnRows<T> <= range.end; k += kTurnRows<T>) {
    ahead.Next();
    if constexpr (kMany) rows_ahead.Next();
    Unrolled<kAskEvery<T>>([&](auto i) __attribute__((always_inline)) { step(k + i * kGroup, 0, kGroup); });
  }
  for (; k < range.end; k += kGroup) step(k, 0, last());

  each_sum([&](F32& one, int r, int v) __attribute__((always_inline)) {
    float* const to = tile + r * range.tile_stride + v * kLanes;
    const int64_t n = column + v * kLanes;
    if constexpr (kSums == Sums::kInt) {
      Store(to, Load<U32>(to) + (U32) __builtin_convertvector(one, I32));
    } else if constexpr (kSums == Sums::kScaled) {
      const F32 both = Fma(Set(range.sums[row + r]), Load<F32>(range.offset + n), one);
      Store(to, Fma(both, Load<F32>(range.scale + n), Load<F32>(to)));
    } else {
      Store(to, one);
    }
  });
}

// Sums of a tile fill the registers, so more rows have fewer columns. A row alone has too few sums to hide
// the latency of an addition with less than four vectors, and two panels at once are read as fast as more.
constexpr int kWideRows = kRegisters == 32 ? 4 : 2;   // so many have four vectors, more have two
constexpr int kManyRows = kRegisters == 32 ? 12 : 6;  // of a tile of expanded panels
// Up to so many rows convert packed panels on the way: those of one tile, which would use an expanded panel
// once, and of two where an instruction converts fp16.
template <typename T>
constexpr int kConvertingRows = kLanes == 16 && std::is_same_v<T, Half> ? 2 * kManyRows : kManyRows;
// Up to so many rows read two packed panels from end to end, not all of a task's columns block by block: runs
// of K instead of kKBlock rows, which prefetchers follow. (fp16 and int8: 5 to 15 % faster; Zen 4.)
template <typename T>
constexpr int kEndToEndRows = kReadsWholePanels ? 1
                              : kLanes == 16    ? kConvertingRows<T>
                                                : 0;

// `tiles` tiles of kRows rows, then `lower` ones of a row less, over all columns. A panel stays near while
// the rows go by.
template <int kRows, int kWide, typename Use>
inline void Sweep(int64_t tiles, int64_t lower, int64_t columns, const Use& use) {
  constexpr int kVectors = kRows <= kWide ? 4 : kRows <= kManyRows ? 2 : 1;
  const auto all_rows = [&](auto vectors, int64_t n) {
    const int64_t first = kVectors == 1 ? n % kPackedColumns / kLanes * (tiles + lower) : 0;
    int64_t tile = 0, row = 0;
    for (; tile < tiles; ++tile, row += kRows) {
      use(std::integral_constant<int, kRows>(), vectors, row, n, first + tile);
    }
    if constexpr (kRows > 1) {
      for (; tile < tiles + lower; ++tile, row += kRows - 1) {
        use(std::integral_constant<int, kRows - 1>(), vectors, row, n, first + tile);
      }
    }
  };
  int64_t n = 0;
  for (; n + kVectors * kLanes <= columns; n += kVectors * kLanes) {
    all_rows(std::integral_constant<int, kVectors>(), n);
  }
  if constexpr (kVectors > 2) {
    for (; n < columns; n += 2 * kLanes) all_rows(std::integral_constant<int, 2>(), n);
  }
}

// Calls use(kRows, kVectors, row, column, tile) for each tile of `rows` rows and `columns` columns, which are
// rounded up to whole panels; `tile` counts those of a panel. The first two are constants to the compiler.
// Tiles have up to kMost rows, and none more than one less than others: a low tile uses a panel too little.
// (4 rows behind 21 times 12 took 5 % of the time; Zen 4.) Those of up to kWide rows have four vectors,
// those of more than kManyRows one, half a panel.
template <int kMost, int kWide = kWideRows, typename Use>
inline void ForEachTile(int64_t rows, int64_t columns, const Use& use) {
  columns = (columns + kPackedColumns - 1) / kPackedColumns * kPackedColumns;
  const int64_t tiles = (rows + kMost - 1) / kMost;
  if (tiles == 0) return;
  const int64_t height = (rows + tiles - 1) / tiles, lower = height * tiles - rows;
  Unrolled<kMost>([&](auto i) {
    if (height == i + 1) Sweep<i + 1, kWide>(tiles - lower, lower, columns, use);
  });
}

template <typename T, Sums kSums, int kMost, bool kMany = false>
void MultiplyRange(const Range& range, int64_t rows, int64_t columns) {
  const Range shared = range.Shared<T>((rows + kMost - 1) / kMost);
  ForEachTile<kMost>(rows, columns,
                     [&](auto tile_rows, auto vectors, int64_t row, int64_t column, int64_t tile) {
                       MultiplyTile<T, kSums, tile_rows, vectors, kMany>(shared, row, column, tile);
                     });
}

// A row alone reads two panels at once, for which the hardware's prefetchers do best by themselves (20 GB/s
// of float32 and 17 of bf16, where one panel that is asked for is read at 15; Zen 3). Calls use(kVectors,
// column) for each tile.
template <typename Use>
inline void ForEachPair(int64_t columns, const Use& use) {
  int64_t n = 0;
  for (; n + kPackedColumns < columns; n += 2 * kPackedColumns) {
    use(std::integral_constant<int, 2 * kPanelVectors>(), n);
  }
  if (n < columns) use(std::integral_constant<int, kPanelVectors>(), n);
}

// Where two vectors are half a panel, tiles of more than two rows would read a weight's lines by halves, one
// half after the other: 9 GB/s of float32 instead of 15 (Zen 3). So tiles are as wide as a panel there, of up
// to three rows, which take turns every `run` of their steps along k, and a row alone has pairs of panels.
// Calls use(kRows, kVectors, row, column, tile, begin, end) for each.
constexpr int kWholePanelRows = kManyRows / 2;
template <typename Use>
inline void ForEachWholePanel(int64_t rows, int64_t columns, int64_t begin, int64_t end, int64_t run,
                              const Use& use) {
  if (rows == 1) {
    return ForEachPair(columns, [&](auto vectors, int64_t column) {
      use(std::integral_constant<int, 1>(), vectors, 0, column, 0, begin, end);
    });
  }
  if (rows <= kWholePanelRows) run = end - begin;
  for (int64_t n = 0; n < columns; n += kPackedColumns) {
    for (int64_t first = begin; first < end; first += run) {
      const int64_t last = end - first < run ? end : first + run;
      ForEachTile<kWholePanelRows, kWholePanelRows>(
          rows, kPackedColumns, [&](auto tile_rows, auto, int64_t row, int64_t, int64_t tile) {
            use(tile_rows, std::integral_constant<int, kPanelVectors>(), row, n, tile, first, last);
          });
    }
  }
}

// kMany: more than kManyRows, all of which read a panel, expanded or not, while it is near. (1024 rows of
// float32: 15 to 25 % faster than tiles of six rows by half a panel that asked for all they could, and not
// for rows; Zen 3.)
template <typename T, bool kMany>
void MultiplyWholePanels(const Range& range, int64_t rows, int64_t columns) {
  // Rows of W; a half or twice as many were about as fast.
  constexpr int64_t kRun = kMany ? 128 : 32;
  const int64_t runs = (range.end - range.begin + kRun - 1) / kRun;
  const int64_t tiles = (rows + kWholePanelRows - 1) / kWholePanelRows;
  Range run = range.Shared<T>(tiles, runs);
  ForEachWholePanel(rows, columns, range.begin, range.end, kRun,
                    [&](auto tile_rows, auto vectors, int64_t row, int64_t column, int64_t tile,
                        int64_t begin, int64_t end) {
                      run.begin = begin;
                      run.end = end;
                      tile += (begin - range.begin) / kRun * tiles;
                      MultiplyTile<T, Sums::kFloat, tile_rows, vectors, kMany>(run, row, column, tile);
                    });
}

// Panels of float32: many rows, or any number where tiles of few rows are no others.
template <Sums kSums>
void MultiplyFloats(const Range& range, int64_t rows, int64_t columns) {
  constexpr bool kFloat = kSums == Sums::kFloat;
  if constexpr (kReadsWholePanels && kFloat) {
    MultiplyWholePanels<float, true>(range, rows, columns);
  } else if (kFloat && rows > kManyRows) {
    MultiplyRange<float, kSums, kManyRows, kFloat>(range, rows, columns);
  } else {
    MultiplyRange<float, kSums, kManyRows>(range, rows, columns);
  }
}

// The sum of `count` floats, in an order that `count` alone decides.
inline float SumOf(const float* a, int64_t count) {
  F32 sum = {};
  for (int64_t k = 0; k < count; k += kLanes) sum = sum + LoadFloats(a + k, count - k);
  float lanes[kLanes];
  Store(lanes, sum);
  for (int step = kLanes / 2; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  }
  return lanes[0];
}

// The sum of columns [begin, end) of a left operand's row, within a block of kKBlock.
inline float SumOfRow(const LeftRows& left, int64_t row, int64_t begin, int64_t end, TaskScratch* scratch) {
  for (int64_t k = begin; k < end; k += kLanes) Store(scratch->row + k - begin, left.Get(row, k));
  return SumOf(scratch->row, end - begin);
}

// Rows of W that belong to one group and to one block of kKBlock: the last one + 1 of those from `begin`,
// before `end`.
inline int64_t PieceEnd(int64_t begin, int64_t end, int64_t group_rows) {
  const int64_t group_end = (begin / group_rows + 1) * group_rows,
                block_end = (begin / kKBlock + 1) * kKBlock;
  const int64_t piece_end = group_end < block_end ? group_end : block_end;
  return piece_end < end ? piece_end : end;
}

// Sums of the left operand's rows over the pieces of rows [block, end) of W: of the piece that begins at k
// from (k - block) / 32 * stride on, since a piece has 32 rows at least, or is the last one.
inline void SumPieces(const LeftRows& left, int64_t block, int64_t end, int64_t group_rows, int64_t stride,
                      TaskScratch* scratch) {
  for (int64_t k = block, piece_end = 0; k < end; k = piece_end) {
    piece_end = PieceEnd(k, end, group_rows);
    float* const sums = scratch->sums + (k - block) / 32 * stride;
    for (int64_t r = 0; r < left.rows; ++r) sums[r] = SumOfRow(left, r, k, piece_end, scratch);
  }
}

// Between the rows of a task's tile. A power of two would put the rows of long ones into the same few sets of
// the first-level cache.
inline int64_t TileStride(int64_t columns) {
  if (columns <= kMinColumns) return kMinColumns;
  return (columns + kPackedColumns - 1) / kPackedColumns * kPackedColumns + kTilePadding;
}

// The columns of a task in one product: those of W from `column`, a multiple of kPackedColumns for packed
// weights.
struct Columns {
  int64_t column, columns;
};

constexpr int64_t kScaleBytes = 2;  // of an antiquant scale or offset, fp16 or bf16

// Offsets and scales of the group of rows that k belongs to; returns the group's last row + 1.
inline int64_t LoadGroup(const Wave& wave, const Product& product, int64_t expert, int64_t k,
                         const Columns& columns, TaskScratch* scratch) {
  const Channels& channels = *product.channels;
  if (channels.antiquant_scale == nullptr) return product.K;
  const int64_t rows = product.K / channels.G;
  const int64_t index = (expert * channels.G + k / rows) * product.N + columns.column;
  const DType dtype = wave.problem->x_dtype;
  LoadRow(dtype, channels.antiquant_offset, index, columns.columns, scratch->antiquant_offset);
  LoadRow(dtype, channels.antiquant_scale, index, columns.columns, scratch->antiquant_scale);
  const int64_t end = (k / rows + 1) * rows;
  if (end < product.K) {  // the next group's are N further, where no hardware prefetcher looks
    for (int64_t n = index + product.N; n < index + product.N + columns.columns; n += 64 / kScaleBytes) {
      __builtin_prefetch(static_cast<const char*>(channels.antiquant_offset) + n * kScaleBytes);
      __builtin_prefetch(static_cast<const char*>(channels.antiquant_scale) + n * kScaleBytes);
    }
  }
  return end;
}

// Rows of panels of so many columns, as float32, that fit scratch: kKBlock over a power of two.
inline int64_t PanelDepth(int64_t columns) {
  int64_t depth = kKBlock;
  while (depth * columns > kPanelSize) depth /= 2;
  return depth;
}

// Expanding a panel, or several passes, must pay: so many rows of an expert take integer weights that were
// scaled first, or fp16 through bf16. Fewer convert on the way, and scale sums. It is the one place where a
// row's bits depend on how many an expert has. 16 is what a tile of AMX has; the others were measured (24 on
// AMX, whose fp16 weights take three passes; 49 and 32 on Zen 4).
constexpr int64_t FewestRows(DType weight) {
  if (!kConvertsIntegers) return weight == DType::kFloat16 ? 24 : 16;
  return weight == DType::kInt4 ? 32 : 49;
}

// How segments that are multiplied as float32 store their left operands.
Left FloatLeftOf(const Problem& problem, int64_t rows) {
  const bool antiquant = problem.channels1.antiquant_scale != nullptr;
  return antiquant && rows < FewestRows(problem.weight_dtype) ? Left::kFloatExact : Left::kFloat;
}

// tile[rows][stride] += rows [row, row + rows) of the segment times the columns.
template <typename T, Sums kSums>
void MultiplyRows(const Wave& wave, const Product& product, const Segment& segment, int64_t row, int64_t rows,
                  const Columns& columns, float* tile, int64_t stride, TaskScratch* scratch) {
  constexpr bool kExpands = !std::is_same_v<T, float>;
  const Weight& weight = *product.weight;
  const LeftRows left(product, segment);
  const bool antiquant = kSums == Sums::kScaled || kSums == Sums::kExact;
  constexpr bool kEndToEnd = kSums == Sums::kFloat || kSums == Sums::kScaled;
  constexpr bool kReadsPairs = kReadsWholePanels && kEndToEnd;
  if constexpr (kEndToEndRows<T> > 0 && kEndToEnd) {
    constexpr int64_t kBoth = 2 * kPackedColumns;
    if (weight.packed && rows <= kEndToEndRows<T> && columns.columns > kBoth) {
      for (int64_t n = 0; n < columns.columns; n += kBoth) {
        const Columns both = {columns.column + n, columns.columns - n < kBoth ? columns.columns - n : kBoth};
        MultiplyRows<T, kSums>(wave, product, segment, row, rows, both, tile + n, stride, scratch);
      }
      return;
    }
  }
  if constexpr (kReadsTransposed && kSums == Sums::kFloat) {
    if (!weight.packed && weight.col_stride != 1 && rows <= kFewRows && IsFloat(left.left)) {
      const T* const from = PlainAt<T>(weight, segment.expert, 0, columns.column);
      WithFewRows(rows, [&](auto few) {
        MultiplyTransposed<T, few>(left, row, from, weight.col_stride, columns.columns, tile, stride);
      });
      return;
    }
  }
  const int64_t converting = weight.packed ? kConvertingRows<T> : kManyRows;
  // To scale takes longer than to convert.
  const bool expanded = kExpands && rows > (kSums == Sums::kExact ? 1 : converting);
  const bool strips = expanded || rows > (kExpands ? converting : kFewRows) || (antiquant && !weight.packed);
  const int64_t width = strips && columns.columns > kMinColumns ? kMinColumns : columns.columns;
  // What goes through scratch must fit there. Either divides kKBlock; for antiquant weights it is kKBlock in
  // any case, since a chain ends with the block.
  const int64_t depth = weight.packed && !expanded ? kKBlock : PanelDepth(width);
  Range range = {};
  range.offset = scratch->antiquant_offset;
  range.scale = scratch->antiquant_scale;
  range.sums = scratch->sums;
  range.tile_stride = stride;
  for (int64_t block = 0; block < product.K; block += depth) {
    const int64_t block_rows = product.K - block < depth ? product.K - block : depth;
    Ahead rows_after = {};
    if (rows > converting && left.PlaneBytes() > wave.cache_bytes / 2) {
      rows_after = RowsAfter(left.At(0, block), left, 1, columns.columns);
    }
    if (IsFloat(left.left)) {
      range.a = reinterpret_cast<const float*>(left.At(row, block));
    } else {  // a single row that tiles could not multiply
      for (int64_t k = 0; k < block_rows; k += kLanes) Store(scratch->row + k, left.Get(row, block + k));
      range.a = scratch->row;
    }
    for (int64_t n = 0; n < columns.columns; n += width) {
      const Columns strip = {columns.column + n, columns.columns - n < width ? columns.columns - n : width};
      range.tile = tile + n;
      const Block part = {segment.expert, block, block_rows, strip.column, strip.columns};
      if constexpr (kSums == Sums::kFloat) {
        if (FloatsReadPlain(weight, wave.problem->weight_dtype, left.left, rows)) {
          const T* const from = PlainAt<T>(weight, part.expert, part.k, part.column);
          WithFewRows(rows, [&](auto few) {
            MultiplyPlainRows<T, few>(range.a, from, weight.row_stride, block_rows, strip.columns, range.tile,
                                      range.tile_stride);
          });
          continue;
        }
      }
      range.panels = PanelsOf<T>(weight, product.K, part, depth, scratch);
      range.rows = rows_after.Beside(n);
      const bool beside = !expanded || n + width < columns.columns,
                 more = beside || block + depth < product.K;
      Ahead ahead = {};
      if (more && rows > converting) {
        ahead = AheadOf<T>(weight, range.panels, part, beside ? 0 : depth,
                           !expanded ? kPackedColumns
                           : beside  ? width
                                     : -n);
      }
      if (expanded) {
        const int64_t expanded_rows =
            (block_rows + Panel<T>::kGroup - 1) / Panel<T>::kGroup * Panel<T>::kGroup;
        const Panels panels = range.panels;
        range.panels = {reinterpret_cast<const char*>(scratch->panel), expanded_rows * kGroupBytes<float>};
        if constexpr (kSums == Sums::kExact) {
          for (int64_t begin = 0, end = 0; begin < block_rows; begin = end) {
            end = LoadGroup(wave, product, segment.expert, block + begin, strip, scratch) - block;
            end = end < block_rows ? end : block_rows;
            Expand<T, true>(panels, begin, end, expanded_rows, strip.columns, *scratch, scratch->panel);
          }
          range.begin = 0;
          range.end = block_rows;
          range.ahead = ahead;
          MultiplyFloats<Sums::kFloat>(range, rows, strip.columns);
          continue;
        }
        Expand<T, false>(panels, 0, block_rows, expanded_rows, strip.columns, *scratch, scratch->panel);
      }
      for (range.begin = 0; range.begin < block_rows; range.begin = range.end) {
        const int64_t group_end =
            LoadGroup(wave, product, segment.expert, block + range.begin, strip, scratch);
        range.end = group_end - block < block_rows ? group_end - block : block_rows;
        range.ahead = ahead.Part<T>(range.begin, range.end);
        for (int64_t r = 0; kSums == Sums::kScaled && r < rows; ++r) {
          scratch->sums[r] = SumOf(range.a + r * kKBlock + range.begin, range.end - range.begin);
        }
        // Of these, tiles that no call reaches are not compiled.
        constexpr bool kWhole = kReadsWholePanels && kSums == Sums::kFloat;
        if constexpr (kSums == Sums::kExact) {
          MultiplyRange<T, kSums, 1>(range, rows, strip.columns);
        } else if (kWhole && rows <= kManyRows) {
          if constexpr (kWhole) MultiplyWholePanels<T, false>(range, rows, strip.columns);
        } else if (kReadsPairs && rows == 1) {
          ForEachPair(strip.columns, [&](auto vectors, int64_t column) {
            if constexpr (kReadsPairs) MultiplyTile<T, kSums, 1, vectors>(range, 0, column, 0);
          });
        } else if (expanded || !kExpands) {
          MultiplyFloats<kSums>(range, rows, strip.columns);
        } else if constexpr (!kWhole) {
          MultiplyRange<T, kSums, kManyRows>(range, rows, strip.columns);
        }
      }
    }
  }
}

// Whether a row of sums has an infinity or a NaN.
inline bool Overflowed(const float* sums, int64_t columns) {
  U32 any = {};
  for (int64_t n = 0; n < columns; n += kLanes) {
    any = any | (U32)((Load<U32>(sums + n) & kInfBits) == kInfBits);
  }
  uint32_t found = 0;
  for (int lane = 0; lane < kLanes; ++lane) found |= any[lane];
  return found != 0;
}

// A tile to add to. -0 is what adding leaves everything as it is: with K == 0 a bias of -0 stays -0. As int32
// it must be 0.
inline void Clear(const Wave& wave, const Columns& columns, int64_t rows, float* tile) {
  const F32 zero = wave.steps.quant ? F32{} : Set(-0.0f);
  for (int64_t i = 0; i < rows * TileStride(columns.columns); i += kLanes) Store(tile + i, zero);
}

// Multiplies those rows again, one by one, whose sums have an infinity or a NaN, and puts these sums into the
// place of those: of the others no bit may change, for which columns are neighbours is chance.
template <typename T, Sums kSums>
void Repeat(const Wave& wave, const Product& product, const Segment& segment, const Columns& columns,
            float* tile, TaskScratch* scratch) {
  for (int64_t r = 0; r < segment.rows; ++r) {
    float* const row = tile + r * TileStride(columns.columns);
    if (!Overflowed(row, columns.columns)) continue;
    float* const again = scratch->group;
    Clear(wave, columns, 1, again);
    MultiplyRows<T, kSums>(wave, product, segment, r, 1, columns, again, TileStride(columns.columns),
                           scratch);
    for (int64_t n = 0; n < columns.columns; n += kLanes) {
      const U32 sums = Load<U32>(row + n);
      Store(row + n, (sums & kInfBits) == kInfBits ? Load<U32>(again + n) : sums);
    }
  }
}

// tile[segment.rows][TileStride(columns)] = the segment's rows of product.a times the columns of W.
inline void Multiply(const Wave& wave, const Product& product, const Segment& segment, const Columns& columns,
                     float* tile, TaskScratch* scratch) {
  const bool antiquant = product.channels->antiquant_scale != nullptr;
  Clear(wave, columns, segment.rows, tile);
  WithWeightType(wave.problem->weight_dtype, [&](auto t) {
    using T = decltype(t);
    constexpr bool kInteger = std::is_same_v<T, int8_t> || std::is_same_v<T, Int4Pair>;
    if constexpr (!kInteger) {
      // Where there are instructions for bf16 or int8, LeftOf (ffn-inl.h) never asks for float32 instead.
      if constexpr (!kMultipliesBf16 || !std::is_same_v<T, BFloat>) {
        MultiplyRows<T, Sums::kFloat>(wave, product, segment, 0, segment.rows, columns, tile,
                                      TileStride(columns.columns), scratch);
      }
    } else if (!antiquant) {
      if constexpr (!kMultipliesInt8) {
        MultiplyRows<int8_t, Sums::kInt>(wave, product, segment, 0, segment.rows, columns, tile,
                                         TileStride(columns.columns), scratch);
      }
    } else {
      if (segment.left == Left::kFloat) {
        MultiplyRows<T, Sums::kExact>(wave, product, segment, 0, segment.rows, columns, tile,
                                      TileStride(columns.columns), scratch);
        return;
      }
      MultiplyRows<T, Sums::kScaled>(wave, product, segment, 0, segment.rows, columns, tile,
                                     TileStride(columns.columns), scratch);
      // Scaling after the sum overflows where a single product need not, and makes NaN of an infinite x.
      Repeat<T, Sums::kExact>(wave, product, segment, columns, tile, scratch);
    }
  });
}

}  // namespace
}  // namespace ffn::cpu
