// SPDX-License-Identifier: Apache-2.0
// The probes of probe.h. Compiled for the baseline: each function names the instructions that it uses, and
// runs only where they are.
#include "cpu/probe.h"

#include <chrono>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu/kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace ffn::cpu {
namespace {

// Sums in registers: two multiply-adds a cycle with a latency of 4 or 5 need ten of them.
constexpr int kSums = 12;
constexpr int64_t kSteps = 20000;  // of a loop, some 100 us: the clock is read between loops

volatile float sink;  // what makes the loops' results needed
// Read at run time, so that no loop can be computed in advance. The sums converge to kAddend / (1 - kFactor).
volatile float factor = 0.75f, addend = 0.3f;

struct Probe {
  const char* name;
  double (*loop)();  // runs once and returns its operations
};

#if defined(__x86_64__)

double FmaBaseline() {
  __m128 sums[kSums];
  for (auto& sum : sums) sum = _mm_set1_ps(addend);
  const __m128 a = _mm_set1_ps(factor), b = _mm_set1_ps(addend);
  for (int64_t step = 0; step < kSteps; ++step)
    for (auto& sum : sums) sum = _mm_add_ps(_mm_mul_ps(sum, a), b);
  for (auto& sum : sums) sink = _mm_cvtss_f32(sum);
  return 2.0 * 4 * kSums * kSteps;
}

__attribute__((target("avx2,fma"))) double FmaAvx2() {
  __m256 sums[kSums];
  for (auto& sum : sums) sum = _mm256_set1_ps(addend);
  const __m256 a = _mm256_set1_ps(factor), b = _mm256_set1_ps(addend);
  for (int64_t step = 0; step < kSteps; ++step)
    for (auto& sum : sums) sum = _mm256_fmadd_ps(sum, a, b);
  for (auto& sum : sums) sink = _mm256_cvtss_f32(sum);
  return 2.0 * 8 * kSums * kSteps;
}

__attribute__((target("avx512f"))) double FmaAvx512() {
  __m512 sums[kSums];
  for (auto& sum : sums) sum = _mm512_set1_ps(addend);
  const __m512 a = _mm512_set1_ps(factor), b = _mm512_set1_ps(addend);
  for (int64_t step = 0; step < kSteps; ++step)
    for (auto& sum : sums) sum = _mm512_fmadd_ps(sum, a, b);
  for (auto& sum : sums) sink = _mm512_cvtss_f32(sum);
  return 2.0 * 16 * kSums * kSteps;
}

__attribute__((target("avx512f,avx512bf16"))) double Bf16() {
  __m512 sums[kSums];
  for (auto& sum : sums) sum = _mm512_set1_ps(addend);
  // Pairs of 0.375 by 0.75: the sums settle nowhere, but stay finite.
  const __m512bh a = (__m512bh)_mm512_set1_epi32(0x3ec0bec0), b = (__m512bh)_mm512_set1_ps(factor);
  for (int64_t step = 0; step < kSteps; ++step)
    for (auto& sum : sums) sum = _mm512_dpbf16_ps(sum, a, b);
  for (auto& sum : sums) sink = _mm512_cvtss_f32(sum);
  return 2.0 * 32 * kSums * kSteps;
}

__attribute__((target("avx512f,avx512vnni"))) double Vnni() {
  const auto some = static_cast<int>(factor * 1e9f);
  __m512i sums[kSums];
  for (auto& sum : sums) sum = _mm512_set1_epi32(some);
  const __m512i a = _mm512_set1_epi32(some), b = _mm512_set1_epi32(some / 3);
  for (int64_t step = 0; step < kSteps; ++step)
    for (auto& sum : sums) sum = _mm512_dpbusd_epi32(sum, a, b);
  for (auto& sum : sums) sink = static_cast<float>(_mm512_cvtsi512_si32(sum));
  return 2.0 * 64 * kSums * kSteps;
}

// Four sums from two tiles on either side, as a kernel that reads each tile twice. Zeros would draw less
// power and run faster than data does.
struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

#define FFN_TILE_PROBE(name, target_name, product, operations)                                  \
  __attribute__((target("amx-tile," target_name))) double name() {                              \
    alignas(64) uint32_t data[2][16][16];                                                       \
    uint32_t random = static_cast<uint32_t>(factor * 4e9f);                                     \
    for (auto& tile : data)                                                                     \
      for (auto& row : tile)                                                                    \
        for (auto& word : row) /* two bf16 of either sign and of size 2 to 0.5, or four int8 */ \
          word = ((random = random * 1664525 + 1013904223) & 0x80ff80ff) | 0x3f003f00;          \
    const TileConfig config;                                                                    \
    _tile_loadconfig(&config);                                                                  \
    _tile_zero(0);                                                                              \
    _tile_zero(1);                                                                              \
    _tile_zero(2);                                                                              \
    _tile_zero(3);                                                                              \
    _tile_loadd(4, data[0], 64);                                                                \
    _tile_loadd(5, data[1], 64);                                                                \
    _tile_loadd(6, data[1], 64);                                                                \
    _tile_loadd(7, data[0], 64);                                                                \
    constexpr int64_t steps = kSteps / 10;                                                      \
    for (int64_t step = 0; step < steps; ++step) {                                              \
      product(0, 4, 6);                                                                         \
      product(1, 4, 7);                                                                         \
      product(2, 5, 6);                                                                         \
      product(3, 5, 7);                                                                         \
    }                                                                                           \
    _tile_stored(0, data[0], 64);                                                               \
    _tile_release();                                                                            \
    sink = static_cast<float>(data[0][0][0]);                                                   \
    return 4.0 * operations * static_cast<double>(steps);                                       \
  }
FFN_TILE_PROBE(AmxBf16, "amx-bf16", _tile_dpbf16ps, (2 * 16 * 16 * 32))
FFN_TILE_PROBE(AmxInt8, "amx-int8", _tile_dpbssd, (2 * 16 * 16 * 64))
#undef FFN_TILE_PROBE

std::vector<Probe> Find() {
  std::vector<Probe> probes;
  if (__builtin_cpu_supports("avx512f")) {
    probes.push_back({"fma", FmaAvx512});
  } else if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    probes.push_back({"fma", FmaAvx2});
  } else {
    probes.push_back({"fma", FmaBaseline});
  }
  if (__builtin_cpu_supports("avx512bf16")) probes.push_back({"bf16", Bf16});
  if (__builtin_cpu_supports("avx512vnni")) probes.push_back({"vnni", Vnni});
  if (MayUseTiles()) {
    probes.push_back({"amx_bf16", AmxBf16});
    probes.push_back({"amx_int8", AmxInt8});
  }
  return probes;
}

#elif defined(__aarch64__)

double FmaNeon() {
  float32x4_t sums[2 * kSums];  // up to four multiply-adds a cycle
  for (auto& sum : sums) sum = vdupq_n_f32(addend);
  const float32x4_t a = vdupq_n_f32(factor), b = vdupq_n_f32(addend);
  for (int64_t step = 0; step < kSteps; ++step)
    for (auto& sum : sums) sum = vfmaq_f32(b, sum, a);
  for (auto& sum : sums) sink = vgetq_lane_f32(sum, 0);
  return 2.0 * 4 * 2 * kSums * kSteps;
}

std::vector<Probe> Find() { return {{"fma", FmaNeon}}; }

#else

double FmaScalar() {
  float sums[kSums];
  for (auto& sum : sums) sum = addend;
  const float a = factor, b = addend;
  for (int64_t step = 0; step < kSteps; ++step)
    for (auto& sum : sums) sum = sum * a + b;
  for (auto& sum : sums) sink = sum;
  return 2.0 * kSums * kSteps;
}

std::vector<Probe> Find() { return {{"fma", FmaScalar}}; }

#endif

const std::vector<Probe>& Probes() {
  static const std::vector<Probe> probes = Find();
  return probes;
}

using Clock = std::chrono::steady_clock;

double Seconds(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

}  // namespace

const char* const* ComputeProbes(size_t* count) {
  static const auto names = [] {
    std::vector<const char*> names;
    for (const Probe& probe : Probes()) names.push_back(probe.name);
    return names;
  }();
  *count = names.size();
  return names.data();
}

double ProbeCompute(const char* name, double seconds) {
  for (const Probe& probe : Probes()) {
    if (std::strcmp(probe.name, name) != 0) continue;
    probe.loop();
    const auto begin = Clock::now();
    double operations = 0;
    do operations += probe.loop();
    while (Seconds(begin) < seconds);
    return operations / Seconds(begin);
  }
  return -1;
}

void ProbeRead(const void* data, size_t size, size_t streams) {
  constexpr size_t kWords = 8;  // a line of 64 bytes each
  const size_t lines = size / (streams * kWords * sizeof(uint64_t));
  const auto* const words = static_cast<const uint64_t*>(data);
  uint64_t sums[kWords] = {};
  for (size_t line = 0; line < lines; ++line) {
    for (size_t stream = 0; stream < streams; ++stream) {
      const uint64_t* const at = words + (stream * lines + line) * kWords;
      for (size_t i = 0; i < kWords; ++i) sums[i] += at[i];
    }
  }
  for (const uint64_t sum : sums) sink = static_cast<float>(sum);
}

}  // namespace ffn::cpu
