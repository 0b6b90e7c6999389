// SPDX-License-Identifier: Apache-2.0
// Instructions of newer CPUs, for tests on x86-64 machines that lack them: AMX's tiles, and VPDPBUSD of
// AVX-512 VNNI and AVX-VNNI. They trap there, and this library's handler of SIGILL does their work and goes
// on behind them. So the kernels that run are those that ship, instruction by instruction, though it takes
// microseconds for each. tests/native.py builds and loads it.
//
// After Intel's Software Developer's Manual, volume 2: TDPBF16PS multiplies and adds fused in float32 without
// subnormals, even and odd products apart. What raises a fault on hardware (a bad configuration, tiles whose
// sizes do not match, no configuration) ends the process with a sentence.
#include <cpuid.h>
#include <immintrin.h>
#include <signal.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;

// One thread's. Not thread_local, whose first use may allocate, which a signal handler must not.
struct Tiles {
  std::atomic<int> thread{0};
  bool configured = false;
  uint16_t row_bytes[kTiles] = {};
  uint8_t rows[kTiles] = {};
  alignas(64) char data[kTiles][kRows][kRowBytes] = {};
};
Tiles all_tiles[1024];

[[noreturn]] void Fault(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  std::abort();
}

Tiles& TilesOfThread() {
  const int thread = static_cast<int>(syscall(SYS_gettid));
  for (Tiles& tiles : all_tiles) {
    int owner = tiles.thread.load(std::memory_order_relaxed);
    if (owner == thread || (owner == 0 && tiles.thread.compare_exchange_strong(owner, thread))) return tiles;
  }
  Fault("more threads have used tiles than the emulation holds");
}

struct Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

void LoadConfig(const char* from, Tiles* tiles) {
  Config config;
  std::memcpy(&config, from, sizeof(config));
  if (config.palette != 1 || config.start_row != 0) Fault("palette 1 from row 0 is the only configuration");
  for (const uint8_t byte : config.reserved) {
    if (byte != 0) Fault("a reserved byte of the configuration is not 0");
  }
  for (int i = 0; i < 16; ++i) {
    const int rows = config.rows[i], bytes = config.row_bytes[i];
    if (i >= kTiles ? rows != 0 || bytes != 0
                    : rows > kRows || bytes > kRowBytes || (rows == 0) != (bytes == 0)) {
      Fault("a tile of the configuration has a size that none can have");
    }
    if (i >= kTiles) continue;
    tiles->rows[i] = config.rows[i];
    tiles->row_bytes[i] = config.row_bytes[i];
  }
  tiles->configured = true;
  std::memset(tiles->data, 0, sizeof(tiles->data));
}

float FromBf16(const char* at) {
  uint16_t bits;
  std::memcpy(&bits, at, 2);
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

// A row of the products' sum. Columns are innermost, so that a compiler makes vectors of them.
__attribute__((target("avx2,fma"))) void AddRowBf16(const Tiles& t, int a, int b, int m, char* row) {
  float even[16] = {}, odd[16] = {}, sums[16];
  for (int k = 0; k < t.row_bytes[a] / 4; ++k) {
    const float left_even = FromBf16(t.data[a][m] + 4 * k), left_odd = FromBf16(t.data[a][m] + 4 * k + 2);
    for (int n = 0; n < 16; ++n) {
      even[n] = __builtin_fmaf(left_even, FromBf16(t.data[b][k] + 4 * n), even[n]);
      odd[n] = __builtin_fmaf(left_odd, FromBf16(t.data[b][k] + 4 * n + 2), odd[n]);
    }
  }
  std::memcpy(sums, row, sizeof(sums));
  for (int n = 0; n < 16; ++n) sums[n] += even[n] + odd[n];
  std::memcpy(row, sums, sizeof(sums));
}

__attribute__((target("avx2"))) void AddRowInt8(const Tiles& t, int a, int b, int m, char* row) {
  uint32_t sums[16];
  std::memcpy(sums, row, sizeof(sums));
  for (int k = 0; k < t.row_bytes[a]; k += 4) {
    const char *const left = t.data[a][m] + k, *const right = t.data[b][k / 4];
    for (int n = 0; n < 16; ++n) {
      int sum = 0;
      for (int i = 0; i < 4; ++i) sum += static_cast<int8_t>(left[i]) * static_cast<int8_t>(right[4 * n + i]);
      sums[n] += static_cast<uint32_t>(sum);
    }
  }
  std::memcpy(row, sums, sizeof(sums));
}

void Multiply(bool bf16, int c, int a, int b, Tiles* t) {
  if (a == b || a == c || b == c) Fault("a product's three tiles must differ");
  if (t->rows[c] != t->rows[a] || t->row_bytes[c] != t->row_bytes[b] || t->row_bytes[a] != 4 * t->rows[b] ||
      t->rows[c] == 0 || t->rows[b] == 0) {
    Fault("the tiles of a product do not match");
  }
  const unsigned controls = _mm_getcsr();
  _mm_setcsr(0x9fc0);  // to nearest, subnormals are zeros on both sides, nothing raises
  for (int m = 0; m < t->rows[c]; ++m) (bf16 ? AddRowBf16 : AddRowInt8)(*t, a, b, m, t->data[c][m]);
  _mm_setcsr(controls);
}

// A general register by its number in instructions.
int64_t Register(const ucontext_t* context, int number) {
  constexpr int kNames[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                            REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  return context->uc_mcontext.gregs[kNames[number]];
}

// The operand in memory behind an instruction's ModRM byte: [base + offset], and index << scale on its own.
struct Memory {
  char* base;
  int64_t index;
};

// A displacement of one byte counts `unit` bytes.
Memory MemoryOperand(const ucontext_t* context, const uint8_t* modrm, int rex_x, int rex_b, int unit,
                     const uint8_t** end) {
  const int mod = *modrm >> 6, rm = *modrm & 7;
  const uint8_t* next = modrm + 1;
  int64_t base = 0, index = 0;
  bool absolute = mod == 0 && rm == 5;
  if (rm == 4) {
    const uint8_t sib = *next++;
    const int index_register = (sib >> 3 & 7) | rex_x << 3;
    if (index_register != 4) index = Register(context, index_register) << (sib >> 6);
    absolute = mod == 0 && (sib & 7) == 5;
    if (!absolute) base = Register(context, (sib & 7) | rex_b << 3);
  } else if (!absolute) {
    base = Register(context, rm | rex_b << 3);
  }
  if (mod == 1) {
    base += static_cast<int8_t>(*next++) * unit;
  } else if (mod == 2 || absolute) {
    int32_t offset;
    std::memcpy(&offset, next, 4);
    next += 4;
    base += offset;
    if (absolute && rm == 5) base += reinterpret_cast<int64_t>(next);  // from the next instruction on
  }
  *end = next;
  return {reinterpret_cast<char*>(base), index};
}

// Part of an interrupted thread's registers, in the order of XSAVE's standard format.
enum State { kYmmHigh = 2, kZmmHigh = 6, kZmm16 = 7 };

char* StateOf(const ucontext_t* context, State state) {
  unsigned eax, offset, ecx, edx;
  __cpuid_count(0xd, state, eax, offset, ecx, edx);
  char* const registers = reinterpret_cast<char*>(context->uc_mcontext.fpregs);
  uint64_t in_use;  // what is not is zero, whatever memory holds
  std::memcpy(&in_use, registers + 512, 8);
  if ((in_use & 1u << state) == 0) {
    std::memset(registers + offset, 0, eax);
    in_use |= 1u << state;
    std::memcpy(registers + 512, &in_use, 8);
  }
  return registers + offset;
}

// The parts of vector register `number`, up to `bytes`: calls use(where it is, its first byte, how many).
template <typename Use>
void EachPart(const ucontext_t* context, int number, int bytes, const Use& use) {
  if (number >= 16) return use(StateOf(context, kZmm16) + 64 * (number - 16), 0, bytes);
  use(reinterpret_cast<char*>(context->uc_mcontext.fpregs) + 160 + 16 * number, 0, 16);
  if (bytes > 16) use(StateOf(context, kYmmHigh) + 16 * number, 16, 16);
  if (bytes > 32) use(StateOf(context, kZmmHigh) + 32 * number, 32, 32);
}

// VPDPBUSD in either encoding, or null.
const uint8_t* ExecuteDot(const ucontext_t* context, const uint8_t* at) {
  const bool evex = at[0] == 0x62;
  if (!evex && at[0] != 0xc4) return nullptr;
  const uint8_t *const opcode = at + (evex ? 4 : 3), *const modrm = opcode + 1;
  // Map 0F38, prefix 66, W = 0.
  if ((at[1] & (evex ? 0x0f : 0x1f)) != 2 || (at[2] & 0x83) != 1 || *opcode != 0x50) return nullptr;
  if (evex && (at[3] & 0x87) != 0) Fault("VPDPBUSD with a mask is not among those emulated");
  const int length = evex ? at[3] >> 5 & 3 : at[2] >> 2 & 1;
  if (length > 2) return nullptr;
  const int bytes = 16 << length;
  const int x = (at[1] & 0x40) == 0, b = (at[1] & 0x20) == 0;
  const int reg = (*modrm >> 3 & 7) | ((at[1] & 0x80) == 0) << 3 | (evex && (at[1] & 0x10) == 0) << 4;
  const int vvvv = (~at[2] >> 3 & 15) | (evex && (at[3] & 0x08) == 0) << 4;
  alignas(64) char sums[64] = {}, left[64] = {}, right[64] = {};
  const auto read = [&](int number, char* to) {
    EachPart(context, number, bytes,
             [to](char* part, int first, int count) { std::memcpy(to + first, part, count); });
  };
  read(reg, sums);
  read(vvvv, left);
  const uint8_t* end = modrm + 1;
  if (*modrm >> 6 == 3) {
    read((*modrm & 7) | b << 3 | (evex && x) << 4, right);
  } else {
    const bool broadcast = evex && (at[3] & 0x10) != 0;
    const Memory from = MemoryOperand(context, modrm, x, b, !evex ? 1 : broadcast ? 4 : bytes, &end);
    for (int i = 0; i < bytes; i += 4)
      std::memcpy(right + i, from.base + from.index + (broadcast ? 0 : i), 4);
  }
  for (int i = 0; i < bytes; i += 4) {
    uint32_t sum;
    std::memcpy(&sum, sums + i, 4);
    for (int j = i; j < i + 4; ++j) {
      sum += static_cast<uint32_t>(static_cast<uint8_t>(left[j]) * static_cast<int8_t>(right[j]));
    }
    std::memcpy(sums + i, &sum, 4);
  }
  // What is above the vector becomes zero.
  EachPart(context, reg, __builtin_cpu_supports("avx512f") ? 64 : 32,
           [&](char* part, int first, int count) { std::memcpy(part, sums + first, count); });
  return end;
}

// Does the instruction's work and returns the address behind it, or null: not one of AMX's.
const uint8_t* ExecuteTiles(const ucontext_t* context, const uint8_t* at) {
  // VEX with three bytes, map 0F38, W = 0, L = 0.
  if (at[0] != 0xc4 || (at[1] & 0x1f) != 2 || (at[2] & 0x84) != 0) return nullptr;
  const int rex_x = (at[1] & 0x40) == 0, rex_b = (at[1] & 0x20) == 0, vvvv = ~at[2] >> 3 & 15;
  enum Prefix { kNone, k66, kF3, kF2 };
  const auto prefix = static_cast<Prefix>(at[2] & 3);
  const uint8_t opcode = at[3];
  const uint8_t* const modrm = at + 4;
  const bool memory = *modrm >> 6 != 3;
  const int reg = *modrm >> 3 & 7, rm = *modrm & 7;
  const uint8_t* end = at + 5;

  if (opcode == 0x49 && prefix == kNone) {
    Tiles& tiles = TilesOfThread();
    if (memory) {
      LoadConfig(MemoryOperand(context, modrm, rex_x, rex_b, 1, &end).base, &tiles);
    } else {
      tiles.configured = false;  // TILERELEASE
    }
    return end;
  }
  const bool zero = opcode == 0x49 && prefix == kF2 && !memory;
  const bool load = opcode == 0x4b && (prefix == kF2 || prefix == k66) && memory;  // 66: TILELOADDT1
  const bool store = opcode == 0x4b && prefix == kF3 && memory;
  const bool bf16 = opcode == 0x5c && prefix == kF3 && !memory;
  const bool int8 = opcode == 0x5e && prefix == kF2 && !memory;
  if (!(zero || load || store || bf16 || int8)) return nullptr;
  Tiles& tiles = TilesOfThread();
  if (!tiles.configured) Fault("tiles are used before they are configured, or after their release");
  if (zero) {
    std::memset(tiles.data[reg], 0, sizeof(tiles.data[reg]));
  } else if (load || store) {
    const Memory operand = MemoryOperand(context, modrm, rex_x, rex_b, 1, &end);
    if (tiles.rows[reg] == 0) Fault("a tile that the configuration leaves out is loaded or stored");
    if (load) std::memset(tiles.data[reg], 0, sizeof(tiles.data[reg]));
    for (int row = 0; row < tiles.rows[reg]; ++row) {
      char* const line = operand.base + row * operand.index;
      std::memcpy(load ? tiles.data[reg][row] : line, load ? line : tiles.data[reg][row],
                  tiles.row_bytes[reg]);
    }
  } else {
    Multiply(bf16, reg, rm, vvvv, &tiles);
  }
  return end;
}

void OnIllegalInstruction(int, siginfo_t*, void* data) {
  auto* const context = static_cast<ucontext_t*>(data);
  greg_t& instruction = context->uc_mcontext.gregs[REG_RIP];
  const auto* const at = reinterpret_cast<const uint8_t*>(instruction);
  const uint8_t* next = ExecuteTiles(context, at);
  if (next == nullptr) next = ExecuteDot(context, at);
  if (next == nullptr) {
    signal(SIGILL, SIG_DFL);  // the instruction is tried again, and ends the process
  } else {
    instruction = static_cast<greg_t>(reinterpret_cast<uintptr_t>(next));
  }
}

}  // namespace

// The kernels ask for this by name (csrc/cpu/isa.cc): whether the instruction set `isa` runs with the help
// from here.
extern "C" bool FfnOpsEmulates(const char* isa) {
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (std::strcmp(isa, "avx2_vnni") == 0) return avx2;
  return avx512 && (std::strcmp(isa, "avx512_vnni") == 0 || std::strcmp(isa, "amx") == 0);
}

// How many threads hold tiles that they should have released.
extern "C" int ThreadsWithTiles() {
  int count = 0;
  for (const Tiles& tiles : all_tiles) count += tiles.configured;
  return count;
}

__attribute__((constructor)) static void Install() {
  struct sigaction action = {};
  action.sa_sigaction = OnIllegalInstruction;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGILL, &action, nullptr);
}
