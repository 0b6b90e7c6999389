// SPDX-License-Identifier: Apache-2.0
// The kernels for x86-64 with AVX-512 VNNI beside F, BW, VL and DQ; CMakeLists.txt has the flags.
#include "cpu/ffn-inl.h"

#if !FFN_DOT
#error "isa_avx512_vnni.cc is compiled without its flags"
#endif

namespace ffn::cpu {

const Kernels kAvx512VnniKernels = {"avx512_vnni", LeftOf,        ReadsPlainRows, LoadRows,
                                    FirstProduct,  SecondProduct, PackColumns,    Combine};

}  // namespace ffn::cpu
