// SPDX-License-Identifier: Apache-2.0
// The pybind11 module ffn_ops._native: the CPU kernels for NumPy, without torch, and what doctor asks about
// them. The tests reach every instruction set through it (tests/native.py); the torch operator does not pass
// here (csrc/op).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/ffn.h"
#include "python/bind_contract.h"

namespace py = pybind11;

namespace ffn {
namespace {

using cpu::DType;

template <typename T>
T Find(const std::map<std::string, T>& table, const std::string& what, const std::string& name) {
  const auto found = table.find(name);
  if (found == table.end()) throw py::value_error(what + " " + name + " is unknown");
  return found->second;
}

DType ToDType(const std::string& name) {
  static const std::map<std::string, DType> table = {
      {"float32", DType::kFloat32}, {"float16", DType::kFloat16}, {"bfloat16", DType::kBFloat16},
      {"int8", DType::kInt8},       {"int4", DType::kInt4},       {"int32", DType::kInt32},
      {"int64", DType::kInt64},     {"uint64", DType::kUInt64}};
  return Find(table, "dtype", name);
}

cpu::Activation ToActivation(const std::string& name) {
  using cpu::Activation;
  static const std::map<std::string, Activation> table = {
      {"fastgelu", Activation::kFastGelu}, {"gelu", Activation::kGelu},   {"relu", Activation::kRelu},
      {"silu", Activation::kSilu},         {"geglu", Activation::kGeGlu}, {"swiglu", Activation::kSwiGlu},
      {"reglu", Activation::kReGlu}};
  return Find(table, "activation", name);
}

void Require(bool condition, const std::string& sentence) {
  if (!condition) throw py::value_error(sentence);
}

// An array argument: a pair (buffer, dtype name), since NumPy has neither bfloat16 nor packed int4. Those
// come as uint16 and as uint8, two int4 elements a byte. The buffer is held as long as this lives.
struct Array {
  py::buffer_info info;
  DType dtype = DType::kFloat32;
  std::vector<int64_t> shape;  // in elements
  int64_t size = 0;
  bool dense = false;
};

Array ToArray(const std::string& name, const py::tuple& argument, bool writable = false) {
  Array array;
  array.info = argument[0].cast<py::buffer>().request(writable);
  array.dtype = ToDType(argument[1].cast<std::string>());
  static const std::map<DType, int64_t> sizes = {
      {DType::kFloat32, 4}, {DType::kFloat16, 2}, {DType::kBFloat16, 2}, {DType::kInt8, 1},
      {DType::kInt4, 1},    {DType::kInt32, 4},   {DType::kInt64, 8},    {DType::kUInt64, 8}};
  const py::buffer_info& info = array.info;
  Require(info.itemsize == sizes.at(array.dtype), name + " has items of another size than its dtype");
  array.shape.assign(info.shape.begin(), info.shape.end());
  Require(!array.shape.empty(), name + " has no dimensions");
  if (array.dtype == DType::kInt4) array.shape.back() *= 2;
  array.dense = true;
  array.size = 1;
  int64_t stride = info.itemsize;
  for (size_t i = array.shape.size(); i-- > 0;) {
    array.dense = array.dense && (info.shape[i] == 1 || info.strides[i] == stride);
    stride *= info.shape[i];
    array.size *= array.shape[i];
  }
  array.dense = array.dense || array.size == 0;
  return array;
}

class Arguments {
 public:
  explicit Arguments(const py::dict& arrays) {
    for (const auto& [name, value] : arrays) {
      const std::string key = name.cast<std::string>();
      arrays_.emplace(key, ToArray(key, value.cast<py::tuple>(), key == "y"));
    }
  }

  const Array* Get(const std::string& name) const {
    const auto found = arrays_.find(name);
    return found == arrays_.end() ? nullptr : &found->second;
  }

  const Array& Needed(const std::string& name) const {
    const Array* array = Get(name);
    Require(array != nullptr, name + " is missing");
    return *array;
  }

  // The data of a dense array of `size` elements; null when it is absent.
  const void* Data(const std::string& name, int64_t size, DType dtype) const {
    const Array* array = Get(name);
    if (array == nullptr) return nullptr;
    Require(array->dense && array->size == size && array->dtype == dtype,
            name + " has another size, dtype or layout");
    return array->info.ptr;
  }

  cpu::Weight Weight(const std::string& name, int64_t E) const {
    const Array& array = Needed(name);
    const size_t rank = array.shape.size();
    Require(rank == 2 || (rank == 3 && array.shape[0] == E), name + " has another rank, or other experts");
    const int64_t K = array.shape[rank - 2], N = array.shape[rank - 1];
    if (array.dense) return {array.info.ptr, K * N, N, 1};
    const auto stride = [&](size_t i) { return array.info.strides[i] / array.info.itemsize; };
    const cpu::Weight weight = {array.info.ptr, rank == 3 ? stride(0) : 0, stride(rank - 2),
                                stride(rank - 1)};
    Require(array.dtype != DType::kInt4 && (weight.row_stride == 1 || weight.col_stride == 1),
            name + " has neither dense rows nor dense columns");
    return weight;
  }

 private:
  std::map<std::string, Array> arrays_;
};

cpu::Channels ToChannels(const Arguments& arguments, const std::string& index, const cpu::Problem& p,
                         int64_t K, int64_t N) {
  cpu::Channels channels;
  channels.bias = arguments.Data("bias" + index, p.E * N, p.bias_dtype);
  channels.deq_scale = arguments.Data("deq_scale" + index, p.E * N, p.deq_dtype);
  Require((p.x_dtype == DType::kInt8) == (channels.deq_scale != nullptr),
          "deq_scale" + index + " belongs to int8 x");
  const bool antiquant = p.x_dtype != p.weight_dtype;
  const Array* scale = arguments.Get("antiquant_scale" + index);
  Require(antiquant == (scale != nullptr),
          "antiquant_scale" + index + " belongs to weights of another dtype than x");
  if (scale != nullptr) {
    if (p.E * N > 0) channels.G = scale->size / (p.E * N);
    Require(channels.G >= 1 && K % channels.G == 0,
            "antiquant_scale" + index + " has groups that do not divide K");
    channels.antiquant_scale = arguments.Data("antiquant_scale" + index, p.E * channels.G * N, p.x_dtype);
    channels.antiquant_offset = arguments.Data("antiquant_offset" + index, p.E * channels.G * N, p.x_dtype);
    Require(channels.antiquant_offset != nullptr, "antiquant_offset" + index + " is missing");
  }
  return channels;
}

// Runs one call into the array y; threads > 1 divides it among as many workers, who then run one after the
// other. Only what keeps the kernels inside the arrays is checked here.
void Ffn(const std::string& activation, bool tokens_index_flag, bool high_precision,
         const std::optional<std::string>& isa, int64_t threads, const py::kwargs& arrays) {
  const Arguments arguments(arrays);
  // The contract's verdict on the call belongs here, before anything is read from the arrays.

  cpu::Problem p;
  const Array& x = arguments.Needed("x");
  const Array& y = arguments.Needed("y");
  const Array& weight1 = arguments.Needed("weight1");
  const Array& weight2 = arguments.Needed("weight2");
  p.x_dtype = x.dtype;
  p.y_dtype = y.dtype;
  p.weight_dtype = weight1.dtype;
  p.activation = ToActivation(activation);
  p.high_precision = high_precision;
  const bool float_x =
      x.dtype == DType::kFloat32 || x.dtype == DType::kFloat16 || x.dtype == DType::kBFloat16;
  const bool integer_weight = p.weight_dtype == DType::kInt8 || p.weight_dtype == DType::kInt4;
  const bool quant = x.dtype == DType::kInt8;
  Require(weight2.dtype == weight1.dtype && (p.weight_dtype == x.dtype || (float_x && integer_weight)) &&
              (float_x || quant),
          "x, weight1 and weight2 have dtypes that do not go together");
  Require(y.dtype == DType::kFloat32 || y.dtype == DType::kFloat16 || y.dtype == DType::kBFloat16,
          "y has no floating dtype");
  p.bias_dtype = quant ? DType::kInt32 : x.dtype == DType::kFloat16 ? DType::kFloat16 : DType::kFloat32;
  if (quant) {
    p.deq_dtype = arguments.Needed("deq_scale1").dtype;
    Require(p.deq_dtype == DType::kUInt64 || p.deq_dtype == DType::kInt64 || p.deq_dtype == DType::kFloat32 ||
                p.deq_dtype == DType::kBFloat16,
            "deq_scale1 has another dtype than uint64, int64, float32 or bfloat16");
  }

  p.K1 = x.shape.back();
  p.M = 1;
  for (size_t i = 0; i + 1 < x.shape.size(); ++i) p.M *= x.shape[i];
  const Array* tokens = arguments.Get("expert_tokens");
  const bool experts = tokens != nullptr && tokens->size > 0;
  p.E = experts ? tokens->size : 1;
  p.weight1 = arguments.Weight("weight1", p.E);
  p.weight2 = arguments.Weight("weight2", p.E);
  p.N1 = weight1.shape.back();
  p.K2 = weight2.shape[weight2.shape.size() - 2];
  p.N2 = weight2.shape.back();
  Require(weight1.shape[weight1.shape.size() - 2] == p.K1, "weight1 has another K than x");
  Require(p.N1 == (cpu::IsGlu(p.activation) ? 2 * p.K2 : p.K2),
          "weight2 has another K than weight1 has columns");
  Require(p.E == 1 || (weight1.shape.size() == 3 && weight2.shape.size() == 3),
          "the weights have no experts");

  std::vector<int64_t> row_ends = {p.M};
  if (experts) {
    const auto* values = static_cast<const int64_t*>(arguments.Data("expert_tokens", p.E, DType::kInt64));
    row_ends.assign(values, values + p.E);
    int64_t last = 0;
    for (int64_t& end : row_ends) {
      const int64_t begin = tokens_index_flag ? 0 : last;
      Require(end >= 0 && end <= p.M - begin && begin + end >= last,
              "expert_tokens does not divide the rows of x");
      last = end += begin;
    }
    Require(last == p.M, "expert_tokens does not divide the rows of x");
  }
  p.row_ends = row_ends.data();

  p.channels1 = ToChannels(arguments, "1", p, p.K1, p.N1);
  p.channels2 = ToChannels(arguments, "2", p, p.K2, p.N2);
  if (quant) {
    p.per_channel_scale = arguments.Needed("scale").size != p.E;
    p.scale = static_cast<const float*>(
        arguments.Data("scale", p.per_channel_scale ? p.E * p.N1 : p.E, DType::kFloat32));
    p.offset = static_cast<const float*>(arguments.Data("offset", p.E, DType::kFloat32));
    Require(p.offset != nullptr, "offset is missing");
  }
  p.x = arguments.Data("x", p.M * p.K1, x.dtype);
  p.y = const_cast<void*>(arguments.Data("y", p.M * p.N2, y.dtype));

  cpu::ParallelFor serial;
  serial.threads = threads;
  serial.run = [](void*, int64_t count, void (*body)(void*, int64_t), void* context) {
    for (int64_t i = 0; i < count; ++i) body(context, i);
  };
  const py::gil_scoped_release released;
  cpu::RunFfn(p, serial, isa ? isa->c_str() : nullptr);
}

std::vector<std::pair<std::string, bool>> Isas() {
  size_t count = 0;
  const char* const* names = cpu::CompiledIsas(&count);
  std::vector<std::pair<std::string, bool>> isas;
  for (size_t i = 0; i < count; ++i) isas.emplace_back(names[i], cpu::IsaSupported(names[i]));
  return isas;
}

}  // namespace
}  // namespace ffn

PYBIND11_MODULE(_native, module) {
  module.doc() = "The CPU kernels for NumPy arrays, and facts about them.";
  module.def("ffn", &ffn::Ffn, py::kw_only(), py::arg("activation"), py::arg("tokens_index_flag") = false,
             py::arg("high_precision") = false, py::arg("isa") = py::none(), py::arg("threads") = 1,
             "Computes y of one call. Every other keyword is an operand, as a pair of a buffer and its "
             "dtype's name.");
  module.def("isas", &ffn::Isas,
             "Instruction sets compiled in, best first: (name, whether this machine has it).");
  ffn::BindContract(module);
  module.def("selected_isa", &ffn::cpu::SelectedIsa, "The instruction set that calls use.");
}
