// SPDX-License-Identifier: Apache-2.0
// What torch_npu links or looks for and the emulator does not do: the older single-operator interface
// (aclop), virtual memory, sharing between processes, profiling and kernel binaries. Options and descriptions
// are taken; what would have to work answers with a status.
#include <cstdio>
#include <vector>

#include "emulator/runtime/runtime.h"

struct aclTensorDesc {
  aclDataType dtype;
  aclFormat format;
  std::vector<int64_t> shape;
};
struct aclDataBuffer {};
struct aclopAttr {};

namespace {
void (*before_aclop)() = [] {};
}  // namespace

EMULATOR_API void emulator_before_aclop(void (*hook)()) { before_aclop = hook; }

extern "C" {
#pragma GCC visibility push(default)

aclTensorDesc* aclCreateTensorDesc(aclDataType dtype, int rank, const int64_t* shape, aclFormat format) {
  before_aclop();
  if (rank < 0 || (shape == nullptr && rank > 0)) {
    emulator_error(emulator::kInvalidParam, "%s: %d dimensions at %p", __func__, rank,
                   static_cast<const void*>(shape));
    return nullptr;
  }
  return new aclTensorDesc{dtype, format, std::vector<int64_t>(shape, shape + rank)};
}
void aclDestroyTensorDesc(const aclTensorDesc* desc) { delete desc; }
aclError aclGetTensorDescDimV2(const aclTensorDesc* desc, size_t index, int64_t* size) {
  RESULTS(desc, size);
  if (index >= desc->shape.size()) {
    return emulator_error(emulator::kInvalidParam, "%s: size %zu of %zu", __func__, index,
                          desc->shape.size());
  }
  *size = desc->shape[index];
  return 0;
}
aclFormat aclGetTensorDescFormat(const aclTensorDesc* desc) {
  return desc != nullptr ? desc->format : ACL_FORMAT_UNDEFINED;
}
size_t aclGetTensorDescNumDims(const aclTensorDesc* desc) { return desc != nullptr ? desc->shape.size() : 0; }
aclDataType aclGetTensorDescType(const aclTensorDesc* desc) {
  return desc != nullptr ? desc->dtype : ACL_DT_UNDEFINED;
}
void aclSetTensorDescName(aclTensorDesc*, const char*) {}
aclError aclSetTensorFormat(aclTensorDesc*, aclFormat) { return 0; }
aclError aclSetTensorPlaceMent(aclTensorDesc*, aclMemType) { return 0; }
aclError aclSetTensorShape(aclTensorDesc*, int, const int64_t*) { return 0; }
aclDataBuffer* aclCreateDataBuffer(void*, size_t) { return new aclDataBuffer; }
aclError aclDestroyDataBuffer(const aclDataBuffer* buffer) {
  delete buffer;
  return 0;
}
aclopAttr* aclopCreateAttr() { return new aclopAttr; }
void aclopDestroyAttr(const aclopAttr* attr) { delete attr; }
aclError aclopSetAttrBool(aclopAttr*, const char*, uint8_t) { return 0; }
aclError aclopSetAttrDataType(aclopAttr*, const char*, aclDataType) { return 0; }
aclError aclopSetAttrFloat(aclopAttr*, const char*, float) { return 0; }
aclError aclopSetAttrInt(aclopAttr*, const char*, int64_t) { return 0; }
aclError aclopSetAttrListBool(aclopAttr*, const char*, int, const uint8_t*) { return 0; }
aclError aclopSetAttrListFloat(aclopAttr*, const char*, int, const float*) { return 0; }
aclError aclopSetAttrListInt(aclopAttr*, const char*, int, const int64_t*) { return 0; }
aclError aclopSetAttrListListInt(aclopAttr*, const char*, int, const int*, const int64_t* const[]) {
  return 0;
}
aclError aclopSetAttrString(aclopAttr*, const char*, const char*) { return 0; }

aclError aclopCompileAndExecute(const char* type, int, const aclTensorDesc* const[],
                                const aclDataBuffer* const[], int, const aclTensorDesc* const[],
                                aclDataBuffer* const[], const aclopAttr*, aclopEngineType, aclopCompileType,
                                const char*, aclrtStream) {
  CALL();
  return emulator_error(100024, "the emulator has no operator %s", type);  // ACL_ERROR_OP_NOT_FOUND
}

aclError aclSetCompileopt(aclCompileOpt, const char*) { return 0; }
size_t aclGetCompileoptSize(aclCompileOpt) { return sizeof "disable"; }
aclError aclGetCompileopt(aclCompileOpt, char* value, size_t size) {
  RESULTS(value);
  std::snprintf(value, size, "disable");
  return 0;
}
aclError aclrtCtxSetSysParamOpt(aclSysParamOpt, int64_t) { return 0; }
aclError aclrtSetSysParamOpt(aclSysParamOpt, int64_t) { return 0; }
aclError aclrtGetSysParamOpt(aclSysParamOpt, int64_t* value) {
  RESULTS(value);
  *value = 0;
  return 0;
}
aclError aclmdlInitDump() { return 0; }
aclError aclmdlSetDump(const char*) { return 0; }
aclError aclmdlFinalizeDump() { return 0; }

#pragma GCC visibility pop
}

// Loaded, and never called on the paths that the emulator serves; no prototype is at hand for all of them.
#define ABSENT(name) \
  EMULATOR_API long name() { return emulator_error(emulator::kNotSupported, "%s is not emulated", #name); }
#define IGNORED(name) \
  EMULATOR_API long name() { return 0; }

#ifndef FFN_OPS_VENDOR_ACL
ABSENT(aclrtBinaryGetFunction)
ABSENT(aclrtBinaryLoadFromData)
ABSENT(aclrtFreePhysical)
ABSENT(aclrtGetFunctionAddr)
ABSENT(aclrtMallocPhysical)
ABSENT(aclrtMapMem)
ABSENT(aclrtMemExportToShareableHandle)
ABSENT(aclrtMemImportFromShareableHandle)
ABSENT(aclrtMemSetPidToShareableHandle)
ABSENT(aclrtProcessReport)
ABSENT(aclrtReleaseMemAddress)
ABSENT(aclrtReserveMemAddress)
ABSENT(aclrtUnmapMem)
#endif
ABSENT(rtDevBinaryRegister)
ABSENT(rtFunctionRegister)
ABSENT(rtGetC2cCtrlAddr)
ABSENT(rtKernelLaunch)
IGNORED(MsprofGetHashId)
IGNORED(MsprofRegisterCallback)
IGNORED(MsprofReportAdditionalInfo)
IGNORED(MsprofReportApi)
IGNORED(MsprofReportCompactInfo)
IGNORED(MsprofSysCycleTime)
