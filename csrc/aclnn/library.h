// SPDX-License-Identifier: Apache-2.0
// The functions of CANN that we call, found at run time: nothing is linked, so one build runs without CANN,
// with any CANN, and with the emulator. ffn.h uses them. Knows neither torch nor Python.
#pragma once

#include <functional>
#include <string>

#include "aclnn/acl.h"

namespace ffn::aclnn {

struct Library {
  decltype(&aclCreateTensor) create_tensor = nullptr;
  decltype(&aclDestroyTensor) destroy_tensor = nullptr;
  decltype(&aclSetAclOpExecutorRepeatable) set_repeatable = nullptr;
  decltype(&aclDestroyAclOpExecutor) destroy_executor = nullptr;
  decltype(&aclSetInputTensorAddr) set_input_address = nullptr;
  decltype(&aclSetOutputTensorAddr) set_output_address = nullptr;
  decltype(&aclnnFFNV3GetWorkspaceSize) ffn_workspace_size = nullptr;
  decltype(&aclnnFFNV3) ffn = nullptr;
  decltype(&aclGetRecentErrMsg) recent_message = nullptr;
  decltype(&aclrtGetSocName) soc_name = nullptr;
  decltype(&aclrtMemsetAsync) memset_async = nullptr;

  std::string path;  // of the library that holds aclnnFFNV3
};

// Resolves all of them at the first call: by torch_npu's own resolver when torch_npu is loaded, then in the
// order that the vendor documents (contract section g). Throws std::runtime_error that names what is missing
// and every path that was tried; the next call tries again.
const Library& GetLibrary();

// torch_npu's task queue, when its entry points are found: `enqueue` runs a function in order with
// torch_npu's own launches, on another thread or at once as TASK_QUEUE_ENABLE says; `stream` is the current
// stream's handle without waiting for the queue, which is right only inside such a function.
struct TaskQueue {
  void (*enqueue)(const std::string& name, const std::function<int()>& function, bool synchronous);
  aclrtStream (*stream)();
};
const TaskQueue* FindTaskQueue();

// The storage format of a tensor, as torch_npu keeps it; ACL_FORMAT_ND without torch_npu. `tensor` is the
// at::Tensor behind an AtenTensorHandle.
aclFormat StorageFormat(const void* tensor);

// Throws std::runtime_error with the call, its status, what the status means, and the vendor's own message.
[[noreturn]] void ThrowStatus(const Library& library, const char* call, int status);

}  // namespace ffn::aclnn
