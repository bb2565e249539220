// Matrix products on weights as vLLM keeps them on a CPU (dispatch_cpu_unquantized_gemm in model_executor/layers/utils.py, 0.32).
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <optional>

namespace sedac {

// The numbers are those of engine/vllm/parts.py (`WeightForm`).
enum WeightForm : int64_t {
  kHandler = 0,  // a handler of oneDNN
  kPacked = 1,   // the tiles that machines with AMX multiply weights of up to 1 MiB from; a bias is fp32 then
  kPlain = 2,    // (outputs, inputs), as torch has it
};

struct Weights {
  at::Tensor tensor;
  int64_t form = kHandler;
};

// (N, inputs) -> (N, outputs) by the very kernel that vLLM calls for these weights.
inline at::Tensor multiply(const at::Tensor& x, const Weights& weights, const std::optional<at::Tensor>& bias, int64_t num_outputs) {
  static const auto by_handler = c10::Dispatcher::singleton()
                                     .findSchemaOrThrow("_C::onednn_mm", "")
                                     .typed<void(at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, const at::Tensor&)>();
  if (weights.form == kPlain) return at::linear(x, weights.tensor, bias);
  at::Tensor out = at::empty({x.size(0), num_outputs}, x.options());
  if (weights.form == kHandler) {
    by_handler.call(out, x, bias, weights.tensor);
  } else {
    static const auto by_tiles =
        c10::Dispatcher::singleton()
            .findSchemaOrThrow("_C::weight_packed_linear", "")
            .typed<void(at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, bool)>();
    by_tiles.call(out, x, weights.tensor, bias, true);
  }
  return out;
}

}  // namespace sedac
