// SPDX-License-Identifier: Apache-2.0
// The activations of contract.md section e.2 on float32 vectors. Used by ffn-inl.h; built on vec-inl.h.
// Where the formulas meet infinities and NaN they are followed as written: silu(-inf) is -inf / inf = NaN.
#pragma once

#include "cpu/vec-inl.h"

namespace ffn::cpu {
namespace {

// e^x, within 2 ulp where the result is normal; 0 and infinity where it leaves the range, subnormals in
// between, NaN for NaN. x = n ln 2 + r with |r| <= ln 2 / 2; e^r is 1 + r + r^2 p(r), p of degree 4
// interpolating (e^r - 1 - r) / r^2 at the Chebyshev nodes (relative error 2^-26.5).
inline F32 Exp(F32 x) {
  // Beyond these the result is infinite or 0. Written so that NaN stays.
  x = Max(Min(x, Set(89.0f)), Set(-104.0f));
  // Adding 1.5 * 2^23 leaves no bits below 1: the sum's low bits are the nearest integer.
  const F32 to_integer = Set(0x1.8p23f);
  const F32 shifted = Fma(x, Set(0x1.715476p+0f), to_integer);  // log2(e)
  const U32 n = Bits(shifted) - Bits(to_integer);
  const F32 n_float = shifted - to_integer;
  // ln 2 in two parts, the first of 9 bits: its product with n is exact with or without a fused multiply-add.
  F32 r = Fma(n_float, Set(-0x1.63p-1f), x);
  r = Fma(n_float, Set(0x1.bd0106p-13f), r);
  F32 p = Fma(Set(1.3926213e-3f), r, Set(8.363203e-3f));
  p = Fma(p, r, Set(4.1666556e-2f));
  p = Fma(p, r, Set(1.6666576e-1f));
  p = Fma(p, r, Set(0.5f));
  p = Fma(p * r, r, r) + 1.0f;
  return TimesPowerOf2(p, n_float, n);
}

inline F32 TimesSigmoid(F32 x, F32 z) { return x / (1.0f + Exp(-z)); }

// The tanh form, for gelu and geglu alike: z = 1.5957691216057308 (x + 0.044715 x^3), as x (c1 + c3 x^2).
inline F32 Gelu(F32 x) {
  return TimesSigmoid(x, x * Fma(x * x, Set(0.0713548162726f), Set(1.5957691216057308f)));
}

// The erf form, x P(X <= x) for a standard normal X: with t = 1 / (1 + 0.35 |x|), P(X > |x|) is e^(-x^2 / 2)
// times a polynomial of t without constant term, that interpolates at the Chebyshev nodes of |x| <= 14
// (relative error 2^-24.6), beyond which it is 0.
inline F32 GeluErf(F32 x) {
  const F32 size = Max(x, -x);
  const F32 t = 1.0f / Fma(Set(0.35f), size, Set(1.0f));
  F32 p = Fma(Set(-0x1.e644fp-6f), t, Set(0x1.2c2038p-3f));
  p = Fma(p, t, Set(-0x1.0b396cp-2f));
  p = Fma(p, t, Set(0x1.520642p-3f));
  p = Fma(p, t, Set(-0x1.bb21b2p-6f));
  p = Fma(p, t, Set(0x1.b6bdcap-4f));
  p = Fma(p, t, Set(0x1.e93f12p-4f));
  p = Fma(p, t, Set(0x1.1e8a56p-3f));
  p = Fma(p, t, Set(0x1.1df06ap-3f));
  const F32 tail = p * t * Exp(-0.5f * x * x);
  return x * (x < 0.0f ? tail : 1.0f - tail);
}

// Calls use with the function of an activation, or of a GLU's right half: once for many vectors.
template <typename Use>
inline void WithActivation(Activation activation, const Use& use) {
  switch (activation) {
    case Activation::kFastGelu:
      return use([](F32 x) { return TimesSigmoid(x, 1.702f * x); });
    case Activation::kGelu:
    case Activation::kGeGlu:
      return use([](F32 x) { return Gelu(x); });
    case Activation::kSilu:
    case Activation::kSwiGlu:
      return use([](F32 x) { return TimesSigmoid(x, x); });
    case Activation::kRelu:
    case Activation::kReGlu:
      return use([](F32 x) { return x < 0.0f ? F32{} : x; });  // NaN stays
    case Activation::kGeluErf:
      return use([](F32 x) { return GeluErf(x); });
    case Activation::kRelu2:
      return use([](F32 x) { return x < 0.0f ? F32{} : x * x; });
  }
  __builtin_unreachable();
}

}  // namespace
}  // namespace ffn::cpu
