// What the operators share: the buffers of one model, written in place by Python between steps and read here without locks.
//
// T tokens of the step, D hidden size, F neurons (intermediate size), R probe rank.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace sedac {

constexpr int64_t kMaxLevels = 16;
constexpr uint8_t kLevelFull = 0, kLevelSkip = 1;

// How a level reduces one layer's MLP; the numbers are those of engine/backends/kinds, and a test holds both equal.
enum Kind : uint8_t { kFull = 0, kSkip = 1, kWidth = 2, kContextual = 3 };

// Bits of `role_T`.
constexpr uint8_t kDecides = 1, kSoft = 2, kObserved = 4, kOfCandidate = 8;

// Sides: the policy in force, and the candidate of a roll-out beside it, for the tokens whose role has kOfCandidate.
constexpr int kNumSides = 2;

struct Buffers {
  at::Tensor level;       // (T) uint8: level of the token's MLPs from here on
  at::Tensor role;        // (T) uint8: whether the token is decided about, softly, or only observed; and its side
  at::Tensor done;        // (T) uint8: 1 once a checkpoint's decision is final
  at::Tensor goal;        // (T) uint8: level when confident
  at::Tensor scale;       // (T) float: multiplies the thresholds
  at::Tensor confidence;  // (T) float: accumulated so far
  at::Tensor saved;       // (T) float: MLPs saved so far in this step, in full MLPs of the token
  at::Tensor risk;        // (checkpoints, T) float: NaN where not evaluated
  at::Tensor active;      // (1) uint8: 1 while any token of the step is or may get reduced
  at::Tensor ladder;      // (levels, levels) uint8: per goal, the levels of soft exit in ascending order of saving, 255-terminated
  at::Tensor shares;      // (levels) float: share of MLP work that a level saves
};

struct Rule {
  int64_t rule = 0;  // 0 first or single, 1 accumulate
  int64_t scope = 0;  // 0 token, 1 batch
  double decay = 0.0;
};

struct Model {
  Buffers b;
  Rule rules[kNumSides];
  bool strict = false;  // every row at its very level, also where more is not slower
};

// One model per worker process; its buffers live as long as the process.
inline Model& model() {
  static Model instance;
  return instance;
}

template <typename T>
inline T* data(const at::Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

}  // namespace sedac
