// SPDX-License-Identifier: Apache-2.0
// The kernels for x86-64 with AVX-512 F, BW, VL and DQ; CMakeLists.txt has the flags.
#include "cpu/ffn-inl.h"

namespace ffn::cpu {

static_assert(kLanes == 16, "isa_avx512.cc is compiled without -mavx512f -mavx512bw -mavx512vl -mavx512dq");
const Kernels kAvx512Kernels = {"avx512",     LeftOf,        ReadsPlainRows, LoadRows,
                                FirstProduct, SecondProduct, PackColumns,    Combine};

}  // namespace ffn::cpu
