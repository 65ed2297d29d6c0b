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

/* Rows as columns: [row / LANES, words, LANES]; zeros up to a whole panel. */
INLINE void turned(const Rows *x, long b, long h, long from, long n, long d, int bf16, int pairs, Word *to) {
    long terms = words(d, pairs);
    for (long r = 0; r < up(n, LANES); r++) {
        Word *panel = to + r / LANES * terms * LANES + r % LANES;
        if (r >= n) {
            for (long t = 0; t < terms; t++) panel[t * LANES] = 0;
            continue;
        }
        const char *row = row_at(x, b, h, from + r, bf16);
        for (long t = 0; t < terms; t++) panel[t * LANES] = word(row, t, d, bf16, pairs);
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
