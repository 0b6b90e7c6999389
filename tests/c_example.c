/* SPDX-License-Identifier: Apache-2.0 */
/* A C program in the flow of the vendor's documentation: what it prints, test_c_example.py checks. */
#include <stdio.h>

#include "aclnn/acl.h"

#define OK(call)                                                                   \
  do {                                                                             \
    const int status = (call);                                                     \
    if (status != 0) {                                                             \
      fprintf(stderr, "%s gave %d: %s\n", #call, status, aclGetRecentErrMsg());    \
      return 1;                                                                    \
    }                                                                              \
  } while (0)

enum { M = 4, K = 2, ZERO = 0, ONE = 0x3c00, TWO = 0x4000, MINUS_ONE = 0xbc00, THREE = 0x4200, HALF = 0x3800 };

static int Make(const uint16_t* values, int64_t rows, int64_t columns, void** memory, aclTensor** tensor) {
  const int64_t dims[] = {rows, columns};
  const size_t size = (size_t)(rows * columns) * sizeof *values;
  OK(aclrtMalloc(memory, size, ACL_MEM_MALLOC_HUGE_FIRST));
  OK(aclrtMemcpy(*memory, size, values, size, ACL_MEMCPY_HOST_TO_DEVICE));
  *tensor = aclCreateTensor(dims, 2, ACL_FLOAT16, NULL, 0, ACL_FORMAT_ND, dims, 2, *memory);
  return *tensor == NULL;
}

int main(void) {
  const uint16_t x[M * K] = {ONE, TWO, MINUS_ONE, ZERO, THREE, ONE, ZERO, HALF};
  const uint16_t weight1[K * K] = {ONE, MINUS_ONE, ZERO, ONE};
  const uint16_t weight2[K * K] = {TWO, ZERO, ZERO, ONE};
  uint16_t y[M * K] = {0};
  void* memory[4];
  aclTensor* tensors[4];
  aclrtStream stream;

  OK(aclInit(NULL));
  OK(aclrtSetDevice(0));
  OK(aclrtCreateStream(&stream));
  OK(Make(x, M, K, &memory[0], &tensors[0]));
  OK(Make(weight1, K, K, &memory[1], &tensors[1]));
  OK(Make(weight2, K, K, &memory[2], &tensors[2]));
  OK(Make(y, M, K, &memory[3], &tensors[3]));

  uint64_t size = 0;
  aclOpExecutor* executor = NULL;
  OK(aclnnFFNV3GetWorkspaceSize(tensors[0], tensors[1], tensors[2], NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL,
                                NULL, NULL, NULL, "relu", 1, false, tensors[3], &size, &executor));
  void* workspace = NULL;
  if (size > 0) OK(aclrtMalloc(&workspace, size, ACL_MEM_MALLOC_HUGE_FIRST));
  OK(aclnnFFNV3(workspace, size, executor, stream));
  OK(aclrtSynchronizeStream(stream));
  OK(aclrtMemcpy(y, sizeof y, memory[3], sizeof y, ACL_MEMCPY_DEVICE_TO_HOST));
  for (int i = 0; i < M * K; ++i) printf("%04x\n", y[i]);

  for (int i = 0; i < 4; ++i) {
    OK(aclDestroyTensor(tensors[i]));
    OK(aclrtFree(memory[i]));
  }
  if (workspace != NULL) OK(aclrtFree(workspace));
  OK(aclrtDestroyStream(stream));
  OK(aclrtResetDevice(0));
  OK(aclFinalize());
  return 0;
}
