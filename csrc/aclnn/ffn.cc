// SPDX-License-Identifier: Apache-2.0
// The two phases of aclnnFFNV3. See ffn.h.
#include "aclnn/ffn.h"

namespace ffn::aclnn {
namespace {

// torch_npu names the format by the rank, and the operator takes them all for ND (contract g).
aclFormat Format(size_t rank) {
  return rank == 3   ? ACL_FORMAT_NCL
         : rank == 4 ? ACL_FORMAT_NCHW
         : rank == 5 ? ACL_FORMAT_NCDHW
                     : ACL_FORMAT_ND;
}

std::vector<int64_t> DenseStrides(const std::vector<int64_t>& shape) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= shape[i] > 0 ? shape[i] : 1;
  }
  return strides;
}

aclTensor* Create(const Library& library, const TensorDesc& desc) {
  const std::vector<int64_t> strides = DenseStrides(desc.shape);
  aclTensor* const tensor =
      library.create_tensor(desc.shape.data(), desc.shape.size(), desc.dtype, strides.data(), desc.offset,
                            Format(desc.shape.size()), &desc.storage, 1, desc.data);
  if (tensor == nullptr) ThrowStatus(library, "aclCreateTensor", 561103);
  return tensor;
}

}  // namespace

Prepared::Prepared(const Library& library, const Call& call)
    : library_(library), executor_(nullptr, DestroyExecutor{&library, &repeatable_}) {
  const aclTensor* t[kTensors] = {};
  for (int i = 0; i < kTensors; ++i) {
    aclTensor* const tensor = call.tensors[i].given ? Create(library, call.tensors[i]) : nullptr;
    tensors_[static_cast<size_t>(i)] = {tensor, DestroyTensor{&library}};
    t[i] = tensor;
  }
  aclOpExecutor* executor = nullptr;
  const int status =
      library.ffn_workspace_size(t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7], t[8], t[9], t[10], t[11],
                                 t[12], t[13], call.activation.c_str(), call.inner_precise,
                                 call.tokens_index_flag, t[kY], &workspace_size_, &executor);
  if (status != 0) ThrowStatus(library, "aclnnFFNV3GetWorkspaceSize", status);
  executor_.reset(executor);
}

int Prepared::Run(void* workspace, uint64_t size, aclrtStream stream) {
  aclOpExecutor* const executor =
      repeatable_ ? executor_.get() : executor_.release();  // phase 2 ends it, come what may
  return library_.ffn(workspace, size, executor, stream);
}

void Prepared::MakeRepeatable() {
  if (const int status = library_.set_repeatable(executor_.get())) {
    ThrowStatus(library_, "aclSetAclOpExecutorRepeatable", status);
  }
  repeatable_ = true;
}

void Prepared::SetAddress(int index, void* address) {
  aclTensor* const tensor = tensors_[static_cast<size_t>(index)].get();
  if (index == kY) {
    if (const int status = library_.set_output_address(executor_.get(), 0, tensor, address)) {
      ThrowStatus(library_, "aclSetOutputTensorAddr", status);
    }
    return;
  }
  size_t position = 0;  // among the inputs that were given
  for (int i = 0; i < index; ++i) position += tensors_[static_cast<size_t>(i)] != nullptr;
  if (const int status = library_.set_input_address(executor_.get(), position, tensor, address)) {
    ThrowStatus(library_, "aclSetInputTensorAddr", status);
  }
}

}  // namespace ffn::aclnn
