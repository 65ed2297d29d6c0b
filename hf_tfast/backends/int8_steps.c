/* The passes around an integer product, each once over memory; called from int8.py, compiled on first use.

   Rows are independent, threads take whole rows. A largest absolute value is found on the bits of the floats, where NaN
   is above everything: what is not finite makes a scale that is not, and so outputs that are not. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#include <omp.h>

enum { NONE = -1, GELU, GELU_TANH, QUICK_GELU, RELU, SILU };

#define INLINE static inline __attribute__((always_inline))

INLINE int32_t magnitude(float x) {
    int32_t bits;
    memcpy(&bits, &x, 4);
    return bits & 0x7fffffff;
}

INLINE float number(int32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

/* Within 3e-7: Abramowitz and Stegun, "Handbook", 7.1.28. */
INLINE float error_function(float x) {
    float z = fabsf(x), p = 0.0000430638f;
    p = p * z + 0.0002765672f;
    p = p * z + 0.0001520143f;
    p = p * z + 0.0092705272f;
    p = p * z + 0.0422820123f;
    p = p * z + 0.0705230784f;
    p = p * z + 1;
    p *= p;
    p *= p;
    p *= p;
    p *= p;
    return copysignf(1 - 1 / p, x);
}

/* Within 2e-7 of it, relative: e^r by its series on |r| <= log(2) / 2, times a power of two. */
INLINE float exponential(float x) {
    x = x < -87 ? -87 : x;
    x = x > 87 ? 87 : x;
    float n = rintf(x * 1.44269504f), r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1 / 720.0f;
    p = p * r + 1 / 120.0f;
    p = p * r + 1 / 24.0f;
    p = p * r + 1 / 6.0f;
    p = p * r + 0.5f;
    p = p * r + 1;
    p = p * r + 1;
    return p * number(((int32_t)n + 127) << 23);
}

INLINE float swish(float y, float z) { return y / (1 + exponential(-z)); }

INLINE float activated(float y, int kind) {
    if (kind == GELU) return 0.5f * y * (1 + error_function(y * 0.707106781f));
    if (kind == GELU_TANH) return swish(y, y * (1.59576912f + 0.0713548163f * y * y));
    if (kind == QUICK_GELU) return swish(y, 1.702f * y);
    if (kind == RELU) return y < 0 ? 0 : y;
    return swish(y, y);
}

INLINE void rounded(const float *x, float factor, long k, int8_t *codes) {
    for (long i = 0; i < k; i++) codes[i] = (int8_t)(int32_t)rintf(x[i] * factor);
}

INLINE void quantised(const float *x, int32_t most, long k, int8_t *codes, float *scale) {
    *scale = number(most);
    rounded(x, 127 / (*scale < 1e-30f ? 1e-30f : *scale), k, codes);
}

/* x [n k] -> codes [n k], scale [n]: x ~ codes * scale / 127. A step above 0: codes = x / step, and no scale. */
void tfast_quantise(const float *x, long n, long k, int8_t *codes, float *scale, float step, int threads) {
#pragma omp parallel for num_threads(threads) if (n > 1)
    for (long r = 0; r < n; r++) {
        const float *row = x + r * k;
        if (step > 0) {
            rounded(row, 1 / step, k, codes + r * k);
            continue;
        }
        int32_t most = 0;
        for (long i = 0; i < k; i++) {
            int32_t bits = magnitude(row[i]);
            most = bits > most ? bits : most;
        }
        quantised(row, most, k, codes + r * k, scale + r);
    }
}

/* Outputs of a layer before scaling: sums, rows `stride` apart; the weight's scale and bias; `more` to add, or null. */
typedef struct {
    const int32_t *sums;
    const float *scale, *bias, *more;
    long stride;
} Layer;

/* One row of `out`, and the bits of its largest absolute value. What the loop does is known when it is compiled. */
INLINE int32_t outputs(const Layer *a, const Layer *b, float s, long r, long k, float *out, int kind, int gated,
                       int added) {
    const int32_t *x = a->sums + r * a->stride, *z = gated ? b->sums + r * b->stride : 0;
    const float *w = a->scale, *bias = a->bias, *more = added ? a->more + r * a->stride : 0;
    const float *v = gated ? b->scale : 0, *also = gated ? b->bias : 0;
    const float *rest = gated && added ? b->more + r * b->stride : 0;
    int32_t most = 0;
    for (long i = 0; i < k; i++) {
        float y = x[i] * (s * w[i]) + bias[i] + (added ? more[i] : 0);
        if (kind >= 0) y = activated(y, kind);
        if (gated) y *= z[i] * (s * v[i]) + also[i] + (added ? rest[i] : 0);
        out[i] = y;
        int32_t bits = magnitude(y);
        most = bits > most ? bits : most;
    }
    return most;
}

INLINE int32_t of_kind(const Layer *a, const Layer *b, float s, long r, long k, float *out, int kind) {
    if (b) return a->more ? outputs(a, b, s, r, k, out, kind, 1, 1) : outputs(a, b, s, r, k, out, kind, 1, 0);
    return a->more ? outputs(a, b, s, r, k, out, kind, 0, 1) : outputs(a, b, s, r, k, out, kind, 0, 0);
}

static int32_t one_row(const Layer *a, const Layer *b, float s, long r, long k, float *out, int kind) {
    switch (kind) {
        case GELU: return of_kind(a, b, s, r, k, out, GELU);
        case GELU_TANH: return of_kind(a, b, s, r, k, out, GELU_TANH);
        case QUICK_GELU: return of_kind(a, b, s, r, k, out, QUICK_GELU);
        case RELU: return of_kind(a, b, s, r, k, out, RELU);
        case SILU: return of_kind(a, b, s, r, k, out, SILU);
    }
    return of_kind(a, 0, s, r, k, out, NONE);
}

/* h = act(a) or act(a) * b, [n k] of rows with scale [n] -> codes, and scale `to` [n].
   h: [n k] where `keep`, else room for one row a thread. */
void tfast_middle(const Layer *a, const Layer *b, const float *scale, long n, long k, int kind, float *h, int keep,
                  int8_t *codes, float *to, int threads) {
#pragma omp parallel for num_threads(threads) if (n > 1)
    for (long r = 0; r < n; r++) {
        float *row = h + (keep ? r : omp_get_thread_num()) * k;
        int32_t most = one_row(a, b, scale[r] * (1 / 16129.0f), r, k, row, kind);
        quantised(row, most, k, codes + r * k, to + r);
    }
}

/* y [n k] of sums of rows with scale [n]. */
void tfast_scale_back(const Layer *a, const float *scale, long n, long k, float *y, int threads) {
#pragma omp parallel for num_threads(threads) if (n > 1)
    for (long r = 0; r < n; r++) one_row(a, 0, scale[r] * (1 / 16129.0f), r, k, y + r * k, NONE);
}
