// The gated MLP as two operators in place of vLLM's two matrix products: `gate_up` and `down`.
//
// Between them runs vLLM's own activation, so a row at level `full` goes through vLLM's kernels alone and comes out bit
// for bit as without SEDAC. Reduced rows are computed whole in `gate_up`, from neuron-major weights (row n of gate, up and
// down belongs to neuron n, in order of importance), and put into the result by `down`.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <array>
#include <cmath>

#include "products.h"
#include "rows.h"
#include "state.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>

namespace sedac {
namespace {

// Up to so many rows every weight is read once for all of them; above, matrix products pay. Rows that choose their own neurons
// share fewer of them, so theirs are fewer (measured: benchmarks/speed.py).
constexpr int64_t kFewRows = 8, kFewContextual = 2;

struct Mlp {
  Weights gate_up_weights, down_weights;  // vLLM's own
  int64_t num_outputs = 0, hidden = 0;
  at::Tensor kinds;       // (levels) uint8: Kind
  at::Tensor parameters;  // (levels) float: width: leading neurons; contextual: threshold
  at::Tensor gate, up, down, scale;  // neuron-major (F, D) and (F), undefined where only skip is attached
  at::Tensor natural_scale;          // (F) in the model's own order
  at::Tensor repair_order;           // (F) int64, only where `down` was repaired: the model's own neuron of each row
  int64_t activation = 0;            // 0 silu, 1 gelu, 2 gelu (tanh)
  bool scores_activation = false;    // score of a neuron from act(gate), not from gate
  // Of the running step, from gate_up to down.
  bool plain = true, compact = false;
  std::vector<int64_t> full_rows, masked_rows, reduced_rows;
  at::Tensor reduced, gate_up;
  int64_t num_tokens = 0;
};

std::vector<Mlp>& mlps() {
  static std::vector<Mlp> all;
  return all;
}

// What rows cost at each level, for any MLP of the model, by number of rows; empty: unknown, and every row is computed at its very level.
struct Costs {
  std::vector<float> full;                // microseconds of so many rows in full
  std::vector<std::vector<float>> level;  // of so many rows at a reduced level; infinite: never chosen
  std::vector<float> split;               // what it costs beside to compute only some of so many rows in full
};

Costs& costs() {
  static Costs instance;
  return instance;
}

// Beyond the table costs grow in proportion to the rows.
float get_cost(const std::vector<float>& of, int64_t rows) {
  const int64_t last = static_cast<int64_t>(of.size()) - 1;
  return rows <= last ? of[rows] : of[last] * static_cast<float>(rows) / static_cast<float>(last);
}

// A reduced form must promise this share of the time at most; closer than that the measured costs do not tell.
constexpr float kMaxShare = 0.95f;

// Which kinds of levels to compute as such, a bit each, for rows counted by level: the choice with the least cost. Rows of the
// other kinds are computed in full, which is at least what their level promises.
unsigned choose_kinds(const std::array<int64_t, kMaxLevels>& counts, const uint8_t* kinds, int64_t num_rows) {
  constexpr unsigned kAll = 1u << kSkip | 1u << kWidth | 1u << kContextual;
  const Costs& known = costs();
  if (known.full.empty() || model().strict) return kAll;
  unsigned present = 0;
  int64_t num_few = 0, num_contextual = 0;
  for (int64_t v = 0; v < kMaxLevels; ++v) {
    if (!counts[v]) continue;
    present |= 1u << kinds[v];
    num_contextual += kinds[v] == kContextual ? counts[v] : 0;
    num_few += kinds[v] == kContextual || kinds[v] == kWidth ? counts[v] : 0;
  }
  if (num_contextual > kFewContextual || num_few > kFewRows) present &= ~(1u << kContextual);  // they would be computed in full, then masked
  unsigned best = 0;
  float least = kMaxShare * get_cost(known.full, num_rows);
  for (unsigned chosen = 1u << kSkip; chosen <= kAll; ++chosen) {
    if ((chosen & present & kAll) != chosen) continue;
    int64_t num_full = num_rows;
    float cost = 0;
    for (int64_t v = 0; v < kMaxLevels; ++v) {
      if (!counts[v] || !(chosen & 1u << kinds[v])) continue;
      num_full -= counts[v];
      if (kinds[v] != kSkip) cost += get_cost(known.level[v], counts[v]);
    }
    if (num_full > 0) cost += get_cost(known.full, num_full) + get_cost(known.split, num_rows);
    if (cost < least) least = cost, best = chosen;
  }
  return best;
}

at::Tensor full_product(const at::Tensor& x, const Weights& weights, int64_t num_outputs) { return multiply(x, weights, std::nullopt, num_outputs); }

at::Tensor activate_rows(const at::Tensor& gate, int64_t activation) {
  return activation == 0 ? at::silu(gate) : at::gelu(gate, activation == 1 ? "none" : "tanh");
}

at::Tensor to_index(const std::vector<int64_t>& rows) { return at::tensor(rows, at::kLong); }

void set_row(float value, float& to) { to = value; }
void set_row(float value, bf16& to) { to = c10::BFloat16(value).x; }

struct Row {
  int64_t limit;      // neurons from here on are off
  float threshold;    // of the score; 0: none
};

// The neurons of one thread's part: which ones any row asks for, and their activations, (neuron, row), 0 where a row is off.
struct Part {
  std::vector<int32_t> wanted;
  std::vector<float> h;
  std::vector<int64_t> counts;
};

// Products first, then the choice: a branch that is guessed wrong between two rows of weights would throw away the loads
// that the processor has begun for the rows to come.
template <typename W>
void pass_gate(const Mlp& m, const W* x, const std::vector<Row>& rows, int64_t begin, int64_t end, Part& part) {
  const int64_t num_rows = rows.size(), hidden = m.hidden, num_neurons = std::max<int64_t>(end - begin, 0);
  const W* gate = static_cast<const W*>(m.gate.const_data_ptr());
  const at::Tensor products = at::empty({num_neurons, num_rows}, at::kFloat);
  float* g = products.mutable_data_ptr<float>();
  for (int64_t n = 0; n < num_neurons; ++n) {
    const W *row = gate + (begin + n) * hidden, *next = n + 1 < num_neurons ? row + hidden : nullptr;
    dot_rows(row, x, hidden, num_rows, hidden, g + n * num_rows, next);
  }
  const at::Tensor activated = activate_rows(products, m.activation);
  const float *h = activated.const_data_ptr<float>(), *scores = m.scores_activation ? h : g, *scale = m.scale.const_data_ptr<float>() + begin;
  part.counts.assign(num_rows, 0);
  part.wanted.resize(num_neurons), part.h.resize(num_neurons * num_rows);
  int64_t num_wanted = 0;
  for (int64_t n = 0; n < num_neurons; ++n) {
    bool any = false;
    float* kept = part.h.data() + num_wanted * num_rows;
    for (int64_t r = 0; r < num_rows; ++r) {
      const int64_t at = n * num_rows + r;
      const bool on = (begin + n < rows[r].limit) & ((rows[r].threshold <= 0) | (std::abs(scores[at]) * scale[n] >= rows[r].threshold));
      kept[r] = on ? h[at] : 0.0f;
      part.counts[r] += on, any |= on;
    }
    part.wanted[num_wanted] = begin + n, num_wanted += any;
  }
  part.wanted.resize(num_wanted);
}

// The row of `weights` that will be read after the i-th wanted neuron's.
template <typename W>
const W* find_next(const Part& part, const W* weights, int64_t hidden, size_t i) {
  return i + 1 < part.wanted.size() ? weights + part.wanted[i + 1] * hidden : nullptr;
}

template <typename W>
void pass_up(const Mlp& m, const W* x, int64_t num_rows, Part& part) {
  const W* up = static_cast<const W*>(m.up.const_data_ptr());
  const int64_t hidden = m.hidden, num_wanted = part.wanted.size();
  std::vector<float> values(num_rows);
  for (int64_t i = 0; i < num_wanted; ++i) {
    dot_rows(up + part.wanted[i] * hidden, x, hidden, num_rows, hidden, values.data(), find_next(part, up, hidden, i));
    for (int64_t r = 0; r < num_rows; ++r) part.h[i * num_rows + r] *= values[r];
  }
}

template <typename W>
void pass_down(const Mlp& m, int64_t num_rows, const Part& part, float* y) {
  const W* down = static_cast<const W*>(m.down.const_data_ptr());
  const int64_t hidden = m.hidden, num_wanted = part.wanted.size();
  int64_t i = 0;
  std::vector<float> h(4 * num_rows);
  for (; num_rows > 2 && i + 4 <= num_wanted; i += 4) {
    const W* block[4];
    for (int64_t k = 0; k < 4; ++k) {
      block[k] = down + part.wanted[i + k] * hidden;
      for (int64_t r = 0; r < num_rows; ++r) h[r * 4 + k] = part.h[(i + k) * num_rows + r];
    }
    add_scaled(block, h.data(), y, num_rows, hidden);
  }
  for (; i < num_wanted; ++i) {
    const W* next = find_next(part, down, hidden, i);
    for (int64_t r = 0; r < num_rows; ++r) add_scaled_one(down + part.wanted[i] * hidden, part.h[i * num_rows + r], y + r * hidden, hidden, next);
  }
}

// `x` (N, D) -> (N, D), each row by its own `Row`; every weight that any row needs is read once. `computed` (N): share of the MLP.
template <typename W>
at::Tensor compute_few(const Mlp& m, const at::Tensor& x, const std::vector<Row>& rows, std::vector<float>& computed) {
  const int64_t num_rows = x.size(0), hidden = m.hidden, num_neurons = m.gate.size(0), num_threads = at::get_num_threads();
  const at::Tensor held = x.contiguous();
  const W* in = static_cast<const W*>(held.const_data_ptr());
  at::Tensor out = at::empty_like(held);
  int64_t limit = 0;
  for (const Row& row : rows) limit = std::max(limit, row.limit);
  std::vector<float> sums(num_threads * num_rows * hidden, 0.0f);
  std::vector<Part> parts(num_threads);
  const int64_t share = (limit + num_threads - 1) / num_threads;
  at::parallel_for(0, num_threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) {
      const int64_t begin = std::min(limit, p * share), end = std::min(limit, begin + share);
      pass_gate(m, in, rows, begin, end, parts[p]);
      pass_up(m, in, num_rows, parts[p]);
      pass_down<W>(m, num_rows, parts[p], sums.data() + p * num_rows * hidden);
    }
  });
  W* result = static_cast<W*>(out.mutable_data_ptr());
  for (int64_t r = 0; r < num_rows; ++r) {
    int64_t active = 0;
    for (const Part& part : parts) active += part.counts[r];
    // Contextual rows read the whole gate, ordered rows their leading part alone.
    const float gates = rows[r].threshold > 0 ? num_neurons : rows[r].limit;
    computed[r] = (gates + 2.0f * active) / (3.0f * num_neurons);
    for (int64_t d = 0; d < hidden; ++d) {
      float sum = 0;
      for (int64_t p = 0; p < num_threads; ++p) sum += sums[(p * num_rows + r) * hidden + d];
      set_row(sum, result[r * hidden + d]);
    }
  }
  return out;
}

at::Tensor compute_few(const Mlp& m, const at::Tensor& x, const std::vector<Row>& rows, std::vector<float>& computed) {
  return x.scalar_type() == at::kBFloat16 ? compute_few<bf16>(m, x, rows, computed) : compute_few<float>(m, x, rows, computed);
}

// Many rows of one width: matrix products over the leading neurons, no weight copied.
at::Tensor compute_width(const Mlp& m, const at::Tensor& x, int64_t width) {
  const at::Tensor gate = at::linear(x, m.gate.narrow(0, 0, width)), up = at::linear(x, m.up.narrow(0, 0, width));
  return at::mm(activate_rows(gate, m.activation) * up, m.down.narrow(0, 0, width));
}

void compute_reduced(Mlp& m, const at::Tensor& x, const std::vector<Row>& rows, float* saved) {
  m.reduced = at::Tensor();
  if (m.reduced_rows.empty()) return;
  const at::Tensor held = x.index_select(0, to_index(m.reduced_rows));
  if (static_cast<int64_t>(rows.size()) <= kFewRows) {
    std::vector<float> computed(rows.size());
    m.reduced = compute_few(m, held, rows, computed);
    for (size_t i = 0; i < rows.size(); ++i) saved[m.reduced_rows[i]] += 1.0f - computed[i];
    return;
  }
  m.reduced = at::empty_like(held);
  std::vector<bool> seen(rows.size(), false);
  for (size_t i = 0; i < rows.size(); ++i) {
    if (seen[i]) continue;
    std::vector<int64_t> group;
    for (size_t j = i; j < rows.size(); ++j) {
      if (rows[j].limit == rows[i].limit) group.push_back(j), seen[j] = true;
    }
    const at::Tensor index = to_index(group);
    m.reduced.index_copy_(0, index, compute_width(m, held.index_select(0, index), rows[i].limit));
    for (const int64_t j : group) saved[m.reduced_rows[j]] += 1.0f - static_cast<float>(rows[i].limit) / m.gate.size(0);
  }
}

// `compact`: give only the rows that vLLM's own kernels compute, for callers that need no fixed shape; `down` spreads them again.
at::Tensor gate_up(const at::Tensor& x, const at::Tensor& level_T, int64_t index, int64_t num_outputs, bool compact) {
  Mlp& m = mlps()[index];
  const Buffers& b = model().b;
  m.plain = !*data<uint8_t>(b.active);
  if (m.plain) return full_product(x, m.gate_up_weights, num_outputs);

  const int64_t num_tokens = m.num_tokens = x.size(0);
  const uint8_t *level = data<uint8_t>(b.level), *kinds = data<uint8_t>(m.kinds);
  const float* parameters = data<float>(m.parameters);
  float* saved = data<float>(b.saved);
  m.full_rows.clear(), m.masked_rows.clear(), m.reduced_rows.clear();
  std::vector<Row> rows;
  const int64_t num_neurons = m.gate.defined() ? m.gate.size(0) : 0;
  std::array<int64_t, kMaxLevels> counts{};
  for (int64_t t = 0; t < num_tokens; ++t) ++counts[level[t]];
  const unsigned chosen = choose_kinds(counts, kinds, num_tokens);
  int64_t num_contextual = 0, num_width = 0;
  for (int64_t v = 0; v < kMaxLevels; ++v) {
    num_contextual += kinds[v] == kContextual ? counts[v] : 0, num_width += kinds[v] == kWidth ? counts[v] : 0;
  }
  const bool few = num_contextual <= kFewContextual && num_contextual + num_width <= kFewRows;
  for (int64_t t = 0; t < num_tokens; ++t) {
    const uint8_t kind = chosen & 1u << kinds[level[t]] ? kinds[level[t]] : kFull;
    const float parameter = parameters[level[t]];
    if (kind == kSkip) {
      saved[t] += 1.0f;
    } else if (kind == kWidth) {
      m.reduced_rows.push_back(t), rows.push_back({static_cast<int64_t>(parameter), 0.0f});
    } else if (kind == kContextual && few) {
      m.reduced_rows.push_back(t), rows.push_back({num_neurons, parameter});
    } else if (kind == kContextual) {
      m.masked_rows.push_back(t);
    } else {
      m.full_rows.push_back(t);
    }
  }
  m.plain = static_cast<int64_t>(m.full_rows.size()) == num_tokens;
  if (m.plain) return full_product(x, m.gate_up_weights, num_outputs);
  compute_reduced(m, x, rows, saved);
  std::vector<int64_t> through = m.full_rows;
  through.insert(through.end(), m.masked_rows.begin(), m.masked_rows.end());
  const bool all = static_cast<int64_t>(through.size()) == num_tokens && (m.full_rows.empty() || m.masked_rows.empty());
  m.compact = compact && !all;
  at::Tensor out;
  if (all) {
    out = full_product(x, m.gate_up_weights, num_outputs);
  } else {
    const at::Tensor held = to_index(through);
    at::Tensor product = through.empty() ? at::empty({0, num_outputs}, x.options())
                                         : full_product(x.index_select(0, held), m.gate_up_weights, num_outputs);
    if (compact) {
      out = product;
    } else {
      out = at::empty({num_tokens, num_outputs}, x.options());
      if (!through.empty()) out.index_copy_(0, held, product);
    }
  }
  m.gate_up = m.masked_rows.empty() ? at::Tensor() : out;
  return out;
}

// Set to 0 what a row's own gate would have left out; `gate_up` (N, 2F) and `h` (N, F) row by row, limits (N).
template <typename W>
at::Tensor mask(const Mlp& m, const at::Tensor& gate_up, const at::Tensor& h, const std::vector<float>& limits) {
  const int64_t num_neurons = h.size(1);
  at::Tensor out = at::empty({h.size(0), num_neurons}, h.options());
  const W *products = static_cast<const W*>(gate_up.const_data_ptr()), *from = static_cast<const W*>(h.const_data_ptr());
  W* to = static_cast<W*>(out.mutable_data_ptr());
  const float* scale = m.natural_scale.const_data_ptr<float>();
  at::parallel_for(0, h.size(0), 4, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const W *gate = products + r * 2 * num_neurons, *up = gate + num_neurons, *row = from + r * num_neurons;
      // h = act(gate) * up, so abs(act(gate)) * scale >= limit needs no activation of its own
      mask_row(row, m.scores_activation ? row : gate, m.scores_activation ? up : nullptr, scale, limits[r], to + r * num_neurons, num_neurons);
    }
  });
  return out;
}

// Many contextual rows were computed in full by then; masking saves no time, but gives what their levels mean. `h` (N, F) and
// the kept `gate_up` hold them alone.
at::Tensor down_masked(const Mlp& m, const at::Tensor& gate_up, const at::Tensor& h, int64_t hidden) {
  const uint8_t* level = data<uint8_t>(model().b.level);
  std::vector<float> limits;
  for (const int64_t t : m.masked_rows) limits.push_back(data<float>(m.parameters)[level[t]]);
  const at::Tensor held = h.contiguous();
  const at::Tensor masked = h.scalar_type() == at::kBFloat16 ? mask<bf16>(m, gate_up, held, limits) : mask<float>(m, gate_up, held, limits);
  return m.repair_order.defined() ? at::mm(masked.index_select(1, m.repair_order), m.down) : full_product(masked, m.down_weights, hidden);
}

at::Tensor down(const at::Tensor& h, const at::Tensor& level_T, int64_t index, int64_t hidden) {
  Mlp& m = mlps()[index];
  if (m.plain) return full_product(h, m.down_weights, hidden);
  const int64_t num_tokens = m.num_tokens, num_full = m.full_rows.size(), num_masked = m.masked_rows.size();
  at::Tensor out;
  if (num_masked == num_tokens) {
    out = down_masked(m, m.gate_up, h, hidden);
  } else {
    out = at::zeros({num_tokens, hidden}, h.options());
    if (num_full) {
      const at::Tensor held = to_index(m.full_rows);
      out.index_copy_(0, held, full_product(m.compact ? h.narrow(0, 0, num_full) : h.index_select(0, held), m.down_weights, hidden));
    }
    if (num_masked) {
      const at::Tensor held = to_index(m.masked_rows);
      const auto take = [&](const at::Tensor& t) { return m.compact ? t.narrow(0, num_full, num_masked) : t.index_select(0, held); };
      out.index_copy_(0, held, down_masked(m, take(m.gate_up), take(h), hidden));
    }
    if (m.reduced.defined()) out.index_copy_(0, to_index(m.reduced_rows), m.reduced);
  }
  m.reduced = m.gate_up = at::Tensor();
  return out;
}

// Zeros where every row of the MLP is skipped, else nothing; eager mode asks before it runs anything of the MLP.
std::optional<at::Tensor> skip_all(const at::Tensor& x, int64_t index) {
  const uint8_t *level = data<uint8_t>(model().b.level), *kinds = data<uint8_t>(mlps()[index].kinds);
  const int64_t num_tokens = x.size(0);
  for (int64_t t = 0; t < num_tokens; ++t) {
    if (kinds[level[t]] != kSkip) return std::nullopt;
  }
  float* saved = data<float>(model().b.saved);
  for (int64_t t = 0; t < num_tokens; ++t) saved[t] += 1.0f;
  return at::zeros_like(x);
}

void add_mlp(int64_t index, const at::Tensor& gate_up, const at::Tensor& down, int64_t hidden, const at::Tensor& kinds,
             const at::Tensor& parameters, int64_t activation, int64_t gate_up_form, int64_t down_form) {
  TORCH_CHECK(kinds.scalar_type() == at::kByte && parameters.scalar_type() == at::kFloat, "kinds are uint8, parameters fp32");
  auto& all = mlps();
  if (static_cast<int64_t>(all.size()) <= index) all.resize(index + 1);
  Mlp& m = all[index];
  m.gate_up_weights = {gate_up, gate_up_form}, m.down_weights = {down, down_form}, m.hidden = hidden;
  m.kinds = kinds, m.parameters = parameters, m.activation = activation;
}

// Neuron-major weights in order of importance and the scores' scale in that order; `natural_scale` in the model's own order;
// `repair_order` only where `down` was repaired, so that many contextual rows use it too.
void set_neurons(int64_t index, const at::Tensor& gate, const at::Tensor& up, const at::Tensor& down, const at::Tensor& scale,
                 const at::Tensor& natural_scale, const std::optional<at::Tensor>& repair_order, bool scores_activation) {
  Mlp& m = mlps().at(index);
  TORCH_CHECK(scale.scalar_type() == at::kFloat && natural_scale.scalar_type() == at::kFloat, "scales are fp32");
  TORCH_CHECK(gate.sizes() == up.sizes() && gate.sizes() == down.sizes() && gate.size(1) == m.hidden, "neuron-major weights are (F, D)");
  m.gate = gate, m.up = up, m.down = down, m.scale = scale, m.natural_scale = natural_scale;
  m.repair_order = repair_order.value_or(at::Tensor()), m.scores_activation = scores_activation;
}

// Microseconds by number of rows, 0 among them: in full and split (R), at each level (levels, R); empty: forget them.
void set_costs(const at::Tensor& full, const at::Tensor& level, const at::Tensor& split) {
  Costs& known = costs();
  known = {};
  if (!full.numel()) return;
  TORCH_CHECK(full.numel() > 1 && full.numel() == split.numel() && level.dim() == 2 && level.size(0) == kMaxLevels && level.size(1) == full.numel(),
              "costs are (R), (", kMaxLevels, ", R), (R)");
  const auto read = [](const at::Tensor& t) {
    const at::Tensor held = t.contiguous();
    return std::vector<float>(data<float>(held), data<float>(held) + held.numel());
  };
  known.full = read(full), known.split = read(split);
  for (int64_t v = 0; v < kMaxLevels; ++v) known.level.push_back(read(level[v]));
}

void set_strict(bool strict) { model().strict = strict; }

// A contiguous tensor on huge pages, for weights that are read in long runs.
at::Tensor empty_huge(at::IntArrayRef size, at::ScalarType dtype) {
  constexpr size_t kPage = 1 << 21;
  size_t bytes = c10::elementSize(dtype);
  for (const int64_t n : size) bytes *= n;
  bytes = (bytes + kPage - 1) / kPage * kPage;
  void* memory = std::aligned_alloc(kPage, bytes);
  TORCH_CHECK(memory != nullptr, "no memory for ", bytes, " bytes of neuron-major weights");
  madvise(memory, bytes, MADV_HUGEPAGE);
  return at::from_blob(memory, size, [](void* p) { std::free(p); }, at::TensorOptions().dtype(dtype));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(sedac, library) {
  library.def(
      "add_mlp(int index, Tensor gate_up, Tensor down, int hidden, Tensor kinds, Tensor parameters, int activation, int gate_up_form=0, "
      "int down_form=0) -> ()", add_mlp);
  library.def("set_neurons(int index, Tensor gate, Tensor up, Tensor down, Tensor scale, Tensor natural_scale, Tensor? repair_order, bool scores_activation) -> ()", set_neurons);
  library.def("set_costs(Tensor full, Tensor level, Tensor split) -> ()", set_costs);
  library.def("set_strict(bool strict) -> ()", set_strict);
  library.def("empty_huge(int[] size, ScalarType dtype) -> Tensor", empty_huge);
  library.def("skip_all(Tensor x, int index) -> Tensor?");
  library.def("gate_up(Tensor x, Tensor level, int index, int num_outputs, bool compact) -> Tensor");
  library.def("down(Tensor h, Tensor level, int index, int hidden) -> Tensor");
}
TORCH_LIBRARY_IMPL(sedac, CPU, library) {
  library.impl("skip_all", skip_all);
  library.impl("gate_up", gate_up);
  library.impl("down", down);
}

}  // namespace sedac
