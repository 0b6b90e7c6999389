// SPDX-License-Identifier: Apache-2.0
// The evaluation, function by function as in ffn_ops/contract.py: facts, then rules in table order, then
// sentences.
#include "contract/contract.h"

#include <algorithm>

namespace ffn::contract {
namespace {

struct Facts {
  int64_t value[kFactCount];
};

bool InMask(int64_t value, uint64_t members) {
  return value >= 0 && value < 64 && (members >> value & 1) != 0;
}

// Saturates at INT64_MAX; a zero size makes it zero wherever it stands.
int64_t Product(const int64_t* sizes, size_t count) {
  int64_t product = 1;
  for (size_t i = 0; i < count; ++i) {
    if (__builtin_mul_overflow(product, sizes[i], &product)) product = INT64_MAX;
  }
  return product;
}

// The last size but `from_end`, of an operand that has at least two axes.
int64_t Axis(const Spec& spec, size_t from_end) {
  return spec.given && spec.shape.size() >= 2 ? spec.shape[spec.shape.size() - 1 - from_end] : kUnknown;
}

int64_t FindActivation(const std::string& name) {
  std::string lower = name;
  for (char& c : lower) {
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  }
  const auto* found = std::find(kActivations, kActivations + kActivationCount, lower);
  return found == kActivations + kActivationCount ? kUnknown : found - kActivations;
}

int64_t FindMode(const Call& call) {
  const auto takes = [&](int64_t mode, Operand operand) {
    return InMask(static_cast<int64_t>(call.operands[operand].dtype),
                  kModes[mode].columns[kOperandColumn[operand]]);
  };
  int64_t first = kUnknown;
  for (int64_t mode = 0; mode < kModeCount; ++mode) {
    if (!takes(mode, kXOperand) || !takes(mode, kWeight1Operand)) continue;
    if (call.operands[kOutputDtypeOperand].given && takes(mode, kOutputDtypeOperand)) return mode;
    if (first == kUnknown) first = mode;
  }
  return first;
}

Facts Describe(const Call& call, Target target) {
  Facts facts;
  int64_t* value = facts.value;
  std::fill(value, value + kFactCount, kUnknown);
  const Spec* operands = call.operands;

  const Spec& tokens = operands[kExpertTokensOperand];
  const std::vector<int64_t>& ids = operands[kTopkIdsOperand].shape;
  const bool moe = operands[kTopkIdsOperand].given || operands[kTopkWeightsOperand].given;
  const bool experts = moe || (tokens.given && (tokens.shape.empty() || tokens.shape[0] != 0));
  value[kMoeFact] = moe;
  value[kExpertsFact] = experts;
  if (ids.size() > 1) value[kTopKFact] = ids.back();
  const std::vector<int64_t>& weight1 = operands[kWeight1Operand].shape;
  if (moe) {
    if (weight1.size() >= 3) value[kEFact] = weight1[0];
  } else if (!experts) {
    value[kEFact] = 0;
  } else if (tokens.shape.size() == 1) {
    value[kEFact] = tokens.shape[0];
  }
  value[kK1Fact] = Axis(operands[kWeight1Operand], 1);
  value[kN1Fact] = Axis(operands[kWeight1Operand], 0);
  value[kK2Fact] = Axis(operands[kWeight2Operand], 1);
  value[kN2Fact] = Axis(operands[kWeight2Operand], 0);
  const std::vector<int64_t>& x = operands[kXOperand].shape;
  value[kRankFact] = static_cast<int64_t>(x.size());
  value[kMFact] = Product(x.data(), x.empty() ? 0 : x.size() - 1);
  const Spec& scale1 = operands[kAntiquantScale1Operand];
  value[kPerGroupFact] = scale1.given && scale1.shape.size() == (experts ? 3u : 2u);
  if (value[kPerGroupFact]) {
    value[kG1Fact] = Axis(scale1, 1);
    value[kG2Fact] = Axis(operands[kAntiquantScale2Operand], 1);
  }
  const Spec& scale = operands[kScaleOperand];
  value[kPerChannelFact] =
      scale.given && (experts ? scale.shape.size() == 2 : scale.shape.size() == 1 && scale.shape[0] != 1);

  for (int i = 0; i < kOperandCount; ++i) {
    if (operands[i].given) value[kXDtypeFact + i] = static_cast<int64_t>(operands[i].dtype);
  }
  value[kActivationFact] = FindActivation(call.activation);
  value[kModeFact] = FindMode(call);
  value[kTargetFact] = target;
  const bool glu = InMask(value[kActivationFact], kGluMask);
  const bool fp16_only = target == kAscend310pTarget && operands[kXOperand].dtype != DType::kBfloat16;
  // The least int64 stands for unknown; no test can tell it from the next one.
  value[kInnerPreciseFact] = std::max(call.inner_precise.value_or(glu || fp16_only), kUnknown + 1);
  return facts;
}

bool Applies(const ShapeRow& row, const Facts& facts, Route route) {
  return InMask(route, row.routes) && InMask(facts.value[kExpertsFact], row.experts) &&
         InMask(facts.value[kPerGroupFact], row.per_group);
}

// The sizes that `row` demands in this call; kUnknown where any will do.
std::vector<int64_t> Sizes(const ShapeRow& row, const Call& call, const Facts& facts) {
  std::vector<int64_t> sizes;
  for (int i = 0; i < row.rank; ++i) {
    const int axis = row.axes[i];
    const std::vector<int64_t>& x = call.operands[kXOperand].shape;
    if (axis >= 0) {
      sizes.push_back(facts.value[axis]);
    } else if (axis < -1) {
      sizes.push_back(-2 - axis);
    } else if (!x.empty()) {
      sizes.insert(sizes.end(), x.begin(), x.end() - 1);
    }
  }
  return sizes;
}

bool Fits(const std::vector<int64_t>& got, const std::vector<int64_t>& want) {
  if (got.size() != want.size()) return false;
  for (size_t i = 0; i < got.size(); ++i) {
    if (want[i] != kUnknown && got[i] != want[i]) return false;
  }
  return true;
}

bool Addressable(const Call& call) {
  for (const Spec& spec : call.operands) {
    if (!spec.given) continue;
    const __int128 bits = static_cast<__int128>(Product(spec.shape.data(), spec.shape.size())) *
                          kDTypeBits[static_cast<int>(spec.dtype)];
    if (bits / 8 >= INT64_MAX) return false;  // where Product saturates
  }
  return true;
}

bool Holds(const RuleRow& rule, const Call& call, const Facts& facts, Route route) {
  const int64_t mode = facts.value[kModeFact];
  const Spec& operand = call.operands[rule.a < kOperandCount ? rule.a : 0];
  const unsigned accepted =
      mode == kUnknown || rule.a >= kOperandCount ? 0 : kModes[mode].columns[kOperandColumn[rule.a]];
  const int64_t value = facts.value[rule.a];
  switch (rule.check) {
    case Check::known_activation:
      return facts.value[kActivationFact] != kUnknown;
    case Check::known_mode:
      return mode != kUnknown;
    case Check::addressable:
      return Addressable(call);
    case Check::given:
      return mode == kUnknown || operand.given || accepted == 0;
    case Check::left_out:
      return mode == kUnknown || !operand.given || accepted != 0;
    case Check::dtype:
      return accepted == 0 || !operand.given || InMask(static_cast<int64_t>(operand.dtype), accepted);
    case Check::shape:
      if (!operand.given) return true;
      for (const ShapeRow& row : kShapes) {
        if (row.operand == rule.a && Applies(row, facts, route) &&
            Fits(operand.shape, Sizes(row, call, facts))) {
          return true;
        }
      }
      return false;
    case Check::one_of:
      return value == kUnknown || InMask(value, rule.members);
    case Check::between:
      return value == kUnknown || (rule.b <= value && value <= rule.c);
    case Check::equal: {
      const int64_t other = facts.value[rule.c];
      return value == kUnknown || other == kUnknown || static_cast<__int128>(rule.b) * other == value;
    }
    case Check::multiple: {
      const int64_t divisor = rule.c < 0 ? rule.b : facts.value[rule.c];
      return value == kUnknown || divisor == kUnknown || divisor == 0 || value % divisor == 0;
    }
  }
  return true;
}

std::string Brackets(const std::vector<int64_t>& sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (i > 0) text += ", ";
    text += sizes[i] == kUnknown ? "?" : std::to_string(sizes[i]);
  }
  return text + "]";
}

std::string Names(const ShapeRow& row) {
  std::string text = "[";
  for (int i = 0; i < row.rank; ++i) {
    if (i > 0) text += ", ";
    const int axis = row.axes[i];
    text += axis >= 0 ? kFactNames[axis] : axis == -1 ? "..." : std::to_string(-2 - axis);
  }
  return text + "]";
}

std::string Field(const std::string& field, const RuleRow& rule, const Call& call, const Facts& facts,
                  Route route) {
  const int64_t mode = facts.value[kModeFact];
  if (field == "activation") return "'" + call.activation + "'";
  if (field == "mode") return mode == kUnknown ? "?" : kModes[mode].name;
  if (field == "dtype") return kDTypeNames[static_cast<int>(call.operands[rule.a].dtype)];
  if (field == "dtypes") return mode == kUnknown ? "?" : kModes[mode].texts[kOperandColumn[rule.a]];
  if (field == "shape") return Brackets(call.operands[rule.a].shape);
  if (field == "pattern") {
    std::string text;
    for (const ShapeRow& row : kShapes) {
      if (row.operand != rule.a || !Applies(row, facts, route)) continue;
      if (!text.empty()) text += " or ";
      text += Names(row) + " = " + Brackets(Sizes(row, call, facts));
    }
    return text;
  }
  for (int fact = 0; fact < kFactCount; ++fact) {
    if (field != kFactNames[fact]) continue;
    const int64_t value = facts.value[fact];
    if (value == kUnknown) return "?";
    return fact >= kXDtypeFact ? kDTypeNames[value] : std::to_string(value);
  }
  return "{" + field + "}";  // unreachable: a test renders every rule
}

std::string Render(const RuleRow& rule, const Call& call, const Facts& facts, Route route) {
  std::string text;
  for (const char* c = rule.text; *c != '\0'; ++c) {
    if (*c != '{') {
      text += *c;
      continue;
    }
    std::string field;
    while (*++c != '}') field += *c;
    text += Field(field, rule, call, facts, route);
  }
  return text;
}

bool Broken(const RuleRow& rule, const Call& call, const Facts& facts, Route route) {
  if (!InMask(route, rule.routes)) return false;
  const bool applies = std::all_of(std::begin(rule.when), std::end(rule.when), [&](int condition) {
    return condition < 0 || InMask(facts.value[kConditions[condition].fact], kConditions[condition].members);
  });
  return applies && !Holds(rule, call, facts, route);
}

}  // namespace

std::vector<Violation> Violations(const Call& call, Route route, Target target) {
  const Facts facts = Describe(call, target);
  std::vector<Violation> violations;
  for (const RuleRow& rule : kRules) {
    if (Broken(rule, call, facts, route)) violations.push_back({rule.name, Render(rule, call, facts, route)});
  }
  return violations;
}

std::string Resolve(const Call& call, Target target, Plan* plan) {
  const Facts facts = Describe(call, target);
  const RuleRow* nearest = nullptr;
  Route nearest_route = kCpuRoute;
  for (int i = 0; i < kRouteCount; ++i) {
    if (!InMask(i, kTargetRoutes[target])) continue;
    const auto route = static_cast<Route>(i);
    const RuleRow* const broken =
        std::find_if(std::begin(kRules), std::end(kRules),
                     [&](const RuleRow& rule) { return Broken(rule, call, facts, route); });
    if (broken == std::end(kRules)) {
      plan->route = route;
      std::copy(std::begin(facts.value), std::end(facts.value), plan->facts);
      return {};
    }
    if (nearest == nullptr || broken > nearest) {
      nearest = broken;
      nearest_route = route;
    }
  }
  return Render(*nearest, call, facts, nearest_route);
}

std::string RowEnds(const int64_t* expert_tokens, int64_t E, int64_t M, bool tokens_index_flag,
                    std::vector<int64_t>* ends) {
  int64_t end = 0;
  for (int64_t e = 0; e < E; ++e) {
    const int64_t value = expert_tokens[e];
    const auto subject = [&] {
      return "expert_tokens[" + std::to_string(e) + "] is " + std::to_string(value);
    };
    if (value < (tokens_index_flag ? end : 0)) {
      return subject() + (tokens_index_flag
                              ? ", but end rows start at 0 and cannot decrease (leave tokens_index_flag out "
                                "to pass counts)"
                              : ", but a count of rows cannot be negative (pass the number of rows of each "
                                "expert)");
    }
    if (value > (tokens_index_flag ? M : M - end)) {
      return subject() + ", but then experts own more than the M = " + std::to_string(M) +
             " rows of x (their total must be M; " + (tokens_index_flag ? "end rows" : "counts") +
             " were expected)";
    }
    end = tokens_index_flag ? value : end + value;
    ends->push_back(end);
  }
  if (E > 0 && end != M) {
    return "expert_tokens covers " + std::to_string(end) + " rows, but x has M = " + std::to_string(M) +
           " (every row needs an expert: drop the rest of x)";
  }
  return {};
}

std::optional<Target> FindTarget(const std::string& name) {
  for (int target = 0; target < kTargetCount; ++target) {
    if (name == kTargetNames[target]) return static_cast<Target>(target);
  }
  return std::nullopt;
}

DType OnlyDType(int64_t mode, Operand operand) {
  return static_cast<DType>(__builtin_ctz(kModes[mode].columns[kOperandColumn[operand]]));
}

}  // namespace ffn::contract
