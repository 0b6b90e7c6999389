// SPDX-License-Identifier: Apache-2.0
// The contract's C++ evaluation for the tests that compare it with ffn_ops/contract.py. Part of _native
// (module.cc).
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>

#include "contract/contract.h"

namespace ffn {

// A name's position in one of the contract's tables.
template <size_t kCount>
int Position(const char* const (&names)[kCount], const std::string& name) {
  const auto* found = std::find(std::begin(names), std::end(names), name);
  if (found == std::end(names)) throw pybind11::value_error(name + " is not in the contract's tables");
  return static_cast<int>(found - names);
}

void BindContract(pybind11::module_& module);

}  // namespace ffn
