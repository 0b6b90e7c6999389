// SPDX-License-Identifier: Apache-2.0
// The kernels for aarch64 with products of fp16 (FMLAL) beside dot products: Kunpeng 920,
// which has neither bf16 nor products of matrices; CMakeLists.txt has the flags.
#include "cpu/ffn-inl.h"

#if !defined(FFN_DOT_FP16)
#error "isa_neon_fhm.cc is compiled without its flags"
#endif

namespace ffn::cpu {

const Kernels kNeonFhmKernels = {"neon_fhm",   LeftOf,        ReadsPlainRows, LoadRows,
                                 FirstProduct, SecondProduct, PackColumns,    Combine};

}  // namespace ffn::cpu
