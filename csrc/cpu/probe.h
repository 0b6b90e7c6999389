// SPDX-License-Identifier: Apache-2.0
// What the machine could do at best, measured: the limits that benchmarks/ compares times with. Everything
// runs on the calling thread; whoever wants the whole machine's limit calls from all its cores at once.
#pragma once

#include <cstddef>

namespace ffn::cpu {

// The probes of this machine, names into `count`: "fma", float32 multiply-adds of the widest vectors; "vnni",
// "amx_bf16" and "amx_int8" where it has them.
const char* const* ComputeProbes(size_t* count);

// Operations per second (2 for each multiply-add) over about `seconds`, from registers only. Negative for an
// unknown name.
double ProbeCompute(const char* name, double seconds);

// Reads `size` bytes once, in `streams` streams side by side, of which there is one at least.
void ProbeRead(const void* data, size_t size, size_t streams);

}  // namespace ffn::cpu
