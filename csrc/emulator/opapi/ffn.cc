// SPDX-License-Identifier: Apache-2.0
// The exported functions of aclnnFFN, V2 and V3, both phases of each. See ffn.h.
#include "emulator/opapi/ffn.h"

#include <algorithm>
#include <cstring>
#include <string>

namespace emulator {
namespace {

constexpr int kInner = 561000;

uint64_t RoundedUp(uint64_t bytes) {
  return (bytes + 32 + 511) / 512 * 512;
}  // as the executor rounds each part

// Phase 1 once its parameters are collected.
int Prepare(const FfnCall& call, uint64_t* workspace_size, aclOpExecutor** executor) {
  const std::string phase1 = std::string(call.function) + "GetWorkspaceSize";
  if (const int status = emulator_call(phase1.c_str())) return status;
  FfnPlan plan;
  if (const int status = CheckFfn(call, &plan)) return status;
  aclOpExecutor made;
  made.name = call.function;
  made.workspace_size = plan.empty ? 0 : WorkspaceSize(plan, call);
  for (const aclTensor* tensor : call.tensors)
    made.tensors.push_back(tensor != nullptr ? *tensor : aclTensor());
  made.run = [plan](const std::vector<aclTensor>& tensors, void* workspace) {
    // A device uses the workspace too: whoever freed or shared it too early finds it overwritten.
    if (workspace != nullptr) std::memset(workspace, 0xFB, 512);
    return RunFfn(plan, tensors);
  };
  Publish(std::move(made), workspace_size, executor);
  return 0;
}

// Phase 2; the vendor maps every failure to one code (contract g).
int Phase2(const char* function, void* workspace, uint64_t size, aclOpExecutor* executor,
           aclrtStream stream) {
  return Launch(function, workspace, size, executor, stream) == 0 ? 0 : kInner;
}

}  // namespace

uint64_t WorkspaceSize(const FfnPlan& plan, const FfnCall& call) {
  constexpr uint64_t kSystem = 16777216;
  constexpr int64_t cube_cores = 20, vector_cores = 40;  // a 910B3's; callers may not depend on the number
  const auto u = [](int64_t value) { return static_cast<uint64_t>(value); };
  const uint64_t M = u(plan.M), K1 = u(plan.K1), N1 = u(plan.N1), N2 = u(plan.N2),
                 E = u(std::max<int64_t>(plan.E, 1));
  if (plan.pipeline == Pipeline::kGlu) {
    const uint64_t base_m = std::min<uint64_t>(M, 128), base_n = std::min<uint64_t>(N1 / 2, 256);
    return RoundedUp(base_m * base_n * 2 * 4 * u(vector_cores) + M * (N1 / 2) * 2 + kSystem);
  }
  const bool bf16 = call.tensors[kY]->dtype == ACL_BF16, quant = plan.pipeline == Pipeline::kQuant;
  const uint64_t sx = call.tensors[kX]->dtype == ACL_INT8 ? 1 : 2;
  const bool wide = plan.pipeline == Pipeline::kHighPrecision || bf16;
  uint64_t first = M * N1 * (wide ? 4 : 2), second = M * N1 * sx, extra = 0;
  if (IsAscend310P()) first = 0;
  if (quant && bf16) extra += M * N2 * 4;
  if (quant && !plan.smooth && call.tensors[kDeqScale1]->dtype == ACL_FLOAT) {
    first = (first + 63) / 64 * 64;
    second = (second + 63) / 64 * 64;
    extra += E * N1 * 8 + E * N2 * 8;
  }
  if (plan.pipeline == Pipeline::kAntiquant) extra += K1 * N1 * sx * 2 + N1 * N2 * sx * 2;
  return RoundedUp(first + second + u(cube_cores) * 2 * 32 + extra + kSystem);
}

}  // namespace emulator

#define FFN_TENSORS                                                                                \
  const aclTensor *bias1, const aclTensor *bias2, const aclTensor *scale, const aclTensor *offset, \
      const aclTensor *deq_scale1, const aclTensor *deq_scale2, const aclTensor *antiquant_scale1, \
      const aclTensor *antiquant_scale2, const aclTensor *antiquant_offset1,                       \
      const aclTensor *antiquant_offset2, const char *activation, int64_t inner_precise
#define FFN_CALL(name, version, tokens, list, index)                                            \
  const emulator::FfnCall call {                                                                \
    name, version,                                                                              \
        {x,                                                                                     \
         weight1,                                                                               \
         weight2,                                                                               \
         tokens,                                                                                \
         bias1,                                                                                 \
         bias2,                                                                                 \
         scale,                                                                                 \
         offset,                                                                                \
         deq_scale1,                                                                            \
         deq_scale2,                                                                            \
         antiquant_scale1,                                                                      \
         antiquant_scale2,                                                                      \
         antiquant_offset1,                                                                     \
         antiquant_offset2,                                                                     \
         y},                                                                                    \
        list, activation, inner_precise, index, workspace_size != nullptr&& executor != nullptr \
  }

extern "C" {
#pragma GCC visibility push(default)

aclnnStatus aclnnFFNGetWorkspaceSize(const aclTensor* x, const aclTensor* weight1, const aclTensor* weight2,
                                     const aclIntArray* expert_tokens, FFN_TENSORS, const aclTensor* y,
                                     uint64_t* workspace_size, aclOpExecutor** executor) {
  FFN_CALL("aclnnFFN", 1, nullptr, expert_tokens, false);
  return emulator::Prepare(call, workspace_size, executor);
}

aclnnStatus aclnnFFNV2GetWorkspaceSize(const aclTensor* x, const aclTensor* weight1, const aclTensor* weight2,
                                       const aclIntArray* expert_tokens, FFN_TENSORS, bool tokens_index_flag,
                                       const aclTensor* y, uint64_t* workspace_size,
                                       aclOpExecutor** executor) {
  FFN_CALL("aclnnFFNV2", 2, nullptr, expert_tokens, tokens_index_flag);
  return emulator::Prepare(call, workspace_size, executor);
}

aclnnStatus aclnnFFNV3GetWorkspaceSize(const aclTensor* x, const aclTensor* weight1, const aclTensor* weight2,
                                       const aclTensor* expert_tokens, FFN_TENSORS, bool tokens_index_flag,
                                       const aclTensor* y, uint64_t* workspace_size,
                                       aclOpExecutor** executor) {
  FFN_CALL("aclnnFFNV3", 3, expert_tokens, nullptr, tokens_index_flag);
  return emulator::Prepare(call, workspace_size, executor);
}

aclnnStatus aclnnFFN(void* workspace, uint64_t workspace_size, aclOpExecutor* executor, aclrtStream stream) {
  return emulator::Phase2(__func__, workspace, workspace_size, executor, stream);
}

aclnnStatus aclnnFFNV2(void* workspace, uint64_t workspace_size, aclOpExecutor* executor,
                       aclrtStream stream) {
  return emulator::Phase2(__func__, workspace, workspace_size, executor, stream);
}

aclnnStatus aclnnFFNV3(void* workspace, uint64_t workspace_size, aclOpExecutor* executor,
                       aclrtStream stream) {
  return emulator::Phase2(__func__, workspace, workspace_size, executor, stream);
}

#pragma GCC visibility pop
}
