// SPDX-License-Identifier: Apache-2.0
// Where CANN's functions are looked for, and what its status codes mean. See library.h.
#include "aclnn/library.h"

#include <dlfcn.h>
#include <glob.h>

#include <cstdlib>
#include <fstream>
#include <memory>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <vector>

namespace ffn::aclnn {
namespace {

std::string Variable(const char* name) {
  const char* const value = std::getenv(name);
  return value == nullptr ? "" : value;
}

std::vector<std::string> Split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, separator);) {
    if (!part.empty()) parts.push_back(part);
  }
  return parts;
}

// The libraries that may hold an operator, in the vendor's order of precedence: custom operator packages,
// vendors' packages in the order of their config.ini, then CANN's own, in one file or split by domain.
std::vector<std::string> Candidates() {
  std::vector<std::string> paths;
  const std::string custom = "/op_api/lib/libcust_opapi.so";
  for (const std::string& folder : Split(Variable("ASCEND_CUSTOM_OPP_PATH"), ':'))
    paths.push_back(folder + custom);
  if (const std::string opp = Variable("ASCEND_OPP_PATH"); !opp.empty()) {
    std::ifstream config(opp + "/vendors/config.ini");
    const std::string key = "load_priority=";
    for (std::string line; std::getline(config, line);) {
      if (line.rfind(key, 0) != 0) continue;
      for (const std::string& vendor : Split(line.substr(key.size()), ',')) {
        paths.push_back(opp + "/vendors/" + vendor + custom);
      }
    }
  }
  if (const std::string home = Variable("ASCEND_HOME_PATH"); !home.empty()) {
    glob_t found = {};
    if (glob((home + "/lib64/libopapi_*.so").c_str(), 0, nullptr, &found) == 0) {
      paths.insert(paths.end(), found.gl_pathv, found.gl_pathv + found.gl_pathc);
    }
    globfree(&found);
  }
  for (const char* name : {"libopapi.so", "libopapi_transformer.so", "libnnopbase.so", "libascendcl.so"}) {
    paths.emplace_back(name);  // on the loader's paths, or loaded already
  }
  return paths;
}

void* TorchNpu() { return dlopen("libtorch_npu.so", RTLD_LAZY | RTLD_NOLOAD); }

class Resolver {
 public:
  Resolver() {
    if (void* const torch_npu = TorchNpu()) {
      by_torch_npu_ = reinterpret_cast<void* (*)(const char*)>(dlsym(torch_npu, "_Z16GetOpApiFuncAddrPKc"));
    }
  }

  template <class Function>
  void Find(const char* name, Function* function) {
    void* address = by_torch_npu_ != nullptr ? by_torch_npu_(name) : nullptr;
    for (size_t i = 0; address == nullptr && i < candidates_.size(); ++i) {
      if (void* const handle = Open(i)) address = dlsym(handle, name);
    }
    if (address == nullptr) missing_.emplace_back(name);
    *function = reinterpret_cast<Function>(address);
  }

  void ThrowIfAnyIsMissing() const {
    if (missing_.empty()) return;
    std::string text = "CANN's ";
    for (size_t i = 0; i < missing_.size(); ++i) text += (i > 0 ? ", " : "") + missing_[i];
    text += missing_.size() == 1 ? " was" : " were";
    text += " not found, but the operator calls it on an NPU; tried";
    for (size_t i = 0; i < candidates_.size(); ++i)
      text += (i > 0 ? "; " : " ") + candidates_[i] + " (" + why_[i] + ")";
    text +=
        " (install CANN 8, which has aclnnFFNV3 in libopapi.so, or a later one, which has it in "
        "libopapi_transformer.so, and source its set_env.sh)";
    throw std::runtime_error(text);
  }

 private:
  // The i-th candidate, opened once; null when it cannot be.
  void* Open(size_t i) {
    if (i < handles_.size()) return handles_[i];
    void* const handle = dlopen(candidates_[i].c_str(), RTLD_LAZY);
    const char* const error = handle == nullptr ? dlerror() : nullptr;
    handles_.push_back(handle);
    why_.emplace_back(error == nullptr ? "loaded, without it" : error);
    return handle;
  }

  void* (*by_torch_npu_)(const char*) = nullptr;
  const std::vector<std::string> candidates_ = Candidates();
  std::vector<void*> handles_;
  std::vector<std::string> why_, missing_;
};

Library Resolve() {
  Library library;
  Resolver resolver;
  resolver.Find("aclCreateTensor", &library.create_tensor);
  resolver.Find("aclDestroyTensor", &library.destroy_tensor);
  resolver.Find("aclSetAclOpExecutorRepeatable", &library.set_repeatable);
  resolver.Find("aclDestroyAclOpExecutor", &library.destroy_executor);
  resolver.Find("aclSetInputTensorAddr", &library.set_input_address);
  resolver.Find("aclSetOutputTensorAddr", &library.set_output_address);
  resolver.Find("aclnnFFNV3GetWorkspaceSize", &library.ffn_workspace_size);
  resolver.Find("aclnnFFNV3", &library.ffn);
  resolver.Find("aclGetRecentErrMsg", &library.recent_message);
  resolver.Find("aclrtGetSocName", &library.soc_name);
  resolver.Find("aclrtMemsetAsync", &library.memset_async);
  resolver.ThrowIfAnyIsMissing();
  Dl_info info = {};
  if (dladdr(reinterpret_cast<void*>(library.ffn), &info) != 0) library.path = info.dli_fname;
  return library;
}

// Contract.md's list of statuses.
const char* Meaning(int status) {
  switch (status) {
    case 161001:
      return "a parameter is null";
    case 161002:
      return "a parameter is invalid";
    case 361001:
      return "a call of the runtime failed";
    case 561000:
      return "inner error";
    case 561001:
      return "shapes could not be inferred";
    case 561002:
      return "tiling failed";
    case 561003:
      return "no kernel was found";
    case 561101:
      return "no executor could be created";
    case 561102:
      return "the executor cannot be reused";
    case 561103:
      return "an inner pointer is null: tiling failed, or no kernel takes these dtypes";
    case 561107:
      return "the path of the operator package is missing (ASCEND_OPP_PATH)";
    case 561112:
      return "the kernel package is missing (install the kernels for this SoC)";
    default:
      return "an error of the runtime or the driver";
  }
}

}  // namespace

const Library& GetLibrary() {
  static std::mutex mutex;
  static std::unique_ptr<const Library> library;
  std::lock_guard<std::mutex> lock(mutex);
  if (library == nullptr) library = std::make_unique<const Library>(Resolve());
  return *library;
}

const TaskQueue* FindTaskQueue() {
  static const TaskQueue queue = [] {
    TaskQueue found = {};
    if (void* const torch_npu = TorchNpu()) {
      // OpCommand::RunOpApiV2 and GetAclStream, the two that torch_npu's own EXEC_NPU_CMD is made of.
      found.enqueue = reinterpret_cast<decltype(found.enqueue)>(
          dlsym(torch_npu,
                "_ZN6at_npu6native9OpCommand10RunOpApiV2ERKNSt7__cxx1112basic_stringIcSt11char_"
                "traitsIcESaIcEEERKSt8"
                "functionIFivEEb"));
      found.stream = reinterpret_cast<decltype(found.stream)>(dlsym(torch_npu, "_Z12GetAclStreamv"));
    }
    return found;
  }();
  return queue.enqueue != nullptr && queue.stream != nullptr ? &queue : nullptr;
}

aclFormat StorageFormat(const void* tensor) {
  using GetNpuFormat = int64_t (*)(const void*);
  static const GetNpuFormat get = [] {  // at_npu::native::get_npu_format(const at::Tensor&)
    void* const torch_npu = TorchNpu();
    return torch_npu == nullptr ? nullptr
                                : reinterpret_cast<GetNpuFormat>(
                                      dlsym(torch_npu, "_ZN6at_npu6native14get_npu_formatERKN2at6TensorE"));
  }();
  return get == nullptr ? ACL_FORMAT_ND : static_cast<aclFormat>(get(tensor));
}

void ThrowStatus(const Library& library, const char* call, int status) {
  const char* const message = library.recent_message();
  std::string text =
      std::string(call) + " failed with " + std::to_string(status) + " (" + Meaning(status) + ")";
  if (message != nullptr && *message != '\0') text += ": " + std::string(message);
  throw std::runtime_error(text);
}

}  // namespace ffn::aclnn
