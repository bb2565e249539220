// A draft pass as one operator: the target's own layers and the draft's head for one new token per sequence, on vLLM's own packed
// weights and KV cache. Between the matrix products and the attention, which are vLLM's operators, nothing returns to Python.
//
// What it writes into the KV cache is written again by verification before any layer reads it, so its rounding (the stream stays
// in fp32 here) changes no answer. N drafting sequences, D hidden size, H head size.
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <cmath>
#include <limits>

#include "products.h"
#include "state.h"

namespace sedac {

namespace {

struct DraftLayer {
  at::Tensor attention_norm, qkv_bias, q_norm, k_norm, cos_sin, key_cache, value_cache;  // no cache: no attention
  at::Tensor mlp_norm;                                                                   // no norm: no MLP
  Weights qkv, o, gate_up, down;
  int64_t num_heads = 0, num_kv_heads = 0, head_size = 0, num_neurons = 0, sliding_window = -1;
  int64_t gated = -1;  // number of the gated MLP (mlp.cpp), whose level counts; -1: none, in full
  double scale = 1.0, softcap = 0.0, eps = 1e-6;
  std::string isa;
};

std::vector<DraftLayer>& layers() {
  static std::vector<DraftLayer> all;
  return all;
}

at::Tensor multiply(const at::Tensor& x, const Weights& weights, const at::Tensor& bias, int64_t num_outputs) {
  return multiply(x, weights, bias.defined() ? std::optional<at::Tensor>(bias) : std::nullopt, num_outputs);
}

// (N, D) fp32 to its RMS norm times `weight`, in the model's dtype.
template <typename W>
at::Tensor normalize(const std::vector<float>& x, const at::Tensor& weight, double eps, int64_t num_rows) {
  const int64_t size = weight.numel();
  at::Tensor out = at::empty({num_rows, size}, weight.options());
  const W* scales = static_cast<const W*>(weight.const_data_ptr());
  W* to = static_cast<W*>(out.mutable_data_ptr());
  for (int64_t r = 0; r < num_rows; ++r) {
    const float* row = x.data() + r * size;
    float sum = 0;
    for (int64_t i = 0; i < size; ++i) sum += row[i] * row[i];
    const float factor = 1.0f / std::sqrt(sum / size + static_cast<float>(eps));
    for (int64_t i = 0; i < size; ++i) to[r * size + i] = static_cast<W>(row[i] * factor * static_cast<float>(scales[i]));
  }
  return out;
}

template <typename W>
void add_to(std::vector<float>& x, const at::Tensor& more) {
  const W* from = static_cast<const W*>(more.const_data_ptr());
  for (size_t i = 0; i < x.size(); ++i) x[i] += static_cast<float>(from[i]);
}

// Rotate the heads of one row (heads * H) where they stand, after their norm where there is one.
template <typename W>
void rotate(const W* from, W* to, int64_t num_heads, int64_t size, const float* cos_sin, int64_t rotary, const at::Tensor& norm, double eps) {
  const int64_t half = rotary / 2;
  std::vector<float> head(size);
  for (int64_t h = 0; h < num_heads; ++h, from += size, to += size) {
    float sum = 0;
    for (int64_t i = 0; i < size; ++i) head[i] = static_cast<float>(from[i]), sum += head[i] * head[i];
    if (norm.defined()) {
      const float factor = 1.0f / std::sqrt(sum / size + static_cast<float>(eps));
      const W* scales = static_cast<const W*>(norm.const_data_ptr());
      for (int64_t i = 0; i < size; ++i) head[i] *= factor * static_cast<float>(scales[i]);
    }
    for (int64_t i = 0; i < half; ++i) {
      const float first = head[i], second = head[i + half], cosine = cos_sin[i], sine = cos_sin[half + i];
      to[i] = static_cast<W>(first * cosine - second * sine);
      to[i + half] = static_cast<W>(second * cosine + first * sine);
    }
    for (int64_t i = rotary; i < size; ++i) to[i] = static_cast<W>(head[i]);
  }
}

struct Step {
  const at::Tensor &positions, &slots, &table, &seq_lens, &starts, &scheduling;
};

template <typename W>
at::Tensor attend(const DraftLayer& layer, const at::Tensor& normed, const Step& step) {
  static const auto cache = c10::Dispatcher::singleton().findSchemaOrThrow("_C::cpu_attn_reshape_and_cache", "");
  static const auto attention = c10::Dispatcher::singleton().findSchemaOrThrow("_C::cpu_attention_with_kv_cache", "");
  const int64_t num = normed.size(0), size = layer.head_size, heads = layer.num_heads, kv_heads = layer.num_kv_heads;
  const int64_t width = (heads + 2 * kv_heads) * size, rotary = layer.cos_sin.size(1);
  const at::Tensor qkv = multiply(normed, layer.qkv, layer.qkv_bias, width);
  at::Tensor q = at::empty({num, heads, size}, qkv.options()), k = at::empty({num, kv_heads, size}, qkv.options());
  const at::Tensor v = qkv.narrow(1, (heads + kv_heads) * size, kv_heads * size).contiguous().view({num, kv_heads, size});
  const W* from = static_cast<const W*>(qkv.const_data_ptr());
  const int64_t* positions = step.positions.const_data_ptr<int64_t>();
  for (int64_t r = 0; r < num; ++r) {
    const float* cos_sin = layer.cos_sin.const_data_ptr<float>() + positions[r] * rotary;
    rotate(from + r * width, static_cast<W*>(q.mutable_data_ptr()) + r * heads * size, heads, size, cos_sin, rotary, layer.q_norm, layer.eps);
    rotate(from + r * width + heads * size, static_cast<W*>(k.mutable_data_ptr()) + r * kv_heads * size, kv_heads, size, cos_sin, rotary,
           layer.k_norm, layer.eps);
  }
  torch::jit::Stack stack{k, v, layer.key_cache, layer.value_cache, step.slots, layer.isa, 1.0, 1.0, std::string("auto")};
  cache.callBoxed(&stack);
  at::Tensor out = at::empty({num, heads, size}, qkv.options());
  stack = {q, layer.key_cache, layer.value_cache, out, step.starts, step.seq_lens, layer.scale, true, c10::IValue(), layer.sliding_window,
           step.table, layer.softcap, step.scheduling, c10::IValue(), c10::IValue(), 1.0, 1.0, std::string("auto")};
  attention.callBoxed(&stack);
  return multiply(out.view({num, heads * size}), layer.o, at::Tensor(), normed.size(1));
}

// The gated MLP's two products (mlp.cpp).
at::Tensor gate_up(const at::Tensor& x, int64_t index, int64_t num_outputs) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("sedac::gate_up", "")
                             .typed<at::Tensor(const at::Tensor&, const at::Tensor&, int64_t, int64_t, bool)>();
  return op.call(x, model().b.level, index, num_outputs, false);
}

at::Tensor down(const at::Tensor& h, int64_t index, int64_t hidden) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("sedac::down", "")
                             .typed<at::Tensor(const at::Tensor&, const at::Tensor&, int64_t, int64_t)>();
  return op.call(h, model().b.level, index, hidden);
}

template <typename W>
at::Tensor compute_mlp(const DraftLayer& layer, const at::Tensor& normed) {
  const int64_t num = normed.size(0), neurons = layer.num_neurons, hidden = normed.size(1);
  const at::Tensor both = layer.gated < 0 ? multiply(normed, layer.gate_up, at::Tensor(), 2 * neurons) : gate_up(normed, layer.gated, 2 * neurons);
  at::Tensor h = at::empty({num, neurons}, both.options());
  const W* from = static_cast<const W*>(both.const_data_ptr());
  W* to = static_cast<W*>(h.mutable_data_ptr());
  for (int64_t r = 0; r < num; ++r) {
    const W *gate = from + r * 2 * neurons, *up = gate + neurons;
    for (int64_t i = 0; i < neurons; ++i) {
      const float g = static_cast<float>(gate[i]);
      to[r * neurons + i] = static_cast<W>(static_cast<float>(static_cast<W>(g / (1.0f + std::exp(-g)))) * static_cast<float>(up[i]));
    }
  }
  return layer.gated < 0 ? multiply(h, layer.down, at::Tensor(), hidden) : down(h, layer.gated, hidden);
}

template <typename W>
at::Tensor run(const at::Tensor& ids, const Step& step, const at::Tensor& embedding, const at::Tensor& norm, double eps, const Weights& head) {
  const int64_t num = ids.size(0), hidden = embedding.size(1);
  const int32_t* tokens = ids.const_data_ptr<int32_t>();
  const W* rows = static_cast<const W*>(embedding.const_data_ptr());
  std::vector<float> x(num * hidden);
  for (int64_t r = 0; r < num; ++r) {
    for (int64_t i = 0; i < hidden; ++i) x[r * hidden + i] = static_cast<float>(rows[tokens[r] * hidden + i]);
  }
  for (const DraftLayer& layer : layers()) {
    if (layer.key_cache.defined()) add_to<W>(x, attend<W>(layer, normalize<W>(x, layer.attention_norm, layer.eps, num), step));
    if (layer.mlp_norm.defined()) add_to<W>(x, compute_mlp<W>(layer, normalize<W>(x, layer.mlp_norm, layer.eps, num)));
  }
  const at::Tensor normed = normalize<W>(x, norm, eps, num);
  return head.tensor.numel() ? multiply(normed, head, at::Tensor(), embedding.size(0)) : normed;
}

// Write the keys and values that a layer makes of streams (T, D) that the target computed.
template <typename W>
void fill(const at::Tensor& stream, const at::Tensor& positions, const at::Tensor& slots, const DraftLayer& layer) {
  static const auto cache = c10::Dispatcher::singleton().findSchemaOrThrow("_C::cpu_attn_reshape_and_cache", "");
  const int64_t num = stream.size(0), size = layer.head_size, kv_heads = layer.num_kv_heads, rotary = layer.cos_sin.size(1);
  const int64_t width = (layer.num_heads + 2 * kv_heads) * size, start = layer.num_heads * size;
  std::vector<float> x(stream.numel());
  const W* rows = static_cast<const W*>(stream.const_data_ptr());
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(rows[i]);
  const at::Tensor qkv = multiply(normalize<W>(x, layer.attention_norm, layer.eps, num), layer.qkv, layer.qkv_bias, width);
  at::Tensor k = at::empty({num, kv_heads, size}, qkv.options());
  const at::Tensor v = qkv.narrow(1, start + kv_heads * size, kv_heads * size).contiguous().view({num, kv_heads, size});
  const W* from = static_cast<const W*>(qkv.const_data_ptr());
  const int64_t* at_T = positions.const_data_ptr<int64_t>();
  for (int64_t r = 0; r < num; ++r) {
    rotate(from + r * width + start, static_cast<W*>(k.mutable_data_ptr()) + r * kv_heads * size, kv_heads, size,
           layer.cos_sin.const_data_ptr<float>() + at_T[r] * rotary, rotary, layer.k_norm, layer.eps);
  }
  torch::jit::Stack stack{k, v, layer.key_cache, layer.value_cache, slots, layer.isa, 1.0, 1.0, std::string("auto")};
  cache.callBoxed(&stack);
}

// Of the last layer, the draft's head; `stream` is contiguous.
void draft_fill(const at::Tensor& stream, const at::Tensor& positions, const at::Tensor& slots) {
  const DraftLayer& layer = layers().back();
  stream.scalar_type() == at::kBFloat16 ? fill<c10::BFloat16>(stream, positions, slots, layer) : fill<float>(stream, positions, slots, layer);
}

// `head`: weights of an lm_head with as many outputs as `embedding` has rows, and the result are logits (N, V); empty: normed states (N, D).
at::Tensor draft_pass(const at::Tensor& ids, const at::Tensor& positions, const at::Tensor& slots, const at::Tensor& table, const at::Tensor& seq_lens,
                      const at::Tensor& starts, const at::Tensor& scheduling, const at::Tensor& embedding, const at::Tensor& norm, double eps,
                      const at::Tensor& head, int64_t head_form) {
  const Step step{positions, slots, table, seq_lens, starts, scheduling};
  return embedding.scalar_type() == at::kBFloat16 ? run<c10::BFloat16>(ids, step, embedding, norm, eps, {head, head_form})
                                                  : run<float>(ids, step, embedding, norm, eps, {head, head_form});
}

void draft_clear() { layers().clear(); }

// `parts`: norm of the attention, qkv weights and bias, norms of q and k, cosines and sines, output weights, key and value cache; norm of the MLP,
// its two weights; empty ones for none. `sizes`: those of DraftLayer, then the forms of the four weights.
void draft_add(at::TensorList parts, at::IntArrayRef sizes, at::ArrayRef<double> numbers, std::string isa) {
  const auto take = [&](size_t i) { return parts[i].numel() ? parts[i] : at::Tensor(); };
  DraftLayer layer;
  layer.attention_norm = take(0), layer.qkv = {take(1), sizes[6]}, layer.qkv_bias = take(2), layer.q_norm = take(3), layer.k_norm = take(4);
  layer.cos_sin = take(5), layer.o = {take(6), sizes[7]}, layer.key_cache = take(7), layer.value_cache = take(8);
  layer.mlp_norm = take(9), layer.gate_up = {take(10), sizes[8]}, layer.down = {take(11), sizes[9]};
  layer.num_heads = sizes[0], layer.num_kv_heads = sizes[1], layer.head_size = sizes[2], layer.num_neurons = sizes[3];
  layer.sliding_window = sizes[4], layer.gated = sizes[5];
  layer.scale = numbers[0], layer.softcap = numbers[1], layer.eps = numbers[2];
  layer.isa = std::move(isa);
  layers().push_back(std::move(layer));
}

// The most likely token of each row of logits (N, V), and its probability.
template <typename W>
void pick(const at::Tensor& logits, int64_t* tokens, float* confidences) {
  const int64_t num = logits.size(0), size = logits.size(1);
  const W* from = static_cast<const W*>(logits.const_data_ptr());
  for (int64_t r = 0; r < num; ++r) {
    const W* row = from + r * size;
    float best = -std::numeric_limits<float>::infinity(), sum = 0;
    int64_t token = 0;
    for (int64_t i = 0; i < size; ++i) {
      const float value = static_cast<float>(row[i]);
      if (value > best) best = value, token = i;
    }
    for (int64_t i = 0; i < size; ++i) {
      const float below = static_cast<float>(row[i]) - best;
      if (below > -20.0f) sum += std::exp(below);
    }
    tokens[r] = token, confidences[r] = 1.0f / sum;
  }
}

std::tuple<at::Tensor, at::Tensor> draft_pick(const at::Tensor& logits) {
  const at::Tensor held = logits.contiguous();
  at::Tensor tokens = at::empty({logits.size(0)}, at::kLong), confidences = at::empty({logits.size(0)}, at::kFloat);
  if (held.scalar_type() == at::kBFloat16) {
    pick<c10::BFloat16>(held, tokens.mutable_data_ptr<int64_t>(), confidences.mutable_data_ptr<float>());
  } else {
    pick<float>(held, tokens.mutable_data_ptr<int64_t>(), confidences.mutable_data_ptr<float>());
  }
  return {tokens, confidences};
}

TORCH_LIBRARY_FRAGMENT(sedac, library) {
  library.def("draft_clear() -> ()");
  library.def("draft_add(Tensor[] parts, int[] sizes, float[] numbers, str isa) -> ()");
  library.def(
      "draft_pass(Tensor ids, Tensor positions, Tensor slots, Tensor table, Tensor seq_lens, Tensor starts, Tensor scheduling, Tensor embedding, "
      "Tensor norm, float eps, Tensor head, int head_form) -> Tensor");
  library.def("draft_fill(Tensor stream, Tensor positions, Tensor slots) -> ()");
  library.def("draft_pick(Tensor logits) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(sedac, CompositeExplicitAutograd, library) {
  library.impl("draft_clear", draft_clear);
  library.impl("draft_add", draft_add);
  library.impl("draft_pass", draft_pass);
  library.impl("draft_fill", draft_fill);
  library.impl("draft_pick", draft_pick);
}

}  // namespace
}  // namespace sedac
