// SPDX-License-Identifier: Apache-2.0
// The kernels for x86-64 with AVX-VNNI beside AVX2, FMA and F16C; CMakeLists.txt has the flags.
#include "cpu/ffn-inl.h"

#if !defined(__AVXVNNI__)
#error "isa_avx2_vnni.cc is compiled without its flags"
#endif

namespace ffn::cpu {

const Kernels kAvx2VnniKernels = {"avx2_vnni",  LeftOf,        ReadsPlainRows, LoadRows,
                                  FirstProduct, SecondProduct, PackColumns,    Combine};

}  // namespace ffn::cpu
