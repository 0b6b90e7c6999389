// SPDX-License-Identifier: Apache-2.0
// memory.h. Knows nothing of the kernels but what they align to.
#include "cpu/memory.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>
#include <new>
#include <utility>

namespace ffn::cpu {
namespace {

constexpr size_t kHugePage = 2 << 20;
constexpr size_t kLine = 64;

// Pieces of many pages begin on a large one.
std::align_val_t AlignmentOf(size_t bytes) {
  return std::align_val_t{bytes < 2 * kHugePage ? kLine : kHugePage};
}

void Free(char* data, size_t bytes) { ::operator delete(data, AlignmentOf(bytes)); }

struct Piece {
  char* data = nullptr;
  size_t bytes = 0;
  ~Piece() { Free(data, bytes); }
};

thread_local Piece kept[2];  // by Scratch::Use

// madvise's numbers on Linux, some of which its older headers lack. Where the system refuses, pages stay
// small and everything else as it is.
constexpr int kMadviseHugePage = 14, kMadviseCollapse = 25;

void Advise([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes, [[maybe_unused]] int advice) {
#if defined(__linux__)
  const auto address = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t begin = (address + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (address + bytes) / kHugePage * kHugePage;
  if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, advice);
#endif
}

}  // namespace

void AskForHugePages(void* memory, size_t bytes) { Advise(memory, bytes, kMadviseHugePage); }

void CollapseToHugePages(void* memory, size_t bytes) { Advise(memory, bytes, kMadviseCollapse); }

Scratch::Scratch(Use use, size_t bytes) : use_(use), bytes_(bytes), data_(nullptr) {
  Piece& piece = kept[use];
  if (piece.bytes >= bytes) {
    bytes_ = std::exchange(piece.bytes, 0);
    data_ = std::exchange(piece.data, nullptr);
  }
  if (data_ == nullptr) {
    data_ = static_cast<char*>(::operator new(bytes, AlignmentOf(bytes)));
    AskForHugePages(data_, bytes);
  }
}

Scratch::~Scratch() {
  Piece& piece = kept[use_];
  if (bytes_ <= kKept && bytes_ > piece.bytes) {
    std::swap(piece.bytes, bytes_);
    std::swap(piece.data, data_);
  }
  Free(data_, bytes_);
}

}  // namespace ffn::cpu
