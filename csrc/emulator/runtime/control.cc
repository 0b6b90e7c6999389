// SPDX-License-Identifier: Apache-2.0
// The test aids: counters, trace, injected failures and slowness, and the functions by which ffn_ops/emulator
// sets them. Every ABI function passes through emulator_call.
#include <fnmatch.h>

#include <algorithm>
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

#include "emulator/runtime/runtime.h"

namespace {

struct Control {
  std::mutex mutex;
  std::map<std::string, long> counters;
  std::string trace;  // names, one a line
  bool tracing = false;
  long fail_in = 0;  // the call to fail, counted down to 0; 0: none
  std::string fail_pattern, failed;
};

// Never destroyed: stream threads may outlive static objects.
Control& control() {
  static Control& c = *new Control;
  return c;
}

std::atomic<int> task_delay{0}, launch_delay{0};
// Of the last error on this thread, and what aclGetRecentErrMsg returned last. Arrays, since they are written
// after the thread's objects are gone: streams are drained, and libraries close, while the process ends.
thread_local char message[1024], last_read[sizeof message];

void CopyOut(const std::string& text, char* buffer, size_t size) {
  if (size > 0) buffer[text.copy(buffer, size - 1)] = '\0';
}

}  // namespace

namespace emulator {

void Count(const char* counter, long change) {
  std::lock_guard lock(control().mutex);
  control().counters[counter] += change;
}

int CheckResults(const char* function, std::initializer_list<const void*> results) {
  if (std::find(results.begin(), results.end(), nullptr) == results.end()) return 0;
  return emulator_error(kInvalidParam, "%s: a pointer for the result is null", function);
}

int TaskDelay() { return task_delay; }
int LaunchDelay() { return launch_delay; }

}  // namespace emulator

int emulator_call(const char* name) {
  Control& c = control();
  {
    std::lock_guard lock(c.mutex);
    ++c.counters["calls"];
    if (c.tracing) c.trace.append(name).append("\n");
    if (c.fail_in == 0 || fnmatch(c.fail_pattern.c_str(), name, 0) != 0 || --c.fail_in > 0) return 0;
    c.failed = name;
  }
  const bool aclnn = fnmatch("aclnn*", name, 0) == 0;
  return emulator_error(aclnn ? 561000 : emulator::kInternalError, "%s: injected failure", name);
}

int emulator_error(int code, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  return code;
}

void emulator_live(const char* kind, int change) {
  emulator::Count((std::string("live_") + kind).c_str(), change);
}

extern "C" __attribute__((visibility("default"))) const char* aclGetRecentErrMsg() {
  std::memcpy(last_read, message, sizeof message);
  message[0] = '\0';  // read once, as the vendor's
  return last_read;
}

// ---- for ffn_ops/emulator, through ctypes ----

// "name value" lines.
EMULATOR_API void emulator_counters(char* buffer, size_t size) {
  std::string text;
  {
    std::lock_guard lock(control().mutex);
    for (const auto& [name, value] : control().counters) text += name + " " + std::to_string(value) + "\n";
  }
  CopyOut(text, buffer, size);
}

EMULATOR_API void emulator_start_trace() {
  std::lock_guard lock(control().mutex);
  control().trace.clear();
  control().tracing = true;
}

// Ends the trace and returns the size of its text; emulator_read_trace copies it.
EMULATOR_API size_t emulator_stop_trace() {
  std::lock_guard lock(control().mutex);
  control().tracing = false;
  return control().trace.size();
}

EMULATOR_API void emulator_read_trace(char* buffer, size_t size) {
  std::lock_guard lock(control().mutex);
  CopyOut(control().trace, buffer, size);
}

// Makes the k-th call from now whose name matches (null: every name does) fail; k = 0 disarms.
EMULATOR_API void emulator_fail_at(long k, const char* pattern) {
  std::lock_guard lock(control().mutex);
  control().fail_in = k;
  control().fail_pattern = pattern != nullptr ? pattern : "*";
  if (k > 0) control().failed.clear();
}

// The name of the call that failed since emulator_fail_at, or an empty text.
EMULATOR_API void emulator_failed(char* buffer, size_t size) {
  std::lock_guard lock(control().mutex);
  CopyOut(control().failed, buffer, size);
}

EMULATOR_API void emulator_slow(int launch_us, int task_us) {
  launch_delay = std::max(launch_us, 0);
  task_delay = std::max(task_us, 0);
}
