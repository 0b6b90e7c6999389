// SPDX-License-Identifier: Apache-2.0
// The contract's C++ evaluation for the tests that compare it with ffn_ops/contract.py. Part of _native (module.cc).
#pragma once

#include <pybind11/pybind11.h>

namespace ffn {

void BindContract(pybind11::module_& module);

}  // namespace ffn
