// SPDX-License-Identifier: Apache-2.0
// Whole blocks of prepacked weights: sizes, header, packing, unpacking, pages. See packed.h.
#include "cpu/packed.h"

#include <algorithm>
#include <cstring>
#include <iterator>

#include "cpu/kernels.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"

namespace ffn::cpu {
namespace {

constexpr char kMagic[8] = {'f', 'f', 'n', '_', 'p', 'a', 'c', 'k'};
constexpr uint32_t kVersion = 2;

struct Format {
  int64_t bits;     // of an element
  int64_t group;    // rows that stand together
  int64_t padding;  // K is filled up to a multiple of this
};

Format FormatOf(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return {32, 1, 1};
    case DType::kFloat16:
      return {16, 1, 32};
    case DType::kBFloat16:
      return {16, 2, 32};
    case DType::kInt8:
      return {8, 4, 64};
    default:
      return {4, kNibbles, 32};
  }
}

bool IsWeightDType(DType dtype) { return dtype <= DType::kInt4; }

// Elements of 1 << kLogBits bits, read and written by their number.
template <int kLogBits>
uint32_t Get(const void* data, int64_t index) {
  constexpr int kBits = 1 << kLogBits;
  if constexpr (kBits == 4) {
    return static_cast<const uint8_t*>(data)[index / 2] >> (index % 2 * 4) & 15;
  } else {
    uint32_t value = 0;
    std::memcpy(&value, static_cast<const char*>(data) + index * (kBits / 8), kBits / 8);
    return value;  // little-endian, as everything this runs on
  }
}

template <int kLogBits>
void UnpackPanel(const PackedHeader& header, int64_t group, const char* panel, int64_t column,
                 int64_t columns, void* to) {
  constexpr int kBits = 1 << kLogBits;
  for (int64_t k = 0; k < header.K; ++k) {
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t place = kBits == 4 ? NibbleOf(k) : k % group;
      const uint32_t value = Get<kLogBits>(panel, (k / group * kPackedColumns + c) * group + place);
      const int64_t index = k * header.N + column + c;
      if constexpr (kBits == 4) {
        uint8_t& byte = static_cast<uint8_t*>(to)[index / 2];
        byte = static_cast<uint8_t>(index % 2 == 0 ? value : byte | value << 4);
      } else {
        std::memcpy(static_cast<char*>(to) + index * (kBits / 8), &value, kBits / 8);
      }
    }
  }
}

int64_t PanelBytes(const PackedHeader& header) {
  const Format format = FormatOf(header.dtype);
  return (header.K + format.padding - 1) / format.padding * format.padding * kPackedColumns * format.bits / 8;
}

int64_t PanelCount(const PackedHeader& header) { return (header.N + kPackedColumns - 1) / kPackedColumns; }

char* PanelsOf(const PackedHeader& header, void* block, int64_t expert) {
  return static_cast<char*>(block) + sizeof(PackedHeader) + expert * PanelCount(header) * PanelBytes(header);
}

}  // namespace

PackedHeader HeaderOf(DType dtype, int64_t E, int64_t K, int64_t N) {
  PackedHeader header = {};
  std::memcpy(header.magic, kMagic, sizeof(kMagic));
  header.version = kVersion;
  header.dtype = dtype;
  header.E = E;
  header.K = K;
  header.N = N;
  return header;
}

int64_t PackedBytes(const PackedHeader& header) {
  int64_t bytes = 0;
  if (__builtin_add_overflow(header.K, 64, &bytes) ||
      __builtin_mul_overflow(bytes, kPackedColumns * FormatOf(header.dtype).bits, &bytes) ||
      header.N > INT64_MAX - kPackedColumns ||
      __builtin_mul_overflow(PanelBytes(header), PanelCount(header), &bytes) ||
      __builtin_mul_overflow(bytes, std::max<int64_t>(header.E, 1), &bytes) ||
      __builtin_add_overflow(bytes, static_cast<int64_t>(sizeof(PackedHeader)), &bytes)) {
    return -1;
  }
  return bytes;
}

std::string ReadHeader(const char* name, const void* block, int64_t bytes, PackedHeader* header) {
  const std::string subject = name;
  if (bytes < static_cast<int64_t>(sizeof(PackedHeader)) || std::memcmp(block, kMagic, sizeof(kMagic)) != 0) {
    return subject +
           " is a row of uint8, but does not begin as a prepacked weight does (make it with ffn_ops.prepack)";
  }
  std::memcpy(header, block, sizeof(PackedHeader));
  if (header->version != kVersion || !IsWeightDType(header->dtype)) {
    return subject + " is a packed weight of version " + std::to_string(header->version) +
           ", but this ffn_ops reads version " + std::to_string(kVersion) +
           " (unpack it with the ffn_ops that packed it, or pack the original again)";
  }
  const bool pairs = header->dtype != DType::kInt4 || header->N % 2 == 0;  // two columns share a byte
  const bool sizes = header->E >= 0 && header->K >= 0 && header->N >= 0 && pairs;
  const int64_t expected = sizes ? PackedBytes(*header) : -1;
  if (expected != bytes) {
    return subject + " holds " + std::to_string(bytes) + " bytes, but its header promises " +
           std::to_string(expected) + " (it was cut or changed: pack the original again)";
  }
  return {};
}

Weight PackedWeight(const PackedHeader& header, const void* block) {
  Weight weight;
  weight.data = static_cast<const char*>(block) + sizeof(PackedHeader);
  weight.packed = true;
  weight.panel_bytes = PanelBytes(header);
  weight.expert_stride = PanelCount(header) * weight.panel_bytes;
  return weight;
}

void BeginBlock(const PackedHeader& header, void* block) {
  AskForHugePages(block, static_cast<size_t>(PackedBytes(header)));
  std::memcpy(block, &header, sizeof(header));
}

void PackExpert(const PackedHeader& header, const Weight& from, int64_t expert, const ParallelFor& parallel,
                void* block, const char* isa) {
  const Kernels& kernels = KernelsOf(isa);
  const int64_t panels = PanelCount(header), bytes = PanelBytes(header);
  char* const to = PanelsOf(header, block, expert);
  // Several panels a task, so that a row of the weight is read in long runs.
  constexpr int64_t kPanelsPerTask = 8;
  ForEach(parallel, parallel.threads, (panels + kPanelsPerTask - 1) / kPanelsPerTask,
          [&](int64_t i, int64_t) {
            const int64_t column = i * kPanelsPerTask * kPackedColumns;
            const int64_t columns = std::min(kPanelsPerTask * kPackedColumns, header.N - column);
            kernels.pack(from, header.dtype, header.K, {expert, 0, header.K, column, columns}, bytes,
                         to + i * kPanelsPerTask * bytes);
          });
  // An allocator may have handed out memory that was touched before BeginBlock could ask.
  if (expert == std::max<int64_t>(header.E, 1) - 1) {
    CollapseToHugePages(block, static_cast<size_t>(PackedBytes(header)));
  }
}

void Unpack(const PackedHeader& header, const void* block, const ParallelFor& parallel, void* to) {
  const Format format = FormatOf(header.dtype);
  const int64_t panels = PanelCount(header);
  ForEach(parallel, parallel.threads, std::max<int64_t>(header.E, 1) * panels, [&](int64_t i, int64_t) {
    const int64_t column = i % panels * kPackedColumns;
    const int64_t columns = std::min(kPackedColumns, header.N - column);
    const char* const panel =
        PanelsOf(header, const_cast<void*>(block), i / panels) + i % panels * PanelBytes(header);
    char* const dense = static_cast<char*>(to) + i / panels * header.K * header.N * format.bits / 8;
    switch (format.bits) {
      case 4:
        return UnpackPanel<2>(header, format.group, panel, column, columns, dense);
      case 8:
        return UnpackPanel<3>(header, format.group, panel, column, columns, dense);
      case 16:
        return UnpackPanel<4>(header, format.group, panel, column, columns, dense);
      default:
        return UnpackPanel<5>(header, format.group, panel, column, columns, dense);
    }
  });
}

}  // namespace ffn::cpu
