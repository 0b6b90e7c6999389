// SPDX-License-Identifier: Apache-2.0
// The kernels for aarch64 with products of matrices of bf16 and int8 (BFMMLA, SMMLA) beside
// FMLAL and dot products; CMakeLists.txt has the flags.
#include "cpu/ffn-inl.h"

#if !defined(FFN_MATRICES) || !defined(FFN_DOT_FP16)
#error "isa_neon_i8mm.cc is compiled without its flags"
#endif

namespace ffn::cpu {

const Kernels kNeonI8mmKernels = {"neon_i8mm",  LeftOf,        ReadsPlainRows, LoadRows,
                                  FirstProduct, SecondProduct, PackColumns,    Combine};

}  // namespace ffn::cpu
