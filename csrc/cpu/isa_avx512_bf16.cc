// SPDX-License-Identifier: Apache-2.0
// The kernels for x86-64 with AVX-512 BF16 beside VNNI, F, BW, VL and DQ; CMakeLists.txt has the flags.
#include "cpu/ffn-inl.h"

#if !defined(FFN_DOT_BF16)
#error "isa_avx512_bf16.cc is compiled without its flags"
#endif

namespace ffn::cpu {

const Kernels kAvx512Bf16Kernels = {"avx512_bf16", LeftOf,        ReadsPlainRows, LoadRows,
                                    FirstProduct,  SecondProduct, PackColumns,    Combine};

}  // namespace ffn::cpu
