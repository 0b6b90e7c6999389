// SPDX-License-Identifier: Apache-2.0
// The two phases of aclnnFFNV3 as Python objects, for ffn_ops/aclnn.py. Part of _native (module.cc).
#pragma once

#include <pybind11/pybind11.h>

namespace ffn {

void BindAclnn(pybind11::module_& module);

}  // namespace ffn
