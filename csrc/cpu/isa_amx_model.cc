// SPDX-License-Identifier: Apache-2.0
// The kernels of isa_amx.cc over tiles in plain C++, so that they are tested where no CPU has AMX. Slow, and
// never chosen unless named.
#define FFN_AMX_MODEL 1
#include "cpu/ffn-inl.h"

namespace ffn::cpu {

const Kernels kAmxModelKernels = {"amx_model",   LeftOf,      LoadRows, FirstProduct,
                                  SecondProduct, PackColumns, Combine};

}  // namespace ffn::cpu
