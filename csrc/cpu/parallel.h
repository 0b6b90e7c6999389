// SPDX-License-Identifier: Apache-2.0
// Tasks on the caller's threads, for ffn.cc and moe.cc: whoever is free takes the next task.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "cpu/ffn.h"

namespace ffn::cpu {

// Subnormals and rounding as IEEE 754 has them while it lives: these settings belong to threads, and which
// thread takes a task is chance. torch.set_flush_denormal changes one thread's.
class DefaultFloatingPoint {
 public:
  DefaultFloatingPoint() : before_(Get()) { Set(kDefault); }
  ~DefaultFloatingPoint() { Set(before_); }
  DefaultFloatingPoint(const DefaultFloatingPoint&) = delete;
  DefaultFloatingPoint& operator=(const DefaultFloatingPoint&) = delete;

 private:
#if defined(__x86_64__)
  using Control = uint32_t;
  static constexpr Control kDefault =
      0x1f80;  // MXCSR at reset: exceptions masked, nearest even, subnormals kept
  static Control Get() { return __builtin_ia32_stmxcsr(); }
  static void Set(Control value) { __builtin_ia32_ldmxcsr(value); }
#elif defined(__aarch64__)
  using Control = uint64_t;
  static constexpr Control kDefault = 0;  // FPCR: nearest even, subnormals kept
  static Control Get() {
    Control value;
    __asm__ volatile("mrs %0, fpcr" : "=r"(value));
    return value;
  }
  static void Set(Control value) { __asm__ volatile("msr fpcr, %0" : : "r"(value)); }
#else
  using Control = int;
  static constexpr Control kDefault = 0;
  static Control Get() { return 0; }
  static void Set(Control) {}
#endif

  const Control before_;
};

// Runs task(i, worker) for every i in [0, tasks) on up to `workers` workers, each taking the next one that is
// left.
template <typename Task>
void ForEach(const ParallelFor& parallel, int64_t workers, int64_t tasks, const Task& task) {
  struct Context {
    const Task& task;
    const int64_t tasks;
    std::atomic<int64_t> next{0};
  } context = {task, tasks};
  const auto body = [](void* opaque, int64_t worker) {
    Context& context = *static_cast<Context*>(opaque);
    const DefaultFloatingPoint ieee;
    for (int64_t i; (i = context.next.fetch_add(1, std::memory_order_relaxed)) < context.tasks;)
      context.task(i, worker);
  };
  workers = std::min(workers, tasks);
  if (workers > 1) {
    parallel.run(parallel.self, workers, body, &context);
  } else {
    body(&context, 0);
  }
}

// A region costs some microseconds, so a worker must have as much to do (this many multiplications).
inline constexpr int64_t kWorkPerWorker = 1 << 17;

}  // namespace ffn::cpu
