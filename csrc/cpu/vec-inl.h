// SPDX-License-Identifier: Apache-2.0
// Vectors of the instruction set this translation unit is compiled for: types, fused multiply-add,
// conversions and roundings. The bottom of ffn-inl.h. All *-inl.h files live in an unnamed namespace and use
// nothing from std at run time: whatever they emit stays in the translation unit (see kernels.h).
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "cpu/kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace ffn::cpu {
namespace {

// Lanes of a vector, and vector registers, of which gemm-inl.h fills most with sums.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define FFN_AVX512 1
constexpr int kLanes = 16;
constexpr int kRegisters = 32;
// GCC 12 warns of an uninitialised variable inside the unmasked intrinsics, so those with a mask are used.
constexpr __mmask16 kAllLanes = 0xffff;
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define FFN_AVX2 1
constexpr int kLanes = 8;
constexpr int kRegisters = 16;
#else
constexpr int kLanes = 4;
#if defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif
#endif

using F32 = float __attribute__((vector_size(4 * kLanes)));
using I32 = int32_t __attribute__((vector_size(4 * kLanes)));
using U32 = uint32_t __attribute__((vector_size(4 * kLanes)));
using U16 = uint16_t __attribute__((vector_size(2 * kLanes)));
using I16 = int16_t __attribute__((vector_size(2 * kLanes)));
using I8 = int8_t __attribute__((vector_size(kLanes)));
using U8 = uint8_t __attribute__((vector_size(kLanes)));

// Elements of the narrow formats in memory.
struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};
struct Int4Pair {
  uint8_t bits;  // the first element in the low nibble
};
// A stored weight has this many elements in an item.
template <typename T>
constexpr int kPerItem = std::is_same_v<T, Int4Pair> ? 2 : 1;

// Whether panels are asked for ahead of their reading: 1 KB was measured best on Intel's CPUs, and nothing at
// all on AMD's (Zen 4: 58 GB/s without, 54 with), whose own prefetchers are what avx512_bf16 relies on.
#if defined(FFN_AVX512) && defined(__AVX512BF16__) && !FFN_AMX
constexpr bool kAsks = false;
#else
constexpr bool kAsks = true;
#endif
template <bool kAnyway = false>
inline void AskFor(const char* panel) {
  if constexpr (kAsks || kAnyway) __builtin_prefetch(panel + 1024);
}

// Calls use(i) for each i in [0, kCount), a constant to the compiler.
template <int... kIndex, typename Use>
inline __attribute__((always_inline)) void ForEachIndex(std::integer_sequence<int, kIndex...>,
                                                        const Use& use) {
  (use(std::integral_constant<int, kIndex>()), ...);
}
template <int kCount, typename Use>
inline __attribute__((always_inline)) void Unrolled(const Use& use) {
  ForEachIndex(std::make_integer_sequence<int, kCount>(), use);
}

template <typename V>
inline V Load(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

template <typename V>
inline void Store(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

inline F32 Set(float x) { return x - F32{}; }
// Of NaN and a number, NaN.
inline F32 Min(F32 x, F32 most) {
#if defined(FFN_AVX512)
  return (F32)_mm512_maskz_min_ps(kAllLanes, (__m512)most, (__m512)x);
#else
  return x > most ? most : x;
#endif
}
inline F32 Max(F32 x, F32 least) {
#if defined(FFN_AVX512)
  return (F32)_mm512_maskz_max_ps(kAllLanes, (__m512)least, (__m512)x);
#else
  return x < least ? least : x;
#endif
}
inline U32 SetBits(uint32_t x) { return x - U32{}; }
inline U32 Bits(F32 v) { return (U32)v; }
inline F32 FromBits(U32 v) { return (F32)v; }
inline F32 IntToFloat(I32 v) { return __builtin_convertvector(v, F32); }

// p 2^n for integers n of -150 to 128, whose bits are those of n_float.
inline F32 TimesPowerOf2(F32 p, [[maybe_unused]] F32 n_float, [[maybe_unused]] U32 n) {
#if defined(FFN_AVX512)
  return (F32)_mm512_maskz_scalef_ps(kAllLanes, (__m512)p, (__m512)n_float);
#else
  // In two factors: an exponent reaches from -126 to 127 only.
  const U32 half = (U32)((I32)n >> 1);
  return p * FromBits((half + 127) << 23) * FromBits((n - half + 127) << 23);
#endif
}

// a * b + c, rounded once where the baseline has an instruction for it. x86-64 without AVX2 rounds twice.
inline F32 Fma(F32 a, F32 b, F32 c) {
#if defined(FFN_AVX512)
  return (F32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(FFN_AVX2)
  return (F32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (F32)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

constexpr uint32_t kInfBits = 0x7f800000;
// float32 patterns around fp16's range.
constexpr uint32_t kFp16MinNormalBits = 0x38800000;  // 2^-14
constexpr uint32_t kFp16OverflowBits = 0x47800000;   // 2^16: what rounds to this or above is infinite
constexpr uint32_t kFp16Rebias = (127 - 15) << 23;
constexpr float kFp16MinSubnormal = 0x1p-24f;

inline F32 HalfToFloat(U16 h) {
#if defined(FFN_AVX512)
  return (F32)_mm512_maskz_cvtph_ps(kAllLanes, (__m256i)h);
#elif defined(FFN_AVX2)
  return (F32)_mm256_cvtph_ps((__m128i)h);
#elif defined(__aarch64__)
  return (F32)vcvt_f32_f16((float16x4_t)h);
#else
  const U32 wide = __builtin_convertvector(h, U32);
  const U32 magnitude = (wide & 0x7fff) << 13;
  U32 bits = magnitude + kFp16Rebias;
  bits = magnitude >= (0x7c00u << 13) ? bits + kFp16Rebias : bits;
  const U32 subnormal = Bits(IntToFloat((I32)(wide & 0x3ff)) * kFp16MinSubnormal);
  bits = magnitude < (0x400u << 13) ? subnormal : bits;
  return FromBits(bits | (wide & 0x8000) << 16);
#endif
}

// Ties to even; overflow is infinite.
inline U16 FloatToHalf(F32 v) {
#if defined(FFN_AVX512)
  return (U16)_mm512_maskz_cvtps_ph(kAllLanes, (__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(FFN_AVX2)
  return (U16)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__aarch64__)
  return (U16)vcvt_f16_f32((float32x4_t)v);
#else
  const U32 magnitude = Bits(v) & 0x7fffffff;
  U32 rounded = (magnitude + 0xfff + ((magnitude >> 13) & 1)) & ~0x1fffu;
  rounded = rounded > kFp16OverflowBits ? SetBits(kFp16OverflowBits) : rounded;
  U32 half = (rounded - kFp16Rebias) >> 13;
  // Below 2^-14 the step is 2^-24, which is that of float32 at 0.5: the addition rounds.
  const U32 subnormal = Bits(FromBits(magnitude) + 0.5f) - Bits(Set(0.5f));
  half = magnitude < kFp16MinNormalBits ? subnormal : half;
  half = magnitude > kInfBits ? SetBits(0x7e00) : half;
  return __builtin_convertvector(half | ((Bits(v) >> 16) & 0x8000), U16);
#endif
}

inline F32 RoundToFp16HalfAway(F32 v) {
  const U32 magnitude = Bits(v) & 0x7fffffff;
  U32 normal = (magnitude + 0x1000) & ~0x1fffu;
  normal = normal >= kFp16OverflowBits ? SetBits(kInfBits) : normal;
  normal = magnitude > kInfBits ? magnitude : normal;
  // Below 2^-14: steps of 2^-24. Larger values are masked to 0, so that the conversion to int is defined.
  const F32 steps = FromBits(magnitude < kFp16MinNormalBits ? magnitude : U32{}) / kFp16MinSubnormal;
  const F32 whole = IntToFloat(__builtin_convertvector(steps, I32));
  const F32 subnormal = (steps - whole >= 0.5f ? whole + 1.0f : whole) * kFp16MinSubnormal;
  const U32 rounded = magnitude < kFp16MinNormalBits ? Bits(subnormal) : normal;
  return FromBits(rounded | (Bits(v) & 0x80000000));
}

// Adds `half` of a bf16 step, less what makes a tie even, and cuts. A carry into the exponent is right, up to
// infinity.
inline F32 CutToBf16(F32 v, U32 half) {
  const U32 bits = Bits(v);
  const U32 nan = bits | 0x400000;
  return FromBits(((bits & 0x7fffffff) > kInfBits ? nan : bits + half) & 0xffff0000);
}

inline F32 Round(Rounding rounding, F32 v) {
  switch (rounding) {
    case Rounding::kNone:
      return v;
    case Rounding::kFp16:
      return HalfToFloat(FloatToHalf(v));
    case Rounding::kFp16HalfAway:
      return RoundToFp16HalfAway(v);
    case Rounding::kBf16:
      return CutToBf16(v, ((Bits(v) >> 16) & 1) + 0x7fff);
    case Rounding::kBf16HalfAway:
      return CutToBf16(v, SetBits(0x8000));
  }
  __builtin_unreachable();
}

// kLanes elements from p as float32. Reads exactly these.
inline F32 LoadFloats(const float* p) { return Load<F32>(p); }
inline F32 LoadFloats(const Half* p) { return HalfToFloat(Load<U16>(p)); }
inline F32 LoadFloats(const BFloat* p) {
#if defined(FFN_AVX512)  // which GCC 12 converts in halves
  return FromBits((U32)_mm512_maskz_cvtepu16_epi32(kAllLanes, Load<__m256i>(p)) << 16);
#else
  return FromBits(__builtin_convertvector(Load<U16>(p), U32) << 16);
#endif
}
// GCC 12 converts vectors of bytes element by element, though there are instructions.
inline F32 LoadFloats(const int8_t* p) {
#if defined(FFN_AVX512)
  return IntToFloat((I32)_mm512_maskz_cvtepi8_epi32(kAllLanes, Load<__m128i>(p)));
#elif defined(FFN_AVX2)
  return IntToFloat((I32)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  return IntToFloat(__builtin_convertvector(Load<I8>(p), I32));
#endif
}
// kLanes bytes, each in the low bits of its lane.
inline U32 LoadBytes(const int8_t* p) {
#if defined(FFN_AVX512)
  return (U32)_mm512_maskz_cvtepu8_epi32(kAllLanes, Load<__m128i>(p));
#elif defined(FFN_AVX2)
  return (U32)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  return __builtin_convertvector(Load<U8>(p), U32);
#endif
}
// The low bits of each lane.
inline void StoreBytes(void* p, I32 v) {
#if defined(FFN_AVX512)
  Store(p, _mm512_maskz_cvtepi32_epi8(kAllLanes, (__m512i)v));
#else
  Store(p, __builtin_convertvector(v, I8));
#endif
}
// kLanes int4 elements, each in the low bits of its lane.
inline U32 LoadNibbles(const Int4Pair* p) {
  // Each lane gets the word with its nibble, moves the nibble to the top and down again.
#if defined(FFN_AVX512)
  const U32 low = SetBits(Load<uint32_t>(p));
  const U32 high = SetBits(Load<uint32_t>(p + 4));
  const I32 in_low = {-1, -1, -1, -1, -1, -1, -1, -1};
  const U32 word = in_low ? low : high;
  const U32 left = {28, 24, 20, 16, 12, 8, 4, 0, 28, 24, 20, 16, 12, 8, 4, 0};
#elif defined(FFN_AVX2)
  const U32 word = SetBits(Load<uint32_t>(p));
  const U32 left = {28, 24, 20, 16, 12, 8, 4, 0};
#else
  const U32 word = SetBits(Load<uint16_t>(p));
  const U32 left = {28, 24, 20, 16};
#endif
  return word << left >> 28;
}

// The int4 in bits [kShift, kShift + 4) of each lane.
template <int kShift>
inline F32 SignedNibble(U32 word) {
#if defined(FFN_AVX512)
  // A permutation looks at the four lowest bits of an index, so it is a table.
  const F32 table = {0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1};
  return (F32)_mm512_maskz_permutexvar_ps(kAllLanes, (__m512i)(word >> kShift), (__m512)table);
#else
  return IntToFloat((I32)(word << (28 - kShift)) >> 28);
#endif
}

// The first `count` of kLanes elements, then zeros; count <= 0 reads nothing.
template <typename T>
inline F32 LoadFloats(const T* p, int64_t count) {
  if (count >= kLanes) return LoadFloats(p);
  T buffer[kLanes] = {};
  if (count > 0) __builtin_memcpy(buffer, p, static_cast<size_t>(count) * sizeof(T));
  return LoadFloats(buffer);
}

// Elements [index, index + count) of a stored array. Writes zeros up to the next multiple of kLanes.
template <typename T>
inline void LoadRow(const void* data, int64_t index, int64_t count, float* row) {
  const T* from = static_cast<const T*>(data) + index;
  for (int64_t j = 0; j < count; j += kLanes) Store(row + j, LoadFloats(from + j, count - j));
}

inline void LoadRow(DType dtype, const void* data, int64_t index, int64_t count, float* row) {
  switch (dtype) {
    case DType::kFloat32:
      return LoadRow<float>(data, index, count, row);
    case DType::kFloat16:
      return LoadRow<Half>(data, index, count, row);
    case DType::kBFloat16:
      return LoadRow<BFloat>(data, index, count, row);
    case DType::kInt8:
      return LoadRow<int8_t>(data, index, count, row);
    default:
      __builtin_unreachable();
  }
}

// Narrows to T. bf16 expects a value already rounded to it; fp16 rounds ties to even.
inline void StoreAs(float* p, F32 v) { Store(p, v); }
inline void StoreAs(Half* p, F32 v) { Store(p, FloatToHalf(v)); }
inline void StoreAs(BFloat* p, F32 v) { Store(p, __builtin_convertvector(Bits(v) >> 16, U16)); }

// Lane j of the result is element kIndex[j] of a and b in a row.
template <int... kIndex>
inline F32 Shuffle(F32 a, F32 b, std::integer_sequence<int, kIndex...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, kIndex...);
#else
  return __builtin_shuffle(a, b, I32{kIndex...});
#endif
}

// The quarters that two rows kDistance apart hold after swapping their off-diagonal blocks.
template <int kDistance, int... kLane>
inline void SwapBlocks(F32* upper, F32* lower, std::integer_sequence<int, kLane...>) {
  const F32 a = *upper, b = *lower;
  *upper = Shuffle(a, b,
                   std::integer_sequence<int, (kLane & kDistance ? kLanes + kLane - kDistance : kLane)...>());
  *lower = Shuffle(a, b,
                   std::integer_sequence<int, (kLane & kDistance ? kLanes + kLane : kLane + kDistance)...>());
}

// a[i][j] <-> a[j][i] of kLanes rows, by swapping ever smaller blocks.
template <int kDistance = kLanes / 2>
inline void Transpose(F32* a) {
  for (int i = 0; i < kLanes; ++i) {
    if (!(i & kDistance))
      SwapBlocks<kDistance>(a + i, a + i + kDistance, std::make_integer_sequence<int, kLanes>());
  }
  if constexpr (kDistance > 1) Transpose<kDistance / 2>(a);
}

// Two values as bf16 in each lane's word, the first in the low half; ties to even. Subnormals may be zeros:
// products of bf16 take them for that.
inline U32 PairOfBf16(F32 low, F32 high) {
#if defined(FFN_AVX512) && defined(__AVX512BF16__)
  constexpr uint16_t kInterleave[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512bh both = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  return (U32)_mm512_maskz_permutexvar_epi16(~__mmask32{0}, Load<__m512i>(kInterleave), (__m512i)both);
#endif
  return Bits(Round(Rounding::kBf16, low)) >> 16 | Bits(Round(Rounding::kBf16, high));
}

// What rounding fp16 to bf16 leaves over; here ties go away from zero, which is simpler, and no further from
// the value. Of an infinity it is NaN.
inline F32 RestOfHalf(F32 half, U32* rounded) {
  *rounded = (Bits(half) + 0x8000) & 0xffff0000;
  return half - FromBits(*rounded);
}

#if defined(FFN_AVX512)
// Pair kPair of the int4 in each word (ffn.h: NibbleOf) as two bf16.
template <int kPair>
inline U32 PairOfNibbles(U32 word) {
  // A permutation of 16-bit elements looks at the five lowest bits of an index; the fifth does not matter.
  constexpr uint16_t kTable[32] = {0,      0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
                                   0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,
                                   0,      0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
                                   0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80};
  return (U32)_mm512_maskz_permutexvar_epi16(~__mmask32{0}, (__m512i)(word >> (4 * kPair)),
                                             Load<__m512i>(kTable));
}

// The first (kPair 0) or the last two int8 in each word as two bf16. A byte that is 128 more is put where it
// counts 1 in a float32 of 2^23 or of 2^15; the difference to that is the int8, in the upper half alone.
// (Tables of AVX512_VBMI take half the instructions, and as much time beside eight rows and more; Zen 4.)
template <int kPair>
inline U32 PairOfInt8(U32 word) {
  constexpr uint16_t kUpper[32] = {1,  33, 3,  35, 5,  37, 7,  39, 9,  41, 11, 43, 13, 45, 15, 47,
                                   17, 49, 19, 51, 21, 53, 23, 55, 25, 57, 27, 59, 29, 61, 31, 63};
  word = word ^ 0x80808080u;
  if constexpr (kPair == 1) word = word >> 16;
  const F32 first = FromBits((word & 0xff) | Bits(Set(0x1p23f))) - (0x1p23f + 128);
  const F32 second = FromBits((word & 0xff00) | Bits(Set(0x1p15f))) - (0x1p15f + 128);
  return (U32)_mm512_permutex2var_epi16((__m512i)first, Load<__m512i>(kUpper), (__m512i)second);
}
#endif

// The int8 in each word as pairs of int16: the first and the third, or (kPair 1) the second and the fourth.
template <int kPair>
inline U32 PairOfBytes(U32 word) {
  using Pairs = int16_t __attribute__((vector_size(4 * kLanes)));
  return (U32)((Pairs)(kPair == 0 ? word << 8 : word) >> 8);
}
// Where an element is that such pairs meet, in rows of int16: the second and the third of each four change
// places.
constexpr int64_t PlaceInPairs(int64_t element) {
  return (element & ~int64_t{3}) | (element & 1) << 1 | (element >> 1 & 1);
}
template <int... kLane>
inline F32 InPairs(F32 v, std::integer_sequence<int, kLane...>) {
  return Shuffle(v, v, std::integer_sequence<int, static_cast<int>(PlaceInPairs(kLane))...>());
}

// Dot products of 32-bit words, each four int8 or two bf16: where those of int8 are, FFN_DOT is 1, and
// FFN_DOT_BF16 where those of bf16 are too, with FFN_MATRICES as 2 x 2 at once; FFN_DOT_FP16 where fp16 are
// multiplied into float32 sums; FFN_DOT_INT16 where int8 are multiplied as pairs of int16. DotProduct adds to
// each lane of the sum the products of the elements in that lane of w and x: int32 wraps around, and
// subnormal bf16 and sums are zeros. MultiplyWord<i> takes word i of a row's kWords for all lanes. Intel's
// int8 take w as unsigned, so there Weights makes each weight kWordOffset more than it was.
#if defined(FFN_AVX512) && defined(__AVX512VNNI__)
#define FFN_DOT 1
inline I32 DotProduct(I32 sum, U32 w, I32 x) {
  return (I32)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x);
}
#elif defined(FFN_AVX2) && defined(__AVXVNNI__)
#define FFN_DOT 1
inline I32 DotProduct(I32 sum, U32 w, I32 x) {
  return (I32)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)w, (__m256i)x);
}
#elif defined(FFN_AVX2)
// What multiplies int8 saturates; int16 are exact, at half the rate.
#define FFN_DOT 1
#define FFN_DOT_INT16 1
inline I32 DotProduct(I32 sum, U32 w, I32 x) {
  __m256i added = _mm256_add_epi32((__m256i)sum, _mm256_madd_epi16((__m256i)w, (__m256i)x));
  asm("" : "+x"(added));  // GCC else adds products to each other first, and keeps them in memory until then
  return (I32)added;
}
#elif defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
#define FFN_DOT 1
inline I32 DotProduct(I32 sum, U32 w, I32 x) {
  return (I32)vdotq_s32((int32x4_t)sum, (int8x16_t)w, (int8x16_t)x);
}
#endif
#if defined(__aarch64__) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC) && \
    defined(__ARM_FEATURE_MATMUL_INT8)
#define FFN_DOT_BF16 1
#define FFN_MATRICES 1
#endif
// Clang once had another name for it than the standard.
#if defined(__aarch64__) && (defined(__ARM_FEATURE_FP16_FML) || defined(__ARM_FEATURE_FP16FML))
#define FFN_DOT_FP16 1
#endif
#if defined(FFN_AVX512) && defined(__AVX512BF16__) && !FFN_AMX
#define FFN_DOT_BF16 1
inline F32 DotProduct(F32 sum, U32 w, I32 x) {
  return (F32)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)x);
}
#endif

#if FFN_DOT
constexpr int kWords = 4;
#if defined(__x86_64__)
#if FFN_DOT_INT16
constexpr int kWordOffset = 0;
#else
constexpr int kWordOffset = 128;
#endif
using Words = const char*;
inline Words LoadWords(const char* p) { return p; }
template <typename Sum>
inline U32 Weights(U32 w) {
  return std::is_same_v<Sum, I32> ? w ^ 0x80808080u : w;
}
template <int kWord, typename Sum>
inline Sum MultiplyWord(Sum sum, U32 w, Words x) {
  return DotProduct(sum, w, Load<int32_t>(x + 4 * kWord) - I32{});
}
#else
constexpr int kWordOffset = 0;
using Words = int8x16_t;
inline Words LoadWords(const char* p) { return Load<Words>(p); }
template <typename Sum>
inline U32 Weights(U32 w) {
  return w;
}
template <int kWord>
inline I32 MultiplyWord(I32 sum, U32 w, Words x) {
  return (I32)vdotq_laneq_s32((int32x4_t)sum, (int8x16_t)w, x, kWord);
}

#if FFN_DOT_FP16
// Adds element kElement of a row times four halves of w, the first or the last ones, as float32.
using Halves = uint16_t __attribute__((vector_size(16)));
template <int kElement, bool kLast>
inline F32 MultiplyHalf(F32 sum, Halves w, Words x) {
  const auto acc = (float32x4_t)sum;
  const auto columns = (float16x8_t)w, row = (float16x8_t)x;
  return (F32)(kLast ? vfmlalq_laneq_high_f16(acc, columns, row, kElement)
                     : vfmlalq_laneq_low_f16(acc, columns, row, kElement));
}
#endif

#if FFN_MATRICES
// Products of matrices: 2 x 2 sums += two rows' pairs of words by two columns' pairs of words, row by row.
inline I32 MultiplyMatrices(I32 sum, U32 rows, U32 columns) {
  return (I32)vmmlaq_s32((int32x4_t)sum, (int8x16_t)rows, (int8x16_t)columns);
}
inline F32 MultiplyMatrices(F32 sum, U32 rows, U32 columns) {
  return (F32)vbfmmlaq_f32((float32x4_t)sum, vreinterpretq_bf16_u32((uint32x4_t)rows),
                           vreinterpretq_bf16_u32((uint32x4_t)columns));
}
// The first (kHalf 0) or the last pairs of words of two vectors, one beside the other; and words by turns.
template <int kHalf, typename V>
inline V PairsOf(V a, V b) {
  const auto x = (uint64x2_t)a, y = (uint64x2_t)b;
  return (V)(kHalf == 0 ? vzip1q_u64(x, y) : vzip2q_u64(x, y));
}
template <int kHalf>
inline U32 WordsByTurns(U32 a, U32 b) {
  const auto x = (uint32x4_t)a, y = (uint32x4_t)b;
  return (U32)(kHalf == 0 ? vzip1q_u32(x, y) : vzip2q_u32(x, y));
}
#endif
#endif
#endif

// What is multiplied in its narrow format (narrow-inl.h), by tiles (amx-inl.h) or by dot products
// (dot-inl.h); the rest is multiplied as float32.
#if !defined(FFN_AMX)
#define FFN_AMX 0
#endif
#if !defined(FFN_DOT)
#define FFN_DOT 0
#endif
#if !defined(FFN_DOT_INT16)
#define FFN_DOT_INT16 0
#endif
#if !defined(FFN_DOT_BF16)
#define FFN_DOT_BF16 0
#endif
#if !defined(FFN_DOT_FP16)
#define FFN_DOT_FP16 0
#endif
#if !defined(FFN_MATRICES)
#define FFN_MATRICES 0
#endif
constexpr bool kMultipliesInt8 = FFN_AMX || FFN_DOT;
constexpr bool kMultipliesInt16 = !FFN_AMX && FFN_DOT_INT16;  // instead of int8
constexpr bool kMultipliesBf16 = FFN_AMX || FFN_DOT_BF16;
constexpr bool kMultipliesFp16 = !FFN_AMX && FFN_DOT_FP16;
constexpr bool kMultipliesMatrices = !FFN_AMX && FFN_MATRICES;
constexpr bool kSplitsFp16 = FFN_AMX;  // three passes of dot products are not faster than one of float32
// Integers beside few rows become pairs of bf16 on their way, where that takes few instructions.
#if FFN_DOT_BF16 && defined(FFN_AVX512)
#define FFN_DOT_INTEGERS 1
#else
#define FFN_DOT_INTEGERS 0
#endif
constexpr bool kConvertsIntegers = FFN_DOT_INTEGERS;

}  // namespace
}  // namespace ffn::cpu
