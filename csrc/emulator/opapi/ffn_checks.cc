// SPDX-License-Identifier: Apache-2.0
// Phase 1's checks in the vendor's order, with the vendor's status codes (contract section c); where the
// vendor's documents and sources differ, as section i resolves it. See ffn.h.
#include <strings.h>

#include <cstring>

#include "emulator/opapi/ffn.h"

namespace emulator {
namespace {

constexpr int kNull = 161001, kInvalid = 161002, kTiling = 561103;

const char* const kNames[kParameters] = {"x",
                                         "weight1",
                                         "weight2",
                                         "expertTokens",
                                         "bias1",
                                         "bias2",
                                         "scale",
                                         "offset",
                                         "deqScale1",
                                         "deqScale2",
                                         "antiquantScale1",
                                         "antiquantScale2",
                                         "antiquantOffset1",
                                         "antiquantOffset2",
                                         "y"};

struct Name {
  const char* text;
  Activation activation;
};
constexpr Name kActivations[] = {{"fastgelu", Activation::kFastGelu}, {"gelu", Activation::kGelu},
                                 {"silu", Activation::kSilu},         {"relu", Activation::kRelu},
                                 {"geglu", Activation::kGeglu},       {"swiglu", Activation::kSwiglu},
                                 {"reglu", Activation::kReglu}};

bool IsGlu(Activation activation) { return activation >= Activation::kGeglu; }

bool IsKnown(int format) { return format >= ACL_FORMAT_NCHW && format <= ACL_FORMAT_FRACTAL_NZ_C0_8; }

bool IsNz(int format) {
  return format == ACL_FORMAT_FRACTAL_NZ ||
         (format >= ACL_FORMAT_FRACTAL_NZ_C0_16 && format <= ACL_FORMAT_FRACTAL_NZ_C0_8);
}

bool IsPrivate(int format) {
  return IsNz(format) || format == ACL_FORMAT_NC1HWC0 || format == ACL_FORMAT_FRACTAL_Z ||
         format == ACL_FORMAT_NC1HWC0_C04 || format == ACL_FORMAT_NDC1HWC0 || format == ACL_FRACTAL_Z_3D;
}

// All sizes but the last: M of x.
int64_t Rows(const std::vector<int64_t>& shape) {
  return shape.empty() ? 0 : ElementCount({shape.begin(), shape.end() - 1});
}

// The checks of one call. Each method returns the status of the first rule it finds broken, 0 when there is
// none.
class Checks {
 public:
  Checks(const FfnCall& call, FfnPlan* plan) : call_(call), plan_(*plan) {}

  int All() {
    if (const int status = Arguments()) return status;
    if (const int status = Tokens()) return status;
    if (const int status = Shapes()) return status;
    if (const int status = IsAscend310P() ? OnAscend310P() : DTypes()) return status;
    if (const int status = Memory()) return status;
    plan_.empty = false;
    for (const int64_t size : t(kX).shape) plan_.empty |= size == 0;
    return plan_.empty ? 0 : Launch();
  }

 private:
  bool has(Parameter p) const { return call_.tensors[p] != nullptr; }
  const aclTensor& t(Parameter p) const { return *call_.tensors[p]; }
  int dtype(Parameter p) const { return t(p).dtype; }
  size_t rank(Parameter p) const { return t(p).shape.size(); }
  bool experts() const { return plan_.E > 0; }

  int Fail(int status, const char* rule) const {
    return emulator_error(status, "%s: %s", call_.function, rule);
  }
  int Fail(int status, Parameter p, const char* rule) const {
    return emulator_error(status, "%s: %s %s", call_.function, kNames[p], rule);
  }

  // c.1, steps 0 to 4
  int Arguments() {
    if (call_.activation == nullptr) return Fail(kNull, "activation is null");
    const Name* found = nullptr;
    for (const Name& name : kActivations) {
      if (strcasecmp(name.text, call_.activation) == 0) found = &name;
    }
    if (found == nullptr) return Fail(kInvalid, "activation is none of the seven names");
    plan_.activation = found->activation;
    for (const Parameter p : {kX, kWeight1, kWeight2, kY}) {
      if (!has(p)) return Fail(kNull, p, "is null");
    }
    for (int p = 0; p < kParameters; ++p) {  // the device would read freed memory
      if (call_.tensors[p] != nullptr && !IsLive(call_.tensors[p])) {
        return Fail(kInvalid, static_cast<Parameter>(p), "was destroyed");
      }
    }
    if (call_.token_list != nullptr && !IsLive(call_.token_list)) {
      return Fail(kInvalid, kExpertTokens, "was destroyed");
    }
    if (has(kDeqScale1) && has(kDeqScale2) && dtype(kDeqScale1) != dtype(kDeqScale2)) {
      return Fail(kInvalid, "deqScale1 and deqScale2 differ in dtype");
    }
    for (const Parameter p : {kDeqScale1, kDeqScale2}) {  // 3a: the caller's tensor is changed
      if (has(p) && dtype(p) == ACL_INT64 && dtype(kY) == ACL_FLOAT16) {
        const_cast<aclTensor*>(call_.tensors[p])->dtype = ACL_UINT64;
      }
    }
    if (!call_.can_answer) return Fail(kNull, "workspaceSize or executor is null");
    return 0;
  }

  // Steps 6 and 7
  int Tokens() {
    plan_.tokens_index_flag = call_.tokens_index_flag;
    plan_.list = call_.token_list != nullptr && !call_.token_list->values.empty();
    if (has(kExpertTokens)) {
      const auto& shape = t(kExpertTokens).shape;
      plan_.E = shape.empty() ? 1 : shape[0];
    } else {
      plan_.E = plan_.list ? static_cast<int64_t>(call_.token_list->values.size()) : 0;
    }
    if (!plan_.list) return 0;
    plan_.token_list = call_.token_list->values;
    int64_t total = 0, before = 0;
    for (const int64_t value : plan_.token_list) {
      if (value < 0) return Fail(kInvalid, "expertTokens has a negative value");
      if (call_.tokens_index_flag && value < before) return Fail(kInvalid, "expertTokens decreases");
      total = call_.tokens_index_flag ? value : value > INT64_MAX - total ? INT64_MAX : total + value;
      before = value;
    }
    const int64_t rows = Rows(t(kX).shape);
    if (total == rows) return 0;
    return emulator_error(kInvalid, "%s: expertTokens %s %lld, but x has %lld rows (they must be equal)",
                          call_.function, call_.tokens_index_flag ? "ends at" : "adds up to",
                          static_cast<long long>(total), static_cast<long long>(rows));
  }

  // Steps 8 to 16
  int Shapes() {
    for (const Parameter p : {kX, kWeight1, kWeight2, kY}) {
      const int format = t(p).format;
      if (!IsKnown(format)) return Fail(kInvalid, p, "has an unknown format");
      if (IsPrivate(format) && !(IsNz(format) && IsAscend310P())) {
        return Fail(kInvalid, p, "has a private format");
      }
      plan_.private_format |= IsNz(format);
    }
    if (rank(kY) != rank(kX)) return Fail(kInvalid, "y and x differ in rank");
    if (rank(kX) < 2 || rank(kX) > 8) return Fail(kInvalid, "x must have 2 to 8 dimensions");
    const size_t weight_rank = experts() ? 3 : 2;
    for (const Parameter p : {kWeight1, kWeight2}) {
      if (rank(p) != weight_rank)
        return Fail(kInvalid, p, experts() ? "must have 3 dimensions" : "must have 2 dimensions");
    }
    const auto &x = t(kX).shape, &w1 = t(kWeight1).shape, &w2 = t(kWeight2).shape;
    plan_.M = Rows(x);
    plan_.K1 = w1[weight_rank - 2];
    plan_.N1 = w1[weight_rank - 1];
    plan_.K2 = w2[weight_rank - 2];
    plan_.N2 = w2[weight_rank - 1];
    if (plan_.K1 > 65535 || plan_.K2 > 65535) return Fail(kInvalid, "K1 and K2 must be below 65536");
    if (x.back() != plan_.K1) return Fail(kInvalid, "x and weight1 differ in K1");
    if (IsGlu(plan_.activation)) {
      if (plan_.N1 % 2 != 0) return Fail(kInvalid, "N1 must be even for a GLU activation");
      if (plan_.K2 != plan_.N1 / 2) return Fail(kInvalid, "K2 must be N1 / 2 for a GLU activation");
      if (plan_.K1 != plan_.N2)
        return Fail(kInvalid, "K1 must be N2");  // i.11: the vendor writes out of bounds
    } else {
      if (plan_.K1 != plan_.N2) return Fail(kInvalid, "K1 must be N2");
      if (plan_.N1 != plan_.K2) return Fail(kInvalid, "N1 must be K2");
      if (const int status = First(kWeight1)) return status;
      if (const int status = First(kWeight2)) return status;
    }
    if (const int status = PerExpert(kBias1, plan_.N1)) return status;
    return PerExpert(kBias2, plan_.N2);
  }

  // [N], or [E, N] with experts; absent is fine.
  int PerExpert(Parameter p, int64_t N) const {
    if (!has(p)) return 0;
    if (const int status = Rank(p)) return status;
    if (const int status = Last(p, N)) return status;
    return First(p);
  }

  int Rank(Parameter p) const {
    return rank(p) == (experts() ? 2u : 1u) ? 0 : Fail(kInvalid, p, "has the wrong rank");
  }

  int Last(Parameter p, int64_t N) const {
    return t(p).shape.back() == N ? 0 : Fail(kInvalid, p, "has the wrong last size");
  }

  int First(Parameter p) const {
    return !experts() || t(p).shape[0] == plan_.E ? 0 : Fail(kInvalid, p, "must have E experts");
  }

  int Bias(aclDataType wanted) const {
    for (const Parameter p : {kBias1, kBias2}) {
      if (has(p) && dtype(p) != wanted) return Fail(kInvalid, p, "has the wrong dtype");
    }
    return 0;
  }

  int NoQuant() const {
    for (const Parameter p : {kScale, kOffset, kDeqScale1, kDeqScale2}) {
      if (has(p)) return Fail(kInvalid, p, "must be null in this mode");
    }
    return 0;
  }

  int NoAntiquant() const {
    for (const Parameter p : {kAntiquantScale1, kAntiquantScale2, kAntiquantOffset1, kAntiquantOffset2}) {
      if (has(p)) return Fail(kInvalid, p, "must be null in this mode");
    }
    return 0;
  }

  // c.2
  int DTypes() {
    const int x = dtype(kX), w = dtype(kWeight1), y = dtype(kY);
    if (x != ACL_FLOAT16 && x != ACL_BF16 && x != ACL_INT8) return Fail(kInvalid, kX, "has the wrong dtype");
    if (w != dtype(kWeight2)) return Fail(kInvalid, "weight1 and weight2 differ in dtype");
    if (w != ACL_FLOAT16 && w != ACL_BF16 && w != ACL_INT8 && w != ACL_INT4) {
      return Fail(kInvalid, kWeight1, "has the wrong dtype");
    }
    const bool integer = w == ACL_INT8 || w == ACL_INT4;
    if (IsGlu(plan_.activation)) {
      plan_.pipeline = Pipeline::kGlu;
      if (x != ACL_FLOAT16 || w != ACL_FLOAT16) return Fail(kInvalid, "a GLU activation takes float16");
      if (call_.inner_precise != 1) return Fail(kInvalid, "a GLU activation takes innerPrecise 1");
      if (experts()) return Fail(kInvalid, "a GLU activation takes no experts");
      if (const int status = Bias(ACL_FLOAT16)) return status;
      if (const int status = NoQuant()) return status;  // i.10
      return NoAntiquant();
    }
    if (x == ACL_BF16) {
      if (y != ACL_BF16) return Fail(kInvalid, kY, "must be bfloat16");
      if (integer) return Antiquant(ACL_BF16, ACL_FLOAT);
      plan_.pipeline = Pipeline::kBf16;
      if (w != ACL_BF16) return Fail(kInvalid, kWeight1, "must be bfloat16, int8 or int4");
      if (call_.inner_precise != 0) return Fail(kInvalid, "bfloat16 takes innerPrecise 0");
      return PlainParameters(ACL_FLOAT);
    }
    if (x == ACL_INT8) {
      plan_.pipeline = Pipeline::kQuant;
      if (w != ACL_INT8) return Fail(kInvalid, kWeight1, "must be int8");
      if (const int status = Bias(ACL_INT32)) return status;
      if (y != ACL_BF16 && y != ACL_FLOAT16) return Fail(kInvalid, kY, "must be float16 or bfloat16");
      return Quant();
    }
    if (y != ACL_FLOAT16) return Fail(kInvalid, kY, "must be float16");
    if (integer) return Antiquant(ACL_FLOAT16, ACL_FLOAT16);
    plan_.pipeline = call_.inner_precise == 0 ? Pipeline::kHighPrecision : Pipeline::kHighPerformance;
    if (w != ACL_FLOAT16) return Fail(kInvalid, kWeight1, "must be float16, int8 or int4");
    return PlainParameters(ACL_FLOAT16);
  }

  int PlainParameters(aclDataType bias) const {
    if (const int status = NoQuant()) return status;
    if (const int status = NoAntiquant()) return status;
    return Bias(bias);
  }

  int Quant() {
    for (const Parameter p : {kScale, kOffset, kDeqScale1, kDeqScale2}) {
      if (!has(p)) return Fail(kInvalid, p, "is null, but int8 x needs it");
    }
    const int deq = dtype(kDeqScale1);
    if (dtype(kY) == ACL_BF16 ? deq != ACL_BF16 : deq != ACL_UINT64 && deq != ACL_INT64 && deq != ACL_FLOAT) {
      return Fail(kInvalid, kDeqScale1, "has the wrong dtype for y");
    }
    if (dtype(kScale) != ACL_FLOAT) return Fail(kInvalid, kScale, "must be float32");
    if (dtype(kOffset) != ACL_FLOAT) return Fail(kInvalid, kOffset, "must be float32");
    if (const int status = NoAntiquant()) return status;
    if (const int status = Rank(kDeqScale1)) return status;
    if (const int status = Rank(kDeqScale2)) return status;
    if (rank(kOffset) != 1) return Fail(kInvalid, kOffset, "must have 1 dimension");
    if (const int status = Last(kDeqScale1, plan_.N1)) return status;
    if (const int status = Last(kDeqScale2, plan_.N2)) return status;
    if (const int status = Scale()) return status;
    if (t(kOffset).shape[0] != (experts() ? plan_.E : 1))
      return Fail(kInvalid, kOffset, "must be [1] or [E]");
    if (const int status = First(kDeqScale1)) return status;
    return First(kDeqScale2);
  }

  int Scale() {
    const auto& scale = t(kScale).shape;
    if (experts()) {
      if (scale.empty() || scale.size() > 2 || scale[0] != plan_.E)
        return Fail(kInvalid, kScale, "must be [E] or [E, N1]");
      if (scale.size() == 2 && scale[1] != plan_.N1) return Fail(kInvalid, kScale, "must be [E] or [E, N1]");
      plan_.smooth = scale.size() == 2;
    } else {
      if (scale.size() != 1 || (scale[0] != 1 && scale[0] != plan_.N1))
        return Fail(kInvalid, kScale, "must be [1] or [N1]");
      plan_.smooth = scale[0] == plan_.N1 && plan_.N1 != 1;
    }
    return plan_.smooth && dtype(kDeqScale1) == ACL_FLOAT
               ? Fail(kInvalid, kScale, "per channel excludes a float32 deqScale")
               : 0;
  }

  int Antiquant(aclDataType parameters, aclDataType bias) {
    plan_.pipeline = Pipeline::kAntiquant;
    for (const Parameter p : {kAntiquantScale1, kAntiquantScale2, kAntiquantOffset1, kAntiquantOffset2}) {
      if (!has(p)) return Fail(kInvalid, p, "is null, but integer weights need it");
    }
    for (const Parameter p : {kAntiquantScale1, kAntiquantOffset1, kAntiquantScale2, kAntiquantOffset2}) {
      if (dtype(p) != parameters) return Fail(kInvalid, p, "must have the dtype of x");
    }
    if (const int status = NoQuant()) return status;
    if (const int status = Bias(bias)) return status;
    const size_t per_channel = experts() ? 2 : 1, found = rank(kAntiquantScale1);
    if (found != per_channel && found != per_channel + 1)
      return Fail(kInvalid, kAntiquantScale1, "has the wrong rank");
    for (const Parameter p : {kAntiquantOffset1, kAntiquantScale2, kAntiquantOffset2}) {
      if (rank(p) != found) return Fail(kInvalid, p, "differs in rank from antiquantScale1");
    }
    if (t(kAntiquantOffset1).shape != t(kAntiquantScale1).shape)
      return Fail(kInvalid, kAntiquantOffset1, "must have its scale's shape");
    if (t(kAntiquantOffset2).shape != t(kAntiquantScale2).shape)
      return Fail(kInvalid, kAntiquantOffset2, "must have its scale's shape");
    const auto &scale1 = t(kAntiquantScale1).shape, &scale2 = t(kAntiquantScale2).shape;
    if (const int status = Last(kAntiquantScale1, plan_.N1)) return status;
    if (const int status = Last(kAntiquantScale2, plan_.N2)) return status;
    if (dtype(kWeight1) == ACL_INT4 && (plan_.N1 % 2 != 0 || plan_.N2 % 2 != 0)) {
      return Fail(kInvalid, "N1 and N2 must be even for int4");
    }
    if (const int status = First(kAntiquantScale1)) return status;
    if (const int status = First(kAntiquantScale2)) return status;
    if (found == per_channel) return 0;
    const int64_t G1 = scale1[found - 2], G2 = scale2[found - 2];
    if (G1 < 1 || G2 < 1 || plan_.K1 % G1 != 0 || plan_.K2 % G2 != 0) {
      return Fail(kInvalid, "the number of groups must divide K");
    }
    return dtype(kWeight1) == ACL_INT4 ? 0 : Fail(kInvalid, "groups are for int4 only");
  }

  // c.4
  int OnAscend310P() {
    if (call_.version == 1) return Fail(kInvalid, "is not for this SoC");
    plan_.pipeline = Pipeline::kHighPerformance;
    if (rank(kX) != 2) return Fail(kInvalid, kX, "must have 2 dimensions on this SoC");
    if (call_.inner_precise != 1) return Fail(kInvalid, "innerPrecise must be 1 on this SoC");
    if (IsGlu(plan_.activation)) return Fail(kInvalid, "this SoC has no GLU activation");
    for (const Parameter p : {kX, kY}) {
      if (dtype(p) != ACL_FLOAT16) return Fail(kInvalid, p, "must be float16 on this SoC");
    }
    if (experts()) return Fail(kInvalid, "this SoC takes no experts");
    for (const Parameter p : {kWeight1, kWeight2}) {
      if (dtype(p) != ACL_FLOAT16) return Fail(kInvalid, p, "must be float16 on this SoC");
    }
    return PlainParameters(ACL_FLOAT16);
  }

  // Stricter than the device, which would read whatever is there.
  int Memory() const {
    for (int p = 0; p < kParameters; ++p) {
      if (call_.tensors[p] == nullptr) continue;
      if (const int status = CheckTensor(call_.function, kNames[p], *call_.tensors[p])) return status;
    }
    return 0;
  }

  // Steps 21 to 23: tiling, the kernel's dtypes, and the copy into y (c.3)
  int Launch() const {
    if (t(kWeight1).format != t(kWeight2).format || t(kX).format != t(kY).format)
      return Fail(kTiling, "formats differ");
    if (call_.inner_precise != 0 && call_.inner_precise != 1)
      return Fail(kTiling, "innerPrecise must be 0 or 1");
    const int64_t block = dtype(kX) == ACL_INT8 ? 32 : 16;
    if (plan_.M > INT32_MAX / block * block) return Fail(kTiling, "x has too many rows");
    if (experts()) {
      const int64_t values = has(kExpertTokens) ? ElementCount(t(kExpertTokens).shape) : plan_.E;
      if (values != plan_.E) return Fail(kTiling, "expertTokens must have E values");
      if (plan_.E > 256) return Fail(kTiling, "there may be 256 experts at most");
      if (has(kExpertTokens) && dtype(kExpertTokens) != ACL_INT64)
        return Fail(kTiling, kExpertTokens, "must be int64");
    }
    if (plan_.pipeline == Pipeline::kGlu && dtype(kY) != ACL_FLOAT16)
      return Fail(kTiling, kY, "must be float16");
    if (t(kY).shape != t(kX).shape && !(ElementCount(t(kX).shape) == 1 && ElementCount(t(kY).shape) == 1)) {
      return Fail(kTiling, kY, "must have the shape of x");
    }
    return 0;
  }

  const FfnCall& call_;
  FfnPlan& plan_;
};

}  // namespace

bool IsAscend310P() { return std::strncmp(aclrtGetSocName(), "Ascend310P", 10) == 0; }

int CheckFfn(const FfnCall& call, FfnPlan* plan) {
  *plan = {};
  return Checks(call, plan).All();
}

}  // namespace emulator
