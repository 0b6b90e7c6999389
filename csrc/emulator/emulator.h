// SPDX-License-Identifier: Apache-2.0
// What the emulator's libraries use of its runtime (libascendcl.so, runtime/), beside the vendor's own
// functions. nnopbase/, opapi/ and aten/ include this; C linkage, since they are separate libraries.
#pragma once

#include <cstddef>
#include <cstdint>

#include "aclnn/acl.h"

#define EMULATOR_API extern "C" __attribute__((visibility("default")))

// The first line of every ABI function, `if (const int code = emulator_call(__func__)) return code;`: counts
// the call, writes it to the trace, and is non-zero when it is the call that fail_at chose (which then does
// nothing, except that a destroy function still destroys). aclGetRecentErrMsg and pure getters of objects do
// not call it.
EMULATOR_API int emulator_call(const char* name);

// Sets what aclGetRecentErrMsg answers on this thread, writes the trace, and returns `code`.
EMULATOR_API int emulator_error(int code, const char* format, ...) __attribute__((format(printf, 2, 3)));

// Live objects by kind ("aclTensor", "aclOpExecutor", ...), for the counters: +1 when made, -1 when
// destroyed.
EMULATOR_API void emulator_live(const char* kind, int change);

// The host's view of device memory, or null unless [device, device + size) lies inside one live allocation of
// the thread's current device. A host access through the device address itself faults. `size` 0 asks for the
// address alone.
EMULATOR_API void* emulator_host_view(const void* device, size_t size);

// Queues task(context) on a stream (null: the current device's default stream) and takes ownership of
// context, which drop(context) frees after the task, or at once on failure. Returns 0, or the status of an
// unknown stream or of a current device that is not the stream's. A task that returns non-zero (having called
// emulator_error) poisons its stream: later synchronisations return that status, as on a device. Counts one
// launch.
EMULATOR_API int emulator_enqueue(aclrtStream stream, const char* name, int (*task)(void*),
                                  void (*drop)(void*), void* context);

// Calls hook() before each descriptor of the older interface (aclop) is made, which torch_npu does on the
// caller's thread, for what it finds no aclnn function for: where aten/ refuses such a call, by an exception.
EMULATOR_API void emulator_before_aclop(void (*hook)());
