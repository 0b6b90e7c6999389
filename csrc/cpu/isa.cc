// SPDX-License-Identifier: Apache-2.0
// Chooses among the instruction sets that are compiled in (kernels.h). Compiled for the baseline.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <dlfcn.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace ffn::cpu {
namespace {

constexpr const Kernels* kKernels[] = {
#if defined(__x86_64__)
    &kAmxKernels,     &kAvx512Bf16Kernels, &kAvx512VnniKernels,
    &kAvx512Kernels,  &kAvx2VnniKernels,   &kAvx2Kernels,
#elif defined(__aarch64__)
    &kNeonI8mmKernels,
    &kNeonFhmKernels,
    &kNeonKernels,
#endif
    &kGenericKernels,
};

bool Supported(const Kernels& kernels) {
#if defined(__x86_64__)
  // These ask the operating system too (XCR0). F16C is not among the names every compiler knows; it has no
  // state.
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
  const bool avx2 = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (&kernels == &kAvx2Kernels) return avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (&kernels == &kAvx512Kernels) return avx512;
  if (&kernels == &kAvx2VnniKernels) {  // CPUID leaf 7, subleaf 1: AVX-VNNI, whose name GCC 12 does not know
    return avx2 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax & 1u << 4) != 0;
  }
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  if (&kernels == &kAvx512VnniKernels) return vnni;
  if (&kernels == &kAvx512Bf16Kernels) return vnni && __builtin_cpu_supports("avx512bf16");
  if (&kernels == &kAmxKernels) return avx512 && __builtin_cpu_supports("avx512bf16") && MayUseTiles();
#elif defined(__aarch64__)
  // Armv8.2-A, which it is compiled for, has no bit of its own; every CPU with dot products is one.
  const unsigned long has = getauxval(AT_HWCAP), has2 = getauxval(AT_HWCAP2);
  // The kernel's numbers, some of which older headers lack.
  constexpr unsigned long kFphp = 1 << 9, kAsimdHp = 1 << 10, kAsimdDp = 1 << 20, kAsimdFhm = 1 << 23;
  constexpr unsigned long kI8mm = 1 << 13, kBf16 = 1 << 14;  // of has2
  const auto all = [](unsigned long has, unsigned long bits) { return (has & bits) == bits; };
  const bool neon = all(has, kAsimdDp), fhm = neon && all(has, kFphp | kAsimdHp | kAsimdFhm);
  if (&kernels == &kNeonKernels) return neon;
  if (&kernels == &kNeonFhmKernels) return fhm;
  if (&kernels == &kNeonI8mmKernels) return fhm && all(has2, kBf16 | kI8mm);
#endif
  return &kernels == &kGenericKernels;
}

// Whether they run at all: on this machine, or with something in the process that does the work of
// instructions which it lacks (tests/instructions.cc). Such help counts only for what is asked for by name.
bool Runs(const Kernels& kernels) {
#if defined(__x86_64__)
  using Emulates = bool(const char*);
  const auto emulates = reinterpret_cast<Emulates*>(dlsym(RTLD_DEFAULT, "FfnOpsEmulates"));
  if (emulates != nullptr && emulates(kernels.name)) return true;
#endif
  return Supported(kernels);
}

// Whether they are the better choice where they run. A dot product of bf16 does twice the work of a float32
// multiply-add: AMD's CPUs take as long for either (Zen 4, measured), Intel's four times as long.
bool IsWorthwhile([[maybe_unused]] const Kernels& kernels) {
#if defined(__x86_64__)
  if (&kernels == &kAvx512Bf16Kernels) return __builtin_cpu_is("amd");
#endif
  return true;
}

const Kernels* Named(const char* name) {
  for (const Kernels* kernels : kKernels) {
    if (std::strcmp(kernels->name, name) == 0) return kernels;
  }
  return nullptr;
}

// `who` is what asked for it, and opens the error.
const Kernels& Require(const std::string& who, const char* name, const char* fix) {
  const Kernels* named = Named(name);
  if (named != nullptr && Runs(*named)) return *named;
  std::string names;
  for (const Kernels* kernels : kKernels) {
    if (named == nullptr || Runs(*kernels)) names += (names.empty() ? "" : ", ") + std::string(kernels->name);
  }
  throw std::runtime_error(who + " is " + name + ", but this " +
                           (named == nullptr ? "build has " : "machine can run ") + names + " (" + fix + ")");
}

const Kernels& Selected() {
  static const Kernels& selected = []() -> const Kernels& {
    const char* forced = std::getenv("FFN_OPS_ISA");
    if (forced != nullptr && *forced != '\0')
      return Require("FFN_OPS_ISA", forced, "unset it, or name one of these");
    for (const Kernels* kernels : kKernels) {
      if (Supported(*kernels) && IsWorthwhile(*kernels)) return *kernels;
    }
    return kGenericKernels;
  }();
  return selected;
}

}  // namespace

bool MayUseTiles() {
#if defined(__x86_64__)
  // CPUID leaf 7: AMX-BF16, AMX-TILE and AMX-INT8. Linux gives a process the registers when it asks.
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kTileBits = 1u << 22 | 1u << 24 | 1u << 25;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0 || (edx & kTileBits) != kTileBits) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

const Kernels& KernelsOf(const char* isa) {
  return isa == nullptr ? Selected() : Require("isa", isa, "name one of these");
}

const char* const* CompiledIsas(size_t* count) {
  static const auto names = [] {
    std::vector<const char*> names;
    for (const Kernels* kernels : kKernels) names.push_back(kernels->name);
    return names;
  }();
  *count = names.size();
  return names.data();
}

bool IsaSupported(const char* name) {
  const Kernels* kernels = Named(name);
  return kernels != nullptr && Runs(*kernels);
}

const char* SelectedIsa() { return Selected().name; }

}  // namespace ffn::cpu
