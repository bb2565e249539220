// Inner loops over one row of weights, in fp32: a dot product and a weighted sum.
//
// One row at a time, start to end: a core reads memory about twice as fast in one sequential stream as in four.
// Compiled once per instruction set and chosen when the library is loaded, so one build runs on every x86-64.
#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
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

template <typename W>
SEDAC_INLINE float dot_inline(const W* w, const float* x, int64_t n) {
  f32x16 s0{}, s1{}, s2{}, s3{}, a, b, c, d;
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    load16(w + i, a), load16(w + i + 16, b), load16(w + i + 32, c), load16(w + i + 48, d);
    s0 += a * *reinterpret_cast<const f32x16*>(x + i);
    s1 += b * *reinterpret_cast<const f32x16*>(x + i + 16);
    s2 += c * *reinterpret_cast<const f32x16*>(x + i + 32);
    s3 += d * *reinterpret_cast<const f32x16*>(x + i + 48);
  }
  const f32x16 s = (s0 + s1) + (s2 + s3);
  float sum = 0;
  for (int lane = 0; lane < 16; ++lane) sum += s[lane];
  for (; i < n; ++i) sum += widen(w[i]) * x[i];
  return sum;
}

template <typename W>
SEDAC_INLINE void add_scaled_inline(const W* w, float h, float* y, int64_t n) {
  f32x16 a, b;
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    load16(w + i, a), load16(w + i + 16, b);
    *reinterpret_cast<f32x16*>(y + i) += a * h;
    *reinterpret_cast<f32x16*>(y + i + 16) += b * h;
  }
  for (; i < n; ++i) y[i] += widen(w[i]) * h;
}

// The dot product of a row of n weights with x.
SEDAC_CLONES float dot(const float* w, const float* x, int64_t n) { return dot_inline(w, x, n); }
SEDAC_CLONES float dot(const bf16* w, const float* x, int64_t n) { return dot_inline(w, x, n); }
// y += h * w over n elements.
SEDAC_CLONES void add_scaled(const float* w, float h, float* y, int64_t n) { add_scaled_inline(w, h, y, n); }
SEDAC_CLONES void add_scaled(const bf16* w, float h, float* y, int64_t n) { add_scaled_inline(w, h, y, n); }

// Ask for a row that will be read soon; the hardware's own prefetching does not find scattered rows.
template <typename W>
inline void prefetch(const W* row, int64_t n) {
  const char* bytes = reinterpret_cast<const char*>(row);
  for (int64_t i = 0; i < n * static_cast<int64_t>(sizeof(W)); i += 64) __builtin_prefetch(bytes + i, 0, 2);
}

}  // namespace sedac
