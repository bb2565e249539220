// The checkpoint: probe and decision rule for every token of the step in one operator.
//
// The rule is the one of sedac/probe/cascade.py (`decide`), which tests hold against this file.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "rows.h"
#include "state.h"

namespace sedac {
namespace {

// A checkpoint as one side has it; only values in these tensors change, never their addresses.
struct Checkpoint {
  at::Tensor down, norm_weight, norm_bias, out_weight, out_bias;  // the LREProbe, fp32, in the leading rows of what the largest rank takes
  at::Tensor rank;    // (1) int64: rows in use; 0: no probe
  at::Tensor knobs;   // (3) float: threshold, weight, target; threshold 0: off
  at::Tensor counts;  // (2) int64: tokens decided about, tokens that became confident
};

std::vector<std::array<Checkpoint, kNumSides>>& checkpoints() {
  static std::vector<std::array<Checkpoint, kNumSides>> all;
  return all;
}

// The same for the length of one step, read once.
struct Side {
  const float *down, *norm_weight, *norm_bias, *out_weight, *out_bias;
  int64_t rank;
  float threshold, weight, target;
  Rule rule;

  Side(const Checkpoint& c, const Rule& rule)
      : down(data<float>(c.down)),
        norm_weight(data<float>(c.norm_weight)),
        norm_bias(data<float>(c.norm_bias)),
        out_weight(data<float>(c.out_weight)),
        out_bias(data<float>(c.out_bias)),
        rank(*data<int64_t>(c.rank)),
        threshold(rank > 0 ? data<float>(c.knobs)[0] : 0.0f),
        weight(data<float>(c.knobs)[1]),
        target(data<float>(c.knobs)[2]),
        rule(rule) {}
};

constexpr int64_t kMaxRank = 4096;
constexpr float kNormEpsilon = 1e-5f;
constexpr float kSoftplusLinear = 20.0f;

float get_risk(const Side& side, const float* stream, int64_t hidden) {
  const int64_t rank = side.rank;
  float z[kMaxRank];
  for (int64_t r = 0; r < rank; ++r) dot_rows(side.down + r * hidden, stream, hidden, 1, hidden, z + r);
  float mean = 0, variance = 0;
  for (int64_t r = 0; r < rank; ++r) mean += z[r];
  mean /= rank;
  for (int64_t r = 0; r < rank; ++r) variance += (z[r] - mean) * (z[r] - mean);
  const float inverse = 1.0f / std::sqrt(variance / rank + kNormEpsilon);
  float logit = *side.out_bias;
  for (int64_t r = 0; r < rank; ++r) logit += ((z[r] - mean) * inverse * side.norm_weight[r] + side.norm_bias[r]) * side.out_weight[r];
  return logit > kSoftplusLinear ? logit : std::log1p(std::exp(logit));
}

void read_row(const at::Tensor& from, int64_t row, float* to, bool add) {
  const int64_t size = from.size(1);
  TORCH_CHECK(from.stride(1) == 1, "rows of the stream are contiguous");
  const auto read = [&](const auto* values) {
    for (int64_t d = 0; d < size; ++d) to[d] = add ? to[d] + widen(values[d]) : widen(values[d]);
  };
  if (from.scalar_type() == at::kBFloat16) {
    read(static_cast<const bf16*>(from.const_data_ptr()) + row * from.stride(0));
  } else {
    TORCH_CHECK(from.scalar_type() == at::kFloat, "the stream is fp32 or bf16");
    read(from.const_data_ptr<float>() + row * from.stride(0));
  }
}

uint8_t get_soft_level(const Buffers& b, uint8_t goal, float confidence) {
  const float ratio = std::tanh(2.0f * confidence - 1.0f) / 2.0f + 0.5f;
  const uint8_t* steps = data<uint8_t>(b.ladder) + goal * kMaxLevels;
  uint8_t level = kLevelFull;
  for (int64_t i = 0; i < kMaxLevels && steps[i] != 255; ++i) {
    if (data<float>(b.shares)[steps[i]] <= ratio) level = steps[i];
  }
  return level;
}

// The residual stream after the checkpoint's layer (T, D): whole, or `hidden` and `residual` to be added.
void decide(const at::Tensor& hidden, const std::optional<at::Tensor>& residual, int64_t index) {
  const Buffers& b = model().b;
  if (!*data<uint8_t>(b.active)) return;
  const int64_t num_tokens = std::min(hidden.size(0), b.role.size(0)), size = hidden.size(1);
  uint8_t *role = data<uint8_t>(b.role), *done = data<uint8_t>(b.done), *goal = data<uint8_t>(b.goal), *level = data<uint8_t>(b.level);
  float *confidence = data<float>(b.confidence), *risk = data<float>(b.risk) + index * b.risk.size(1);
  const float* scale = data<float>(b.scale);
  const auto& checkpoint = checkpoints()[index];
  const std::array<Side, kNumSides> sides = {Side(checkpoint[0], model().rules[0]), Side(checkpoint[1], model().rules[1])};
  const auto get_side = [&](int64_t t) { return role[t] & kOfCandidate ? 1 : 0; };

  std::vector<int32_t> rows;
  for (int64_t t = 0; t < num_tokens; ++t) {
    const bool decides = (role[t] & kDecides) && !done[t] && sides[get_side(t)].threshold > 0;
    if (decides || ((role[t] & kObserved) && sides[get_side(t)].rank > 0)) rows.push_back(t);
  }
  if (rows.empty()) return;
  at::parallel_for(0, rows.size(), 8, [&](int64_t begin, int64_t end) {
    std::vector<float> stream(size);
    for (int64_t i = begin; i < end; ++i) {
      const int32_t t = rows[i];
      read_row(hidden, t, stream.data(), false);
      if (residual) read_row(*residual, t, stream.data(), true);
      risk[t] = get_risk(sides[get_side(t)], stream.data(), size);
    }
  });

  int64_t num_decided[kNumSides] = {}, num_confident[kNumSides] = {};
  bool all_confident[kNumSides] = {true, true};
  std::vector<int32_t> confident;
  for (const int32_t t : rows) {
    const int number = get_side(t);
    const Side& side = sides[number];
    if (!(role[t] & kDecides) || done[t] || side.threshold <= 0) continue;
    ++num_decided[number];
    const float limit = side.threshold * scale[t];
    bool sure = risk[t] < limit;  // false for NaN
    if (side.rule.rule == 1) {
      const float now = sure ? (limit - risk[t]) / limit : 0.0f;
      confidence[t] = confidence[t] * static_cast<float>(side.rule.decay) + now * side.weight;
      sure = confidence[t] >= side.target;
    }
    if (sure) {
      confident.push_back(t);
    } else {
      all_confident[number] = false;
    }
  }
  const float* shares = data<float>(b.shares);
  for (const int32_t t : confident) {
    const int number = get_side(t);
    if (sides[number].rule.scope == 1 && !all_confident[number]) continue;
    const bool soft = role[t] & kSoft;
    const uint8_t wanted = soft ? get_soft_level(b, goal[t], confidence[t]) : goal[t];
    if (shares[wanted] > shares[level[t]]) level[t] = wanted;
    if (soft && level[t] != goal[t]) continue;  // a later checkpoint may be surer still
    done[t] = 1;
    ++num_confident[number];
  }
  for (int side = 0; side < kNumSides; ++side) {
    data<int64_t>(checkpoint[side].counts)[0] += num_decided[side];
    data<int64_t>(checkpoint[side].counts)[1] += num_confident[side];
  }
}

void checkpoint(const at::Tensor& stream, at::Tensor& level_T, int64_t index) { decide(stream, std::nullopt, index); }

void checkpoint_parts(const at::Tensor& hidden, const std::optional<at::Tensor>& residual, at::Tensor& level_T, int64_t index) {
  decide(hidden, residual, index);
}

void add_checkpoint(
    int64_t index, int64_t side, const std::vector<at::Tensor>& probe, const at::Tensor& rank, const at::Tensor& knobs, const at::Tensor& counts) {
  TORCH_CHECK(side >= 0 && side < kNumSides, "side ", side, " of ", kNumSides);
  TORCH_CHECK(probe.size() == 5 && probe[0].size(0) <= kMaxRank, "a probe has 5 tensors and a rank of at most ", kMaxRank);
  for (const at::Tensor& t : probe) TORCH_CHECK(t.scalar_type() == at::kFloat && t.is_contiguous(), "probes are fp32");
  TORCH_CHECK(knobs.scalar_type() == at::kFloat, "knobs are fp32");
  TORCH_CHECK(rank.scalar_type() == at::kLong && counts.scalar_type() == at::kLong, "rank and counts are int64");
  auto& all = checkpoints();
  if (static_cast<int64_t>(all.size()) <= index) all.resize(index + 1);
  all[index][side] = {probe[0], probe[1], probe[2], probe[3], probe[4], rank, knobs, counts};
}

void set_buffers(const std::vector<at::Tensor>& t) {
  TORCH_CHECK(t.size() == 11, "11 buffers, in the order of state.h");
  for (size_t i = 0; i < t.size(); ++i) {
    const bool is_float = i == 4 || i == 5 || i == 6 || i == 7 || i == 10;
    TORCH_CHECK(t[i].scalar_type() == (is_float ? at::kFloat : at::kByte) && t[i].is_contiguous(), "buffer ", i, " has another type than state.h says");
  }
  model().b = {t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7], t[8], t[9], t[10]};
}

// What passes over the same tokens have left together: MLPs saved and final decisions, by token.
struct Repeats {
  std::vector<float> saved, done;
};

Repeats& repeats() {
  static Repeats instance;
  return instance;
}

// Passes change levels, decisions and risks; the rest of the last active pass's tokens is where it was written.
void begin_repeat(const at::Tensor& floor) {
  const Buffers& b = model().b;
  const int64_t num_tokens = floor.size(0), width = b.risk.size(1);
  TORCH_CHECK(floor.scalar_type() == at::kByte && floor.is_contiguous() && num_tokens <= b.level.size(0), "floors are (T) uint8");
  std::copy_n(floor.const_data_ptr<uint8_t>(), num_tokens, data<uint8_t>(b.level));
  for (int64_t c = 0; c < b.risk.size(0); ++c) std::fill_n(data<float>(b.risk) + c * width, num_tokens, std::nanf(""));
  *data<uint8_t>(b.active) = 1;
}

void end_repeat(int64_t num_tokens) {
  const Buffers& b = model().b;
  Repeats& left = repeats();
  if (static_cast<int64_t>(left.saved.size()) < num_tokens) left.saved.resize(num_tokens, 0.0f), left.done.resize(num_tokens, 0.0f);
  float *saved = data<float>(b.saved), *confidence = data<float>(b.confidence);
  uint8_t *done = data<uint8_t>(b.done), *level = data<uint8_t>(b.level);
  for (int64_t t = 0; t < num_tokens; ++t) {
    left.saved[t] += saved[t], left.done[t] += done[t];
    saved[t] = confidence[t] = 0.0f, done[t] = level[t] = 0;
  }
  *data<uint8_t>(b.active) = 0;
}

std::tuple<at::Tensor, at::Tensor> take_repeats(int64_t num_tokens) {
  Repeats& left = repeats();
  const auto take = [&](std::vector<float>& from) {
    at::Tensor to = at::zeros({num_tokens}, at::kFloat);
    std::copy_n(from.begin(), std::min<int64_t>(num_tokens, from.size()), to.mutable_data_ptr<float>());
    from.clear();
    return to;
  };
  return {take(left.saved), take(left.done)};
}

void set_rule(int64_t side, int64_t rule, int64_t scope, double decay) {
  TORCH_CHECK(side >= 0 && side < kNumSides, "side ", side, " of ", kNumSides);
  model().rules[side] = {rule, scope, decay};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(sedac, library) {
  library.def("set_buffers(Tensor[] buffers) -> ()", set_buffers);
  library.def("set_rule(int side, int rule, int scope, float decay) -> ()", set_rule);
  library.def("begin_repeat(Tensor floor) -> ()", begin_repeat);
  library.def("end_repeat(int num_tokens) -> ()", end_repeat);
  library.def("take_repeats(int num_tokens) -> (Tensor, Tensor)", take_repeats);
  library.def("add_checkpoint(int index, int side, Tensor[] probe, Tensor rank, Tensor knobs, Tensor counts) -> ()", add_checkpoint);
  library.def("checkpoint(Tensor stream, Tensor(a!) level, int index) -> ()");
  library.def("checkpoint_parts(Tensor hidden, Tensor? residual, Tensor(a!) level, int index) -> ()");
}
TORCH_LIBRARY_IMPL(sedac, CPU, library) { library.impl("checkpoint", checkpoint), library.impl("checkpoint_parts", checkpoint_parts); }

}  // namespace sedac
