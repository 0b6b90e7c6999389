// SPDX-License-Identifier: Apache-2.0
// Streams and events. A stream is a thread that runs its tasks in order, started with the first task; a
// failed task makes every later synchronisation of its stream fail, as on a device.
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "emulator/runtime/runtime.h"

namespace {

struct Task {
  int (*run)(void*);
  void (*drop)(void*);
  void* context;
};

class Stream {
 public:
  explicit Stream(int device, int id) : device_(device), id_(id) {}
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream() {
    {
      std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    wake_.notify_all();
    if (thread_.joinable()) thread_.join();  // runs what is queued first
  }

  int device() const { return device_; }
  int id() const { return id_; }

  // False when the host has no thread left for the stream.
  bool Push(const Task& task) {
    std::lock_guard lock(mutex_);
    try {
      if (!thread_.joinable()) thread_ = std::thread([this] { Run(); });
    } catch (const std::system_error&) {
      return false;
    }
    tasks_.push_back(task);
    ++pushed_;
    wake_.notify_one();
    return true;
  }

  // Waits for what was pushed before; the stream's first failure, or 0.
  int Wait() {
    std::unique_lock lock(mutex_);
    const uint64_t last = pushed_;
    done_.wait(lock, [&] { return finished_ >= last; });
    if (status_ != 0) emulator_error(status_, "%s", error_.c_str());
    return status_;
  }

  bool Busy() {
    std::lock_guard lock(mutex_);
    return finished_ < pushed_;
  }

 private:
  void Run() {
    emulator::SetCurrentDevice(device_);
    std::unique_lock lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return stopping_ || !tasks_.empty(); });
      if (tasks_.empty()) return;
      const Task task = tasks_.front();
      tasks_.pop_front();
      lock.unlock();
      if (const int delay = emulator::TaskDelay()) usleep(static_cast<useconds_t>(delay));
      const int status = task.run(task.context);
      task.drop(task.context);
      const std::string error = status == 0 ? "" : aclGetRecentErrMsg();
      lock.lock();
      if (status != 0 && status_ == 0) {
        status_ = status;
        error_ = error;
      }
      ++finished_;
      done_.notify_all();
    }
  }

  const int device_, id_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::deque<Task> tasks_;
  uint64_t pushed_ = 0, finished_ = 0;
  int status_ = 0;
  std::string error_;
  bool stopping_ = false;
  std::thread thread_;
};

// One record of an event is a generation; waits are for the last one at their call.
struct Event {
  std::mutex mutex;
  std::condition_variable changed;
  uint64_t recorded = 0, reached = 0;
  std::chrono::steady_clock::time_point time;  // of the last record that was reached

  bool Complete() {
    std::lock_guard lock(mutex);
    return reached >= recorded;
  }

  // When the event was reached; nothing before it was recorded, and before its last record was reached.
  std::optional<std::chrono::steady_clock::time_point> Time() {
    std::lock_guard lock(mutex);
    return recorded > 0 && reached >= recorded ? std::optional(time) : std::nullopt;
  }
};

struct Registry {
  std::mutex mutex;
  std::map<void*, std::shared_ptr<Stream>> streams;
  std::map<int, std::shared_ptr<Stream>> defaults;  // by device
  std::map<void*, std::shared_ptr<Event>> events;
  int next_id = 0;
};

// Never destroyed: threads use it until the process ends. Busy streams end their work before static objects
// go.
Registry& registry() {
  static Registry& r = *[] {
    std::atexit([] { emulator::WaitForStreams(-1); });
    return new Registry;
  }();
  return r;
}

// Finds the stream behind a handle, the current device's default for null; the status when there is none.
int Find(const char* function, aclrtStream handle, std::shared_ptr<Stream>* found) {
  Registry& r = registry();
  std::lock_guard lock(r.mutex);
  if (handle != nullptr) {
    const auto it = r.streams.find(handle);
    if (it == r.streams.end()) {
      return emulator_error(emulator::kInvalidHandle, "%s: %p is no live stream", function, handle);
    }
    *found = it->second;
    return 0;
  }
  const int device = emulator::CurrentDevice();
  if (device < 0) return emulator_error(emulator::kContextNull, "%s: no device was set", function);
  auto& stream = r.defaults[device];
  if (stream == nullptr) stream = std::make_shared<Stream>(device, r.next_id++);
  *found = stream;
  return 0;
}

std::shared_ptr<Event> FindEvent(const char* function, aclrtEvent handle) {
  Registry& r = registry();
  std::lock_guard lock(r.mutex);
  const auto it = r.events.find(handle);
  if (it != r.events.end()) return it->second;
  emulator_error(emulator::kInvalidHandle, "%s: %p is no live event", function, handle);
  return nullptr;
}

// Finds a stream of the current device.
int FindCurrent(const char* function, aclrtStream handle, std::shared_ptr<Stream>* found) {
  if (const int status = Find(function, handle, found)) return status;
  if ((*found)->device() == emulator::CurrentDevice()) return 0;
  return emulator_error(emulator::kStreamContext, "%s: the stream is of device %d, but device %d is current",
                        function, (*found)->device(), emulator::CurrentDevice());
}

int Enqueue(const char* function, aclrtStream handle, const Task& task) {
  std::shared_ptr<Stream> stream;
  int status = FindCurrent(function, handle, &stream);
  if (status == 0 && !stream->Push(task)) {
    status = emulator_error(emulator::kInternalError, "%s: the host has no thread for the stream", function);
  }
  if (status != 0) task.drop(task.context);
  return status;
}

int Synchronize(const char* function, aclrtStream handle) {
  std::shared_ptr<Stream> stream;
  if (const int status = Find(function, handle, &stream)) return status;
  emulator::Count("synchronizations");
  return stream->Wait();
}

int SynchronizeDevice(const char* function) {
  if (emulator::CurrentDevice() < 0)
    return emulator_error(emulator::kContextNull, "%s: no device was set", function);
  emulator::Count("synchronizations");
  return emulator::WaitForStreams(emulator::CurrentDevice());
}

}  // namespace

namespace emulator {

int Enqueue(const char* function, aclrtStream stream, int (*task)(void*), void (*drop)(void*),
            void* context) {
  return ::Enqueue(function, stream, {task, drop, context});
}

int CheckStream(const char* function, aclrtStream stream) {
  std::shared_ptr<Stream> found;
  return FindCurrent(function, stream, &found);
}

int WaitForStreams(int device) {
  std::vector<std::shared_ptr<Stream>> streams;
  {
    Registry& r = registry();
    std::lock_guard lock(r.mutex);
    for (const auto& [handle, stream] : r.streams) streams.push_back(stream);
    for (const auto& [of, stream] : r.defaults) streams.push_back(stream);
  }
  int first = 0;
  for (const auto& stream : streams) {
    if (device >= 0 && stream->device() != device) continue;
    const int status = stream->Wait();
    if (first == 0) first = status;
  }
  return first;
}

}  // namespace emulator

int emulator_enqueue(aclrtStream stream, const char* name, int (*task)(void*), void (*drop)(void*),
                     void* context) {
  if (const int delay = emulator::LaunchDelay()) usleep(static_cast<useconds_t>(delay));
  emulator::Count("launches");
  return Enqueue(name, stream, {task, drop, context});
}

extern "C" {
#pragma GCC visibility push(default)

aclError aclrtCreateStreamWithConfig(aclrtStream* handle, uint32_t, uint32_t) {
  CALL();
  RESULTS(handle);
  const int device = emulator::CurrentDevice();
  if (device < 0) return emulator_error(emulator::kContextNull, "%s: no device was set", __func__);
  Registry& r = registry();
  std::lock_guard lock(r.mutex);
  auto stream = std::make_shared<Stream>(device, r.next_id++);
  *handle = stream.get();
  r.streams[*handle] = std::move(stream);
  emulator_live("stream", 1);
  return 0;
}

aclError aclrtCreateStream(aclrtStream* handle) { return aclrtCreateStreamWithConfig(handle, 0, 0); }

aclError aclrtDestroyStream(aclrtStream handle) {
  const int injected = emulator_call(__func__);
  std::shared_ptr<Stream> stream;
  {
    Registry& r = registry();
    std::lock_guard lock(r.mutex);
    const auto it = r.streams.find(handle);
    if (it == r.streams.end()) {
      return emulator_error(emulator::kInvalidHandle, "%s: %p is no live stream", __func__, handle);
    }
    stream = std::move(it->second);
    r.streams.erase(it);
  }
  emulator_live("stream", -1);
  const int status = stream->Wait();
  return injected != 0 ? injected : status;
}

aclError aclrtDestroyStreamForce(aclrtStream handle) { return aclrtDestroyStream(handle); }

aclError aclrtSynchronizeStream(aclrtStream handle) {
  CALL();
  return Synchronize(__func__, handle);
}

aclError aclrtSynchronizeStreamWithTimeout(aclrtStream handle, int32_t) {
  CALL();
  return Synchronize(__func__, handle);
}

aclError aclrtStreamQuery(aclrtStream handle, aclrtStreamStatus* status_out) {
  CALL();
  RESULTS(status_out);
  std::shared_ptr<Stream> stream;
  if (const int status = Find(__func__, handle, &stream)) return status;
  *status_out = stream->Busy() ? ACL_STREAM_STATUS_NOT_READY : ACL_STREAM_STATUS_COMPLETE;
  return 0;
}

aclError aclrtStreamGetId(aclrtStream handle, int32_t* id) {
  CALL();
  RESULTS(id);
  std::shared_ptr<Stream> stream;
  if (const int status = Find(__func__, handle, &stream)) return status;
  *id = stream->id();
  return 0;
}

aclError aclrtSetStreamOverflowSwitch(aclrtStream handle, uint32_t) {  // torch_npu's, on the 310P
  CALL();
  std::shared_ptr<Stream> stream;
  return Find(__func__, handle, &stream);
}

aclError aclrtSetStreamFailureMode(aclrtStream handle, uint64_t) {
  CALL();
  std::shared_ptr<Stream> stream;
  return Find(__func__, handle, &stream);
}

aclError aclrtSynchronizeDevice() {
  CALL();
  return SynchronizeDevice(__func__);
}

aclError aclrtSynchronizeDeviceWithTimeout(int32_t) {
  CALL();
  return SynchronizeDevice(__func__);
}

aclError aclrtCreateEventExWithFlag(aclrtEvent* handle, uint32_t) {
  CALL();
  RESULTS(handle);
  auto event = std::make_shared<Event>();
  *handle = event.get();
  Registry& r = registry();
  std::lock_guard lock(r.mutex);
  r.events[*handle] = std::move(event);
  emulator_live("event", 1);
  return 0;
}

aclError aclrtCreateEventWithFlag(aclrtEvent* handle, uint32_t flag) {
  return aclrtCreateEventExWithFlag(handle, flag);
}
aclError aclrtCreateEvent(aclrtEvent* handle) { return aclrtCreateEventExWithFlag(handle, 0); }

// Tasks that still wait for the event keep it alive.
aclError aclrtDestroyEvent(aclrtEvent handle) {
  const int injected = emulator_call(__func__);
  Registry& r = registry();
  std::lock_guard lock(r.mutex);
  if (r.events.erase(handle) == 0) {
    return emulator_error(emulator::kInvalidHandle, "%s: %p is no live event", __func__, handle);
  }
  emulator_live("event", -1);
  return injected;
}

aclError aclrtResetEvent(aclrtEvent handle, aclrtStream stream) {
  CALL();
  if (FindEvent(__func__, handle) == nullptr) return emulator::kInvalidHandle;
  std::shared_ptr<Stream> found;
  return Find(__func__, stream, &found);
}

aclError aclrtRecordEvent(aclrtEvent handle, aclrtStream stream) {
  CALL();
  std::shared_ptr<Event> event = FindEvent(__func__, handle);
  if (event == nullptr) return emulator::kInvalidHandle;
  // Held until the record is queued: generations are queued in their order, and one that is not is never
  // waited for.
  std::lock_guard lock(event->mutex);
  const uint64_t generation = event->recorded + 1;
  const int status = emulator::Enqueue(__func__, stream, [event, generation] {
    {
      std::lock_guard task_lock(event->mutex);
      if (generation > event->reached) {
        event->reached = generation;
        event->time = std::chrono::steady_clock::now();
      }
    }
    event->changed.notify_all();
  });
  if (status == 0) event->recorded = generation;
  return status;
}

aclError aclrtStreamWaitEvent(aclrtStream stream, aclrtEvent handle) {
  CALL();
  std::shared_ptr<Event> event = FindEvent(__func__, handle);
  if (event == nullptr) return emulator::kInvalidHandle;
  uint64_t generation;
  {
    std::lock_guard lock(event->mutex);
    generation = event->recorded;
  }
  return emulator::Enqueue(__func__, stream, [event, generation] {
    std::unique_lock lock(event->mutex);
    event->changed.wait(lock, [&] { return event->reached >= generation; });
  });
}

aclError aclrtSynchronizeEvent(aclrtEvent handle) {
  CALL();
  const std::shared_ptr<Event> event = FindEvent(__func__, handle);
  if (event == nullptr) return emulator::kInvalidHandle;
  emulator::Count("synchronizations");
  std::unique_lock lock(event->mutex);
  const uint64_t generation = event->recorded;
  event->changed.wait(lock, [&] { return event->reached >= generation; });
  return 0;
}

aclError aclrtQueryEventStatus(aclrtEvent handle, aclrtEventRecordedStatus* status_out) {
  CALL();
  RESULTS(status_out);
  const std::shared_ptr<Event> event = FindEvent(__func__, handle);
  if (event == nullptr) return emulator::kInvalidHandle;
  *status_out = event->Complete() ? ACL_EVENT_RECORDED_STATUS_COMPLETE : ACL_EVENT_RECORDED_STATUS_NOT_READY;
  return 0;
}

aclError aclrtQueryEventWaitStatus(aclrtEvent handle, aclrtEventWaitStatus* status_out) {
  CALL();
  RESULTS(status_out);
  const std::shared_ptr<Event> event = FindEvent(__func__, handle);
  if (event == nullptr) return emulator::kInvalidHandle;
  *status_out = event->Complete() ? ACL_EVENT_WAIT_STATUS_COMPLETE : ACL_EVENT_WAIT_STATUS_NOT_READY;
  return 0;
}

aclError aclrtEventElapsedTime(float* milliseconds, aclrtEvent from, aclrtEvent to) {
  CALL();
  RESULTS(milliseconds);
  const std::shared_ptr<Event> begin = FindEvent(__func__, from), end = FindEvent(__func__, to);
  if (begin == nullptr || end == nullptr) return emulator::kInvalidHandle;
  const auto first = begin->Time(), last = end->Time();
  if (!first || !last) {
    return emulator_error(emulator::kInvalidParam, "%s: both events must be recorded and complete", __func__);
  }
  *milliseconds = std::chrono::duration<float, std::milli>(*last - *first).count();
  return 0;
}

#pragma GCC visibility pop
}
