// SPDX-License-Identifier: Apache-2.0
// Memory of the driver (ffn.cc, moe.cc) and of packed weights (packed.cc): 2 MB pages, and scratch that a
// thread keeps from one call to the next, since the system clears every page that it hands out.
#pragma once

#include <cstddef>

namespace ffn::cpu {

// Asks for 2 MB pages, best effort: nothing should have touched the memory yet.
void AskForHugePages(void* memory, size_t bytes);
// Moves memory that is in use already onto 2 MB pages, best effort (Linux 6.1).
void CollapseToHugePages(void* memory, size_t bytes);

// Memory for one call, aligned for every kernel. What is at most kKept stays with the calling thread until
// the thread ends, one piece for each use; a call inside another one gets memory of its own.
class Scratch {
 public:
  enum Use { kRows, kResults };
  static constexpr size_t kKept = 64 << 20;

  Scratch(Use use, size_t bytes);  // throws std::bad_alloc
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  char* data() const { return data_; }

 private:
  const Use use_;
  size_t bytes_;
  char* data_;
};

}  // namespace ffn::cpu
