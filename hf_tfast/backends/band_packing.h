/* Rows of a tensor in the order in which products read them. */

#include "band_vectors.h"

/* Strides of a tensor in numbers; the last axis is contiguous. */
typedef struct {
    void *at;
    long b, h, row;
} Rows;

INLINE long up(long n, long step) { return (n + step - 1) / step * step; }
INLINE long words(long d, int pairs) { return pairs ? (d + 1) / 2 : d; }
INLINE const char *row_at(const Rows *x, long b, long h, long row, int bf16) {
    return (const char *)x->at + (b * x->b + h * x->h + row * x->row) * (bf16 ? 2 : 4);
}

INLINE Word word(const char *row, long t, long d, int bf16, int pairs) {
    Word x = 0;
    if (pairs) memcpy(&x, row + 4 * t, 2 * t + 1 < d ? 4 : 2);
    else if (bf16) x = (Word)((const uint16_t *)row)[t] << 16;
    else memcpy(&x, row + 4 * t, 4);
    return x;
}

/* One row: [words]. */
INLINE void plain(const char *row, long d, int bf16, int pairs, Word *to) {
    if (pairs || !bf16) {
        to[words(d, pairs) - 1] = 0;
        memcpy(to, row, d * (bf16 ? 2 : 4));
        return;
    }
    for (long t = 0; t < d; t++) to[t] = (Word)((const uint16_t *)row)[t] << 16;
}

#if defined(__AVX512F__)
/* Words [t, t + LANES) of LANES rows, null for zeros, as columns: to[k LANES + r] = row r's word t + k. */
INLINE void flipped(const char *const *rows, long t, Word *to) {
    __m512i x[LANES], at = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
#pragma GCC unroll 16
    for (int r = 0; r < LANES; r++)
        x[r] = rows[r] ? _mm512_loadu_si512(rows[r] + 4 * t) : _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int s = 1; s < LANES; s *= 2) { /* of rows s apart, blocks of s words change places */
        __m512i from = _mm512_set1_epi32(s), upper = _mm512_and_epi32(at, from), far = _mm512_set1_epi32(LANES);
        __mmask16 high = _mm512_cmpneq_epi32_mask(upper, _mm512_setzero_si512());
        __m512i low = _mm512_mask_add_epi32(at, high, _mm512_sub_epi32(at, from), far);
        __m512i top = _mm512_mask_add_epi32(_mm512_add_epi32(at, from), high, at, far);
#pragma GCC unroll 16
        for (int r = 0; r < LANES; r++) {
            if (r & s) continue;
            __m512i a = x[r], b = x[r + s];
            x[r] = _mm512_permutex2var_epi32(a, low, b);
            x[r + s] = _mm512_permutex2var_epi32(a, top, b);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < LANES; r++) _mm512_storeu_si512(to + r * LANES, x[r]);
}
#endif

/* LANES rows, null for zeros, as columns: [words, LANES]. */
INLINE void panel(const char *const *rows, long d, int bf16, int pairs, Word *to) {
    long terms = words(d, pairs), t = 0;
#if defined(__AVX512F__)
    if (pairs || !bf16)
        for (long whole = pairs ? d / 2 : d; t + LANES <= whole; t += LANES) flipped(rows, t, to + t * LANES);
#endif
    for (; t < terms; t++)
        for (int r = 0; r < LANES; r++) to[t * LANES + r] = rows[r] ? word(rows[r], t, d, bf16, pairs) : 0;
}

/* Rows as columns: [row / LANES, words, LANES]; zeros up to a whole panel. */
INLINE void turned(const Rows *x, long b, long h, long from, long n, long d, int bf16, int pairs, Word *to) {
    const char *rows[LANES];
    for (long r = 0; r < n; r += LANES, to += words(d, pairs) * LANES) {
        for (int k = 0; k < LANES; k++) rows[k] = r + k < n ? row_at(x, b, h, from + r + k, bf16) : 0;
        panel(rows, d, bf16, pairs, to);
    }
}

/* Rows as they are, or two and two side by side: [row or row / 2, wide]; zeros up to `wide`, and from n to `end`. */
INLINE void across(const Rows *x, long b, long h, long from, long n, long end, long d, long wide, int bf16, int pairs,
                   Word *to) {
    for (long r = 0; r < end; r += 1 + pairs, to += wide) {
        if (r >= n) {
            memset(to, 0, 4 * wide);
            continue;
        }
        const char *row = row_at(x, b, h, from + r, bf16);
        for (long t = d; t < wide; t++) to[t] = 0;
        if (!pairs) {
            plain(row, d, bf16, 0, to);
            continue;
        }
        const uint16_t *low = (const uint16_t *)row;
        const uint16_t *high = r + 1 < n ? (const uint16_t *)row_at(x, b, h, from + r + 1, bf16) : 0;
        if (high)
            for (long t = 0; t < d; t++) to[t] = low[t] | (Word)high[t] << 16;
        else
            for (long t = 0; t < d; t++) to[t] = low[t];
    }
}

/* A row of fp32 to the tensor. */
INLINE void put(const Rows *x, long b, long h, long row, const float *from, float factor, long d, int bf16) {
    char *to = (char *)row_at(x, b, h, row, bf16);
    if (bf16)
        for (long t = 0; t < d; t++) ((uint16_t *)to)[t] = narrowed(from[t] * factor);
    else
        for (long t = 0; t < d; t++) ((float *)to)[t] = from[t] * factor;
}
