// SPDX-License-Identifier: Apache-2.0
// From a checked call to a Problem, and from a prepacked weight to what the contract sees of it: the one
// place where the contract's terms become the kernels' and back. csrc/op and csrc/python add the pointers and
// row ends.
#pragma once

#include "contract/contract.h"
#include "cpu/ffn.h"
#include "cpu/packed.h"

namespace ffn::cpu {

// Sizes, dtypes, activation and flags. `plan` is what contract::Resolve made of `call`.
Problem ProblemOf(const contract::Call& call, const contract::Plan& plan);

DType FromContract(contract::DType dtype);
// The weight that was packed.
contract::Spec SpecOf(const PackedHeader& header);

}  // namespace ffn::cpu
