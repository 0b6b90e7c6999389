// SPDX-License-Identifier: Apache-2.0
// From a checked call to a Problem: the one place where the contract's terms become the kernels'.
// csrc/op and csrc/python add the pointers and row ends.
#pragma once

#include "contract/contract.h"
#include "cpu/ffn.h"

namespace ffn::cpu {

// Sizes, dtypes, activation and flags. `plan` is what contract::Resolve made of `call`.
Problem ProblemOf(const contract::Call& call, const contract::Plan& plan);

}  // namespace ffn::cpu
