// SPDX-License-Identifier: Apache-2.0
// The kernels for x86-64 with AVX2, FMA and F16C; CMakeLists.txt has the flags.
#include "cpu/ffn-inl.h"

namespace ffn::cpu {

static_assert(kLanes == 8, "isa_avx2.cc is compiled without -mavx2 -mfma -mf16c");
const Kernels kAvx2Kernels = {"avx2",       LeftOf,        ReadsPlainRows, LoadRows,
                              FirstProduct, SecondProduct, PackColumns,    Combine};

}  // namespace ffn::cpu
