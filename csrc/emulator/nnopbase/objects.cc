// SPDX-License-Identifier: Apache-2.0
// Making, reading and destroying aclnn's objects. Each live one is in a registry, so that destroying a
// pointer twice, or one that never was an object, is refused instead of corrupting memory. See objects.h.
#include "emulator/nnopbase/objects.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>
#include <set>
#include <type_traits>

namespace {

constexpr int kNull = 161001, kInvalid = 161002, kInnerNull = 561103;

// The live objects of one class. Never destroyed: queues may destroy objects while the process ends.
template <class T>
struct Live {
  std::mutex mutex;
  std::set<const T*> objects;
  static Live& Get() {
    static Live& live = *new Live;
    return live;
  }
};

template <class T>
T* Made(const char* kind, std::unique_ptr<T> object) {
  T* const raw = object.release();
  Live<T>& live = Live<T>::Get();
  std::lock_guard lock(live.mutex);
  live.objects.insert(raw);
  emulator_live(kind, 1);
  return raw;
}

template <class T>
int Destroy(const char* function, const char* kind, const T* object) {
  const int injected = emulator_call(function);
  if (object == nullptr) return emulator_error(kNull, "%s: the pointer is null", function);
  {
    Live<T>& live = Live<T>::Get();
    std::lock_guard lock(live.mutex);
    if (live.objects.erase(object) == 0) {
      return emulator_error(kInvalid, "%s: %p is no live %s (destroyed before?)", function,
                            static_cast<const void*>(object), kind);
    }
  }
  delete object;
  emulator_live(kind, -1);
  return injected;
}

template <class T>
bool IsKnown(const T* object) {
  Live<T>& live = Live<T>::Get();
  std::lock_guard lock(live.mutex);
  return live.objects.count(object) > 0;
}

// More dimensions or values than any caller has: a count that was computed wrong, whose values are not there.
constexpr uint64_t kMostDims = 64, kMostValues = 1 << 24;

// An object from an array of `count` values; null, with an error set, for a null array or a senseless count.
template <class Object, class Value>
Object* FromArray(const char* function, const char* kind, const Value* values, uint64_t count) {
  if (emulator_call(function) != 0) return nullptr;
  if (values == nullptr && count > 0) {
    emulator_error(kNull, "%s: the array is null, but its size is %llu", function,
                   static_cast<unsigned long long>(count));
    return nullptr;
  }
  if (count > kMostValues) {
    emulator_error(kInvalid, "%s: %llu values, but there may be %llu", function,
                   static_cast<unsigned long long>(count), static_cast<unsigned long long>(kMostValues));
    return nullptr;
  }
  return Made(kind, std::make_unique<Object>(Object{{values, values + count}}));
}

// A list with its members, as the vendor's.
template <class List, class Member>
int DestroyList(const char* function, const char* kind, const List* list,
                std::vector<const Member*> List::* members, aclnnStatus (*destroy)(const Member*)) {
  if (list != nullptr && IsKnown(list)) {
    for (const Member* member : list->*members) {
      if (member != nullptr) destroy(member);
    }
  }
  return Destroy(function, kind, list);
}

template <class Object, class Value>
int GetSize(const char* function, const Object* object, std::vector<Value> Object::* values,
            uint64_t* count) {
  if (object == nullptr || count == nullptr) return emulator_error(kNull, "%s: null", function);
  if (!IsKnown(object)) return emulator_error(kInvalid, "%s: the object was destroyed", function);
  *count = (object->*values).size();
  return 0;
}

std::vector<int64_t> DenseStrides(const std::vector<int64_t>& shape) {
  std::vector<int64_t> strides;
  for (auto size = shape.begin(); size != shape.end(); ++size) {
    strides.push_back(emulator::ElementCount({size + 1, shape.end()}));
  }
  return strides;
}

// The element that `steps` strides lead to, or the first or last of all int64_t where that one is beyond.
int64_t Reach(int64_t from, int64_t steps, int64_t stride) {
  int64_t distance, to;
  if (__builtin_mul_overflow(steps, stride, &distance) || __builtin_add_overflow(from, distance, &to)) {
    return stride < 0 ? INT64_MIN : INT64_MAX;
  }
  return to;
}

int CopyOut(const std::vector<int64_t>& values, int64_t** out, uint64_t* count) {
  *out = new int64_t[values.size()];  // the caller's, to delete[], as the vendor's
  std::memcpy(*out, values.data(), values.size() * sizeof(int64_t));
  *count = values.size();
  return 0;
}

}  // namespace

namespace emulator {

int ElementBits(int dtype) {
  switch (dtype) {
    case ACL_INT4:
      return 4;
    case ACL_INT8:
    case ACL_UINT8:
    case ACL_BOOL:
      return 8;
    case ACL_FLOAT16:
    case ACL_BF16:
    case ACL_INT16:
    case ACL_UINT16:
      return 16;
    case ACL_FLOAT:
    case ACL_INT32:
    case ACL_UINT32:
    case ACL_COMPLEX32:
      return 32;
    case ACL_INT64:
    case ACL_UINT64:
    case ACL_DOUBLE:
    case ACL_COMPLEX64:
      return 64;
    case ACL_COMPLEX128:
      return 128;
    default:
      return 0;
  }
}

int64_t ElementCount(const std::vector<int64_t>& sizes) {
  int64_t count = 1;
  for (const int64_t size : sizes) {
    if (size <= 0) return 0;
    if (__builtin_mul_overflow(count, size, &count)) count = INT64_MAX;
  }
  return count;
}

int CheckTensor(const char* op, const char* parameter, const aclTensor& tensor) {
  const int64_t bits = ElementBits(tensor.dtype);
  if (bits == 0) {
    return emulator_error(kInvalid, "%s: %s has the unknown dtype %d", op, parameter, tensor.dtype);
  }
  for (const int64_t size : tensor.shape) {
    if (size < 0) return emulator_error(kInvalid, "%s: %s has a negative size", op, parameter);
  }
  if (ElementCount(tensor.shape) == 0) return 0;
  int64_t low = tensor.offset, high = tensor.offset;  // elements from the storage's base
  for (size_t i = 0; i < tensor.shape.size(); ++i) {
    int64_t& end = tensor.strides[i] < 0 ? low : high;
    end = Reach(end, tensor.shape[i] - 1, tensor.strides[i]);
  }
  // More has no place in memory, and its bits none in an int64_t.
  const int64_t elements = std::min(ElementCount(tensor.storage), INT64_MAX / 256);
  if (low < 0 || high >= elements) {
    return emulator_error(kInvalid, "%s: %s reaches from element %lld to %lld, but its storage has %lld", op,
                          parameter, static_cast<long long>(low), static_cast<long long>(high),
                          static_cast<long long>(elements));
  }
  const auto* const base = static_cast<const char*>(tensor.data);
  const int64_t first = low * bits / 8, end = ((high + 1) * bits + 7) / 8;
  if (base == nullptr || emulator_host_view(base + first, static_cast<size_t>(end - first)) == nullptr) {
    return emulator_error(kInvalid,
                          "%s: %s at %p with %lld bytes is not in one live allocation of the current device",
                          op, parameter, tensor.data, static_cast<long long>(end - first));
  }
  return 0;
}

template <class T>
bool IsLive(const T* object) {
  if (!IsKnown(object)) return false;
  const auto absent_or_live = [](const auto* member) { return member == nullptr || IsKnown(member); };
  if constexpr (std::is_same_v<T, aclTensorList>) {
    return std::all_of(object->tensors.begin(), object->tensors.end(), absent_or_live);
  }
  if constexpr (std::is_same_v<T, aclScalarList>) {
    return std::all_of(object->scalars.begin(), object->scalars.end(), absent_or_live);
  }
  return true;
}
// Said for each, since the types they are made for are not visible.
#define VISIBLE __attribute__((visibility("default")))
template VISIBLE bool IsLive(const aclTensor*);
template VISIBLE bool IsLive(const aclScalar*);
template VISIBLE bool IsLive(const aclIntArray*);
template VISIBLE bool IsLive(const aclFloatArray*);
template VISIBLE bool IsLive(const aclBoolArray*);
template VISIBLE bool IsLive(const aclTensorList*);
template VISIBLE bool IsLive(const aclScalarList*);

}  // namespace emulator

extern "C" {
#pragma GCC visibility push(default)

aclTensor* aclCreateTensor(const int64_t* view_dims, uint64_t view_rank, aclDataType dtype,
                           const int64_t* strides, int64_t offset, aclFormat format,
                           const int64_t* storage_dims, uint64_t storage_rank, void* data) {
  if (emulator_call(__func__) != 0) return nullptr;
  if ((view_dims == nullptr && view_rank > 0) || (storage_dims == nullptr && storage_rank > 0)) {
    emulator_error(kNull, "%s: dims are null, but their number is not 0", __func__);
    return nullptr;
  }
  if (view_rank > kMostDims || storage_rank > kMostDims) {
    emulator_error(kInvalid, "%s: %llu and %llu dimensions, but there may be %llu", __func__,
                   static_cast<unsigned long long>(view_rank), static_cast<unsigned long long>(storage_rank),
                   static_cast<unsigned long long>(kMostDims));
    return nullptr;
  }
  auto tensor = std::make_unique<aclTensor>();
  tensor->shape.assign(view_dims, view_dims + view_rank);
  tensor->strides =
      strides != nullptr ? std::vector<int64_t>(strides, strides + view_rank) : DenseStrides(tensor->shape);
  tensor->storage.assign(storage_dims, storage_dims + storage_rank);
  tensor->offset = offset;
  tensor->dtype = dtype;
  tensor->format = format;
  tensor->data = data;
  return Made("aclTensor", std::move(tensor));
}
aclnnStatus aclDestroyTensor(const aclTensor* tensor) { return Destroy(__func__, "aclTensor", tensor); }

aclScalar* aclCreateScalar(void* value, aclDataType dtype) {
  if (emulator_call(__func__) != 0) return nullptr;
  const int bytes = emulator::ElementBits(dtype) / 8;
  if (value == nullptr || bytes == 0) {
    emulator_error(kNull, "%s: the value is null or of the unknown dtype %d", __func__,
                   static_cast<int>(dtype));
    return nullptr;
  }
  auto scalar = std::make_unique<aclScalar>(aclScalar{dtype, {}});
  std::memcpy(scalar->value, value, static_cast<size_t>(bytes));
  return Made("aclScalar", std::move(scalar));
}
aclnnStatus aclDestroyScalar(const aclScalar* scalar) { return Destroy(__func__, "aclScalar", scalar); }

#define ARRAY(Kind, Value)                                                                               \
  acl##Kind* aclCreate##Kind(const Value* values, uint64_t count) {                                      \
    return FromArray<acl##Kind, Value>(__func__, "acl" #Kind, values, count);                            \
  }                                                                                                      \
  aclnnStatus aclDestroy##Kind(const acl##Kind* array) { return Destroy(__func__, "acl" #Kind, array); } \
  aclnnStatus aclGet##Kind##Size(const acl##Kind* array, uint64_t* count) {                              \
    return GetSize(__func__, array, &acl##Kind::values, count);                                          \
  }
ARRAY(IntArray, int64_t)
ARRAY(FloatArray, float)
ARRAY(BoolArray, bool)

aclTensorList* aclCreateTensorList(const aclTensor* const* tensors, uint64_t count) {
  return FromArray<aclTensorList>(__func__, "aclTensorList", tensors, count);
}
aclnnStatus aclDestroyTensorList(const aclTensorList* list) {
  return DestroyList(__func__, "aclTensorList", list, &aclTensorList::tensors, &aclDestroyTensor);
}
aclnnStatus aclGetTensorListSize(const aclTensorList* list, uint64_t* count) {
  return GetSize(__func__, list, &aclTensorList::tensors, count);
}

aclScalarList* aclCreateScalarList(const aclScalar* const* scalars, uint64_t count) {
  return FromArray<aclScalarList>(__func__, "aclScalarList", scalars, count);
}
aclnnStatus aclDestroyScalarList(const aclScalarList* list) {
  return DestroyList(__func__, "aclScalarList", list, &aclScalarList::scalars, &aclDestroyScalar);
}
aclnnStatus aclGetScalarListSize(const aclScalarList* list, uint64_t* count) {
  return GetSize(__func__, list, &aclScalarList::scalars, count);
}

#define GETTER(function, Type, expression)                                                           \
  aclnnStatus function(const aclTensor* tensor, Type* out) {                                         \
    if (tensor == nullptr || out == nullptr) return emulator_error(kNull, "%s: null", __func__);     \
    if (!IsKnown(tensor)) return emulator_error(kInvalid, "%s: the tensor was destroyed", __func__); \
    *out = static_cast<Type>(tensor->expression);                                                    \
    return 0;                                                                                        \
  }
GETTER(aclGetViewOffset, int64_t, offset)
GETTER(aclGetFormat, aclFormat, format)
GETTER(aclGetDataType, aclDataType, dtype)
GETTER(aclGetRawTensorAddr, void*, data)

#define SIZES(function, member)                                                                      \
  aclnnStatus function(const aclTensor* tensor, int64_t** values, uint64_t* count) {                 \
    if (tensor == nullptr || values == nullptr || count == nullptr) {                                \
      return emulator_error(kNull, "%s: null", __func__);                                            \
    }                                                                                                \
    if (!IsKnown(tensor)) return emulator_error(kInvalid, "%s: the tensor was destroyed", __func__); \
    return CopyOut(tensor->member, values, count);                                                   \
  }
SIZES(aclGetViewShape, shape)
SIZES(aclGetViewStrides, strides)
SIZES(aclGetStorageShape, storage)

aclnnStatus aclSetRawTensorAddr(aclTensor* tensor, void* address) {
  if (tensor == nullptr) return emulator_error(kInnerNull, "%s: the tensor is null", __func__);
  if (!IsKnown(tensor)) return emulator_error(kInvalid, "%s: the tensor was destroyed", __func__);
  tensor->data = address;
  return 0;
}

aclnnStatus aclnnInit(const char*) { return emulator_call(__func__); }
aclnnStatus aclnnFinalize() { return emulator_call(__func__); }

#pragma GCC visibility pop
}
