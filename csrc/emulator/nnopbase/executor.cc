// SPDX-License-Identifier: Apache-2.0
// The life of an executor between the two phases (contract section g). See objects.h.
#include <memory>
#include <mutex>
#include <set>

#include "emulator/nnopbase/objects.h"

namespace {

constexpr int kNull = 161001, kInvalid = 161002, kInnerNull = 561103;

struct Live {
  std::mutex mutex;
  std::set<aclOpExecutor*> executors;
};

Live& live() {
  static Live& l = *new Live;  // never destroyed: queues run phase 2 until the process ends
  return l;
}

// Takes the executor out of the registry when it is there; the caller owns it then.
std::unique_ptr<aclOpExecutor> Take(aclOpExecutor* executor) {
  std::lock_guard lock(live().mutex);
  if (live().executors.erase(executor) == 0) return nullptr;
  emulator_live("aclOpExecutor", -1);
  return std::unique_ptr<aclOpExecutor>(executor);
}

bool IsLive(aclOpExecutor* executor) {
  std::lock_guard lock(live().mutex);
  return live().executors.count(executor) > 0;
}

// What a queued run needs, apart from the executor, which may be gone by then.
struct Run {
  std::string name;
  std::vector<aclTensor> tensors;
  std::function<int(const std::vector<aclTensor>&, void*)> run;
  void* workspace;
  uint64_t workspace_size;
};

// The device's view of things: memory that was freed after the launch is noticed here.
int RunTask(void* context) {
  const Run& task = *static_cast<Run*>(context);
  for (size_t i = 0; i < task.tensors.size(); ++i) {
    if (task.tensors[i].dtype == ACL_DT_UNDEFINED) continue;
    const std::string parameter = "tensor " + std::to_string(i);
    if (const int status = emulator::CheckTensor(task.name.c_str(), parameter.c_str(), task.tensors[i]))
      return status;
  }
  void* workspace = nullptr;
  if (task.workspace_size > 0) {
    workspace = emulator_host_view(task.workspace, task.workspace_size);
    if (workspace == nullptr) {
      return emulator_error(kInvalid, "%s: the workspace was freed before its task ran", task.name.c_str());
    }
  }
  try {
    return task.run(task.tensors, workspace);
  } catch (const std::exception& error) {
    return emulator_error(561000, "%s: %s", task.name.c_str(), error.what());
  }
}

// Phase 1 was for this layout. The dtype of deqScale may differ by its sign (contract c.1 step 3a).
bool SameLayout(const aclTensor& one, const aclTensor& other) {
  return one.shape == other.shape && one.strides == other.strides && one.offset == other.offset &&
         one.format == other.format && emulator::ElementBits(one.dtype) == emulator::ElementBits(other.dtype);
}

int SetAddress(const char* function, aclOpExecutor* executor, size_t first, size_t end, size_t index,
               const aclTensor* tensor, void* address) {
  if (const int status = emulator_call(function)) return status;
  if (executor == nullptr || tensor == nullptr || address == nullptr) {
    return emulator_error(kInnerNull, "%s: an argument is null", function);
  }
  if (!IsLive(executor))
    return emulator_error(kInvalid, "%s: the executor was used up or destroyed", function);
  if (!executor->repeatable) return emulator_error(kInvalid, "%s: the executor is not repeatable", function);
  if (!emulator::IsLive(tensor)) return emulator_error(kInvalid, "%s: the tensor was destroyed", function);
  // Absent tensors have no position.
  for (size_t i = first; i < end; ++i) {
    aclTensor& mine = executor->tensors[i];
    if (mine.dtype == ACL_DT_UNDEFINED || index-- > 0) continue;
    if (!SameLayout(mine, *tensor)) {
      return emulator_error(kInvalid, "%s: the tensor has another shape, layout or size of elements",
                            function);
    }
    mine.data = address;
    return 0;
  }
  return emulator_error(kInvalid, "%s: the operator has no such tensor", function);
}

}  // namespace

namespace emulator {

void Publish(aclOpExecutor made, uint64_t* workspace_size, aclOpExecutor** executor) {
  *workspace_size = made.workspace_size;
  *executor = new aclOpExecutor(std::move(made));
  std::lock_guard lock(live().mutex);
  live().executors.insert(*executor);
  emulator_live("aclOpExecutor", 1);
}

int Launch(const char* name, void* workspace, uint64_t workspace_size, aclOpExecutor* executor,
           aclrtStream stream) {
  const int injected = emulator_call(name);
  if (executor == nullptr) return emulator_error(kNull, "%s: the executor is null", name);
  if (!::IsLive(executor)) {
    return emulator_error(kInvalid, "%s: %p is no live executor (run or destroyed before?)", name,
                          static_cast<void*>(executor));
  }
  std::unique_ptr<aclOpExecutor> ended;  // a one-shot executor ends here, whatever comes
  if (!executor->repeatable) ended = Take(executor);
  if (injected != 0) return injected;
  if (executor->name != name) {
    return emulator_error(kInvalid, "%s: the executor is one of %s", name, executor->name.c_str());
  }
  if (workspace_size > 0 && workspace == nullptr) {
    return emulator_error(kNull, "%s: the workspace is null, but its size is not 0", name);
  }
  if (workspace_size < executor->workspace_size) {
    return emulator_error(kInvalid, "%s: the workspace has %llu bytes, but needs %llu", name,
                          static_cast<unsigned long long>(workspace_size),
                          static_cast<unsigned long long>(executor->workspace_size));
  }
  if (workspace_size > 0 && emulator_host_view(workspace, workspace_size) == nullptr) {
    return emulator_error(kInvalid,
                          "%s: the workspace at %p is not in one live allocation of the current device", name,
                          workspace);
  }
  auto task =
      std::make_unique<Run>(Run{executor->name, executor->tensors, executor->run, workspace, workspace_size});
  return emulator_enqueue(
      stream, name, &RunTask, [](void* context) { delete static_cast<Run*>(context); }, task.release());
}

}  // namespace emulator

extern "C" {
#pragma GCC visibility push(default)

aclnnStatus aclSetAclOpExecutorRepeatable(aclOpExecutor* executor) {
  if (const int status = emulator_call(__func__)) return status;
  if (executor == nullptr) return emulator_error(kInnerNull, "%s: the executor is null", __func__);
  if (!IsLive(executor))
    return emulator_error(kInvalid, "%s: the executor was used up or destroyed", __func__);
  executor->repeatable = true;
  return 0;
}

aclnnStatus aclDestroyAclOpExecutor(aclOpExecutor* executor) {
  const int injected = emulator_call(__func__);
  if (executor == nullptr) return emulator_error(kInnerNull, "%s: the executor is null", __func__);
  if (Take(executor) == nullptr) {
    return emulator_error(kInvalid, "%s: the executor was used up or destroyed", __func__);
  }
  return injected;
}

aclnnStatus aclSetInputTensorAddr(aclOpExecutor* executor, const size_t index, aclTensor* tensor,
                                  void* address) {
  const size_t inputs =
      executor != nullptr && IsLive(executor) ? executor->tensors.size() - executor->outputs : 0;
  return SetAddress(__func__, executor, 0, inputs, index, tensor, address);
}

aclnnStatus aclSetOutputTensorAddr(aclOpExecutor* executor, const size_t index, aclTensor* tensor,
                                   void* address) {
  const bool known = executor != nullptr && IsLive(executor);
  const size_t all = known ? executor->tensors.size() : 0;
  return SetAddress(__func__, executor, known ? all - executor->outputs : 0, all, index, tensor, address);
}

aclnnStatus aclSetTensorAddr(aclOpExecutor* executor, const size_t index, aclTensor* tensor, void* address) {
  const size_t all = executor != nullptr && IsLive(executor) ? executor->tensors.size() : 0;
  return SetAddress(__func__, executor, 0, all, index, tensor, address);
}

#pragma GCC visibility pop
}
