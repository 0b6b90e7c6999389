// SPDX-License-Identifier: Apache-2.0
// Initialisation, devices, contexts and what the machine says of itself.
#include <unistd.h>

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <string>

#include "emulator/runtime/runtime.h"

namespace {

constexpr int kMostDevices = 64;
std::string& soc = *new std::string("Ascend910B1");  // never destroyed: threads ask while the process ends
int device_count = 2;
char contexts[kMostDevices];  // a device's context is the address of its element
thread_local int current_device = -1;
enum class Life { kNew, kInitialized, kFinalized };
std::atomic<Life> life{Life::kNew};

// Cores of the cube and of the vector unit, as the SoCs have them (contract f for 910B3; 24 and 48 on 910B1
// and B2).
int CubeCores() {
  if (soc.rfind("Ascend310P", 0) == 0) return 8;
  return soc == "Ascend910B3" || soc == "Ascend910B4" ? 20 : 24;
}

int Known(const char* function, int32_t device) {
  if (device >= 0 && device < device_count) return 0;
  return emulator_error(emulator::kInvalidDevice, "%s: device is %d, but there are %d", function, device,
                        device_count);
}

}  // namespace

namespace emulator {
int CurrentDevice() { return current_device; }
void SetCurrentDevice(int device) { current_device = device; }
}  // namespace emulator

EMULATOR_API void emulator_configure(const char* soc_name, int devices) {
  soc = soc_name;
  device_count = devices < kMostDevices ? devices : kMostDevices;
}

extern "C" {
#pragma GCC visibility push(default)

aclError aclInit(const char*) {
  CALL();
  if (life.exchange(Life::kInitialized) == Life::kInitialized) {
    return emulator_error(emulator::kRepeatInitialize, "%s: it was called before", __func__);
  }
  return 0;
}

aclError aclFinalize() {
  CALL();
  const Life before = life;
  if (before == Life::kNew) {
    return emulator_error(emulator::kUninitialized, "%s: aclInit was not called", __func__);
  }
  if (before == Life::kFinalized) {
    return emulator_error(emulator::kRepeatFinalize, "%s: it was called before", __func__);
  }
  life = Life::kFinalized;
  return emulator::WaitForStreams(-1);
}

void aclAppLog(aclLogLevel, const char*, const char*, uint32_t, const char*, ...) {}

const char* aclrtGetSocName() { return soc.c_str(); }

aclError aclrtGetDeviceCount(uint32_t* count) {
  CALL();
  RESULTS(count);
  *count = static_cast<uint32_t>(device_count);
  return 0;
}

aclError aclrtSetDevice(int32_t device) {
  CALL();
  if (const int status = Known(__func__, device)) return status;
  current_device = device;
  return 0;
}

aclError aclrtResetDevice(int32_t device) {
  CALL();
  if (const int status = Known(__func__, device)) return status;
  return emulator::WaitForStreams(device);
}

aclError aclrtGetDevice(int32_t* device) {
  CALL();
  RESULTS(device);
  if (current_device < 0) return emulator_error(emulator::kContextNull, "%s: no device was set", __func__);
  *device = current_device;
  return 0;
}

aclError aclrtGetCurrentContext(aclrtContext* context) {
  CALL();
  RESULTS(context);
  if (current_device < 0) return emulator_error(emulator::kContextNull, "%s: no device was set", __func__);
  *context = &contexts[current_device];
  return 0;
}

aclError aclrtSetCurrentContext(aclrtContext context) {
  CALL();
  auto* const chosen = static_cast<char*>(context);
  if (chosen < contexts || chosen >= contexts + device_count) {
    return emulator_error(emulator::kContextNull, "%s: %p is no context", __func__, context);
  }
  current_device = static_cast<int>(chosen - contexts);
  return 0;
}

aclError aclrtGetPrimaryCtxState(int32_t device, uint32_t* flags, int32_t* active) {
  CALL();
  if (const int status = Known(__func__, device)) return status;
  if (flags != nullptr) *flags = 0;
  if (active != nullptr) *active = 1;
  return 0;
}

aclError aclGetDeviceCapability(uint32_t, aclDeviceInfo info, int64_t* value) {
  CALL();
  RESULTS(value);
  *value = info == ACL_DEVICE_INFO_AI_CORE_NUM       ? CubeCores()
           : info == ACL_DEVICE_INFO_VECTOR_CORE_NUM ? CubeCores() * 2
                                                     : int64_t{192} << 20;
  return 0;
}

aclError aclrtDeviceCanAccessPeer(int32_t* can, int32_t device, int32_t peer) {
  CALL();
  RESULTS(can);
  if (const int status = Known(__func__, device)) return status;
  if (const int status = Known(__func__, peer)) return status;
  *can = 1;
  return 0;
}

aclError aclrtDeviceEnablePeerAccess(int32_t peer, uint32_t) {
  CALL();
  return Known(__func__, peer);
}

aclError aclrtDeviceGetBareTgid(int32_t* pid) {
  CALL();
  RESULTS(pid);
  *pid = getpid();
  return 0;
}

aclError aclrtSetDeviceSatMode(aclrtFloatOverflowMode) {
  CALL();
  return 0;
}

aclError aclrtSetOpExecuteTimeOut(uint32_t) {
  CALL();
  return 0;
}

aclError aclrtSetOpWaitTimeout(uint32_t) {
  CALL();
  return 0;
}

#pragma GCC visibility pop
}
