// SPDX-License-Identifier: Apache-2.0
// The kernels for x86-64 with AMX bf16 and int8 beside AVX-512; CMakeLists.txt has the flags.
#define FFN_AMX 1
#include "cpu/ffn-inl.h"

namespace ffn::cpu {

static_assert(kLanes == 16, "isa_amx.cc is compiled without the flags of isa_avx512.cc");
const Kernels kAmxKernels = {"amx",        LeftOf,        ReadsPlainRows, LoadRows,
                             FirstProduct, SecondProduct, PackColumns,    Combine};

}  // namespace ffn::cpu
