// SPDX-License-Identifier: Apache-2.0
// The machine's limits (cpu/probe.h) for benchmarks/machine.py. Part of _native (module.cc).
#pragma once

#include <pybind11/pybind11.h>

namespace ffn {

void BindProbe(pybind11::module_& module);

}  // namespace ffn
