// SPDX-License-Identifier: Apache-2.0
// Intel AMX for tests on x86-64 machines that lack it: the instructions trap there, and this library's handler
// of SIGILL does their work and goes on behind them. So the kernels that run are those that ship, instruction by
// instruction, though it takes microseconds for each. tests/native.py builds and loads it.
//
// After Intel's Software Developer's Manual, volume 2: TDPBF16PS multiplies and adds fused in float32 without
// subnormals, even and odd products apart. What raises a fault on hardware (a bad configuration, tiles whose sizes
// do not match, no configuration) ends the process with a sentence.
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
  std::fprintf(stderr, "AMX: %s\n", what);
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
    if (i >= kTiles ? rows != 0 || bytes != 0 : rows > kRows || bytes > kRowBytes || (rows == 0) != (bytes == 0)) {
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

Memory MemoryOperand(const ucontext_t* context, const uint8_t* modrm, int rex_x, int rex_b, const uint8_t** end) {
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
    base += static_cast<int8_t>(*next++);
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

// Does the instruction's work and returns the address behind it, or null: not one of AMX's.
const uint8_t* Execute(const ucontext_t* context, const uint8_t* at) {
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
      LoadConfig(MemoryOperand(context, modrm, rex_x, rex_b, &end).base, &tiles);
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
    const Memory operand = MemoryOperand(context, modrm, rex_x, rex_b, &end);
    if (tiles.rows[reg] == 0) Fault("a tile that the configuration leaves out is loaded or stored");
    if (load) std::memset(tiles.data[reg], 0, sizeof(tiles.data[reg]));
    for (int row = 0; row < tiles.rows[reg]; ++row) {
      char* const line = operand.base + row * operand.index;
      std::memcpy(load ? tiles.data[reg][row] : line, load ? line : tiles.data[reg][row], tiles.row_bytes[reg]);
    }
  } else {
    Multiply(bf16, reg, rm, vvvv, &tiles);
  }
  return end;
}

void OnIllegalInstruction(int, siginfo_t*, void* data) {
  auto* const context = static_cast<ucontext_t*>(data);
  greg_t& instruction = context->uc_mcontext.gregs[REG_RIP];
  const uint8_t* const next = Execute(context, reinterpret_cast<const uint8_t*>(instruction));
  if (next == nullptr) {
    signal(SIGILL, SIG_DFL);  // the instruction is tried again, and ends the process
  } else {
    instruction = static_cast<greg_t>(reinterpret_cast<uintptr_t>(next));
  }
}

}  // namespace

// The kernels ask for this by name (csrc/cpu/isa.cc).
extern "C" bool FfnOpsTilesAreEmulated() { return true; }

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
