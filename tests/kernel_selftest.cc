// SPDX-License-Identifier: Apache-2.0
// The CPU kernels of every instruction set that this machine can run, without Python and torch: what `make
// test-aarch64` runs under an emulator. Every mode, dense, by expert and as ffn.moe, is computed plainly in
// double with a bound on the way (docs/numerics.md, made simpler and wider); w8a8 with relu must be exact,
// and a row's bits may depend on nothing else. tests/test_kernels.py asks much more, where Python is. Prints
// a line for each instruction set. An argument names the one that must have been selected.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "cpu/ffn.h"
#include "cpu/packed.h"

namespace {

using namespace ffn::cpu;

struct Mode {
  const char* name;
  DType x, weight, y, bias;
  bool Quant() const { return x == DType::kInt8; }
  bool Antiquant() const { return !Quant() && (weight == DType::kInt8 || weight == DType::kInt4); }
};
constexpr DType kF32 = DType::kFloat32, kF16 = DType::kFloat16, kBf16 = DType::kBFloat16, kI8 = DType::kInt8;
constexpr Mode kModes[] = {
    {"float32", kF32, kF32, kF32, kF32},
    {"fp16", kF16, kF16, kF16, kF16},
    {"bf16", kBf16, kBf16, kBf16, kF32},
    {"w8a8", kI8, kI8, kF16, DType::kInt32},
    {"w8a8_bf16", kI8, kI8, kBf16, DType::kInt32},
    {"w8a16", kF16, kI8, kF16, kF16},
    {"w8a16_bf16", kBf16, kI8, kBf16, kF32},
    {"w4a16", kF16, DType::kInt4, kF16, kF16},
    {"w4a16_bf16", kBf16, DType::kInt4, kBf16, kF32},
};

double RoundTo(DType dtype, double value) {  // nothing here reaches a format's largest number
  if (value == 0) return value;
  const int digits = dtype == kF32 ? 24 : dtype == kF16 ? 11 : 8, smallest = dtype == kF16 ? -24 : -149;
  int exponent;
  std::frexp(value, &exponent);
  const int step = std::max(exponent - digits, smallest);
  return std::ldexp(std::nearbyint(std::ldexp(value, -step)), step);
}

uint32_t FloatBits(double value) {
  const auto narrow = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &narrow, 4);
  return bits;
}

uint32_t HalfBits(double value) {  // of a number that fp16 has
  int exponent;
  const double fraction = std::frexp(std::fabs(value), &exponent);
  const uint32_t sign = std::signbit(value) ? 0x8000 : 0;
  if (value == 0 || exponent < -13) return sign | static_cast<uint32_t>(std::ldexp(std::fabs(value), 24));
  return sign |
         ((static_cast<uint32_t>(exponent + 14) << 10) + static_cast<uint32_t>(fraction * 2048) - 1024);
}

double Decode(DType dtype, const char* bytes, int64_t index) {
  uint32_t bits = 0;
  std::memcpy(&bits, bytes + index * (dtype == kF32 ? 4 : 2), dtype == kF32 ? 4 : 2);
  if (dtype == kF16) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    if (exponent == 31) return NAN;
    return (bits & 0x8000 ? -1 : 1) *
           std::ldexp(exponent == 0 ? fraction : 1024 + fraction, std::max(exponent, 1) - 25);
  }
  if (dtype == kBf16) bits <<= 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

std::vector<char> Encode(DType dtype, const std::vector<double>& values) {
  std::vector<char> bytes;
  for (size_t i = 0; i < values.size(); ++i) {
    const double v = values[i];
    const bool real = dtype <= kBf16;
    uint32_t bits = real ? FloatBits(v) : static_cast<uint32_t>(static_cast<int32_t>(v));
    if (dtype == kF16) bits = HalfBits(v);
    if (dtype == kBf16) bits >>= 16;
    if (dtype == DType::kInt4 && i % 2 == 1) {
      bytes.back() = static_cast<char>((bytes.back() & 15) | (bits & 15) << 4);
      continue;
    }
    const size_t size = dtype == kF32 || dtype == DType::kInt32 ? 4 : dtype == kF16 || dtype == kBf16 ? 2 : 1;
    const char* const from = reinterpret_cast<const char*>(&bits);
    bytes.insert(bytes.end(), from, from + size);
  }
  return bytes;
}

struct Tensor {
  DType dtype = kF32;
  std::vector<double> values;
  std::vector<char> bytes;
  double operator[](int64_t i) const { return values[static_cast<size_t>(i)]; }
};

Tensor Random(DType dtype, int64_t count, double low, double high) {
  static uint64_t state = 20240607;
  Tensor tensor = {dtype, {}, {}};
  for (int64_t i = 0; i < count; ++i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    const double value = low + (high - low) * static_cast<double>(state >> 33) / 0x1p31;
    tensor.values.push_back(dtype <= kBf16 ? RoundTo(dtype, value) : std::floor(value));
  }
  tensor.bytes = Encode(dtype, tensor.values);
  return tensor;
}

struct Call {
  Mode mode;
  Activation activation;
  int64_t M, K[2], N[2], E, G[2];
  std::vector<int64_t> row_ends;
  Tensor x, weight[2], bias[2], deq_scale[2], scale, offset, antiquant_scale[2], antiquant_offset[2];
  bool high_precision;
  // ffn.moe where there are any
  int64_t top_k;
  std::vector<int64_t> ids;
  std::vector<float> weights;
};

Call MakeCall(const Mode& mode, Activation activation, int64_t M, int64_t K1, int64_t K2, int64_t E,
              int64_t top_k) {
  Call call = {};
  call.mode = mode;
  call.activation = activation;
  call.M = M;
  call.E = E;
  call.top_k = top_k;
  call.row_ends = E == 1 ? std::vector<int64_t>{M} : std::vector<int64_t>{M / 2 + 1, M / 2 + 1, M};
  call.high_precision = E > 1;
  call.x = Random(mode.x, M * K1, mode.Quant() ? -128 : -2, mode.Quant() ? 128 : 2);
  for (int i = 0; i < 2; ++i) {
    const int64_t K = call.K[i] = i == 0 ? K1 : K2,
                  N = call.N[i] = i == 0 ? K2 * (IsGlu(activation) ? 2 : 1) : K1;
    const double unit = 1 / std::sqrt(static_cast<double>(K));
    const double top = mode.weight == kI8 ? 128 : mode.weight == DType::kInt4 ? 8 : 2 * unit;
    call.weight[i] = Random(mode.weight, E * K * N, -top, top);
    call.bias[i] = Random(mode.bias, E * N, mode.Quant() ? -2000 : -1, mode.Quant() ? 2000 : 1);
    if (mode.Quant()) {
      call.deq_scale[i] = Random(mode.y == kBf16 ? kBf16 : kF32, E * N, 1e-4 * unit, 4e-4 * unit);
      if (i == 1 && activation == Activation::kRelu) {  // the first column wraps around
        call.bias[i].values[0] = 0x7fffffff;
        call.bias[i].bytes = Encode(mode.bias, call.bias[i].values);
        call.deq_scale[i].values[0] = 0x1p-20;
        call.deq_scale[i].bytes = Encode(call.deq_scale[i].dtype, call.deq_scale[i].values);
      }
      call.scale = Random(kF32, E, 20, 80);
      call.offset = Random(kF32, E, -20, 20);
    } else if (mode.Antiquant()) {
      call.G[i] = activation == Activation::kRelu ? 1 : 2;
      call.antiquant_scale[i] = Random(mode.x, E * call.G[i] * N, unit / top, 2 * unit / top);
      call.antiquant_offset[i] = Random(mode.x, E * call.G[i] * N, -3, 3);
    }
  }
  for (int64_t slot = 0; slot < M * top_k; ++slot) {
    call.ids.push_back(slot % (E + 1));  // E is nobody's
    call.weights.push_back(1 / static_cast<float>(slot % 5 + 1));
  }
  return call;
}

// What a kernel may answer: this far from the value.
struct Cell {
  double value = 0, error = 0;
};

Cell Narrowed(DType dtype, Cell cell) {
  if (cell.error == 0) return {RoundTo(dtype, cell.value), 0};
  const double size = std::fabs(cell.value) + cell.error;
  return {cell.value, cell.error +
                          std::ldexp(size, dtype == kF32   ? -24
                                           : dtype == kF16 ? -11
                                                           : -8) +
                          std::ldexp(1.0, dtype == kF16 ? -25 : -134)};
}

// Column n of a row times an expert's weight, with bias and dequantisation.
Cell ProductOf(const Call& call, int i, int64_t expert, const std::vector<Cell>& a, int64_t n) {
  const int64_t K = call.K[i], N = call.N[i];
  double sum = 0, size = 0, error = 0, sizes = 0;
  for (int64_t k = 0; k < K; ++k) {
    const Cell& from = a[static_cast<size_t>(k)];
    double w = call.weight[i][(expert * K + k) * N + n], most = std::fabs(w);
    if (call.mode.Antiquant()) {
      const int64_t index = (expert * call.G[i] + k / (K / call.G[i])) * N + n;
      const double scale = call.antiquant_scale[i][index], offset = call.antiquant_offset[i][index];
      most = (most + std::fabs(offset)) * std::fabs(scale);
      w = (w + offset) * scale;
    }
    sum += from.value * w;
    error += from.error * std::fabs(w);
    size += (std::fabs(from.value) + from.error) * most;
    sizes += std::fabs(from.value) + from.error + most;
  }
  const double bias = call.bias[i][expert * N + n];
  if (call.mode.Quant()) {
    const auto wrapped = static_cast<int32_t>(static_cast<uint32_t>(static_cast<int64_t>(sum + bias)));
    double scale = call.deq_scale[i][expert * N + n];
    if (call.mode.y == kF16) {  // its upper 19 bits
      const uint32_t bits = FloatBits(scale) & 0xffffe000;
      scale = Decode(kF32, reinterpret_cast<const char*>(&bits), 0);
    }
    const Cell whole = Narrowed(kF32, {static_cast<double>(wrapped), error});
    return Narrowed(kF32, {whole.value * scale, whole.error * scale});
  }
  size += std::fabs(bias);
  const double roundings = static_cast<double>(K + 5) * 0x1p-24;
  // Beside bf16 W may be rounded to it.
  if (call.mode.Antiquant() && call.mode.x == kBf16) error += std::ldexp(size, -9);
  // The last two are what tiles leave out of fp16, and subnormals.
  error += size * roundings / (1 - roundings) + std::ldexp(size, -18) +
           std::ldexp(static_cast<double>(K) + sizes, -126);
  return {sum + bias, error};
}

Cell Activated(Activation activation, const Cell& x) {
  if (activation == Activation::kRelu || activation == Activation::kReGlu)
    return {std::max(x.value, 0.0), x.error};
  const double v = x.value;
  const double z = activation == Activation::kGelu ? 1.5957691216057308 * (v + 0.044715 * v * v * v) : v;
  return {v / (1 + std::exp(-z)), 1.13 * x.error + 20 * 0x1p-24 * (std::fabs(v) + x.error)};
}

double Quantized(double value, double scale, double offset) {
  const double scaled = RoundTo(kF16, RoundTo(kF32, value * RoundTo(kF16, scale)));
  const double q = RoundTo(kF16, RoundTo(kF32, scaled + RoundTo(kF16, offset)));
  return std::clamp(std::nearbyint(q), -128.0, 127.0);
}

// A row of x through an expert, before the last rounding.
std::vector<Cell> RowOf(const Call& call, int64_t row, int64_t expert) {
  const Mode& mode = call.mode;
  std::vector<Cell> x, first, hidden, y;
  for (int64_t k = 0; k < call.K[0]; ++k) x.push_back({call.x[row * call.K[0] + k], 0});
  const bool rounds = mode.y == kF16 && !(mode.weight == kF16 && call.high_precision);
  for (int64_t n = 0; n < call.N[0]; ++n) {
    first.push_back(Narrowed(rounds ? kF16 : kF32, ProductOf(call, 0, expert, x, n)));
  }
  for (int64_t k = 0; k < call.K[1]; ++k) {
    Cell cell = first[static_cast<size_t>(k)];
    if (IsGlu(call.activation)) {
      const Cell gate = Activated(call.activation, first[static_cast<size_t>(call.K[1] + k)]);
      cell = Narrowed(kF32, {cell.value * gate.value, std::fabs(cell.value) * gate.error +
                                                          (std::fabs(gate.value) + gate.error) * cell.error});
    } else {
      cell = Activated(call.activation, cell);
    }
    cell = Narrowed(mode.Quant() ? kF16 : mode.x, cell);
    if (mode.Quant()) {
      const auto q = [&](double value) { return Quantized(value, call.scale[expert], call.offset[expert]); };
      const double value = q(cell.value);
      cell = {value, std::max(q(cell.value + cell.error) - value, value - q(cell.value - cell.error))};
    }
    hidden.push_back(cell);
  }
  for (int64_t n = 0; n < call.N[1]; ++n) y.push_back(ProductOf(call, 1, expert, hidden, n));
  return y;
}

std::vector<Cell> Expected(const Call& call) {
  std::vector<Cell> y;
  int64_t expert = 0;
  for (int64_t row = 0; row < call.M; ++row) {
    std::vector<Cell> sum(static_cast<size_t>(call.N[1]));
    while (call.row_ends[static_cast<size_t>(expert)] <= row) ++expert;
    if (call.top_k == 0) sum = RowOf(call, row, expert);
    for (int64_t slot = row * call.top_k; slot < (row + 1) * call.top_k; ++slot) {
      if (call.ids[static_cast<size_t>(slot)] >= call.E) continue;
      const double weight = call.weights[static_cast<size_t>(slot)];
      const std::vector<Cell> result = RowOf(call, row, call.ids[static_cast<size_t>(slot)]);
      for (size_t n = 0; n < sum.size(); ++n) {
        const double size = std::fabs(result[n].value) + result[n].error;
        sum[n].value += weight * result[n].value;
        sum[n].error += weight * (result[n].error + 3 * 0x1p-24 * size) + 0x1p-149;
      }
    }
    for (const Cell& cell : sum) y.push_back(Narrowed(call.mode.y, cell));
  }
  return y;
}

enum class Layout { kPlain, kTransposed, kPacked };

// y of rows [first, first + rows) with the kernels of `isa`.
std::vector<char> Run(const Call& call, const char* isa, Layout layout, int64_t threads, int64_t first,
                      int64_t rows) {
  const Mode& mode = call.mode;
  const auto run = [](void*, int64_t count, void (*body)(void*, int64_t), void* context) {
    std::vector<std::thread> team;
    for (int64_t i = 0; i < count; ++i) team.emplace_back(body, context, i);
    for (std::thread& member : team) member.join();
  };
  const ParallelFor parallel = {threads, nullptr, run};
  Problem p;
  p.x_dtype = mode.x;
  p.weight_dtype = mode.weight;
  p.y_dtype = mode.y;
  p.bias_dtype = mode.bias;
  p.deq_dtype = call.deq_scale[0].dtype;
  p.activation = call.activation;
  p.high_precision = call.high_precision;
  p.M = rows;
  p.K1 = call.K[0], p.N1 = call.N[0], p.K2 = call.K[1], p.N2 = call.N[1], p.E = call.E;
  p.x = call.x.bytes.data() + first * p.K1 * static_cast<int64_t>(call.x.bytes.size()) / (call.M * p.K1);
  p.row_ends = rows == call.M ? call.row_ends.data() : &rows;
  std::vector<char> blocks[2];
  for (int i = 0; i < 2; ++i) {
    const int64_t K = call.K[i], N = call.N[i];
    Weight& weight = i == 0 ? p.weight1 : p.weight2;
    weight = {call.weight[i].bytes.data(), K * N, N, 1, false, 0};
    if (layout == Layout::kTransposed) {
      std::vector<double> transposed;
      for (int64_t j = 0; j < p.E * K * N; ++j) {
        transposed.push_back(call.weight[i][j / (K * N) * K * N + j % K * N + j / K % N]);
      }
      blocks[i] = Encode(mode.weight, transposed);
      weight = {blocks[i].data(), K * N, 1, K, false, 0};
    } else if (layout == Layout::kPacked) {
      const PackedHeader header = HeaderOf(mode.weight, p.E == 1 ? 0 : p.E, K, N);
      blocks[i].resize(static_cast<size_t>(PackedBytes(header)));
      BeginBlock(header, blocks[i].data());
      for (int64_t e = 0; e < p.E; ++e) PackExpert(header, weight, e, parallel, blocks[i].data(), isa);
      weight = PackedWeight(header, blocks[i].data());
    }
    Channels& channels = i == 0 ? p.channels1 : p.channels2;
    channels.bias = call.bias[i].bytes.data();
    if (mode.Quant()) channels.deq_scale = call.deq_scale[i].bytes.data();
    if (mode.Antiquant()) {
      channels = {channels.bias, nullptr, call.antiquant_scale[i].bytes.data(),
                  call.antiquant_offset[i].bytes.data(), call.G[i]};
    }
  }
  p.scale = reinterpret_cast<const float*>(call.scale.bytes.data());
  p.offset = reinterpret_cast<const float*>(call.offset.bytes.data());
  std::vector<char> y(static_cast<size_t>(rows * p.N2 * (mode.y == kF32 ? 4 : 2)));
  p.y = y.data();
  if (call.top_k > 0) {
    RunMoe(p, {call.top_k, call.ids.data(), call.weights.data()}, parallel, isa);
  } else {
    RunFfn(p, parallel, isa);
  }
  return y;
}

// Empty, or what is wrong. `used` becomes the largest part of a bound that was needed.
std::string Check(const Call& call, const std::vector<Cell>& expected, const char* isa, double* used) {
  const std::vector<char> y = Run(call, isa, Layout::kPlain, 1, 0, call.M);
  for (size_t i = 0; i < expected.size(); ++i) {
    const double distance =
        std::fabs(Decode(call.mode.y, y.data(), static_cast<int64_t>(i)) - expected[i].value);
    if (!(distance <= expected[i].error))
      return "cell " + std::to_string(i) + " is " + std::to_string(distance) + " off";
    if (expected[i].error > 0) *used = std::max(*used, distance / expected[i].error);
  }
  if (Run(call, isa, Layout::kPacked, 8, 0, call.M) != y) return "packed weights and 8 threads change bits";
  if (call.mode.weight != DType::kInt4 && Run(call, isa, Layout::kTransposed, 8, 0, call.M) != y) {
    return "transposed weights change bits";
  }
  if (call.E > 1 || call.top_k > 0) return {};
  std::vector<char> parts = Run(call, isa, Layout::kPacked, 1, 0, call.M / 2);
  const std::vector<char> rest = Run(call, isa, Layout::kPacked, 1, call.M / 2, call.M - call.M / 2);
  parts.insert(parts.end(), rest.begin(), rest.end());
  return parts == y ? "" : "splitting the rows changes bits";
}

}  // namespace

int main(int count, char** arguments) {
  std::map<std::string, double> used;
  std::map<std::string, int> failures;
  size_t isas = 0;
  const char* const* const names = CompiledIsas(&isas);
  int calls = 0;
  const auto check = [&](const Call& call) {
    ++calls;
    const std::vector<Cell> expected = Expected(call);
    for (size_t i = 0; i < isas; ++i) {
      if (!IsaSupported(names[i])) continue;
      const std::string wrong = Check(call, expected, names[i], &used[names[i]]);
      if (wrong.empty()) continue;
      ++failures[names[i]];
      std::printf("%s, %s, activation %d, M %d, K1 %d, K2 %d, E %d, top_k %d: %s\n", names[i], call.mode.name,
                  static_cast<int>(call.activation), static_cast<int>(call.M), static_cast<int>(call.K[0]),
                  static_cast<int>(call.K[1]), static_cast<int>(call.E), static_cast<int>(call.top_k),
                  wrong.c_str());
    }
  };
  for (const Mode& mode : kModes) {
    for (const int64_t rows : {3, 69}) {  // few, and more; halves of 69 have 32 at least
      for (const int64_t experts : {1, 3}) {
        check(MakeCall(mode, Activation::kRelu, rows, 300, 72, experts, 0));
        check(MakeCall(mode, Activation::kGelu, rows, 72, 260, experts, 0));
        check(MakeCall(mode, Activation::kSwiGlu, rows, 40, 132, experts,
                       0));  // of which half begins inside a panel
        check(MakeCall(mode, Activation::kReGlu, rows, 64, 128, experts, 0));
      }
      check(MakeCall(mode, Activation::kSwiGlu, rows, 72, 96, 3, 2));
    }
  }
  bool failed = false;
  for (size_t i = 0; i < isas; ++i) {
    if (!IsaSupported(names[i])) {
      std::printf("%s: not on this machine\n", names[i]);
      continue;
    }
    failed = failed || failures[names[i]] > 0;
    std::printf("%s: %d calls, %d wrong, at most %.2f of a bound\n", names[i], calls, failures[names[i]],
                used[names[i]]);
  }
  std::printf("selected: %s\n", SelectedIsa());
  if (count > 1 && std::strcmp(SelectedIsa(), arguments[1]) != 0) {
    std::printf("but it should be %s\n", arguments[1]);
    failed = true;
  }
  return failed ? 1 : 0;
}
