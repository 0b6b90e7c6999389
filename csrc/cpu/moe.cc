// SPDX-License-Identifier: Apache-2.0
// ffn.moe on the CPU: tokens sorted by expert, their experts by RunFfn (ffn.cc), and the weighted sum over
// each token's experts. x is gathered by the task that converts its rows, so no permuted copy of it exists;
// the results, still float32, wait for the sum in one buffer. Nobody adds to another's memory: bits depend
// neither on the schedule nor on the numbering of the experts.
#include <algorithm>
#include <utility>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"

namespace ffn::cpu {
namespace {

// More tokens in a chunk read each expert's weights less often; this much holds 16384 rows of 4096.
constexpr int64_t kResultBytes = 256 << 20;

struct Chunk {
  int64_t tokens;   // at most
  int64_t results;  // floats
};

Chunk PlanChunk(const Problem& p, const Routing& routing) {
  const int64_t bytes = std::max<int64_t>(routing.top_k * p.N2 * 4, 1);  // a token's
  const int64_t tokens = std::clamp<int64_t>(kResultBytes / bytes, 1, std::max<int64_t>(p.M, 1));
  return {tokens, tokens * routing.top_k * p.N2};
}

// What one chunk of tokens needs, in memory that all chunks share.
class Sorted {
 public:
  Sorted(const Problem& p, const Routing& routing, int64_t tokens)
      : routing_(routing),
        E_(p.E),
        ends_(static_cast<size_t>(p.E)),
        assignments_(static_cast<size_t>(tokens * routing.top_k)),
        present_(static_cast<size_t>(tokens * routing.top_k)) {}

  // Sorts the slots of `tokens` tokens by expert, keeping their order within one. Slots and tokens of the
  // result count from the chunk's first.
  void Sort(int64_t first_token, int64_t tokens) {
    const int64_t* const ids = routing_.ids + first_token * routing_.top_k;
    const float* const weights = routing_.weights + first_token * routing_.top_k;
    const int64_t slots = tokens * routing_.top_k;
    std::fill(ends_.begin(), ends_.end(), 0);
    for (int64_t slot = 0; slot < slots; ++slot) {
      present_[static_cast<size_t>(slot)] = ids[slot] < E_;
      if (ids[slot] < E_) ++ends_[static_cast<size_t>(ids[slot])];
    }
    int64_t begin = 0;
    for (int64_t& end : ends_) begin += std::exchange(end, begin);
    rows_ = begin;
    for (int64_t slot = 0; slot < slots; ++slot) {  // moves each expert's begin to its end
      if (ids[slot] >= E_) continue;
      const int64_t row = ends_[static_cast<size_t>(ids[slot])]++;
      assignments_[static_cast<size_t>(row)] = {slot / routing_.top_k, slot, weights[slot]};
    }
  }

  int64_t rows() const { return rows_; }
  const int64_t* ends() const { return ends_.data(); }
  const Assignment* assignments() const { return assignments_.data(); }
  const uint8_t* present() const { return present_.data(); }

 private:
  const Routing& routing_;
  const int64_t E_;
  int64_t rows_ = 0;
  std::vector<int64_t> ends_;
  std::vector<Assignment> assignments_;
  std::vector<uint8_t> present_;
};

size_t ElementBytes(DType y_dtype) { return y_dtype == DType::kFloat32 ? 4 : 2; }

}  // namespace

void RunMoe(const Problem& problem, const Routing& routing, const ParallelFor& parallel, const char* isa) {
  const Kernels& kernels = KernelsOf(isa);
  const Problem& p = problem;
  if (p.M == 0 || p.N2 == 0) return;

  const Chunk chunk = PlanChunk(p, routing);
  Sorted sorted(p, routing, chunk.tokens);
  const Scratch memory(Scratch::kResults, static_cast<size_t>(chunk.results) * sizeof(float));
  float* const results = reinterpret_cast<float*>(memory.data());
  std::vector<int64_t> call_rows(static_cast<size_t>(p.E));
  for (int64_t slot = 0; slot < p.M * routing.top_k; ++slot) {
    if (routing.ids[slot] < p.E) ++call_rows[static_cast<size_t>(routing.ids[slot])];
  }
  const size_t x_bytes = p.x_dtype == DType::kInt8 ? 1 : ElementBytes(p.x_dtype);
  for (int64_t token = 0; token < p.M; token += chunk.tokens) {
    const int64_t tokens = std::min(chunk.tokens, p.M - token);
    sorted.Sort(token, tokens);
    Problem experts = p;
    experts.x = static_cast<const char*>(p.x) + static_cast<size_t>(token * p.K1) * x_bytes;
    experts.M = sorted.rows();
    experts.row_ends = sorted.ends();
    experts.call_rows = call_rows.data();
    experts.assignments = sorted.assignments();
    experts.y = results;
    RunFfn(experts, parallel, isa);

    void* const y = static_cast<char*>(p.y) + static_cast<size_t>(token * p.N2) * ElementBytes(p.y_dtype);
    const Combination combination = {results, sorted.present(), routing.top_k, p.N2, p.y_dtype, y};
    constexpr int64_t kTokensPerTask = 16;
    const int64_t work = tokens * routing.top_k * p.N2;
    ForEach(parallel, std::clamp<int64_t>(work / kWorkPerWorker, 1, parallel.threads),
            (tokens + kTokensPerTask - 1) / kTokensPerTask, [&](int64_t i, int64_t) {
              const int64_t first = i * kTokensPerTask;
              kernels.combine(combination, first, std::min(kTokensPerTask, tokens - first));
            });
  }
}

size_t MoeScratchBytes(const Problem& problem, const Routing& routing, const ParallelFor& parallel) {
  const Chunk chunk = PlanChunk(problem, routing);
  const int64_t slots = chunk.tokens * routing.top_k;
  Problem experts = problem;
  experts.M = slots;
  return ScratchBytes(experts, parallel) + static_cast<size_t>(chunk.results) * sizeof(float) +
         static_cast<size_t>(slots) * (sizeof(Assignment) + 1) +
         2 * static_cast<size_t>(problem.E) * sizeof(int64_t);
}

}  // namespace ffn::cpu
