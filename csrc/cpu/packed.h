// SPDX-License-Identifier: Apache-2.0
// Prepacked weights: one block of bytes that holds the weights of all experts in the order in which the
// kernels read them, behind a header that says what it is. The layout is the same for every instruction set.
// packed.cc handles whole blocks, packed-inl.h writes and reads panels in the kernels; csrc/python offers it
// to ffn_ops/packing.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "cpu/ffn.h"

namespace ffn::cpu {

// The header, then [E][ceil(N / kPackedColumns)] panels of kPackedColumns columns; columns beyond N and rows
// beyond K are zeros. In a panel, as many rows stand together as fit 32 bits, so that the lanes of a vector
// are columns whatever the dtype is, and pairs and quads are what VNNI, AMX and Arm's dot products multiply:
//   float32  [K][32]        bfloat16  [K / 2][32][2], K filled up to 32, the depth of an AMX tile
//   float16  [K][32], as    int8      [K / 4][32][4], K filled up to 64, likewise
//                           int4      [K / 8][32] words, row k in nibble NibbleOf(k)

struct PackedHeader {
  char magic[8];
  uint32_t version;
  DType dtype;
  char zeros[3];
  int64_t E, K, N;  // E is 0 for a dense weight
  char reserved[24];
};
static_assert(sizeof(PackedHeader) == 64, "panels begin on a cache line of the block");

PackedHeader HeaderOf(DType dtype, int64_t E, int64_t K, int64_t N);
// Bytes of the whole block, or -1 when they are beyond int64.
int64_t PackedBytes(const PackedHeader& header);

// Empty, or a sentence: `name` is not a packed weight that this version reads.
std::string ReadHeader(const char* name, const void* block, int64_t bytes, PackedHeader* header);
// The block of a header that ReadHeader accepted, for a Problem.
Weight PackedWeight(const PackedHeader& header, const void* block);

// Writes the header into memory of PackedBytes, and asks for 2 MB pages there, best effort: nothing should
// have touched it yet.
void BeginBlock(const PackedHeader& header, void* block);
// Packs expert `expert` of a plain weight as that of the block (a dense one has only 0), with the kernels of
// `isa` (null: the selected one). Other experts of `from` are not looked at.
void PackExpert(const PackedHeader& header, const Weight& from, int64_t expert, const ParallelFor& parallel,
                void* block, const char* isa = nullptr);
// Unpacks a block into a dense [E, K, N].
void Unpack(const PackedHeader& header, const void* block, const ParallelFor& parallel, void* to);

}  // namespace ffn::cpu
