// SPDX-License-Identifier: Apache-2.0
// See bind_contract.h.
#include "python/bind_contract.h"

#include <pybind11/stl.h>

#include <map>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace ffn {
namespace {

using Specs = std::map<std::string, std::pair<std::string, std::vector<int64_t>>>;

// (rule, sentence) of every rule the call breaks.
std::vector<std::pair<std::string, std::string>> Violations(const Specs& specs, const std::string& activation,
                                                            std::optional<int64_t> inner_precise,
                                                            const std::string& route,
                                                            const std::string& target) {
  contract::Call call;
  for (const auto& [name, spec] : specs) {
    const int dtype = Position(contract::kDTypeNames, spec.first);
    call.operands[Position(contract::kOperandNames, name)] = {true, static_cast<contract::DType>(dtype),
                                                              spec.second};
  }
  call.activation = activation;
  call.inner_precise = inner_precise;
  std::vector<std::pair<std::string, std::string>> result;
  for (const contract::Violation& violation :
       contract::Violations(call, static_cast<contract::Route>(Position(contract::kRouteNames, route)),
                            static_cast<contract::Target>(Position(contract::kTargetNames, target)))) {
    result.emplace_back(violation.rule, violation.text);
  }
  return result;
}

// The end rows, or the sentence that refuses the values.
std::variant<std::vector<int64_t>, std::string> RowEnds(const std::vector<int64_t>& expert_tokens, int64_t M,
                                                        bool tokens_index_flag) {
  std::vector<int64_t> ends;
  std::string broken = contract::RowEnds(expert_tokens.data(), static_cast<int64_t>(expert_tokens.size()), M,
                                         tokens_index_flag, &ends);
  if (!broken.empty()) return broken;
  return ends;
}

}  // namespace

void BindContract(pybind11::module_& module) {
  namespace py = pybind11;
  module.def("violations", &Violations, py::arg("specs"), py::arg("activation"), py::arg("inner_precise"),
             py::arg("route"), py::arg("target"),
             "Every rule that a call breaks, as contract.violations has it.");
  module.def("row_ends", &RowEnds, py::arg("expert_tokens"), py::arg("M"), py::arg("tokens_index_flag"),
             "contract.row_ends, with the sentence returned rather than raised.");
}

}  // namespace ffn
