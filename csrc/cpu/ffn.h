// SPDX-License-Identifier: Apache-2.0
// The CPU feed-forward kernel's interface: one checked call, described by plain sizes and pointers.
// csrc/op and csrc/python fill a Problem after the contract has accepted the call; ffn.cc drives the kernels
// of the instruction set chosen at load (ffn-inl.h, instantiated by isa_*.cc). Knows neither torch nor
// Python.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ffn::cpu {

enum class DType : uint8_t { kFloat32, kFloat16, kBFloat16, kInt8, kInt4, kInt32, kInt64, kUInt64 };

// In the order of the contract's ACTIVATIONS.
enum class Activation : uint8_t { kFastGelu, kGelu, kRelu, kSilu, kGeluErf, kRelu2, kGeGlu, kSwiGlu, kReGlu };

inline bool IsGlu(Activation a) { return a >= Activation::kGeGlu; }

// Columns of a panel of a packed weight (packed.h).
inline constexpr int64_t kPackedColumns = 32;
// Rows of int4 that stand in one word, and which nibble of it is that of row k % 8: even rows in the low
// half, odd ones in the high half, so that neighbours are a pair of 16 bits each.
inline constexpr int64_t kNibbles = 8;
__attribute__((always_inline)) constexpr int64_t NibbleOf(int64_t k) { return k % 8 / 2 + k % 2 * 4; }

// A weight matrix of each expert. Plain: element (e, k, n) is at e * expert_stride + k * row_stride + n *
// col_stride, in elements, from `data`; one of row_stride and col_stride is 1, so that both [K, N] and
// transposed nn.Linear weights are read in place; kInt4 is always dense [E, K, N], two elements per byte
// along N, low nibble first. Packed: the panels of a block that packed.h describes, expert_stride bytes an
// expert.
struct Weight {
  const void* data = nullptr;
  int64_t expert_stride = 0;
  int64_t row_stride = 0;
  int64_t col_stride = 0;
  bool packed = false;
  int64_t panel_bytes = 0;
};

// Everything about one product that is stored per output channel. Null pointers mean "absent". All are dense.
struct Channels {
  const void* bias = nullptr;              // [E, N]; dtype bias_dtype
  const void* deq_scale = nullptr;         // [E, N]; dtype deq_dtype (w8a8 only)
  const void* antiquant_scale = nullptr;   // [E, G, N]; x's dtype (antiquant only)
  const void* antiquant_offset = nullptr;  // [E, G, N]; x's dtype (antiquant only)
  int64_t G = 1;                           // groups along K; row k belongs to group k / (K / G)
};

// A row of x on its way through one expert: it is read from x's row `token`, and its result, times `weight`,
// goes to y's row `slot`.
struct Assignment {
  int64_t token, slot;
  float weight;
};

// y = act(x W1 + b1) W2 + b2. Sizes as everywhere: x is [M, K1], W1 [E, K1, N1], W2 [E, K2, N2], y [M, N2];
// GLU has N1 == 2 * K2, every other activation N1 == K2. A dense call has E == 1 and row_ends {M}. x and y
// are dense row-major. The numerics are contract.md section e, as docs/numerics.md lists them for the CPU.
struct Problem {
  DType x_dtype = DType::kFloat32;
  DType weight_dtype = DType::kFloat32;
  DType y_dtype = DType::kFloat32;
  DType bias_dtype = DType::kFloat32;
  DType deq_dtype = DType::kFloat32;  // of deq_scale1 and deq_scale2: kUInt64, kInt64, kFloat32 or kBFloat16
  Activation activation = Activation::kRelu;
  bool high_precision = false;     // inner_precise == 0; matters for fp16 weights only
  bool second_only = false;        // y = x W2 + b2, where K1 == K2
  bool activate_left = false;      // GLU: act(left) * right instead of left * act(right)
  bool per_channel_scale = false;  // w8a8: scale is [E, N1] instead of [E]
  int64_t M = 0, K1 = 0, N1 = 0, K2 = 0, N2 = 0, E = 1;
  const void* x = nullptr;
  Weight weight1, weight2;
  Channels channels1, channels2;
  const float* scale = nullptr;   // w8a8: [E] or [E, N1]
  const float* offset = nullptr;  // w8a8: [E]
  const int64_t* row_ends =
      nullptr;  // [E]: expert e owns rows [row_ends[e - 1], row_ends[e]); row_ends[E - 1] == M
  // For RunMoe, which takes a call in chunks: [E], the rows of each expert in all of them.
  const int64_t* call_rows = nullptr;
  const Assignment* assignments = nullptr;  // [M], for RunMoe; then y is float32 [.., N2]
  void* y = nullptr;
};

// ffn.moe: y[t] = sum over slots s of weights[t, s] * ffn(x[t]) by expert ids[t, s], added in float32 in the
// order of the slots, beginning with 0, and rounded once. An id of E or more contributes nothing.
struct Routing {
  int64_t top_k = 0;
  const int64_t* ids = nullptr;    // [M, top_k], none negative
  const float* weights = nullptr;  // [M, top_k]
};

// Runs body(context, i) for every i in [0, threads), possibly in parallel, possibly one after the other: a
// body never waits for another one. `threads` is how many can run at once. Nothing may throw inside a body.
struct ParallelFor {
  int64_t threads = 1;
  void* self = nullptr;
  void (*run)(void* self, int64_t count, void (*body)(void* context, int64_t i), void* context) = nullptr;
  int64_t cache_bytes = 0;  // the second-level cache of each thread; 0: what the system says
};

// Computes one call with the kernels of `isa` (null: the selected one; tests name others). Throws
// std::bad_alloc, before any work, when the scratch cannot be allocated, and std::runtime_error for an isa
// that cannot run here.
void RunFfn(const Problem& problem, const ParallelFor& parallel, const char* isa = nullptr);

// Bytes of scratch RunFfn allocates for this problem: at most 24 MiB for the rows of one wave (or one row,
// where that is more) and 936 KiB a thread, whatever M is. Up to 64 MiB stay with the calling thread for its
// next call.
size_t ScratchBytes(const Problem& problem, const ParallelFor& parallel);

// Computes one call of ffn.moe. The problem's M counts tokens and its row_ends are unused. Throws as RunFfn.
// Scratch beyond RunFfn's: at most 256 MiB (or one token's share, where that is more) of float32 results,
// since tokens are taken in as many chunks as that needs, and 40 bytes for each assignment of a chunk. Of the
// results, too, up to 64 MiB stay with the thread.
void RunMoe(const Problem& problem, const Routing& routing, const ParallelFor& parallel,
            const char* isa = nullptr);
size_t MoeScratchBytes(const Problem& problem, const Routing& routing, const ParallelFor& parallel);

// Names of the instruction sets compiled in, best first.
const char* const* CompiledIsas(size_t* count);
bool IsaSupported(const char* name);  // by this machine and its operating system
// The one in use: the best supported, or what the environment variable FFN_OPS_ISA names. Throws
// std::runtime_error with a sentence when that name is unknown or the machine lacks it.
const char* SelectedIsa();

}  // namespace ffn::cpu
