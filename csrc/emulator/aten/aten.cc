// SPDX-License-Identifier: Apache-2.0
// See aten.h.
#include "emulator/aten/aten.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/record_function.h>
#include <c10/core/InferenceMode.h>

namespace emulator {
namespace {

constexpr int kNull = 161001, kInvalid = 161002, kInner = 561000;

std::optional<at::ScalarType> ScalarTypeOf(int dtype) {
  switch (dtype) {
    case ACL_FLOAT:
      return at::kFloat;
    case ACL_FLOAT16:
      return at::kHalf;
    case ACL_BF16:
      return at::kBFloat16;
    case ACL_DOUBLE:
      return at::kDouble;
    case ACL_INT8:
      return at::kChar;
    case ACL_INT16:
      return at::kShort;
    case ACL_INT32:
      return at::kInt;
    case ACL_INT64:
      return at::kLong;
    case ACL_UINT8:
      return at::kByte;
    case ACL_UINT16:
      return at::kUInt16;
    case ACL_UINT32:
      return at::kUInt32;
    case ACL_UINT64:
      return at::kUInt64;
    case ACL_BOOL:
      return at::kBool;
    case ACL_COMPLEX64:
      return at::kComplexFloat;
    case ACL_COMPLEX128:
      return at::kComplexDouble;
    default:
      return std::nullopt;
  }
}

at::Tensor View(const aclTensor& tensor) {
  if (tensor.dtype == ACL_DT_UNDEFINED) return {};
  const at::ScalarType type = *ScalarTypeOf(tensor.dtype);
  size_t elements = 1;
  for (const int64_t size : tensor.shape) elements *= static_cast<size_t>(size);
  if (elements == 0) return at::empty(tensor.shape, type);
  const auto item = static_cast<int64_t>(c10::elementSize(type));
  void* data = emulator_host_view(static_cast<char*>(tensor.data) + tensor.offset * item, 0);
  return at::from_blob(data, tensor.shape, tensor.strides, at::TensorOptions().dtype(type));
}

// torch's operators that run on this thread, each called by the one before it.
thread_local std::vector<std::string> running;

std::unique_ptr<at::ObserverContext> Enter(const at::RecordFunction& call) {
  running.push_back(call.name());
  return nullptr;
}

void Leave(const at::RecordFunction&, at::ObserverContext*) { running.pop_back(); }

// Where an operator has no aclnn function, torch_npu takes aclop instead if it has that, whose errors come
// late, from its queue. So the call ends here, under the name of the operator that needed it.
void RefuseAclop() {
  TORCH_CHECK(running.empty(), running.back(), " is not emulated: torch_npu found no aclnn function for it ",
              "and took aclop (operators.txt lists the functions that there are)");
}

[[maybe_unused]] const bool watching = [] {
  at::addGlobalCallback(at::RecordFunctionCallback(&Enter, &Leave).scopes({at::RecordScope::FUNCTION}));
  emulator_before_aclop(&RefuseAclop);
  return true;
}();

}  // namespace

std::optional<at::Tensor> Reader::Maybe() {
  const at::Tensor& tensor = One();
  return tensor.defined() ? std::optional(tensor) : std::nullopt;
}

Tensors Reader::Many(size_t count) {
  const auto first = next_;
  next_ += static_cast<std::ptrdiff_t>(count);
  return Tensors(first, next_);
}

void Call::Fail(const char* parameter, const char* problem) {
  if (code_ == 0) code_ = emulator_error(kInvalid, "%s: %s %s", made_.name.c_str(), parameter, problem);
}

template <class T>
bool Call::Given(const char* parameter, const T* object) {
  if (object == nullptr) return false;
  if (IsLive(object)) return true;
  Fail(parameter, "was destroyed, or holds what was");
  return false;
}

void Call::Input(const char* parameter, const aclTensor* tensor, bool optional) {
  const bool given = Given(parameter, tensor);
  made_.tensors.push_back(given ? *tensor : aclTensor{});
  if (code_ != 0) return;
  if (given) {
    code_ = CheckTensor(made_.name.c_str(), parameter, *tensor);
    if (!ScalarTypeOf(tensor->dtype))
      Fail(parameter, "has a dtype that the emulator's operators do not know");
  } else if (!optional) {
    code_ = emulator_error(kNull, "%s: %s is null", made_.name.c_str(), parameter);
  }
}

void Call::Output(const char* parameter, const aclTensor* tensor, bool optional) {
  Input(parameter, tensor, optional);
  ++made_.outputs;
}

size_t Call::Input(const char* parameter, const aclTensorList* list) {
  if (!Given(parameter, list)) return 0;
  for (const aclTensor* tensor : list->tensors) Input(parameter, tensor, true);
  return list->tensors.size();
}

size_t Call::Output(const char* parameter, const aclTensorList* list) {
  const size_t count = Input(parameter, list);
  made_.outputs += count;
  return count;
}

at::Scalar Call::Value(const char* parameter, const aclScalar* scalar) {
  if (!Given(parameter, scalar)) {
    if (code_ == 0) code_ = emulator_error(kNull, "%s: %s is null", made_.name.c_str(), parameter);
    return 0;
  }
  switch (scalar->dtype) {
    case ACL_FLOAT:
      return *reinterpret_cast<const float*>(scalar->value);
    case ACL_DOUBLE:
      return *reinterpret_cast<const double*>(scalar->value);
    case ACL_FLOAT16:
      return static_cast<float>(*reinterpret_cast<const at::Half*>(scalar->value));
    case ACL_BF16:
      return static_cast<float>(*reinterpret_cast<const at::BFloat16*>(scalar->value));
    case ACL_INT8:
      return *reinterpret_cast<const int8_t*>(scalar->value);
    case ACL_UINT8:
      return *reinterpret_cast<const uint8_t*>(scalar->value);
    case ACL_INT16:
      return *reinterpret_cast<const int16_t*>(scalar->value);
    case ACL_INT32:
      return *reinterpret_cast<const int32_t*>(scalar->value);
    case ACL_INT64:
      return *reinterpret_cast<const int64_t*>(scalar->value);
    case ACL_BOOL:
      return *reinterpret_cast<const bool*>(scalar->value);
    default:
      Fail(parameter, "has a dtype that the emulator's operators do not know");
      return 0;
  }
}

std::optional<at::Scalar> Call::Maybe(const char* parameter, const aclScalar* scalar) {
  if (scalar == nullptr) return std::nullopt;
  return Value(parameter, scalar);
}

std::vector<int64_t> Call::Value(const char* parameter, const aclIntArray* array) {
  return Given(parameter, array) ? array->values : std::vector<int64_t>();
}

std::vector<uint8_t> Call::Value(const char* parameter, const aclBoolArray* array) {
  return Given(parameter, array) ? array->values : std::vector<uint8_t>();
}

std::string Call::Value(const char*, const char* text) const { return text != nullptr ? text : ""; }

at::ScalarType Call::Value(const char* parameter, aclDataType dtype) {
  const auto type = ScalarTypeOf(dtype);
  if (!type) Fail(parameter, "is a dtype that the emulator's operators do not know");
  return type.value_or(at::kFloat);
}

int Call::Publish(std::function<void(Reader)> body, uint64_t* workspace_size, aclOpExecutor** executor) {
  if (code_ == 0 && (workspace_size == nullptr || executor == nullptr)) {
    code_ = emulator_error(kNull, "%s: workspaceSize or executor is null", made_.name.c_str());
  }
  if (code_ != 0) return code_;
  made_.run = [name = made_.name, body = std::move(body)](const std::vector<aclTensor>& tensors, void*) {
    try {
      c10::InferenceMode no_autograd;
      Tensors views;
      for (const aclTensor& tensor : tensors) views.push_back(View(tensor));
      body(Reader(views));
      return 0;
    } catch (const c10::Error& error) {
      return emulator_error(kInner, "%s: %s", name.c_str(), error.what_without_backtrace());
    }
  };
  emulator::Publish(std::move(made_), workspace_size, executor);
  return 0;
}

void Assign(const at::Tensor& out, const at::Tensor& value) {
  if (!out.defined() || !value.defined()) return;
  TORCH_CHECK(out.numel() == value.numel(), "the output has shape ", out.sizes(), ", but the result ",
              value.sizes());
  out.copy_(value.reshape(out.sizes()));
}

void Assign(const Tensors& outs, const Tensors& values) {
  TORCH_CHECK(outs.size() == values.size(), outs.size(), " outputs, but ", values.size(), " results");
  for (size_t i = 0; i < outs.size(); ++i) Assign(outs[i], values[i]);
}

void Shrink(const aclTensor* caller, const at::Tensor& out, const at::Tensor& value) {
  if (!value.defined()) return;
  TORCH_CHECK(value.numel() <= out.numel(), "the output has room for ", out.numel(),
              " elements, but the result has ", value.numel());
  if (value.numel() > 0) at::from_blob(out.data_ptr(), value.sizes(), out.options()).copy_(value);
  if (!IsLive(caller)) return;
  auto* tensor = const_cast<aclTensor*>(caller);
  tensor->shape = value.sizes().vec();
  tensor->strides = at::empty(value.sizes(), at::TensorOptions(at::kMeta)).strides().vec();
}

c10::List<std::optional<at::Tensor>> Indices(const Tensors& list) {
  c10::List<std::optional<at::Tensor>> indices;
  for (const at::Tensor& tensor : list) {
    indices.push_back(tensor.defined() && tensor.numel() > 0 ? std::optional(tensor) : std::nullopt);
  }
  return indices;
}

at::Generator Random(int64_t seed, int64_t offset) {
  return at::detail::createCPUGenerator(static_cast<uint64_t>(seed * 1000003 + offset));
}

}  // namespace emulator
