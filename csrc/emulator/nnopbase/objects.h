// SPDX-License-Identifier: Apache-2.0
// The objects behind aclnn's opaque pointers, and the executor that both phases of an operator share. Owned
// by libnnopbase.so (objects.cc); opapi/ (the FFN operators) and aten/ (all others) build executors from
// them.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "emulator/emulator.h"

struct aclTensor {
  std::vector<int64_t> shape, strides, storage;  // strides in elements
  int64_t offset = 0;                            // elements from data
  int dtype = ACL_DT_UNDEFINED;                  // aclDataType and aclFormat, or what else the caller passed
  int format = ACL_FORMAT_ND;
  void* data = nullptr;  // device address of the storage's base
};
struct aclScalar {
  int dtype;
  alignas(16) unsigned char value[16];  // of any of the types
};
struct aclIntArray {
  std::vector<int64_t> values;
};
struct aclFloatArray {
  std::vector<float> values;
};
struct aclBoolArray {
  std::vector<uint8_t> values;
};
struct aclTensorList {
  std::vector<const aclTensor*> tensors;  // owned: destroyed with the list
};
struct aclScalarList {
  std::vector<const aclScalar*> scalars;  // owned
};

// What phase 1 leaves for phase 2. Tensors are copies: callers may destroy theirs once phase 2 has returned.
struct aclOpExecutor {
  std::string name;             // of the operator, such as aclnnFFNV3
  uint64_t workspace_size = 0;  // phase 2 refuses less
  bool repeatable = false;
  // Every tensor parameter of phase 1 in its order, absent ones with data null and dtype ACL_DT_UNDEFINED;
  // the last `outputs` of them are outputs. The address setters change `data`.
  std::vector<aclTensor> tensors;
  size_t outputs = 1;
  // Runs on the stream's thread with the host's view of the workspace; returns a status.
  std::function<int(const std::vector<aclTensor>& tensors, void* workspace)> run;
};

#pragma GCC visibility push(default)
namespace emulator {

// Bits of one element; 0 for a dtype that the emulator does not know.
int ElementBits(int dtype);

// The product of sizes, of which a negative one counts as 0; the largest int64_t where it does not fit.
int64_t ElementCount(const std::vector<int64_t>& sizes);

// Zero, or 161002 with a message that names `op` and `parameter`: the tensor's view must stay inside its
// storage, and its storage inside one live allocation of the current device. An empty view is fine.
int CheckTensor(const char* op, const char* parameter, const aclTensor& tensor);

// Whether a caller's pointer may be followed: false for what was destroyed, or never was an object of the
// kind, and for a list with such a member. Of aclTensor, aclScalar, the arrays and the lists.
template <class T>
bool IsLive(const T* object);

// Takes the executor over to the caller of phase 1 (counted as live). `executor` must not be null.
void Publish(aclOpExecutor made, uint64_t* workspace_size, aclOpExecutor** executor);

// Phase 2 of the operator `name`, from emulator_call on: checks executor (unknown, used and other operators'
// ones included) and workspace, queues the run with copies of everything, and ends a one-shot executor
// whether it succeeds or fails. Status codes are contract.md g's, before an operator maps them.
int Launch(const char* name, void* workspace, uint64_t workspace_size, aclOpExecutor* executor,
           aclrtStream stream);

}  // namespace emulator
#pragma GCC visibility pop
