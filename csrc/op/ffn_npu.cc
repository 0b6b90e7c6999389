// SPDX-License-Identifier: Apache-2.0
// torch.ops.ffn.ffn on an NPU (dispatch key PrivateUse1): contract, then aclnnFFNV3's two phases on the
// current stream, with y and workspace from torch's allocator. No value of a tensor is read on the host, so
// nothing waits for the device. Called by library.cc; CANN is behind aclnn/ffn.h.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <thread>

#include "aclnn/ffn.h"
#include "op/call.h"

namespace ffn::op {
namespace {

using contract::Operand;

contract::Target TargetOf(const std::string& soc) {
  if (soc.rfind("Ascend910B", 0) == 0 || soc.rfind("Ascend910_93", 0) == 0)
    return contract::kAscend910bTarget;
  if (soc.rfind("Ascend310P", 0) == 0) return contract::kAscend310pTarget;
  throw std::runtime_error(
      "x is on " + soc +
      ", but aclnnFFNV3 is for Ascend910B, Ascend910_93 and Ascend310P (move the call to the CPU)");
}

aclDataType ToAcl(const Tensor& tensor, bool int4) {
  if (int4) return ACL_INT4;
  switch (tensor.scalar_type()) {
    case ScalarType::Half:
      return ACL_FLOAT16;
    case ScalarType::BFloat16:
      return ACL_BF16;
    case ScalarType::Float:
      return ACL_FLOAT;
    case ScalarType::Char:
      return ACL_INT8;
    case ScalarType::Int:
      return ACL_INT32;
    case ScalarType::Long:
      return ACL_INT64;
    default:
      return ACL_UINT64;  // deq_scale: the contract lets no other dtype through
  }
}

ScalarType ToTorch(contract::DType y) {
  return y == contract::DType::kFloat16 ? ScalarType::Half : ScalarType::BFloat16;
}

// As torch_npu describes a tensor: the storage's base and its length, with the view's offset apart. Packed
// int4 weights hold `values` elements in each of torch's.
aclnn::TensorDesc Describe(const Tensor& tensor, bool int4) {
  const int64_t values = !int4 ? 1 : tensor.scalar_type() == ScalarType::Int ? 8 : 2;
  const int64_t bytes = static_cast<int64_t>(tensor.element_size());
  int64_t storage_bytes = 0;
  aoti_torch_get_storage_size(tensor.get(), &storage_bytes);
  aclnn::TensorDesc desc;
  desc.given = true;
  desc.shape.assign(tensor.sizes().begin(), tensor.sizes().end());
  if (!desc.shape.empty()) desc.shape.back() *= values;
  desc.offset = tensor.storage_offset() * values;
  desc.storage = storage_bytes / bytes * values;
  desc.dtype = ToAcl(tensor, int4);
  auto* const first = static_cast<char*>(const_cast<void*>(tensor.const_data_ptr()));
  desc.data = first == nullptr ? nullptr : first - tensor.storage_offset() * bytes;
  return desc;
}

// The operator checks the format of these (contract c.8), and a private one is no dense memory.
void CheckFormats(const Arguments& arguments) {
  for (const Operand name :
       {contract::kXOperand, contract::kWeight1Operand, contract::kWeight2Operand, contract::kOutOperand}) {
    if (!arguments.operands[name]) continue;
    const aclFormat format = aclnn::StorageFormat(arguments.operand(name).get());
    switch (format) {
      case ACL_FORMAT_ND:
      case ACL_FORMAT_NCHW:
      case ACL_FORMAT_NHWC:
      case ACL_FORMAT_NCDHW:
      case ACL_FORMAT_NCL:
        continue;
      default:
        throw std::runtime_error(std::string(contract::kOperandNames[name]) + " is in the private format " +
                                 std::to_string(format) +
                                 ", but the operator takes dense memory (torch_npu.npu_format_cast(" +
                                 contract::kOperandNames[name] + ", 2) makes it ND)");
    }
  }
}

// `tensor` as dense memory. What torch's exceptions say does not pass the stable ABI; torch 2.13 can be
// asked.
Tensor Dense(const char* name, const Tensor& tensor) {
  if (tensor.is_contiguous()) return tensor;
  try {
    return torch::stable::contiguous(tensor);
  } catch (const std::runtime_error&) {
    using What = const char* (*)();
    static const auto what =
        reinterpret_cast<What>(dlsym(RTLD_DEFAULT, "torch_exception_get_what_without_backtrace"));
    throw std::runtime_error(std::string(name) +
                             " has gaps, and the copy without them failed (free memory, or pass " + name +
                             ".contiguous())" + (what == nullptr ? "" : ": " + std::string(what())));
  }
}

// The current stream's handle once torch_npu's queue is empty: by torch 2.13's shim, or torch_npu's own
// before it. Asked for at each launch, since only a fresh answer is in order with what was queued.
aclrtStream DrainedStream(int32_t device) {
  using ByTorch = AOTITorchError (*)(StreamHandle, void**);
  using ByTorchNpu = AOTITorchError (*)(int32_t, void**);
  static const auto by_torch = reinterpret_cast<ByTorch>(dlsym(RTLD_DEFAULT, "torch_stream_native_handle"));
  void* handle = nullptr;
  if (by_torch != nullptr) {
    StreamHandle stream = nullptr;
    AOTITorchError failed = aoti_torch_get_current_stream(device, &stream);
    if (failed == 0) {
      failed = by_torch(stream, &handle);
      aoti_torch_delete_stream(stream);
    }
    if (failed == 0) return handle;
  } else if (void* const torch_npu = dlopen("libtorch_npu.so", RTLD_LAZY | RTLD_NOLOAD)) {
    const auto by_torch_npu =
        reinterpret_cast<ByTorchNpu>(dlsym(torch_npu, "aoti_torch_get_current_npu_stream"));
    if (by_torch_npu != nullptr && by_torch_npu(device, &handle) == 0) return handle;
  }
  throw std::runtime_error(
      "the current NPU stream has no handle (use torch 2.13 with torch_npu 2.13 or later)");
}

void CheckTokens(const Arguments& arguments, int64_t M) {
  static const char* const wanted = std::getenv("FFN_OPS_CHECK_TOKENS");  // read once
  if (wanted == nullptr || std::strcmp(wanted, "1") != 0) return;
  if (!arguments.operands[contract::kExpertTokensOperand]) return;
  const Tensor& tokens = arguments.operand(contract::kExpertTokensOperand);
  const Tensor host = torch::stable::contiguous(
      torch::stable::to(tokens, torch::stable::Device(torch::headeronly::DeviceType::CPU)));
  std::vector<int64_t> ends;
  const std::string broken = contract::RowEnds(static_cast<const int64_t*>(host.const_data_ptr()),
                                               host.numel(), M, arguments.tokens_index_flag, &ends);
  if (!broken.empty()) throw std::runtime_error(broken);
}

// Phase 2, and before it zeros for rows that no expert owns. Everything it touches is owned or, on the
// device, ordered by the stream, so it may run after the call has returned.
class Launch {
 public:
  Launch(const aclnn::Library& library, const aclnn::Call& call)
      : library_(library),
        prepared_(std::make_unique<aclnn::Prepared>(library, call)),
        y_(call.tensors[aclnn::kY]),
        zero_(call.tensors[contract::kExpertTokensOperand].given) {}

  uint64_t workspace_size() const { return prepared_->workspace_size(); }

  // The failed call and its status, or null and 0. Once: it gives the handles back when it returns, since
  // torch_npu's queue reports a task as done before it drops it.
  std::pair<const char*, int> Run(void* workspace, aclrtStream stream) {
    const std::unique_ptr<aclnn::Prepared> prepared = std::move(prepared_);
    if (zero_) {
      auto* const first =
          static_cast<char*>(y_.data) + y_.offset * 2;  // y has 2 bytes an element in every mode
      size_t size = 2;
      for (const int64_t n : y_.shape) size *= static_cast<size_t>(n);
      if (const int status = library_.memset_async(first, size, 0, size, stream))
        return {"aclrtMemsetAsync", status};
    }
    const int status = prepared->Run(workspace, prepared->workspace_size(), stream);
    return {status != 0 ? "aclnnFFNV3" : nullptr, status};
  }

 private:
  const aclnn::Library& library_;
  std::unique_ptr<aclnn::Prepared> prepared_;
  const aclnn::TensorDesc y_;
  const bool zero_;
};

// Through torch_npu's queue when it can be found. The queue may run the launch here, where a failure is this
// call's, or on its own thread later, where torch_npu reports it with a later operator.
void Submit(const aclnn::Library& library, std::shared_ptr<Launch> launch, void* workspace, int32_t device) {
  const aclnn::TaskQueue* const queue = aclnn::FindTaskQueue();
  if (queue == nullptr) {
    const auto [call, status] = launch->Run(workspace, DrainedStream(device));
    if (status != 0) aclnn::ThrowStatus(library, call, status);
    return;
  }
  const aclrtStream stream = queue->stream();
  std::string error;
  const std::thread::id caller = std::this_thread::get_id();
  queue->enqueue(
      "aclnnFFNV3",
      [&library, &error, caller, launch = std::move(launch), workspace, stream]() {
        const auto [call, status] = launch->Run(workspace, stream);
        if (status == 0) return 0;
        try {
          aclnn::ThrowStatus(library, call, status);
        } catch (const std::runtime_error& failure) {
          // On the queue's own thread torch_npu prints it, and refuses what follows.
          if (std::this_thread::get_id() != caller) throw;
          error = failure.what();
        }
        return 0;
      },
      false);
  if (!error.empty()) throw std::runtime_error(error);
}

}  // namespace

Tensor FfnNpu(const Arguments& arguments) {
  const Tensor& x = arguments.operand(contract::kXOperand);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  CheckPlacement(arguments);
  CheckFormats(arguments);
  const aclnn::Library& library = aclnn::GetLibrary();
  contract::Plan plan;
  const std::string broken = contract::Resolve(Describe(arguments), TargetOf(library.soc_name()), &plan);
  if (!broken.empty()) throw std::runtime_error(broken);
  CheckTokens(arguments, plan.facts[contract::kMFact]);

  const std::optional<Tensor>& out = arguments.operands[contract::kOutOperand];
  const bool in_place = out && CanWriteInto(*out, arguments);
  Tensor y = in_place ? *out : Allocate("y", x.numel(), [&] {
    return torch::stable::new_empty(
        x, x.sizes(), ToTorch(contract::OnlyDType(plan.facts[contract::kModeFact], contract::kOutOperand)));
  });
  if (x.numel() > 0) {
    aclnn::Call call;
    call.activation = arguments.activation;
    call.inner_precise = plan.facts[contract::kInnerPreciseFact];
    call.tokens_index_flag = arguments.tokens_index_flag;
    std::vector<Tensor> dense;  // until the launch is submitted
    for (int i = 0; i < aclnn::kY; ++i) {
      if (!arguments.operands[i]) continue;
      const Tensor& tensor = *arguments.operands[i];
      dense.push_back(Dense(contract::kOperandNames[i], tensor));
      const bool weight = i == contract::kWeight1Operand || i == contract::kWeight2Operand;
      const bool int4 =
          weight && (tensor.scalar_type() == ScalarType::Int || tensor.scalar_type() == ScalarType::Byte);
      call.tensors[i] = Describe(dense.back(), int4);
    }
    call.tensors[aclnn::kY] = Describe(y, false);
    auto launch = std::make_shared<Launch>(library, call);
    const auto bytes = static_cast<int64_t>(launch->workspace_size());
    std::optional<Tensor> workspace;
    if (bytes > 0) {
      workspace = Allocate("the workspace", bytes,
                           [&] { return torch::stable::new_empty(x, {bytes}, ScalarType::Byte); });
    }
    Submit(library, std::move(launch), workspace ? workspace->mutable_data_ptr() : nullptr,
           x.get_device_index());
  }
  if (out && !in_place) {
    Tensor target = *out;
    torch::stable::copy_(target, y);
  }
  return out ? *out : y;
}

}  // namespace ffn::op

// The target of this machine's NPU, by its position in the contract's TARGETS, for ffn_ops/op.py; -1 without
// CANN, or with a SoC that the operator is not for.
extern "C" __attribute__((visibility("default"))) int ffn_ops_npu_target() {
  try {
    return ffn::op::TargetOf(ffn::aclnn::GetLibrary().soc_name());
  } catch (const std::runtime_error&) {
    return -1;
  }
}
