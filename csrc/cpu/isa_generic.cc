// SPDX-License-Identifier: Apache-2.0
// The kernels with the flags of the baseline: any CPU the build targets. On aarch64 that is NEON.
#include "cpu/ffn-inl.h"

namespace ffn::cpu {

const Kernels kGenericKernels = {"generic",    LeftOf,        ReadsPlainRows, LoadRows,
                                 FirstProduct, SecondProduct, PackColumns,    Combine};

}  // namespace ffn::cpu
