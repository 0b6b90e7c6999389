// SPDX-License-Identifier: Apache-2.0
// From aclnn's objects to ATen tensors on the host's view of device memory, for the operators that
// operators.txt lists. generate.py writes one function per line and phase on top of this; aten.cc implements
// it, moe.h holds the operators that are longer than one expression. Built on first use by
// ffn_ops/emulator/operators.py, against the installed torch.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "emulator/nnopbase/objects.h"

namespace emulator {

using Tensors = std::vector<at::Tensor>;

// What an operator's body reads in phase 2: the tensors of phase 1, in the order of its parameters.
class Reader {
 public:
  explicit Reader(const Tensors& tensors) : next_(tensors.begin()) {}
  const at::Tensor& One() { return *next_++; }  // undefined when the caller passed null
  std::optional<at::Tensor> Maybe();
  Tensors Many(size_t count);

 private:
  Tensors::const_iterator next_;
};

// Phase 1: takes the parameters in order, remembers the first thing wrong with them, and makes the executor.
class Call {
 public:
  explicit Call(const char* name) { made_.name = name, made_.outputs = 0; }

  void Input(const char* parameter, const aclTensor* tensor, bool optional);
  void Output(const char* parameter, const aclTensor* tensor, bool optional);
  size_t Input(const char* parameter, const aclTensorList* list);  // its length; absent lists are empty
  size_t Output(const char* parameter, const aclTensorList* list);

  at::Scalar Value(const char* parameter, const aclScalar* scalar);
  std::optional<at::Scalar> Maybe(const char* parameter, const aclScalar* scalar);
  std::vector<int64_t> Value(const char* parameter, const aclIntArray* array);  // absent arrays are empty
  std::vector<uint8_t> Value(const char* parameter, const aclBoolArray* array);
  std::string Value(const char* parameter, const char* text) const;
  at::ScalarType Value(const char* parameter, aclDataType dtype);
  template <class Number>
  Number Value(const char*, Number number) const {
    return number;
  }

  int Publish(std::function<void(Reader)> body, uint64_t* workspace_size, aclOpExecutor** executor);

 private:
  // Whether a parameter is there to be read. All pointers of callers pass here: dead objects fail the call.
  template <class T>
  bool Given(const char* parameter, const T* object);
  void Fail(const char* parameter, const char* problem);

  aclOpExecutor made_;
  int code_ = 0;
};

// Writes a result to an output that may have another dtype or layout, but not another number of elements.
// Skips an output that the caller left out, and a result that was not asked for (an undefined tensor).
void Assign(const at::Tensor& out, const at::Tensor& value);
void Assign(const Tensors& outs, const Tensors& values);

// For outputs whose shape only the run knows: writes the value densely to the memory of `out`, then gives the
// caller's tensor the value's shape, which callers read with aclGetViewShape once the stream has finished.
void Shrink(const aclTensor* caller, const at::Tensor& out, const at::Tensor& value);

// Null entries of an index list stand for whole dimensions, and so do empty ones: that is how torch_npu
// writes them (where an index is really empty, so is the result, and there is nothing to do).
c10::List<std::optional<at::Tensor>> Indices(const Tensors& list);

// The device's random operators get their state as numbers. Same numbers, same values; not the device's
// values.
at::Generator Random(int64_t seed, int64_t offset);

}  // namespace emulator
