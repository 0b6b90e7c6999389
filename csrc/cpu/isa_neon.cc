// SPDX-License-Identifier: Apache-2.0
// The kernels for aarch64 with dot products: Armv8.2-A, as Neoverse N1;
// CMakeLists.txt has the flags.
#include "cpu/ffn-inl.h"

#if !FFN_DOT
#error "isa_neon.cc is compiled without its flags"
#endif

namespace ffn::cpu {

const Kernels kNeonKernels = {"neon",       LeftOf,        ReadsPlainRows, LoadRows,
                              FirstProduct, SecondProduct, PackColumns,    Combine};

}  // namespace ffn::cpu
