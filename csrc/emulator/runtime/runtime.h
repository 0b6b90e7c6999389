// SPDX-License-Identifier: Apache-2.0
// What the files of the emulated runtime share. control.cc counts and injects failures, device.cc knows
// devices and SoC, memory.cc and stream.cc do the work, aclop.cc answers the older single-operator interface.
#pragma once

#include <initializer_list>
#include <utility>

#include "emulator/emulator.h"

#ifndef FFN_OPS_VENDOR_ACL
// Types of acl.h's runtime part that only the emulator defines functions with.
extern "C" {
typedef enum {
  ACL_DEVICE_INFO_AI_CORE_NUM = 0,
  ACL_DEVICE_INFO_VECTOR_CORE_NUM = 1,
  ACL_DEVICE_INFO_L2_SIZE = 2
} aclDeviceInfo;
typedef enum { ACL_DDR_MEM = 0, ACL_HBM_MEM = 1 } aclrtMemAttr;
typedef enum { ACL_STREAM_STATUS_COMPLETE = 0, ACL_STREAM_STATUS_NOT_READY = 1 } aclrtStreamStatus;
typedef enum {
  ACL_EVENT_RECORDED_STATUS_NOT_READY = 0,
  ACL_EVENT_RECORDED_STATUS_COMPLETE = 1
} aclrtEventRecordedStatus;
typedef enum { ACL_EVENT_WAIT_STATUS_COMPLETE = 0, ACL_EVENT_WAIT_STATUS_NOT_READY = 1 } aclrtEventWaitStatus;
typedef enum { ACL_RT_OVERFLOW_MODE_SATURATION = 0, ACL_RT_OVERFLOW_MODE_INFNAN = 1 } aclrtFloatOverflowMode;
typedef enum { ACL_OPT_DETERMINISTIC = 0 } aclSysParamOpt;
typedef enum { ACL_PRECISION_MODE = 0 } aclCompileOpt;
typedef enum { ACL_MEMTYPE_DEVICE = 0, ACL_MEMTYPE_HOST = 1 } aclMemType;
typedef enum { ACL_DEBUG = 0, ACL_INFO = 1, ACL_WARNING = 2, ACL_ERROR = 3 } aclLogLevel;
typedef enum { ACL_ENGINE_SYS = 0 } aclopEngineType;
typedef enum { ACL_COMPILE_SYS = 0 } aclopCompileType;
typedef struct aclTensorDesc aclTensorDesc;
typedef struct aclDataBuffer aclDataBuffer;
typedef struct aclopAttr aclopAttr;
}
#endif

// The first line of an ABI function (emulator.h, emulator_call).
#define CALL() \
  if (const int status = emulator_call(__func__)) return status
// The second line of one that answers through pointers.
#define RESULTS(...) \
  if (const int status = emulator::CheckResults(__func__, {__VA_ARGS__})) return status

namespace emulator {

// Status codes of the runtime (error_codes/rt_error_codes.h in the torch_npu wheel).
inline constexpr int kUninitialized = 100001, kRepeatInitialize = 100002, kRepeatFinalize = 100037,
                     kInvalidParam = 107000, kInvalidDevice = 107001, kContextNull = 107002,
                     kStreamContext = 107003, kInvalidHandle = 107017, kOutOfMemory = 207001,
                     kNotSupported = 207000, kInternalError = 507899;

// The current device of this thread, -1 before aclrtSetDevice.
int CurrentDevice();
void SetCurrentDevice(int device);

void Count(const char* counter, long change = 1);
// kInvalidParam, with a message, when one of the pointers is null.
int CheckResults(const char* function, std::initializer_list<const void*> results);
// Microseconds by which slow() holds up each stream task, and each operator's launch on the caller's thread.
int TaskDelay();
int LaunchDelay();

// Queues work() on a stream; it is for what is no operator: copies, fills, events. `function` is for the
// message.
int Enqueue(const char* function, aclrtStream stream, int (*task)(void*), void (*drop)(void*), void* context);
template <class Work>
int Enqueue(const char* function, aclrtStream stream, Work work) {
  return Enqueue(
      function, stream,
      [](void* context) {
        (*static_cast<Work*>(context))();
        return 0;
      },
      [](void* context) { delete static_cast<Work*>(context); }, new Work(std::move(work)));
}

// Zero, or the status of an unknown stream or of a current device that is not the stream's.
int CheckStream(const char* function, aclrtStream stream);

// Waits for the streams of a device (-1: of all), without counting a synchronisation. The first stream's
// failure, or 0.
int WaitForStreams(int device);

}  // namespace emulator
