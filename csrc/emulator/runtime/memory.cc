// SPDX-License-Identifier: Apache-2.0
// Device memory: two ranges of addresses. The one that callers hold may not be touched by the host, so a host
// access faults as it would go wrong on a device; stream tasks and copies use the other one, the host's view.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <numeric>
#include <set>

#include "emulator/runtime/runtime.h"

namespace {

constexpr size_t kDeviceBytes = size_t{64} << 30;  // that of a 910B
constexpr size_t kPage = 4096;
constexpr size_t kPoisonBytes = size_t{16} << 20;
constexpr int kPoison =
    0xFB;  // fresh memory: a large negative number in every dtype, never the zero one hopes for

struct Block {
  char* host;   // null once it is freed: the address is never given out again, so that a later use is noticed
  size_t size;  // as asked for
  size_t mapped;  // in whole pages
  int device;
};

struct Memory {
  std::mutex mutex;
  std::map<uintptr_t, Block> blocks;  // by device address
  std::set<void*> host_blocks;
  size_t used[64] = {};
};

Memory& memory() {
  static Memory& m = *new Memory;  // never destroyed: stream threads may outlive static objects
  return m;
}

// A view of fresh memory, or null. All views are private copies of one file of poison, so that a page takes
// room when it is first written.
char* MapPoisoned(size_t bytes) {
  static const int file = [] {
    const int made = memfd_create("poison of emulated device memory", MFD_CLOEXEC);
    if (made < 0 || ftruncate(made, kPoisonBytes) != 0) return -1;
    void* const all = mmap(nullptr, kPoisonBytes, PROT_READ | PROT_WRITE, MAP_SHARED, made, 0);
    if (all == MAP_FAILED) return -1;
    std::memset(all, kPoison, kPoisonBytes);
    munmap(all, kPoisonBytes);
    return made;
  }();
  void* const view = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (view == MAP_FAILED) return nullptr;
  for (size_t at = 0; at < bytes; at += kPoisonBytes) {
    if (mmap(static_cast<char*>(view) + at, std::min(kPoisonBytes, bytes - at), PROT_READ | PROT_WRITE,
             MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, file, 0) == MAP_FAILED) {
      munmap(view, bytes);
      return nullptr;
    }
  }
  return static_cast<char*>(view);
}

// What the host has for all devices together.
size_t HostBytes() {
  static const size_t bytes =
      static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

// The live block that holds [address, address + size), or null. The caller holds the mutex.
const std::pair<const uintptr_t, Block>* Find(const void* pointer, size_t size) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  auto it = memory().blocks.upper_bound(address);
  if (it == memory().blocks.begin()) return nullptr;
  --it;
  const size_t offset = address - it->first;
  const bool inside = offset < it->second.size && size <= it->second.size - offset;
  return inside && it->second.host != nullptr ? &*it : nullptr;
}

// The host's view of memory of a device (-1: of any), or null.
void* View(const void* pointer, size_t size, int device) {
  std::lock_guard lock(memory().mutex);
  const auto* const found = Find(pointer, size);
  if (found == nullptr || (device >= 0 && found->second.device != device)) return nullptr;
  return found->second.host + (reinterpret_cast<uintptr_t>(pointer) - found->first);
}

// Whether a byte of [pointer, pointer + size) is or was a device's. `size` is not 0.
bool TouchesDevice(const void* pointer, size_t size) {
  const auto first = reinterpret_cast<uintptr_t>(pointer);
  const size_t most = UINTPTR_MAX - first;
  std::lock_guard lock(memory().mutex);
  auto it = memory().blocks.upper_bound(first + std::min(size - 1, most));
  return it != memory().blocks.begin() && (--it)->first + it->second.mapped > first;
}

// The host's view of one end of a copy, or null with an error set: the end must be where the kind says. A
// copy reaches the memory of other devices too.
void* End(const char* function, const char* end, const void* pointer, size_t size, bool device) {
  if (device) {
    if (void* const view = View(pointer, size, -1)) return view;
  } else if (pointer != nullptr && !TouchesDevice(pointer, size)) {
    return const_cast<void*>(pointer);
  }
  emulator_error(emulator::kInvalidParam, "%s: %s %p with %zu bytes is not in %s memory", function, end,
                 pointer, size, device ? "one allocation of device" : "host");
  return nullptr;
}

struct Copy {
  void* to;
  const void* from;
  size_t size;
};

// Checks both ends of a copy and counts its direction.
int Resolve(const char* function, void* to, size_t capacity, const void* from, size_t size,
            aclrtMemcpyKind kind, Copy* copy) {
  if (size == 0 || size > capacity) {
    return emulator_error(emulator::kInvalidParam, "%s: %zu bytes into %zu", function, size, capacity);
  }
  if (kind < ACL_MEMCPY_HOST_TO_HOST || kind > ACL_MEMCPY_DEVICE_TO_DEVICE) {
    return emulator_error(emulator::kInvalidParam, "%s: copy kind is %d", function, static_cast<int>(kind));
  }
  const bool to_device = kind == ACL_MEMCPY_HOST_TO_DEVICE || kind == ACL_MEMCPY_DEVICE_TO_DEVICE;
  const bool from_device = kind == ACL_MEMCPY_DEVICE_TO_HOST || kind == ACL_MEMCPY_DEVICE_TO_DEVICE;
  void* const to_view = End(function, "destination", to, size, to_device);
  if (to_view == nullptr) return emulator::kInvalidParam;
  const void* const from_view = End(function, "source", from, size, from_device);
  if (from_view == nullptr) return emulator::kInvalidParam;
  if (kind == ACL_MEMCPY_DEVICE_TO_HOST) emulator::Count("device_to_host_copies");
  if (kind == ACL_MEMCPY_HOST_TO_DEVICE) emulator::Count("host_to_device_copies");
  *copy = {to_view, from_view, size};
  return 0;
}

struct Fill {
  void* to;
  int value;
  size_t size;
};

int ResolveFill(const char* function, void* to, size_t capacity, int32_t value, size_t size, Fill* fill) {
  if (size > capacity)
    return emulator_error(emulator::kInvalidParam, "%s: %zu bytes into %zu", function, size, capacity);
  void* const view = emulator_host_view(to, size);
  if (view == nullptr) {
    return emulator_error(emulator::kInvalidParam,
                          "%s: %p with %zu bytes is not in one allocation of the current device", function,
                          to, size);
  }
  *fill = {view, value, size};
  return 0;
}

}  // namespace

void* emulator_host_view(const void* device, size_t size) {
  const int current = emulator::CurrentDevice();
  return current < 0 ? nullptr : View(device, size, current);
}

extern "C" {
#pragma GCC visibility push(default)

aclError aclrtMalloc(void** pointer, size_t size, aclrtMemMallocPolicy) {
  CALL();
  const int device = emulator::CurrentDevice();
  if (device < 0) return emulator_error(emulator::kContextNull, "%s: no device was set", __func__);
  if (size == 0 || pointer == nullptr)
    return emulator_error(emulator::kInvalidParam, "%s: %zu bytes", __func__, size);
  Memory& m = memory();
  std::lock_guard lock(m.mutex);
  if (size > kDeviceBytes - m.used[device]) {
    return emulator_error(emulator::kOutOfMemory, "%s: %zu bytes, but %zu are free", __func__, size,
                          kDeviceBytes - m.used[device]);
  }
  const size_t all = std::accumulate(std::begin(m.used), std::end(m.used), size_t{0});
  const size_t mapped = (size + kPage - 1) / kPage * kPage;
  char* host = nullptr;
  void* address = MAP_FAILED;
  if (all + size <= HostBytes() && (host = MapPoisoned(mapped)) != nullptr) {
    address = mmap(nullptr, mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  }
  if (address == MAP_FAILED) {
    if (host != nullptr) munmap(host, mapped);
    return emulator_error(emulator::kOutOfMemory, "%s: %zu bytes beside %zu, but the host has %zu", __func__,
                          size, all, HostBytes());
  }
  m.blocks[reinterpret_cast<uintptr_t>(address)] = {host, size, mapped, device};
  m.used[device] += size;
  emulator::Count("allocations");
  emulator::Count("live_bytes", static_cast<long>(size));
  *pointer = address;
  return 0;
}

aclError aclrtMallocAlign32(void** pointer, size_t size, aclrtMemMallocPolicy policy) {
  return aclrtMalloc(pointer, size, policy);
}

// Waits for all tasks, as the vendor's does: another device's may use the memory too.
aclError aclrtFree(void* pointer) {
  CALL();
  Memory& m = memory();
  Block block;
  {
    std::lock_guard lock(m.mutex);
    const auto it = m.blocks.find(reinterpret_cast<uintptr_t>(pointer));
    if (it == m.blocks.end() || it->second.host == nullptr) {
      return emulator_error(emulator::kInvalidParam, "%s: %p is not the start of live device memory",
                            __func__, pointer);
    }
  }
  emulator::WaitForStreams(-1);
  {
    std::lock_guard lock(m.mutex);
    Block& live = m.blocks[reinterpret_cast<uintptr_t>(pointer)];
    block = live;
    live.host = nullptr;
    if (block.host == nullptr) {
      return emulator_error(emulator::kInvalidParam, "%s: %p was freed by another thread", __func__, pointer);
    }
    m.used[block.device] -= block.size;
  }
  munmap(block.host, block.mapped);
  emulator::Count("live_bytes", -static_cast<long>(block.size));
  return 0;
}

aclError aclrtMallocHost(void** pointer, size_t size) {
  CALL();
  RESULTS(pointer);
  if (size == 0) return emulator_error(emulator::kInvalidParam, "%s: %zu bytes", __func__, size);
  void* const block =
      size <= HostBytes() ? std::aligned_alloc(kPage, (size + kPage - 1) / kPage * kPage) : nullptr;
  if (block == nullptr) return emulator_error(emulator::kOutOfMemory, "%s: %zu bytes", __func__, size);
  std::lock_guard lock(memory().mutex);
  memory().host_blocks.insert(block);
  *pointer = block;
  return 0;
}

// Waits as aclrtFree: tasks may copy from and to it.
aclError aclrtFreeHost(void* pointer) {
  CALL();
  emulator::WaitForStreams(-1);
  {
    std::lock_guard lock(memory().mutex);
    if (memory().host_blocks.erase(pointer) == 0) {
      return emulator_error(emulator::kInvalidParam, "%s: %p is not from aclrtMallocHost", __func__, pointer);
    }
  }
  std::free(pointer);
  return 0;
}

aclError aclrtGetMemInfo(aclrtMemAttr, size_t* free, size_t* total) {
  CALL();
  RESULTS(free, total);
  const int device = emulator::CurrentDevice();
  if (device < 0) return emulator_error(emulator::kContextNull, "%s: no device was set", __func__);
  std::lock_guard lock(memory().mutex);
  *total = kDeviceBytes;
  *free = kDeviceBytes - memory().used[device];
  return 0;
}

aclError aclrtMemcpy(void* to, size_t capacity, const void* from, size_t size, aclrtMemcpyKind kind) {
  CALL();
  Copy copy{};
  if (const int status = Resolve(__func__, to, capacity, from, size, kind, &copy)) return status;
  std::memmove(copy.to, copy.from, copy.size);
  return 0;
}

aclError aclrtMemcpyAsync(void* to, size_t capacity, const void* from, size_t size, aclrtMemcpyKind kind,
                          aclrtStream stream) {
  CALL();
  Copy copy{};
  if (const int status = Resolve(__func__, to, capacity, from, size, kind, &copy)) return status;
  return emulator::Enqueue(__func__, stream, [copy] { std::memmove(copy.to, copy.from, copy.size); });
}

aclError aclrtMemset(void* to, size_t capacity, int32_t value, size_t size) {
  CALL();
  Fill fill{};
  if (const int status = ResolveFill(__func__, to, capacity, value, size, &fill)) return status;
  std::memset(fill.to, fill.value, fill.size);
  return 0;
}

aclError aclrtMemsetAsync(void* to, size_t capacity, int32_t value, size_t size, aclrtStream stream) {
  CALL();
  if (const int status = emulator::CheckStream(__func__, stream)) return status;
  Fill fill{};
  if (const int status = ResolveFill(__func__, to, capacity, value, size, &fill)) return status;
  return emulator::Enqueue(__func__, stream, [fill] { std::memset(fill.to, fill.value, fill.size); });
}

#pragma GCC visibility pop
}
