// SPDX-License-Identifier: Apache-2.0
// What the device computes, rounding by rounding (contract section e), in plain scalar code. Products
// accumulate in float32 in the order of k; the device's order is unspecified. The MSD variant (e.6) is
// computed as e.5, as the contract permits: what a device gives there differs by about 2^-14 of the largest
// |x| of a row.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "emulator/opapi/ffn.h"

namespace emulator {
namespace {

uint32_t Bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

float FromBits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// float32 values with the precision and range of the narrower format. RNE: to nearest, ties to even; RHA:
// ties away from zero (e.1). Overflow gives infinity.
float Half(float value, bool ties_away) {
  if (!std::isfinite(value)) return value;
  const float magnitude = std::fabs(value);
  float rounded;
  if (magnitude < 0x1p-14f) {  // subnormal halves are multiples of 2^-24
    const float steps = magnitude * 0x1p24f;
    rounded = (ties_away ? std::round(steps) : std::nearbyint(steps)) * 0x1p-24f;
  } else {  // 13 of the 23 mantissa bits go
    const uint32_t bits = Bits(magnitude);
    rounded = FromBits((bits + (ties_away ? 0x1000u : 0xfffu + (bits >> 13 & 1))) & ~0x1fffu);
    if (rounded > 65504.0f) rounded = INFINITY;
  }
  return std::copysign(rounded, value);
}
float HalfRne(float value) { return Half(value, false); }
float HalfRha(float value) { return Half(value, true); }

float Bf16Rne(float value) {
  const uint32_t bits = Bits(value);
  return std::isnan(value) ? value : FromBits((bits + 0x7fffu + (bits >> 16 & 1)) & ~0xffffu);
}
float Bf16Rha(float value) {
  return std::isnan(value) ? value : FromBits((Bits(value) + 0x8000u) & ~0xffffu);
}
float Float32(float value) { return value; }

using Round = float (*)(float);

float FromHalf(uint16_t half) {
  const uint32_t sign = uint32_t{half & 0x8000u} << 16, exponent = half >> 10 & 31, mantissa = half & 1023u;
  if (exponent == 31) return FromBits(sign | 0x7f800000u | mantissa << 13);
  if (exponent == 0)
    return std::copysign(static_cast<float>(mantissa) * 0x1p-24f, FromBits(sign | 0x3f800000u));
  return FromBits(sign | (exponent + 112) << 23 | mantissa << 13);
}

// The bits of a value that Half has rounded.
uint16_t ToHalf(float value) {
  const uint32_t bits = Bits(value), sign = bits >> 16 & 0x8000u;
  const float magnitude = std::fabs(value);
  if (std::isnan(value)) return static_cast<uint16_t>(sign | 0x7e00u);
  if (std::isinf(value)) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x1p-14f) return static_cast<uint16_t>(sign | static_cast<uint32_t>(magnitude * 0x1p24f));
  return static_cast<uint16_t>(sign | ((bits >> 13 & 0x3ffffu) - (112u << 10)));
}

uint16_t ToBf16(float value) {  // that Bf16Rne or Bf16Rha has rounded
  return static_cast<uint16_t>(Bits(value) >> 16 | (std::isnan(value) ? 0x40u : 0u));
}

// One step of e.2 after another; `r` rounds each to the arithmetic's dtype, constants included.
float Activate(Activation activation, float x, Round r) {
  const auto sigmoid_times = [r](float value, float exponent) {
    return r(value / r(1.0f + r(std::exp(exponent))));
  };
  switch (activation) {
    case Activation::kFastGelu:
      return sigmoid_times(x, r(r(-1.702f) * x));
    case Activation::kGelu: {
      const float cube = r(r(x * x) * x);
      const float z = r(r(1.5957691216057308f) * r(x + r(r(0.044715f) * cube)));
      return r(sigmoid_times(x, -std::fabs(z)) * r(std::exp(std::fmin(z, 0.0f))));
    }
    case Activation::kSilu:
      return sigmoid_times(x, -x);
    default:
      return x > 0 || std::isnan(x) ? x : 0.0f;
  }
}

// left * act(right), in float32 (e.2).
float Glu(Activation activation, float left, float right) {
  switch (activation) {
    case Activation::kGeglu: {
      const float exponent = -0.0713548162726f * right * (right * right + 22.363860002236f);
      return left * (right / (1.0f + std::exp(exponent)));
    }
    case Activation::kSwiglu:
      return left * right / (1.0f + std::exp(-right));
    default:
      return left * (right > 0 || std::isnan(right) ? right : 0.0f);
  }
}

// The elements of a tensor in row-major order, whatever its strides.
class Elements {
 public:
  explicit Elements(const aclTensor& tensor)
      : tensor_(tensor),
        base_(static_cast<char*>(emulator_host_view(tensor.data, 0))),
        index_(tensor.shape.size()),
        count_(ElementCount(tensor.shape)),
        position_(tensor.offset) {}

  int64_t count() const { return count_; }

  // Calls visit(position), in elements from base(), for each element.
  template <class Visit>
  void ForEach(const Visit& visit) {
    for (int64_t i = 0; i < count_; ++i) {
      visit(position_);
      for (size_t axis = index_.size(); axis-- > 0;) {
        position_ += tensor_.strides[axis];
        if (++index_[axis] < tensor_.shape[axis]) break;
        position_ -= tensor_.strides[axis] * index_[axis];
        index_[axis] = 0;
      }
    }
  }

  template <class T>
  T Load(int64_t position) const {
    T value;
    std::memcpy(&value, base_ + position * static_cast<int64_t>(sizeof(T)), sizeof value);
    return value;
  }

  template <class T>
  void Store(int64_t position, T value) {
    std::memcpy(base_ + position * static_cast<int64_t>(sizeof(T)), &value, sizeof value);
  }

 private:
  const aclTensor& tensor_;
  char* base_;
  std::vector<int64_t> index_;
  int64_t count_, position_;
};

bool Given(const aclTensor& tensor) { return tensor.dtype != ACL_DT_UNDEFINED; }

// Any dtype of at most 32 bits as float32; int32 keeps its exact value only to 2^24, so it has Integers.
std::vector<float> Floats(const aclTensor& tensor) {
  std::vector<float> values;
  if (!Given(tensor)) return values;
  Elements elements(tensor);
  values.reserve(static_cast<size_t>(elements.count()));
  elements.ForEach([&](int64_t i) {
    switch (tensor.dtype) {
      case ACL_FLOAT16:
        values.push_back(FromHalf(elements.Load<uint16_t>(i)));
        break;
      case ACL_BF16:
        values.push_back(FromBits(uint32_t{elements.Load<uint16_t>(i)} << 16));
        break;
      case ACL_INT8:
        values.push_back(elements.Load<int8_t>(i));
        break;
      case ACL_INT4: {  // two in a byte, the even element low (contract b)
        const int nibble = elements.Load<uint8_t>(i / 2) >> (i % 2 * 4) & 15;
        values.push_back(static_cast<float>(nibble < 8 ? nibble : nibble - 16));
        break;
      }
      default:
        values.push_back(elements.Load<float>(i));
    }
  });
  return values;
}

// int8, int32 and int64.
std::vector<int64_t> Integers(const aclTensor& tensor) {
  std::vector<int64_t> values;
  if (!Given(tensor)) return values;
  Elements elements(tensor);
  values.reserve(static_cast<size_t>(elements.count()));
  elements.ForEach([&](int64_t i) {
    values.push_back(tensor.dtype == ACL_INT8    ? elements.Load<int8_t>(i)
                     : tensor.dtype == ACL_INT32 ? elements.Load<int32_t>(i)
                                                 : elements.Load<int64_t>(i));
  });
  return values;
}

// deq_scale as multipliers (e.4). uint64 and int64 hold float32 bits below, of which the device uses 19;
// float32 goes the same way. `all_bits`: the N1 == 0 path uses all 32.
std::vector<float> Multipliers(const aclTensor& tensor, bool all_bits) {
  if (tensor.dtype == ACL_BF16) return Floats(tensor);
  std::vector<float> values;
  Elements elements(tensor);
  elements.ForEach([&](int64_t i) {
    const uint32_t bits = tensor.dtype == ACL_FLOAT ? elements.Load<uint32_t>(i)
                                                    : static_cast<uint32_t>(elements.Load<uint64_t>(i));
    values.push_back(FromBits(all_bits ? bits : bits & 0xffffe000u));
  });
  return values;
}

// Antiquantised weights (e.5): the groups of a column are blocks of K / G rows; G is 1 per channel.
std::vector<float> Weights(const aclTensor& weight, const aclTensor& scale, const aclTensor& offset,
                           int64_t E, int64_t K, int64_t N) {
  std::vector<float> w = Floats(weight);
  const std::vector<float> s = Floats(scale), o = Floats(offset);
  const bool half = scale.dtype == ACL_FLOAT16;
  if (N == 0 || E == 0 || K == 0) return w;
  const int64_t G = static_cast<int64_t>(s.size()) / (E * N);
  for (int64_t e = 0; e < E; ++e) {
    for (int64_t k = 0; k < K; ++k) {
      const int64_t group = (e * G + k / (K / G)) * N;
      for (int64_t n = 0; n < N; ++n) {
        float& value = w[static_cast<size_t>((e * K + k) * N + n)];
        const float step = value + o[static_cast<size_t>(group + n)],
                    factor = s[static_cast<size_t>(group + n)];
        value = half ? HalfRne(HalfRne(step) * factor) : Bf16Rne(step * factor);
      }
    }
  }
  return w;
}

// bias + row x [K, N], summed in T: float32, or int32 that wraps around as the cube unit's does.
template <class T>
std::vector<T> Product(const T* row, const std::vector<T>& weight, const std::vector<T>& bias, int64_t e,
                       int64_t K, int64_t N) {
  std::vector<T> sums(static_cast<size_t>(N));
  if (!bias.empty()) std::copy_n(bias.begin() + e * N, N, sums.begin());
  for (int64_t k = 0; k < K; ++k) {
    const T* const w = weight.data() + (e * K + k) * N;
    for (int64_t n = 0; n < N; ++n) sums[static_cast<size_t>(n)] += row[k] * w[n];
  }
  return sums;
}

// The end row of each expert; the error of values that do not fit M rows (contract d: undefined on a device).
int RowEnds(const FfnPlan& plan, const aclTensor& tokens, std::vector<int64_t>* ends) {
  if (plan.E == 0) {
    *ends = {plan.M};
    return 0;
  }
  *ends = plan.list ? plan.token_list : Integers(tokens);
  int64_t before = 0;
  for (size_t e = 0; e < ends->size(); ++e) {
    const int64_t value = (*ends)[e];
    int64_t end = value;
    const bool overflow = !plan.tokens_index_flag && __builtin_add_overflow(value, before, &end);
    if (overflow || value < 0 || end < before || end > plan.M) {
      return emulator_error(
          561000,
          "FFN: expertTokens[%zu] is %lld, after %lld of the %lld rows of x, but values must "
          "not be negative%s, and must end within x (undefined on a device; "
          "FFN_OPS_CHECK_TOKENS=1 makes torch.ops.ffn.ffn check them at its call)",
          e, static_cast<long long>(value), static_cast<long long>(before), static_cast<long long>(plan.M),
          plan.tokens_index_flag ? " or decrease" : "");
    }
    (*ends)[e] = before = end;
  }
  return 0;
}

// The pipeline of one call, with its operands unpacked once.
class Ffn {
 public:
  Ffn(const FfnPlan& plan, const std::vector<aclTensor>& t) : plan_(plan), bf16_(t[kY].dtype == ACL_BF16) {
    const int64_t E = std::max<int64_t>(plan.E, 1);
    y_round_ = bf16_ ? Bf16Rne : HalfRne;
    if (plan.pipeline == Pipeline::kQuant) {
      deq1_ = Multipliers(t[kDeqScale1], false);
      deq2_ = Multipliers(t[kDeqScale2], plan.N1 == 0);
      scale_ = Floats(t[kScale]);
      offset_ = Floats(t[kOffset]);
      integer_x_ = Narrow(t[kX]);
      integer_weight1_ = Narrow(t[kWeight1]);
      integer_weight2_ = Narrow(t[kWeight2]);
      integer_bias1_ = Narrow(t[kBias1]);
      integer_bias2_ = Narrow(t[kBias2]);
      return;
    }
    x_ = Floats(t[kX]);
    bias1_ = Floats(t[kBias1]);
    bias2_ = Floats(t[kBias2]);
    if (plan.pipeline == Pipeline::kAntiquant) {
      weight1_ = Weights(t[kWeight1], t[kAntiquantScale1], t[kAntiquantOffset1], E, plan.K1, plan.N1);
      weight2_ = Weights(t[kWeight2], t[kAntiquantScale2], t[kAntiquantOffset2], E, plan.K2, plan.N2);
    } else {
      weight1_ = Floats(t[kWeight1]);
      weight2_ = Floats(t[kWeight2]);
    }
  }

  // One row of y, rounded to y's dtype, by expert e.
  std::vector<float> Row(int64_t row, int64_t e) const {
    if (plan_.N1 == 0) return Bias2Row(e);
    if (plan_.pipeline == Pipeline::kQuant) return QuantRow(row, e);
    std::vector<float> h = Product(x_.data() + row * plan_.K1, weight1_, bias1_, e, plan_.K1, plan_.N1);
    h = Hidden(std::move(h));
    std::vector<float> y = Product(h.data(), weight2_, bias2_, e, plan_.K2, plan_.N2);
    for (float& value : y) value = y_round_(value);
    return y;
  }

 private:
  static std::vector<uint32_t> Narrow(const aclTensor& tensor) {
    const std::vector<int64_t> wide = Integers(tensor);
    return std::vector<uint32_t>(wide.begin(), wide.end());
  }

  static float Signed(uint32_t sum) { return static_cast<float>(static_cast<int32_t>(sum)); }

  // From the first product to what the second takes, for float arithmetic (e.3, e.5).
  std::vector<float> Hidden(std::vector<float> h) const {
    const bool half_steps =
        plan_.pipeline == Pipeline::kHighPerformance || (plan_.pipeline == Pipeline::kAntiquant && !bf16_);
    if (plan_.pipeline == Pipeline::kGlu) {
      const size_t half = static_cast<size_t>(plan_.K2);
      std::vector<float> out(half);
      for (size_t n = 0; n < half; ++n) {
        out[n] = HalfRne(Glu(plan_.activation, HalfRne(h[n]), HalfRne(h[half + n])));
      }
      return out;
    }
    for (float& value : h) {
      if (half_steps) {
        value = Activate(plan_.activation, HalfRne(value), HalfRne);
      } else {
        value = Activate(plan_.activation, value, Float32);
        value = bf16_ ? Bf16Rha(value) : HalfRha(value);
      }
    }
    return h;
  }

  std::vector<float> QuantRow(int64_t row, int64_t e) const {
    const auto sums =
        Product(integer_x_.data() + row * plan_.K1, integer_weight1_, integer_bias1_, e, plan_.K1, plan_.N1);
    std::vector<uint32_t> q(sums.size());
    for (size_t n = 0; n < sums.size(); ++n) {
      const size_t channel = static_cast<size_t>(e * plan_.N1) + n;
      float value = Signed(sums[n]) * deq1_[channel];
      value = bf16_ ? HalfRne(Activate(plan_.activation, value, Float32))
                    : Activate(plan_.activation, HalfRne(value), HalfRne);
      const float scale = HalfRne(scale_[plan_.smooth ? channel : static_cast<size_t>(e)]);
      const float scaled = HalfRne(HalfRne(value * scale) + HalfRne(offset_[static_cast<size_t>(e)]));
      const float nearest = std::nearbyint(scaled);
      const int code =
          std::isnan(nearest) ? 0 : static_cast<int>(std::fmin(std::fmax(nearest, -128.0f), 127.0f));
      q[n] = static_cast<uint32_t>(code);
    }
    const auto out = Product(q.data(), integer_weight2_, integer_bias2_, e, plan_.K2, plan_.N2);
    std::vector<float> y(out.size());
    for (size_t n = 0; n < out.size(); ++n) {
      y[n] = y_round_(Signed(out[n]) * deq2_[static_cast<size_t>(e * plan_.N2) + n]);
    }
    return y;
  }

  // N1 == 0: bias2 in every row (contract d).
  std::vector<float> Bias2Row(int64_t e) const {
    std::vector<float> y(static_cast<size_t>(plan_.N2));
    for (size_t n = 0; n < y.size(); ++n) {
      const size_t channel = static_cast<size_t>(e * plan_.N2) + n;
      if (!integer_bias2_.empty()) y[n] = y_round_(Signed(integer_bias2_[channel]) * deq2_[channel]);
      if (!bias2_.empty()) y[n] = bf16_ ? Bf16Rha(bias2_[channel]) : bias2_[channel];
    }
    return y;
  }

  const FfnPlan& plan_;
  const bool bf16_;  // y
  Round y_round_;
  std::vector<float> x_, weight1_, weight2_, bias1_, bias2_, deq1_, deq2_, scale_, offset_;
  std::vector<uint32_t> integer_x_, integer_weight1_, integer_weight2_, integer_bias1_, integer_bias2_;
};

}  // namespace

int RunFfn(const FfnPlan& plan, const std::vector<aclTensor>& tensors) {
  if (plan.empty) return 0;
  if (plan.private_format) {
    return emulator_error(561000, "FFN: the emulator does not know how FRACTAL_NZ lies in memory");
  }
  std::vector<int64_t> ends;
  if (const int status = RowEnds(plan, tensors[kExpertTokens], &ends)) return status;
  const Ffn ffn(plan, tensors);
  const bool bf16 = tensors[kY].dtype == ACL_BF16;
  Elements y(tensors[kY]);
  std::vector<float> row;
  int64_t element = 0;
  size_t e = 0;
  y.ForEach([&](int64_t position) {
    const int64_t m = element / plan.N2, n = element++ % plan.N2;
    while (e < ends.size() && m >= ends[e]) ++e;
    if (e == ends.size()) return;  // no expert's row: untouched
    if (n == 0) row = ffn.Row(m, static_cast<int64_t>(e));
    const float value = row[static_cast<size_t>(n)];
    y.Store(position, bf16 ? ToBf16(value) : ToHalf(value));
  });
  return 0;
}

}  // namespace emulator
