// Inner loops over rows of weights: dot products with rows of x, and weighted sums of weights; accumulated in fp32.
//
// `next` is the row of weights that will be read after this one, or nullptr. It is asked for line by line while this row is
// computed: the hardware's own prefetching does not find scattered rows and stops at the end of a page, and a burst of requests
// would keep the loads of this row waiting.
//
// For a single row of x, one row of weights at a time, start to end: a core reads memory about twice as fast in one sequential
// stream as in four. For several rows of x arithmetic costs more than reading, so sums take four rows of weights at once.
// Compiled once per instruction set and chosen when the library is loaded, so one build runs on every x86-64.
#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SEDAC_X86 1
#include <immintrin.h>
#define SEDAC_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SEDAC_CLONES
#endif
#define SEDAC_INLINE inline __attribute__((always_inline))

namespace sedac {

using bf16 = uint16_t;
typedef float f32x16 __attribute__((vector_size(64), aligned(4)));
typedef uint32_t u32x16 __attribute__((vector_size(64), aligned(4)));
typedef uint16_t u16x16 __attribute__((vector_size(32), aligned(2)));

SEDAC_INLINE float widen(float value) { return value; }
SEDAC_INLINE float widen(bf16 value) { return __builtin_bit_cast(float, static_cast<uint32_t>(value) << 16); }
SEDAC_INLINE void load16(const float* from, f32x16& to) { to = *reinterpret_cast<const f32x16*>(from); }
SEDAC_INLINE void load16(const bf16* from, f32x16& to) {
  to = reinterpret_cast<f32x16>(__builtin_convertvector(*reinterpret_cast<const u16x16*>(from), u32x16) << 16);
}

// Ask for the lines that hold N elements from here on.
template <int N, typename W>
SEDAC_INLINE void ask_for(const W* from) {
  for (int i = 0; i < N; i += 64 / sizeof(W)) __builtin_prefetch(from + i, 0, 3);
}

// Dot products of one row of weights with R rows of x. Every row is summed in the same order whatever R is, so a token's
// result does not depend on how many share its step.
template <int R, bool Ahead, typename W, typename X>
SEDAC_INLINE void dot_block(const W* w, const X* x, int64_t stride, int64_t n, float* out, const W* next) {
  f32x16 even[R]{}, odd[R]{}, a, b, v;
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    if (Ahead) ask_for<32>(next + i);
    load16(w + i, a), load16(w + i + 16, b);
    for (int r = 0; r < R; ++r) {
      load16(x + r * stride + i, v), even[r] += a * v;
      load16(x + r * stride + i + 16, v), odd[r] += b * v;
    }
  }
  for (int r = 0; r < R; ++r) {
    const f32x16 both = even[r] + odd[r];
    float sum = 0;
    for (int lane = 0; lane < 16; ++lane) sum += both[lane];
    for (int64_t j = i; j < n; ++j) sum += widen(w[j]) * widen(x[r * stride + j]);
    out[r] = sum;
  }
}

template <typename W, typename X>
SEDAC_INLINE void dot_rows_inline(const W* w, const X* x, int64_t stride, int64_t num_rows, int64_t n, float* out, const W* next) {
  int64_t r = 0;
  if (next && num_rows == 1) dot_block<1, true>(w, x, stride, n, out, next), r = 1;
  if (next && num_rows > 1) dot_block<2, true>(w, x, stride, n, out, next), r = 2;
  for (; r + 4 <= num_rows; r += 4) dot_block<4, false>(w, x + r * stride, stride, n, out + r, w);
  for (; r + 2 <= num_rows; r += 2) dot_block<2, false>(w, x + r * stride, stride, n, out + r, w);
  for (; r < num_rows; ++r) dot_block<1, false>(w, x + r * stride, stride, n, out + r, w);
}

// y[r] += sum over the N rows of weights of h[r * N + k] * w[k], for R rows of y; added in the order of k.
template <int N, typename W>
SEDAC_INLINE void add_scaled_block(const W* const* w, const float* h, float* y, int64_t num_rows, int64_t n) {
  f32x16 values[N];
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    for (int k = 0; k < N; ++k) load16(w[k] + i, values[k]);
    for (int64_t r = 0; r < num_rows; ++r) {
      f32x16 sum = *reinterpret_cast<const f32x16*>(y + r * n + i);
      for (int k = 0; k < N; ++k) sum += values[k] * h[r * N + k];
      *reinterpret_cast<f32x16*>(y + r * n + i) = sum;
    }
  }
  for (; i < n; ++i) {
    for (int64_t r = 0; r < num_rows; ++r) {
      for (int k = 0; k < N; ++k) y[r * n + i] += widen(w[k][i]) * h[r * N + k];
    }
  }
}

SEDAC_CLONES void dot_rows(const float* w, const float* x, int64_t stride, int64_t num_rows, int64_t n, float* out, const float* next = nullptr) {
  dot_rows_inline(w, x, stride, num_rows, n, out, next);
}
SEDAC_CLONES void dot_rows_widened(const bf16* w, const bf16* x, int64_t stride, int64_t num_rows, int64_t n, float* out, const bf16* next) {
  dot_rows_inline(w, x, stride, num_rows, n, out, next);
}
SEDAC_CLONES void add_scaled(const float* const* w, const float* h, float* y, int64_t num_rows, int64_t n) {
  add_scaled_block<4>(w, h, y, num_rows, n);
}
SEDAC_CLONES void add_scaled(const bf16* const* w, const float* h, float* y, int64_t num_rows, int64_t n) {
  add_scaled_block<4>(w, h, y, num_rows, n);
}
template <typename W>
SEDAC_INLINE void add_scaled_one_inline(const W* w, float h, float* y, int64_t n, const W* next) {
  int64_t i = 0;
  f32x16 value;
  for (; next && i + 32 <= n; i += 32) {
    ask_for<32>(next + i);
    for (int64_t j = i; j < i + 32; j += 16) load16(w + j, value), *reinterpret_cast<f32x16*>(y + j) += value * h;
  }
  for (; i + 16 <= n; i += 16) load16(w + i, value), *reinterpret_cast<f32x16*>(y + i) += value * h;
  for (; i < n; ++i) y[i] += widen(w[i]) * h;
}
SEDAC_CLONES void add_scaled_one(const float* w, float h, float* y, int64_t n, const float* next) { add_scaled_one_inline(w, h, y, n, next); }
SEDAC_CLONES void add_scaled_one(const bf16* w, float h, float* y, int64_t n, const bf16* next) { add_scaled_one_inline(w, h, y, n, next); }

// to = row where abs(value) * scale >= limit * abs(unit), else 0, over n elements; no `unit`: 1.
template <typename W>
SEDAC_INLINE void mask_row_inline(const W* row, const W* value, const W* unit, const float* scale, float limit, W* to, int64_t n) {
  if (unit) {
    for (int64_t i = 0; i < n; ++i) to[i] = __builtin_fabsf(widen(value[i])) * scale[i] >= limit * __builtin_fabsf(widen(unit[i])) ? row[i] : W(0);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = __builtin_fabsf(widen(value[i])) * scale[i] >= limit ? row[i] : W(0);
  }
}
SEDAC_CLONES void mask_row(const float* row, const float* value, const float* unit, const float* scale, float limit, float* to, int64_t n) {
  mask_row_inline(row, value, unit, scale, limit, to, n);
}
SEDAC_CLONES void mask_row(const bf16* row, const bf16* value, const bf16* unit, const float* scale, float limit, bf16* to, int64_t n) {
  mask_row_inline(row, value, unit, scale, limit, to, n);
}

#ifdef SEDAC_X86
#define SEDAC_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
template <int R, bool Ahead>
SEDAC_BF16 inline void dot_block_bf16(const bf16* w, const bf16* x, int64_t stride, int64_t n, float* out, const bf16* next) {
  __m512 even[R], odd[R];
  for (int r = 0; r < R; ++r) even[r] = odd[r] = _mm512_setzero_ps();
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    if (Ahead) _mm_prefetch(next + i, _MM_HINT_T0), _mm_prefetch(next + i + 32, _MM_HINT_T0);
    const __m512bh a = (__m512bh)_mm512_loadu_si512(w + i), b = (__m512bh)_mm512_loadu_si512(w + i + 32);
    for (int r = 0; r < R; ++r) {
      even[r] = _mm512_dpbf16_ps(even[r], a, (__m512bh)_mm512_loadu_si512(x + r * stride + i));
      odd[r] = _mm512_dpbf16_ps(odd[r], b, (__m512bh)_mm512_loadu_si512(x + r * stride + i + 32));
    }
  }
  for (int r = 0; r < R; ++r) {
    float sum = _mm512_reduce_add_ps(_mm512_add_ps(even[r], odd[r]));
    for (int64_t j = i; j < n; ++j) sum += widen(w[j]) * widen(x[r * stride + j]);
    out[r] = sum;
  }
}

SEDAC_BF16 inline void dot_rows_bf16(const bf16* w, const bf16* x, int64_t stride, int64_t num_rows, int64_t n, float* out, const bf16* next) {
  int64_t r = 0;
  if (next && num_rows == 1) dot_block_bf16<1, true>(w, x, stride, n, out, next), r = 1;
  if (next && num_rows > 1) dot_block_bf16<2, true>(w, x, stride, n, out, next), r = 2;
  for (; r + 4 <= num_rows; r += 4) dot_block_bf16<4, false>(w, x + r * stride, stride, n, out + r, w);
  for (; r + 2 <= num_rows; r += 2) dot_block_bf16<2, false>(w, x + r * stride, stride, n, out + r, w);
  for (; r < num_rows; ++r) dot_block_bf16<1, false>(w, x + r * stride, stride, n, out + r, w);
}

// The processor multiplies pairs of bf16 by itself where it can.
inline void dot_rows(const bf16* w, const bf16* x, int64_t stride, int64_t num_rows, int64_t n, float* out, const bf16* next = nullptr) {
  static const bool has_bf16 = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vl");
  (has_bf16 ? dot_rows_bf16 : dot_rows_widened)(w, x, stride, num_rows, n, out, next);
}
#else
inline void dot_rows(const bf16* w, const bf16* x, int64_t stride, int64_t num_rows, int64_t n, float* out, const bf16* next = nullptr) {
  dot_rows_widened(w, x, stride, num_rows, n, out, next);
}
#endif

}  // namespace sedac
