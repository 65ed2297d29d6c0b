/* Vectors of floats as wide as the processor has them, and the product that everything in band_steps.c,
   few_steps.c and run_steps.c is made of.

   A vector is GCC's (and Clang's) own type; intrinsics stand only where that has no word for what AVX-512 does. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <omp.h>

#if defined(__AVX512F__)
#include <immintrin.h>
enum { LANES = 16, WIDEST = 4 };
#elif defined(__AVX__)
enum { LANES = 8, WIDEST = 2 };
#else
enum { LANES = 4, WIDEST = 2 };
#endif
#if defined(__AVX512BF16__)
enum { PAIRS = 1 };
#else
enum { PAIRS = 0 };
#endif

#define INLINE static inline __attribute__((always_inline))
typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Whole __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t Word __attribute__((may_alias)); /* a float, or a pair of bf16 */

/* ---- vectors ---- */

INLINE Vector all(float x) { return x - (Vector){0}; }

INLINE Whole chosen(Whole where, Whole a, Whole b) { return (where & a) | (~where & b); }

/* Lanes of columns c.. that lie in [low, high). */
INLINE Whole inside(long c, long low, long high) {
    Whole at;
    for (int n = 0; n < LANES; n++) at[n] = (int32_t)c + n;
    return (at >= (int32_t)low) & (at < (int32_t)high);
}

INLINE Vector larger(Vector a, Vector b) {
#if defined(__AVX512F__)
    return (Vector)_mm512_max_ps((__m512)a, (__m512)b); /* b where one is not a number */
#else
    return (Vector)chosen((Whole)(a > b), (Whole)a, (Whole)b);
#endif
}

INLINE float largest(Vector x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)x);
#else
    float y = x[0];
    for (int n = 1; n < LANES; n++) y = x[n] > y ? x[n] : y;
    return y;
#endif
}

INLINE float total(Vector x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#else
    float y = 0;
    for (int n = 0; n < LANES; n++) y += x[n];
    return y;
#endif
}

/* 2^x for x <= 0, within 2e-7 of it, relative; what is below 2^-126 is 2^-126. */
INLINE Vector power(Vector x) {
    const Vector magic = all(12582912.0f);
    x = larger(all(-126), x);
    Vector z = x + magic, f = x - (z - magic);
    Vector p = all(1.5403530e-4f);
    p = p * f + all(1.3333558e-3f);
    p = p * f + all(9.6181291e-3f);
    p = p * f + all(5.5504109e-2f);
    p = p * f + all(2.4022651e-1f);
    p = p * f + all(6.9314718e-1f);
    p = p * f + all(1.0f);
    return p * (Vector)(((Whole)z << 23) + 0x3f800000);
}

/* ---- bf16 ---- */

INLINE float widened(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

INLINE uint16_t narrowed(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 64);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* Bits of bf16 in the lower half of each lane. */
INLINE Whole half(Vector x) {
#if defined(__AVX512BF16__)
    return (Whole)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
    Whole y;
    for (int n = 0; n < LANES; n++) y[n] = narrowed(x[n]);
    return y;
#endif
}

/* ---- the product: c[r][..] (+)= sum over t of a(r, t) * b(t, ..) ---- */

INLINE Vector times(Word a, Vector b, Vector sum, int pairs) {
#if defined(__AVX512BF16__)
    if (pairs) return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
#endif
    float x;
    memcpy(&x, &a, 4);
    return sum + all(x) * b;
}

/* a(r, t) = a[r ar + t at]; b(t, n) the vector at b[t bt + n bn]; c(r, n) the vector at c[r cr + n LANES]. */
typedef struct {
    const Word *a;
    long ar, at;
    const Word *b;
    long bt, bn, terms;
    float *c;
    long cr;
    int add;
} Product;

INLINE void tile(Product p, int rows, int wide, int pairs) {
    Vector sum[12][4];
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int n = 0; n < wide; n++) sum[r][n] = p.add ? *(Vector *)(p.c + r * p.cr + n * LANES) : all(0);
    for (long t = 0; t < p.terms; t++) {
        Vector b[4];
#pragma GCC unroll 4
        for (int n = 0; n < wide; n++) b[n] = *(const Vector *)(p.b + t * p.bt + n * p.bn);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int n = 0; n < wide; n++) sum[r][n] = times(p.a[r * p.ar + t * p.at], b[n], sum[r][n], pairs);
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int n = 0; n < wide; n++) *(Vector *)(p.c + r * p.cr + n * LANES) = sum[r][n];
}

INLINE void column(Product p, long rows, int high, int wide, int pairs) {
    while (rows > 0) {
        int now = rows >= high ? high : rows >= 4 ? 4 : 1;
        if (now == high) tile(p, high, wide, pairs);
        else if (now == 4) tile(p, 4, wide, pairs);
        else tile(p, 1, wide, pairs);
        p.a += now * p.ar;
        p.c += now * p.cr;
        rows -= now;
    }
}

/* `wide` counts vectors. A tile's sums and one row of b lie in registers. */
INLINE void columns(Product p, long rows, long wide, int pairs) {
    while (wide > 0) {
        int now = wide > WIDEST ? WIDEST : (int)wide;
        if (now == 4) column(p, rows, 6, 4, pairs);
        else if (now == 3) column(p, rows, 8, 3, pairs);
        else if (now == 2) column(p, rows, LANES == 16 ? 12 : 6, 2, pairs);
        else column(p, rows, 12, 1, pairs);
        p.b += now * p.bn;
        p.c += now * LANES;
        wide -= now;
    }
}

static void product_of_floats(Product p, long rows, long wide) { columns(p, rows, wide, 0); }
#if defined(__AVX512BF16__)
static void product_of_pairs(Product p, long rows, long wide) { columns(p, rows, wide, 1); }
#endif

INLINE void product(Product p, long rows, long wide, int pairs) {
#if defined(__AVX512BF16__)
    if (pairs) {
        product_of_pairs(p, rows, wide);
        return;
    }
#endif
    product_of_floats(p, rows, wide);
}
