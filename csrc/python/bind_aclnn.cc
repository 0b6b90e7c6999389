// SPDX-License-Identifier: Apache-2.0
// See bind_aclnn.h. Addresses are device addresses as integers; ffn_ops/aclnn.py takes care that what is
// behind them lives.
#include "python/bind_aclnn.h"

#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "aclnn/ffn.h"

namespace ffn {
namespace {

namespace py = pybind11;

// (acl dtype, shape, offset, storage elements, address of the storage); dense, sizes in elements.
using Desc = std::tuple<int, std::vector<int64_t>, int64_t, int64_t, uintptr_t>;

aclnn::TensorDesc ToDesc(const Desc& from) {
  aclnn::TensorDesc desc;
  desc.given = true;
  desc.dtype = static_cast<aclDataType>(std::get<0>(from));
  desc.shape = std::get<1>(from);
  desc.offset = std::get<2>(from);
  desc.storage = std::get<3>(from);
  desc.data = reinterpret_cast<void*>(std::get<4>(from));
  return desc;
}

std::unique_ptr<aclnn::Prepared> Prepare(const std::vector<std::optional<Desc>>& tensors,
                                         const std::string& activation, int64_t inner_precise,
                                         bool tokens_index_flag) {
  if (tensors.size() != aclnn::kTensors) throw py::value_error("a call has 14 inputs and y");
  aclnn::Call call;
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i]) call.tensors[i] = ToDesc(*tensors[i]);
  }
  call.activation = activation;
  call.inner_precise = inner_precise;
  call.tokens_index_flag = tokens_index_flag;
  return std::make_unique<aclnn::Prepared>(aclnn::GetLibrary(), call);
}

void Run(aclnn::Prepared& prepared, uintptr_t workspace, uint64_t size, uintptr_t stream) {
  int status = 0;
  {
    const py::gil_scoped_release released;
    status = prepared.Run(reinterpret_cast<void*>(workspace), size, reinterpret_cast<aclrtStream>(stream));
  }
  if (status != 0) prepared.ThrowRun(status);
}

}  // namespace

void BindAclnn(py::module_& module) {
  module.def(
      "aclnn_library", [] { return aclnn::GetLibrary().path; },
      "The path of the library that holds aclnnFFNV3; RuntimeError with every path tried when there is "
      "none.");
  py::class_<aclnn::Prepared>(module, "Prepared")
      .def(py::init(&Prepare), py::arg("tensors"), py::arg("activation"), py::arg("inner_precise"),
           py::arg("tokens_index_flag"))
      .def_property_readonly("workspace_size", &aclnn::Prepared::workspace_size)
      .def("run", &Run, py::arg("workspace"), py::arg("size"), py::arg("stream"))
      .def("make_repeatable", &aclnn::Prepared::MakeRepeatable)
      .def("set_address", [](aclnn::Prepared& prepared, int index, uintptr_t address) {
        if (index < 0 || index >= aclnn::kTensors) throw py::index_error("a call has 14 inputs and y");
        prepared.SetAddress(index, reinterpret_cast<void*>(address));
      });
}

}  // namespace ffn
