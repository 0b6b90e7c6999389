// SPDX-License-Identifier: Apache-2.0
// The driver of the CPU kernels: walks through a call in waves of rows, each in three parallel regions - rows
// of x to float32, first product, second product. Compiled once, for the baseline; the tasks inside the
// regions are ffn-inl.h, reached through the Kernels table (kernels.h) of the instruction set (isa.cc).
#include "cpu/ffn.h"

#include <unistd.h>

#include <algorithm>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"

namespace ffn::cpu {
namespace {

// The roundings of the call's mode: contract.md section e, docs/numerics.md.
Steps StepsOf(const Problem& p) {
  Steps steps = {};
  steps.glu = IsGlu(p.activation);
  steps.quant = p.x_dtype == DType::kInt8;
  steps.deq_scale_mask = 0xffffe000;
  if (steps.quant) {
    steps.first = p.y_dtype == DType::kFloat16 ? Rounding::kFp16 : Rounding::kNone;
    steps.hidden = Rounding::kFp16;
  } else if (p.x_dtype == DType::kFloat16) {
    const bool high_precision = p.high_precision && p.weight_dtype == DType::kFloat16;
    steps.first = high_precision ? Rounding::kNone : Rounding::kFp16;
    steps.hidden = high_precision && !steps.glu ? Rounding::kFp16HalfAway : Rounding::kFp16;
  } else if (p.x_dtype == DType::kBFloat16) {
    steps.hidden = steps.glu ? Rounding::kBf16 : Rounding::kBf16HalfAway;
  }
  // Storing fp16 rounds by itself, ties to even.
  if (p.y_dtype == DType::kBFloat16) steps.y = Rounding::kBf16;
  if (p.K2 == 0) {
    // y is bias2, by a path of its own (section d).
    steps.deq_scale_mask = 0xffffffff;
    if (p.x_dtype == DType::kBFloat16) steps.y = Rounding::kBf16HalfAway;
  }
  return steps;
}

constexpr int64_t RoundUp(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Rows of x and of the intermediate wait here, as left operands, for the length of a wave.
constexpr int64_t kWaveBytes = 24 << 20;

struct ScratchPlan {
  int64_t wave_rows;
  int64_t segment_rows;   // at most
  int64_t first, second;  // bytes of a row of the two left operands; of one product, the first is the second
  int64_t workers;

  int64_t FirstBytes() const { return first == 0 ? 0 : wave_rows * first + kSlackBytes; }
  int64_t SecondBytes() const { return wave_rows * second + kSlackBytes; }
  size_t Bytes() const {
    return static_cast<size_t>(FirstBytes() + SecondBytes()) +
           static_cast<size_t>(workers) * sizeof(TaskScratch);
  }
};

// Of the cache that one thread has to itself, the second level.
int64_t CacheBytes(const ParallelFor& parallel) {
  static const int64_t detected = [] {
    constexpr int64_t kUnknown = 1 << 20;
#if defined(_SC_LEVEL2_CACHE_SIZE)
    const int64_t bytes =
        sysconf(_SC_LEVEL2_CACHE_SIZE);  // 0 where the system does not know, as on most of Arm's
    if (bytes > 0) return bytes;
#endif
    return kUnknown;
  }();
  return parallel.cache_bytes > 0 ? parallel.cache_bytes : detected;
}

ScratchPlan PlanScratch(const Problem& p, const ParallelFor& parallel, const Kernels& kernels) {
  // An expert with many rows may store them in another way than one with few.
  const int64_t bytes = std::max(LeftBytes(kernels.left_of(p, 1)), LeftBytes(kernels.left_of(p, kMaxRows)));
  ScratchPlan plan = {};
  plan.first = p.second_only ? 0 : RoundUp(p.K1, kKBlock) * bytes;
  plan.second = RoundUp(p.K2, kKBlock) * bytes;
  // A block of the left operand has a quarter of the cache, and so have the sums of a task (TaskColumns).
  const auto cached = [&](int64_t column_bytes) {
    return std::clamp<int64_t>(CacheBytes(parallel) / 4 / (kKBlock * column_bytes), 16, kMaxRows);
  };
  const int64_t row_bytes = std::max<int64_t>(plan.first + plan.second, 1);
  plan.wave_rows = std::min(std::clamp<int64_t>(kWaveBytes / row_bytes, 1, cached(bytes)), p.M);
  // What is multiplied as it lies costs nothing to read again; fewer rows have longer blocks of k then.
  const bool packed = p.weight2.packed && (p.second_only || p.weight1.packed);
  const bool as_it_lies = packed && p.weight_dtype == p.x_dtype;
  plan.segment_rows = as_it_lies ? cached(sizeof(float)) : kMaxRows;
  plan.workers = std::max<int64_t>(parallel.threads, 1);
  return plan;
}

// At least, where there are columns enough: who is through with its tasks waits for the others.
constexpr int64_t kTasksPerWorker = 8;

// Columns of a task of a segment, one of `segments`: as many as the cache has room for their sums, but enough
// tasks for the workers. Bits do not depend on it (gemm-inl.h).
int64_t TaskColumns(const Product& product, int64_t columns, const Segment& segment, bool reads_plain_rows,
                    int64_t segments, int64_t cache_bytes, int64_t workers) {
  // The right half of a GLU may begin inside a panel, which must fit the tile too.
  if (columns != product.N && columns % kPackedColumns != 0) return kPackedColumns;
  const Weight& weight = *product.weight;
  // A transposed weight is contiguous along K, so few rows gain nothing from wide tasks.
  if (!weight.packed && weight.col_stride != 1 && segment.rows <= kFewRows) return kMinColumns;
  if (reads_plain_rows) {
    // As long runs of a row as there may be, each worker having a task, and sums that stay in the caches.
    const int64_t most = std::min(kMaxPlainColumns, 2 * kMaxPlainColumns / segment.rows);
    const int64_t blocks = std::max(RoundUp(columns, most) / most, RoundUp(workers, segments) / segments);
    return std::max(RoundUp(RoundUp(columns, blocks) / blocks, kMinColumns),
                    kMinColumns);  // columns may be 0
  }
  const int64_t halves = columns == product.N ? 1 : 2;
  const int64_t most =
      std::min<int64_t>(cache_bytes / 4 / 4, kTileCells) / (halves * RoundUp(segment.rows, 16));
  int64_t width = kMinColumns;
  while (2 * width <= std::min(most, kMaxColumns) &&
         segments * columns >= kTasksPerWorker * workers * 2 * width) {
    width *= 2;
  }
  return width;
}

// Rows of one expert that a task takes. As many as may be, unless a product is too narrow to give each worker
// two tasks: then each reads its part of the weight several times. Bits do not depend on it (gemm-inl.h).
int64_t SegmentRows(int64_t most, int64_t narrowest, int64_t workers) {
  constexpr int64_t kFewest = 32;
  const int64_t blocks = RoundUp(std::max<int64_t>(narrowest, 1), kMinColumns) / kMinColumns;
  int64_t rows = most;
  while (rows > kFewest && RoundUp(most, rows) / rows * blocks < 2 * workers)
    rows = RoundUp(rows / 2, kFewest);
  return rows;
}

bool BeforeRows(int64_t row, const Segment& segment) { return row < segment.row; }
bool BeforeTasks(int64_t task, const Segment& segment) { return task < segment.first_task; }

// The end of a wave that begins at `first` and has `wave_rows` rows at most. An expert whose rows it would
// cut is left to the next wave where that saves reading its weights once. `expert` owns row `first`. Bits do
// not depend on it.
int64_t WaveEnd(const Problem& p, int64_t expert, int64_t first, int64_t wave_rows) {
  const int64_t end = std::min(first + wave_rows, p.M);
  while (p.row_ends[expert] < end) ++expert;
  const int64_t begin = expert > 0 ? p.row_ends[expert - 1] : 0, left = p.row_ends[expert] - end;
  if (left == 0 || begin <= first) return end;
  const auto waves = [&](int64_t rows) { return RoundUp(rows, wave_rows) / wave_rows; };
  return waves(left + end - begin) < 1 + waves(left) ? begin : end;
}

}  // namespace

void RunFfn(const Problem& p, const ParallelFor& parallel, const char* isa) {
  const Kernels& kernels = KernelsOf(isa);
  if (p.M == 0 || p.N2 == 0) return;

  const bool both = !p.second_only;
  const ScratchPlan plan = PlanScratch(p, parallel, kernels);
  const int64_t cache_bytes = CacheBytes(parallel);
  const Scratch memory(Scratch::kRows, plan.Bytes());
  TaskScratch* scratch = reinterpret_cast<TaskScratch*>(memory.data());
  char* const first = reinterpret_cast<char*>(scratch + plan.workers);
  char* const second = first + plan.FirstBytes();
  std::vector<Segment> segments;
  segments.reserve(static_cast<size_t>(std::min(plan.wave_rows, p.E)));

  Wave wave = {};
  wave.problem = &p;
  wave.steps = StepsOf(p);
  wave.cache_bytes = cache_bytes;
  wave.second = {p.K2, p.N2, second, plan.second, &p.weight2, &p.channels2};
  wave.first = both ? Product{p.K1, p.N1, first, plan.first, &p.weight1, &p.channels1} : wave.second;

  int64_t expert = 0;
  for (wave.first_row = 0; wave.first_row < p.M; wave.first_row += wave.rows) {
    while (p.row_ends[expert] <= wave.first_row) ++expert;
    const int64_t end = WaveEnd(p, expert, wave.first_row, plan.wave_rows);
    wave.rows = end - wave.first_row;
    const int64_t work = wave.rows * ((both ? p.K1 * p.N1 : 0) + p.K2 * p.N2);
    const int64_t workers = std::clamp<int64_t>(work / kWorkPerWorker, 1, plan.workers);
    const int64_t most_rows =
        SegmentRows(std::min(wave.rows, plan.segment_rows), both ? std::min(p.K2, p.N2) : p.N2, workers);
    segments.clear();
    for (int64_t row = wave.first_row; row < end;) {
      while (p.row_ends[expert] <= row) ++expert;
      const int64_t rows = std::min(std::min(p.row_ends[expert], end) - row, most_rows);
      // By the rows of the whole call: where it is cut into waves must not show in anyone's bits.
      const int64_t expert_rows = p.call_rows != nullptr
                                      ? p.call_rows[expert]
                                      : p.row_ends[expert] - (expert > 0 ? p.row_ends[expert - 1] : 0);
      segments.push_back({expert, row - wave.first_row, rows, kernels.left_of(p, expert_rows), 0, 0});
      row += rows;
    }

    constexpr int64_t kRowsPerTask = 16;
    ForEach(parallel, wave.rows * p.K1 < kWorkPerWorker ? 1 : workers,
            RoundUp(wave.rows, kRowsPerTask) / kRowsPerTask, [&](int64_t i, int64_t) {
              const int64_t first = i * kRowsPerTask, last = std::min(first + kRowsPerTask, wave.rows);
              auto segment = std::upper_bound(segments.begin(), segments.end(), first, BeforeRows) - 1;
              for (int64_t row = first; row < last; row = segment++->End()) {
                kernels.load_rows(wave, *segment, row - segment->row, std::min(last, segment->End()) - row);
              }
            });

    const auto run_product = [&](const Product& product, int64_t columns, auto task) {
      int64_t tasks = 0;
      for (Segment& segment : segments) {
        segment.first_task = tasks;
        segment.task_columns = TaskColumns(product, columns, segment,
                                           kernels.reads_plain_rows(*product.weight, p.weight_dtype, segment),
                                           static_cast<int64_t>(segments.size()), cache_bytes, workers);
        tasks += RoundUp(columns, segment.task_columns) / segment.task_columns;
      }
      for (int64_t worker = 0; worker < workers; ++worker) scratch[worker].begins_of = nullptr;
      ForEach(parallel, workers, tasks, [&](int64_t i, int64_t worker) {
        const Segment& segment = *(std::upper_bound(segments.begin(), segments.end(), i, BeforeTasks) - 1);
        const int64_t column = (i - segment.first_task) * segment.task_columns;
        task(wave, segment, column, std::min(segment.task_columns, columns - column), scratch + worker);
      });
    };
    if (both) run_product(wave.first, p.K2, kernels.first_product);
    run_product(wave.second, p.N2, kernels.second_product);
  }
}

size_t ScratchBytes(const Problem& problem, const ParallelFor& parallel) {
  return PlanScratch(problem, parallel, KernelsOf(nullptr)).Bytes();
}

}  // namespace ffn::cpu
