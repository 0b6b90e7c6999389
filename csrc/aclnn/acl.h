/* SPDX-License-Identifier: Apache-2.0 */
/* The part of CANN's C ABI that we call (csrc/aclnn) and emulate (csrc/emulator), under the vendor's names:
 * types, constants and prototypes, and nothing else. Plain C, so a C program builds against it too. Where a
 * header of CANN is at hand, -DFFN_OPS_VENDOR_ACL takes the runtime's part from <acl/acl.h> instead;
 * tests/npu/test_abi.py compiles the emulator that way, so that the compiler compares every prototype with
 * the vendor's. Values and meanings: contract.md section g and the headers in the torch_npu wheel. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef FFN_OPS_VENDOR_ACL
#include <acl/acl.h>
#include <acl/acl_op_compiler.h>
#else

#ifdef __cplusplus
extern "C" {
#endif

typedef int aclError;
typedef void* aclrtStream;
typedef void* aclrtContext;
typedef void* aclrtEvent;

typedef enum {
  ACL_DT_UNDEFINED = -1,
  ACL_FLOAT = 0,
  ACL_FLOAT16 = 1,
  ACL_INT8 = 2,
  ACL_INT32 = 3,
  ACL_UINT8 = 4,
  ACL_INT16 = 6,
  ACL_UINT16 = 7,
  ACL_UINT32 = 8,
  ACL_INT64 = 9,
  ACL_UINT64 = 10,
  ACL_DOUBLE = 11,
  ACL_BOOL = 12,
  ACL_COMPLEX64 = 16,
  ACL_COMPLEX128 = 17,
  ACL_BF16 = 27,
  ACL_INT4 = 29,
  ACL_COMPLEX32 = 33
} aclDataType;

typedef enum {
  ACL_FORMAT_UNDEFINED = -1,
  ACL_FORMAT_NCHW = 0,
  ACL_FORMAT_NHWC = 1,
  ACL_FORMAT_ND = 2,
  ACL_FORMAT_NC1HWC0 = 3,
  ACL_FORMAT_FRACTAL_Z = 4,
  ACL_FORMAT_NC1HWC0_C04 = 12,
  ACL_FORMAT_HWCN = 16,
  ACL_FORMAT_NDHWC = 27,
  ACL_FORMAT_FRACTAL_NZ = 29,
  ACL_FORMAT_NCDHW = 30,
  ACL_FORMAT_NDC1HWC0 = 32,
  ACL_FRACTAL_Z_3D = 33,
  ACL_FORMAT_NC = 35,
  ACL_FORMAT_NCL = 47,
  ACL_FORMAT_FRACTAL_NZ_C0_16 = 50,
  ACL_FORMAT_FRACTAL_NZ_C0_32 = 51,
  ACL_FORMAT_FRACTAL_NZ_C0_2 = 52,
  ACL_FORMAT_FRACTAL_NZ_C0_4 = 53,
  ACL_FORMAT_FRACTAL_NZ_C0_8 = 54
} aclFormat;

typedef enum {
  ACL_MEMCPY_HOST_TO_HOST = 0,
  ACL_MEMCPY_HOST_TO_DEVICE = 1,
  ACL_MEMCPY_DEVICE_TO_HOST = 2,
  ACL_MEMCPY_DEVICE_TO_DEVICE = 3
} aclrtMemcpyKind;

typedef enum { ACL_MEM_MALLOC_HUGE_FIRST = 0, ACL_MEM_MALLOC_NORMAL_ONLY = 2 } aclrtMemMallocPolicy;

aclError aclInit(const char* config_path);
aclError aclFinalize(void);
const char* aclGetRecentErrMsg(void);
size_t aclDataTypeSize(aclDataType dtype);
const char* aclrtGetSocName(void);
aclError aclrtSetDevice(int32_t device);
aclError aclrtGetDevice(int32_t* device);
aclError aclrtResetDevice(int32_t device);
aclError aclrtCreateStream(aclrtStream* stream);
aclError aclrtDestroyStream(aclrtStream stream);
aclError aclrtSynchronizeStream(aclrtStream stream);
aclError aclrtMalloc(void** memory, size_t size, aclrtMemMallocPolicy policy);
aclError aclrtFree(void* memory);
aclError aclrtMemcpy(void* to, size_t capacity, const void* from, size_t size, aclrtMemcpyKind kind);
aclError aclrtMemsetAsync(void* memory, size_t capacity, int32_t value, size_t size, aclrtStream stream);

#ifdef __cplusplus
}
#endif
#endif /* FFN_OPS_VENDOR_ACL */

/* ---- aclnn (libnnopbase, libopapi): no header of these ships with torch_npu ---- */
#ifdef __cplusplus
extern "C" {
#endif

typedef int32_t aclnnStatus;
typedef struct aclTensor aclTensor;
typedef struct aclScalar aclScalar;
typedef struct aclIntArray aclIntArray;
typedef struct aclFloatArray aclFloatArray;
typedef struct aclBoolArray aclBoolArray;
typedef struct aclTensorList aclTensorList;
typedef struct aclScalarList aclScalarList;
typedef struct aclOpExecutor aclOpExecutor;

/* Strides and offset are in elements; the storage shape may be one flat length; data is the storage's base.
 */
aclTensor* aclCreateTensor(const int64_t* view_dims, uint64_t view_rank, aclDataType dtype,
                           const int64_t* strides, int64_t offset, aclFormat format,
                           const int64_t* storage_dims, uint64_t storage_rank, void* data);
aclnnStatus aclDestroyTensor(const aclTensor* tensor);

/* A repeatable executor survives phase 2 and must be destroyed; others end with it. */
aclnnStatus aclSetAclOpExecutorRepeatable(aclOpExecutor* executor);
aclnnStatus aclDestroyAclOpExecutor(aclOpExecutor* executor);
aclnnStatus aclSetInputTensorAddr(aclOpExecutor* executor, const size_t index, aclTensor* tensor,
                                  void* address);
aclnnStatus aclSetOutputTensorAddr(aclOpExecutor* executor, const size_t index, aclTensor* tensor,
                                   void* address);

aclnnStatus aclnnFFNV3GetWorkspaceSize(const aclTensor* x, const aclTensor* weight1, const aclTensor* weight2,
                                       const aclTensor* expert_tokens, const aclTensor* bias1,
                                       const aclTensor* bias2, const aclTensor* scale,
                                       const aclTensor* offset, const aclTensor* deq_scale1,
                                       const aclTensor* deq_scale2, const aclTensor* antiquant_scale1,
                                       const aclTensor* antiquant_scale2, const aclTensor* antiquant_offset1,
                                       const aclTensor* antiquant_offset2, const char* activation,
                                       int64_t inner_precise, bool tokens_index_flag, const aclTensor* y,
                                       uint64_t* workspace_size, aclOpExecutor** executor);
aclnnStatus aclnnFFNV3(void* workspace, uint64_t workspace_size, aclOpExecutor* executor, aclrtStream stream);

#ifdef __cplusplus
}
#endif
