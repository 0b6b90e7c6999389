// SPDX-License-Identifier: Apache-2.0
// The pybind11 module ffn_ops._native: the CPU kernels for NumPy and the two phases of aclnnFFNV3, without
// torch, and what doctor asks about them. The tests reach every instruction set through it (tests/native.py);
// the torch operator does not pass here (csrc/op).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cpu/problem.h"
#include "python/bind_aclnn.h"
#include "python/bind_contract.h"
#include "python/bind_probe.h"

namespace py = pybind11;

namespace ffn {
namespace {

using contract::Operand;

void Require(bool condition, const std::string& sentence) {
  if (!condition) throw py::value_error(sentence);
}

// The operands of a call by their position in the contract. Each is a pair (buffer, dtype name), since NumPy
// has neither bfloat16 nor packed int4: those come as uint16 and as uint8, two int4 elements a byte. Holds
// the buffers while it lives.
class Arrays {
 public:
  explicit Arrays(const py::dict& arguments) {
    for (const auto& [key, value] : arguments) {
      const std::string name = key.cast<std::string>();
      const int operand = Position(contract::kOperandNames, name);
      const py::tuple pair = value.cast<py::tuple>();
      const auto dtype =
          static_cast<contract::DType>(Position(contract::kDTypeNames, pair[1].cast<std::string>()));
      py::buffer_info& buffer = buffers_[operand];
      buffer = pair[0].cast<py::buffer>().request(operand == contract::kOutOperand);
      const bool int4 = dtype == contract::DType::kInt4;
      Require(buffer.itemsize * 8 == (int4 ? 8 : contract::kDTypeBits[static_cast<int>(dtype)]),
              name + " has items of another size than its dtype");
      std::vector<int64_t> shape(buffer.shape.begin(), buffer.shape.end());
      if (int4 && !shape.empty()) shape.back() *= 2;
      call.operands[operand] = {true, dtype, std::move(shape)};
      const bool weight = operand == contract::kWeight1Operand || operand == contract::kWeight2Operand;
      if (!weight || dtype != contract::DType::kUint8 || buffer.ndim != 1) continue;
      cpu::PackedHeader& header = packed_[operand].emplace();
      const std::string broken = cpu::ReadHeader(name.c_str(), buffer.ptr, buffer.size, &header);
      Require(broken.empty(), broken);
      call.operands[operand] = cpu::SpecOf(header);
    }
  }

  // The elements of an operand in row-major order; null when it is absent.
  void* Data(Operand name) const {
    if (!call.operands[name].given) return nullptr;
    const py::buffer_info& buffer = buffers_[name];
    const bool aligned = reinterpret_cast<uintptr_t>(buffer.ptr) % static_cast<size_t>(buffer.itemsize) == 0;
    Require(Dense(name) && aligned,
            std::string(contract::kOperandNames[name]) + " is not C-contiguous and aligned (copy it)");
    return buffer.ptr;
  }

  cpu::Weight Weight(Operand name, int64_t K, int64_t N) const {
    const py::buffer_info& buffer = buffers_[name];
    if (packed_[name]) return cpu::PackedWeight(*packed_[name], Data(name));
    if (Dense(name)) return {buffer.ptr, K * N, N, 1};
    const size_t rank = buffer.shape.size();
    const auto stride = [&](size_t axis) { return buffer.strides[axis] / buffer.itemsize; };
    const cpu::Weight weight = {buffer.ptr, rank == 3 ? stride(0) : 0, stride(rank - 2), stride(rank - 1)};
    const bool whole = std::all_of(buffer.strides.begin(), buffer.strides.end(),
                                   [&](py::ssize_t bytes) { return bytes % buffer.itemsize == 0; });
    Require(
        whole && call.operands[name].dtype != contract::DType::kInt4 &&
            (weight.row_stride == 1 || weight.col_stride == 1),
        std::string(contract::kOperandNames[name]) + " has neither dense rows nor dense columns (copy it)");
    return weight;
  }

  void Fill(cpu::Channels& channels, Operand bias, Operand deq_scale, Operand antiquant_scale,
            Operand antiquant_offset) const {
    channels.bias = Data(bias);
    channels.deq_scale = Data(deq_scale);
    channels.antiquant_scale = Data(antiquant_scale);
    channels.antiquant_offset = Data(antiquant_offset);
  }

  contract::Call call;

 private:
  bool Dense(Operand name) const {
    const py::buffer_info& buffer = buffers_[name];
    py::ssize_t stride = buffer.itemsize;
    bool dense = true;
    for (size_t i = buffer.shape.size(); i-- > 0;) {
      dense = dense && (buffer.shape[i] == 1 || buffer.strides[i] == stride);
      stride *= buffer.shape[i];
    }
    return dense || buffer.size == 0;
  }

  py::buffer_info buffers_[contract::kOperandCount];
  std::optional<cpu::PackedHeader> packed_[contract::kOperandCount];  // of prepacked weights
};

// `threads` workers, who run one after the other.
cpu::ParallelFor Serial(int64_t threads, int64_t cache_bytes = 0) {
  const auto run = [](void*, int64_t count, void (*body)(void*, int64_t), void* context) {
    for (int64_t i = 0; i < count; ++i) body(context, i);
  };
  return {threads, nullptr, run, cache_bytes};
}

// Runs one call of ffn.ffn, or with topk_ids one of ffn.moe, into the array `out`; threads > 1 divides it
// among as many workers, who then run one after the other. cache_bytes: that of ParallelFor. activate_left:
// that of Problem.
void Ffn(const std::string& activation, bool tokens_index_flag, std::optional<int64_t> inner_precise,
         const std::optional<std::string>& isa, int64_t threads, int64_t cache_bytes, bool activate_left,
         const py::kwargs& operands) {
  Arrays arrays(operands);
  Require(arrays.call.operands[contract::kXOperand].given &&
              arrays.call.operands[contract::kWeight1Operand].given &&
              arrays.call.operands[contract::kWeight2Operand].given &&
              arrays.call.operands[contract::kOutOperand].given,
          "x, weight1, weight2 or out is missing, but every call has them (pass all four)");
  arrays.call.activation = activation;
  arrays.call.inner_precise = inner_precise;
  arrays.call.operands[contract::kOutputDtypeOperand] = {
      true, arrays.call.operands[contract::kOutOperand].dtype, {}};
  contract::Plan plan;
  const std::string broken = contract::Resolve(arrays.call, contract::kCpuTarget, &plan);
  Require(broken.empty(), broken);

  cpu::Problem problem = cpu::ProblemOf(arrays.call, plan);
  problem.x = arrays.Data(contract::kXOperand);
  problem.weight1 = arrays.Weight(contract::kWeight1Operand, problem.K1, problem.N1);
  problem.weight2 = arrays.Weight(contract::kWeight2Operand, problem.K2, problem.N2);
  problem.scale = static_cast<const float*>(arrays.Data(contract::kScaleOperand));
  problem.offset = static_cast<const float*>(arrays.Data(contract::kOffsetOperand));
  arrays.Fill(problem.channels1, contract::kBias1Operand, contract::kDeqScale1Operand,
              contract::kAntiquantScale1Operand, contract::kAntiquantOffset1Operand);
  arrays.Fill(problem.channels2, contract::kBias2Operand, contract::kDeqScale2Operand,
              contract::kAntiquantScale2Operand, contract::kAntiquantOffset2Operand);
  problem.y = arrays.Data(contract::kOutOperand);
  problem.activate_left = activate_left;

  const cpu::ParallelFor serial = Serial(threads, cache_bytes);
  if (plan.facts[contract::kMoeFact] != 0) {
    const contract::Call& call = arrays.call;
    Require(call.operands[contract::kTopkIdsOperand].dtype == contract::DType::kInt64 &&
                call.operands[contract::kTopkWeightsOperand].dtype == contract::DType::kFloat32,
            "topk_ids or topk_weights has another dtype than int64 and float32 (convert them)");
    const cpu::Routing routing = {plan.facts[contract::kTopKFact],
                                  static_cast<const int64_t*>(arrays.Data(contract::kTopkIdsOperand)),
                                  static_cast<const float*>(arrays.Data(contract::kTopkWeightsOperand))};
    const int64_t* const ids_end = routing.ids + problem.M * routing.top_k;
    Require(std::all_of(routing.ids, ids_end, [](int64_t id) { return id >= 0; }), "topk_ids is negative");
    const py::gil_scoped_release released;
    return cpu::RunMoe(problem, routing, serial, isa ? isa->c_str() : nullptr);
  }
  std::vector<int64_t> row_ends;
  if (plan.facts[contract::kExpertsFact] != 0) {
    const auto* tokens = static_cast<const int64_t*>(arrays.Data(contract::kExpertTokensOperand));
    const std::string unfit = contract::RowEnds(tokens, problem.E, problem.M, tokens_index_flag, &row_ends);
    Require(unfit.empty(), unfit);
  } else {
    row_ends = {problem.M};
  }
  problem.row_ends = row_ends.data();
  const py::gil_scoped_release released;
  cpu::RunFfn(problem, serial, isa ? isa->c_str() : nullptr);
}

// A weight [K, N] or [E, K, N], packed by the kernels of `isa`.
py::bytes Prepack(const py::object& weight, const std::optional<std::string>& isa) {
  py::dict arguments;
  arguments["weight1"] = weight;
  const Arrays arrays(arguments);
  const contract::Spec& spec = arrays.call.operands[contract::kWeight1Operand];
  const size_t rank = spec.shape.size();
  const int64_t E = rank == 3 ? spec.shape[0] : 0, K = spec.shape[rank - 2], N = spec.shape[rank - 1];
  const cpu::PackedHeader header = cpu::HeaderOf(cpu::FromContract(spec.dtype), E, K, N);
  std::string block(static_cast<size_t>(cpu::PackedBytes(header)), '\0');
  cpu::BeginBlock(header, block.data());
  const cpu::Weight from = arrays.Weight(contract::kWeight1Operand, K, N);
  for (int64_t expert = 0; expert < std::max<int64_t>(E, 1); ++expert) {
    cpu::PackExpert(header, from, expert, Serial(1), block.data(), isa ? isa->c_str() : nullptr);
  }
  return block;
}

// The dtype and shape that went into a packed weight of `size` bytes.
std::pair<std::string, std::vector<int64_t>> PackedSpec(const py::bytes& header, int64_t size) {
  const std::string bytes = header;
  cpu::PackedHeader read;
  const bool whole = bytes.size() == sizeof(read);
  const std::string broken = cpu::ReadHeader("the packed weight", bytes.data(), whole ? size : 0, &read);
  Require(broken.empty(), broken);
  const contract::Spec spec = cpu::SpecOf(read);
  return {contract::kDTypeNames[static_cast<int>(spec.dtype)], spec.shape};
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
  module.doc() = "The CPU kernels for NumPy arrays, the two phases of aclnnFFNV3, and facts about both.";
  module.def("ffn", &ffn::Ffn, py::kw_only(), py::arg("activation"), py::arg("tokens_index_flag") = false,
             py::arg("inner_precise") = py::none(), py::arg("isa") = py::none(), py::arg("threads") = 1,
             py::arg("cache_bytes") = 0, py::arg("activate_left") = false,
             "Computes one call into `out`. Every other keyword is an operand of the contract, as a pair of "
             "a buffer and "
             "its dtype's name.");
  module.def(
      "prepack", &ffn::Prepack, py::arg("weight"), py::arg("isa") = py::none(),
      "A weight, as a pair of a buffer and its dtype's name, packed into bytes that ffn() takes as uint8.");
  module.def("packed_spec", &ffn::PackedSpec, py::arg("header"), py::arg("size"),
             "What prepack() was given, as (dtype, shape), from the first 64 bytes and the number of all.");
  module.def("isas", &ffn::Isas,
             "Instruction sets compiled in, best first: (name, whether this machine has it).");
  module.def("selected_isa", &ffn::cpu::SelectedIsa, "The instruction set that calls use.");
  ffn::BindContract(module);
  ffn::BindAclnn(module);
  ffn::BindProbe(module);
}
