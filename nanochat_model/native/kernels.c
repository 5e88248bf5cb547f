/* CPU kernels: the element-wise parts of the model, each fused into one pass; on CPUs that multiply bfloat16 pairs (AVX512-BF16) the
   products as well, which elsewhere stay with PyTorch.

   Plain C with OpenMP, compiled once for this machine by native/build.py and called through ctypes. The same functions exist
   for float32 and bfloat16 (kernels.inc is included twice); arithmetic is float32 throughout. Reductions over all rows are
   made of fixed pieces in a fixed order, so results do not depend on the number of threads. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

typedef int64_t i64;

/* 2^f on [-1/2, 1/2] by its Chebyshev interpolant of degree 6 (relative error 2.5e-9), times 2^n through the exponent bits.
   NaN passes through. */
static inline float fast_exp(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float z = x * 1.44269504088896341f;
    float n = rintf(z);
    float f = z - n;
    float p = 1.54614447e-4f;
    p = p * f + 1.34004282e-3f;
    p = p * f + 9.61805668e-3f;
    p = p * f + 5.55032723e-2f;
    p = p * f + 2.40226509e-1f;
    p = p * f + 6.93147207e-1f;
    p = p * f + 1.0f;
    int32_t bits;
    memcpy(&bits, &p, 4);
    bits += ((int32_t)n) << 23;
    memcpy(&p, &bits, 4);
    return p;
}

static inline float bf16_to_float(uint16_t v) {
    uint32_t bits = (uint32_t)v << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}

static inline uint16_t float_to_bf16(float v) { /* to nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &v, 4);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

#define REAL float
#define LOAD(v) (v)
#define STORE(v) (v)
#define NAME(n) n##_f32
#include "kernels.inc"
#undef REAL
#undef LOAD
#undef STORE
#undef NAME

#define REAL uint16_t
#define LOAD(v) bf16_to_float(v)
#define STORE(v) float_to_bf16(v)
#define NAME(n) n##_bf16
#include "kernels.inc"
#include "embed.inc"
#include "gates.inc"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include "vectors.inc"
#include "rotary.inc"
#include "attention.inc"
#include "products.inc"
#include "cross_entropy.inc"
#include "muon.inc"
#include "norms.inc"
#endif
