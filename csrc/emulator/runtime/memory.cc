// SPDX-License-Identifier: Apache-2.0
// Device memory: a memory file mapped twice. The device address that callers hold may not be touched by the
// host, so a host access faults as it would go wrong on a device; stream tasks and copies use the other view.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>

#include "emulator/runtime/runtime.h"

namespace {

constexpr size_t kDeviceBytes = size_t{64} << 30;  // that of a 910B
constexpr size_t kPage = 4096;
constexpr int kPoison =
    0xFB;  // fresh memory: a large negative number in every dtype, never the zero one hopes for

struct Block {
  char* host;
  size_t size;    // as asked for
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

// The block that holds [address, address + size), or null. The caller holds the mutex.
const std::pair<const uintptr_t, Block>* Find(const void* pointer, size_t size) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  auto it = memory().blocks.upper_bound(address);
  if (it == memory().blocks.begin()) return nullptr;
  --it;
  const size_t offset = address - it->first;
  return offset < it->second.size && size <= it->second.size - offset ? &*it : nullptr;
}

bool IsDevice(const void* pointer) {
  std::lock_guard lock(memory().mutex);
  return Find(pointer, 0) != nullptr;
}

// The host's view of one end of a copy, or null with an error set: the end must be where the kind says.
void* End(const char* function, const char* end, const void* pointer, size_t size, bool device) {
  void* const view = emulator_host_view(pointer, size);
  if (device ? view != nullptr : pointer != nullptr && !IsDevice(pointer)) {
    return device ? view : const_cast<void*>(pointer);
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
  void* const view = End(function, "destination", to, size, true);
  if (view == nullptr) return emulator::kInvalidParam;
  *fill = {view, value, size};
  return 0;
}

}  // namespace

void* emulator_host_view(const void* device, size_t size) {
  std::lock_guard lock(memory().mutex);
  const auto* const block = Find(device, size);
  return block == nullptr ? nullptr
                          : block->second.host + (reinterpret_cast<uintptr_t>(device) - block->first);
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
  const size_t mapped = (size + kPage - 1) / kPage * kPage;
  const int file = memfd_create("emulated device memory", MFD_CLOEXEC);
  void *host = MAP_FAILED, *address = MAP_FAILED;
  if (file >= 0 && ftruncate(file, static_cast<off_t>(mapped)) == 0) {
    host = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    address = mmap(nullptr, mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  }
  if (file >= 0) close(file);
  if (host == MAP_FAILED || address == MAP_FAILED) {
    if (host != MAP_FAILED) munmap(host, mapped);
    if (address != MAP_FAILED) munmap(address, mapped);
    return emulator_error(emulator::kOutOfMemory, "%s: the host has no room for %zu bytes", __func__, size);
  }
  std::memset(host, kPoison, mapped);
  m.blocks[reinterpret_cast<uintptr_t>(address)] = {static_cast<char*>(host), size, mapped, device};
  m.used[device] += size;
  emulator::Count("allocations");
  emulator::Count("live_bytes", static_cast<long>(size));
  *pointer = address;
  return 0;
}

aclError aclrtMallocAlign32(void** pointer, size_t size, aclrtMemMallocPolicy policy) {
  return aclrtMalloc(pointer, size, policy);
}

// Waits for the device's tasks, as the vendor's does. The address is never given out again, so that a later
// use of it is noticed.
aclError aclrtFree(void* pointer) {
  CALL();
  Memory& m = memory();
  Block block;
  {
    std::lock_guard lock(m.mutex);
    const auto it = m.blocks.find(reinterpret_cast<uintptr_t>(pointer));
    if (it == m.blocks.end()) {
      return emulator_error(emulator::kInvalidParam, "%s: %p is not the start of live device memory",
                            __func__, pointer);
    }
    block = it->second;
  }
  emulator::WaitForStreams(block.device);
  {
    std::lock_guard lock(m.mutex);
    if (m.blocks.erase(reinterpret_cast<uintptr_t>(pointer)) == 0) {
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
  void* const block = size > 0 ? std::aligned_alloc(kPage, (size + kPage - 1) / kPage * kPage) : nullptr;
  if (block == nullptr) return emulator_error(emulator::kOutOfMemory, "%s: %zu bytes", __func__, size);
  std::lock_guard lock(memory().mutex);
  memory().host_blocks.insert(block);
  *pointer = block;
  return 0;
}

aclError aclrtFreeHost(void* pointer) {
  CALL();
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
  Fill fill{};
  if (const int status = ResolveFill(__func__, to, capacity, value, size, &fill)) return status;
  return emulator::Enqueue(__func__, stream, [fill] { std::memset(fill.to, fill.value, fill.size); });
}

#pragma GCC visibility pop
}
