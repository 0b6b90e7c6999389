// SPDX-License-Identifier: Apache-2.0
// One call of aclnnFFN, V2 or V3: its parameters, and what the checks make of them. ffn.cc holds the exported
// functions, ffn_checks.cc the vendor's order of checks, ffn_numerics.cc the arithmetic. All of it is written
// from docs/contract.md and shares nothing with ffn_ops/contract.py or csrc/cpu, so that it is an opinion of
// its own.
#pragma once

#include "emulator/nnopbase/objects.h"

namespace emulator {

// Positions of the tensor parameters, in the vendor's order.
enum Parameter {
  kX,
  kWeight1,
  kWeight2,
  kExpertTokens,
  kBias1,
  kBias2,
  kScale,
  kOffset,
  kDeqScale1,
  kDeqScale2,
  kAntiquantScale1,
  kAntiquantScale2,
  kAntiquantOffset1,
  kAntiquantOffset2,
  kY,
  kParameters
};

struct FfnCall {
  const char* function;  // without GetWorkspaceSize
  int version;           // 1, 2 or 3
  const aclTensor* tensors[kParameters];
  const aclIntArray* token_list;  // versions 1 and 2, where tensors[kExpertTokens] is null
  const char* activation;
  int64_t inner_precise;
  bool tokens_index_flag;
  bool can_answer;  // workspace_size and executor are not null
};

enum class Activation { kFastGelu, kGelu, kSilu, kRelu, kGeglu, kSwiglu, kReglu };

// The vendor's pipelines (contract e.3 to e.5).
enum class Pipeline { kHighPerformance, kHighPrecision, kBf16, kGlu, kQuant, kAntiquant };

struct FfnPlan {
  Pipeline pipeline;
  Activation activation;
  int64_t M, K1, N1, K2, N2;
  int64_t E;    // 0 without experts
  bool smooth;  // quant: scale is per channel
  bool tokens_index_flag;
  bool list;  // versions 1 and 2: the tokens are in token_list
  std::vector<int64_t> token_list;
  bool empty;           // x has no element: nothing to do
  bool private_format;  // of x, a weight or y; the 310P takes it, the emulator's phase 2 does not
};

bool IsAscend310P();

// The status of phase 1 without side effects other than contract c.1 step 3a; fills the plan on success.
int CheckFfn(const FfnCall& call, FfnPlan* plan);

// Bytes of workspace by contract section f.
uint64_t WorkspaceSize(const FfnPlan& plan, const FfnCall& call);

// Phase 2 on the stream's thread. Returns 561000, and writes nothing, for token values that do not fit.
int RunFfn(const FfnPlan& plan, const std::vector<aclTensor>& tensors);

}  // namespace emulator
