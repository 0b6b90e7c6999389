// SPDX-License-Identifier: Apache-2.0
// One call of aclnnFFNV3 in its two phases (contract section g). csrc/op/ffn_npu.cc fills a Call from torch's
// tensors, csrc/python/bind_aclnn.cc from Python's. Knows neither torch nor Python.
#pragma once

#include <array>
#include <memory>
#include <string>
#include <vector>

#include "aclnn/library.h"

namespace ffn::aclnn {

inline constexpr int kTensors = 15;  // the vendor's 14 inputs in their order, then y
inline constexpr int kY = kTensors - 1;

// What becomes an aclTensor, which is dense. Sizes, offset and storage count elements, for int4 too; `data`
// is the storage's first byte on the device.
struct TensorDesc {
  bool given = false;
  std::vector<int64_t> shape;
  int64_t offset = 0;
  int64_t storage = 0;
  aclDataType dtype = ACL_DT_UNDEFINED;
  void* data = nullptr;
};

struct Call {
  TensorDesc tensors[kTensors];
  std::string activation;
  int64_t inner_precise = 0;
  bool tokens_index_flag = false;
};

// Phase 1 done: owns the executor and the descriptors it needs until phase 2 has returned. Not for two
// threads at once.
class Prepared {
 public:
  // Throws std::runtime_error with the vendor's status.
  Prepared(const Library& library, const Call& call);

  uint64_t workspace_size() const { return workspace_size_; }

  // Phase 2, which ends the executor unless it is repeatable. Queues the work on `stream`; workspace and
  // tensors must live until the stream gets there. Returns the vendor's status.
  int Run(void* workspace, uint64_t size, aclrtStream stream);
  void ThrowRun(int status) const { ThrowStatus(library_, "aclnnFFNV3", status); }

  // After this, Run may be called any number of times, with other addresses in between.
  void MakeRepeatable();
  // `index` counts the call's tensors as in Call; it must be one that was given.
  void SetAddress(int index, void* address);

  bool usable() const { return executor_ != nullptr; }
  bool repeatable() const { return repeatable_; }

 private:
  struct DestroyTensor {
    const Library* library;
    void operator()(aclTensor* tensor) const { library->destroy_tensor(tensor); }
  };
  struct DestroyExecutor {
    const Library* library;
    const bool* repeatable;
    // Only a repeatable executor may be destroyed; one whose phase 2 never came is made so first.
    void operator()(aclOpExecutor* executor) const {
      if (!*repeatable) library->set_repeatable(executor);
      library->destroy_executor(executor);
    }
  };

  const Library& library_;
  std::array<std::unique_ptr<aclTensor, DestroyTensor>, kTensors> tensors_;
  bool repeatable_ = false;
  std::unique_ptr<aclOpExecutor, DestroyExecutor> executor_;
  uint64_t workspace_size_ = 0;
};

}  // namespace ffn::aclnn
