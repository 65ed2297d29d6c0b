/* One query per row over some keys of a cache, a step of decoding; called from one_query.py, compiled on first use.

   attend   softmax attention over runs of keys: the first ones, the neighbours, and runs that start at given slots
   blocks   which blocks of keys have the best bounds
   bucket   which keys have the query's bucket number
   corners  the bucket numbers of a few vectors

   A head is one thread's, so that numbers do not depend on how many there are. Sums are fp32. No key is touched but
   those that are read. */

#include "band_packing.h"

typedef uint16_t Halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
enum { LITTLE = 1 << 17, ROUNDS = 64, STRIDE = 64 }; /* numbers read by one thread alone; keys looked at at a time */

INLINE Vector loaded(const char *row, long t, int bf16) {
    if (!bf16) return *(const Vector *)(row + 4 * t);
    return (Vector)(__builtin_convertvector(*(const Halves *)(row + 2 * t), Whole) << 16);
}

INLINE float number(const char *row, long t, int bf16) {
    float x;
    if (bf16) return widened(((const uint16_t *)row)[t]);
    memcpy(&x, row + 4 * t, 4);
    return x;
}

INLINE float dot(const float *q, const char *row, long d, int bf16) {
    Vector one = all(0), two = all(0);
    long t = 0;
    for (; t + 2 * LANES <= d; t += 2 * LANES) {
        one += *(const Vector *)(q + t) * loaded(row, t, bf16);
        two += *(const Vector *)(q + t + LANES) * loaded(row, t + LANES, bf16);
    }
    if (t + LANES <= d) {
        one += *(const Vector *)(q + t) * loaded(row, t, bf16);
        t += LANES;
    }
    float sum = total(one + two);
    for (; t < d; t++) sum += q[t] * number(row, t, bf16);
    return sum;
}

/* How many threads are worth waking for so many numbers. */
INLINE int at_work(long numbers, long threads) { return numbers < LITTLE ? 1 : (int)threads; }

typedef void Work(const void *call, long n, char *room);

/* work(call, n, room) for every n < `units`, in `bytes` of a thread's own. 0, or 1 where there is no memory. */
static int spread(Work *work, const void *call, long units, long bytes, int threads) {
    long failed = 0;
#pragma omp parallel num_threads(threads)
    {
        char *room = aligned_alloc(64, up(bytes, 64));
        if (!room) {
#pragma omp atomic
            failed++;
        }
#pragma omp barrier
        if (!failed) {
#pragma omp for schedule(static)
            for (long n = 0; n < units; n++) work(call, n, room);
        }
        free(room);
    }
    return failed != 0;
}

/* ---- attention ---- */

typedef struct {
    Rows q, k, v, o;
    const float *sinks, *beside;           /* logits without a value, [heads] and [batch heads], or null */
    const int64_t *starts, *lows, *highs;  /* [batch heads many], below 0 for none; [batch] or null */
    long batch, heads, groups, d, e, first, low, high, many, span, bf16, threads;
    double scale, softcap;
} Step;

typedef struct {
    long at, n;
} Run;

INLINE long runs_of(const Step *c, long b, long h, Run *runs) {
    long n = 0, low = c->lows ? c->lows[b] : c->low, high = c->highs ? c->highs[b] : c->high;
    if (c->first) runs[n++] = (Run){0, c->first};
    if (high > low) runs[n++] = (Run){low, high - low};
    for (long m = 0; m < c->many; m++) {
        long at = c->starts[(b * c->heads + h) * c->many + m];
        if (at >= 0) runs[n++] = (Run){at, c->span};
    }
    return n;
}

/* Scores times log2 e -> s; how many. */
INLINE long scored(const Step *c, long b, long h, const Run *runs, long n, const float *q, float *s, int bf16) {
    const float base2 = 1.44269504f, factor = (float)c->scale, cap = (float)c->softcap;
    long g = h / (c->heads / c->groups), count = 0, step = c->k.row * (bf16 ? 2 : 4);
    for (long i = 0; i < n; i++) {
        const char *row = row_at(&c->k, b, g, runs[i].at, bf16);
        for (long m = 0; m < runs[i].n; m++, row += step) s[count++] = dot(q, row, c->d, bf16);
    }
    for (long m = 0; m < count; m++) s[m] = cap > 0 ? cap * tanhf(s[m] * factor / cap) * base2 : s[m] * factor * base2;
    return count;
}

/* Scores -> weights; their sum, that of the logits without a value included. */
INLINE float weighed(float *s, long count, const float *logits, int n) {
    Vector tops = all(-INFINITY), sums = all(0);
    for (long t = count; t < up(count, LANES); t++) s[t] = -INFINITY;
    for (long t = 0; t < count; t += LANES) tops = larger(*(Vector *)(s + t), tops);
    float top = largest(tops), sum = 0;
    for (int i = 0; i < n; i++) top = logits[i] > top ? logits[i] : top;
    for (long t = 0; t < count; t += LANES) {
        Vector y = power(*(Vector *)(s + t) - all(top));
        if (t + LANES > count) y = (Vector)((Whole)y & inside(t, 0, count));
        sums += y;
        *(Vector *)(s + t) = y;
    }
    for (int i = 0; i < n; i++) sum += power(all(logits[i] - top))[0];
    return sum + total(sums);
}

INLINE void summed(const Step *c, long b, long g, const Run *runs, long n, const float *s, float *out, int bf16) {
    long step = c->v.row * (bf16 ? 2 : 4), t = 0;
    for (; t + LANES <= c->e; ) {
        int wide = t + 4 * LANES <= c->e ? 4 : 1;
        const float *p = s;
        Vector sum[4] = {all(0), all(0), all(0), all(0)};
        for (long i = 0; i < n; i++) {
            const char *row = row_at(&c->v, b, g, runs[i].at, bf16);
            if (wide == 4)
                for (long m = 0; m < runs[i].n; m++, row += step, p++)
#pragma GCC unroll 4
                    for (int x = 0; x < 4; x++) sum[x] += all(*p) * loaded(row, t + x * LANES, bf16);
            else
                for (long m = 0; m < runs[i].n; m++, row += step, p++) sum[0] += all(*p) * loaded(row, t, bf16);
        }
        for (int x = 0; x < wide; x++, t += LANES) *(Vector *)(out + t) = sum[x];
    }
    for (; t < c->e; t++) {
        const float *p = s;
        out[t] = 0;
        for (long i = 0; i < n; i++) {
            const char *row = row_at(&c->v, b, g, runs[i].at, bf16);
            for (long m = 0; m < runs[i].n; m++, row += step, p++) out[t] += *p * number(row, t, bf16);
        }
    }
}

INLINE void one_head(const Step *c, long b, long h, Run *runs, float *room, int bf16) {
    const float base2 = 1.44269504f;
    float *q = room, *out = q + up(c->d, LANES), *s = out + up(c->e, LANES), logits[2], sum;
    const char *row = row_at(&c->q, b, h, 0, bf16);
    for (long t = 0; t < c->d; t++) q[t] = number(row, t, bf16);
    long n = runs_of(c, b, h, runs), count = scored(c, b, h, runs, n, q, s, bf16);
    int more = 0;
    if (c->sinks) logits[more++] = c->sinks[h] * base2;
    if (c->beside) logits[more++] = c->beside[b * c->heads + h] * base2;
    sum = weighed(s, count, logits, more);
    summed(c, b, h / (c->heads / c->groups), runs, n, s, out, bf16);
    put(&c->o, b, h, 0, out, count ? 1 / sum : 0, c->e, bf16); /* zeros where nothing is read */
}

static long room_of_runs(const Step *c) { return up((c->many + 2) * sizeof(Run), 64); }

static void attended(const void *call, long n, char *room) {
    const Step *c = call;
    float *numbers = (float *)(room + room_of_runs(c));
    if (c->bf16) one_head(c, n / c->heads, n % c->heads, (Run *)room, numbers, 1);
    else one_head(c, n / c->heads, n % c->heads, (Run *)room, numbers, 0);
}

int tfast_one_query(const Step *c) {
    long near = c->high - c->low, units = c->batch * c->heads;
    for (long b = 0; c->lows && b < c->batch; b++)
        if (c->highs[b] - c->lows[b] > near) near = c->highs[b] - c->lows[b];
    long most = c->first + near + c->many * c->span, extra = up(c->d, LANES) + up(c->e, LANES) + LANES;
    return spread(attended, c, units, room_of_runs(c) + 4 * (extra + most),
                  at_work(units * most * (c->d + c->e), c->threads));
}

/* ---- the blocks of keys with the best bounds ---- */

typedef struct {
    Rows q, boxes;         /* boxes fp32: the middle and half the width, 2 d numbers */
    const int64_t *counts; /* [batch], or null */
    int64_t *found;        /* [batch heads most], ascending, then -1 */
    long batch, heads, groups, d, count, most, bf16, threads;
    double sign;
} Blocks;

/* x reordered so that x[..k] <= x[k] <= x[k..]; nothing in it may be no number. */
static void split(float *x, long n, long k) {
    long low = 0, high = n - 1;
    while (low < high) {
        float pivot = x[(low + high) / 2];
        long i = low, j = high;
        while (i <= j) {
            while (x[i] < pivot) i++;
            while (x[j] > pivot) j--;
            if (i > j) break;
            float held = x[i];
            x[i++] = x[j];
            x[j--] = held;
        }
        if (k <= j) high = j;
        else if (k >= i) low = i;
        else return;
    }
}

/* The `most` largest of s[n]; equal ones, up to rounding, by the earlier; -inf is never among them. As `best` of
   key_blocks.py. */
static void largest_ones(const float *s, float *copy, long n, long most, int64_t *found) {
    long count = 0;
    float from = -INFINITY, over = INFINITY;
    if (most < n) {
        memcpy(copy, s, 4 * n);
        split(copy, n, n - most - 1);
        float following = copy[n - most - 1], cut = INFINITY, top = -INFINITY, least = -3.40282347e38f;
        for (long m = n - most; m < n; m++) {
            cut = copy[m] < cut ? copy[m] : cut;
            top = copy[m] > top && copy[m] < INFINITY ? copy[m] : top; /* what is no number is above all */
        }
        cut = cut < least ? least : cut, top = top < least ? least : top;
        float slack = (fabsf(top) > fabsf(cut) ? fabsf(top) : fabsf(cut)) * 64 * 1.1920929e-7f;
        int tied = cut - slack <= following;
        from = tied ? cut - slack : cut, over = tied ? cut + slack : -INFINITY;
    }
    long room = most;
    for (long m = 0; over < INFINITY && m < n; m++) room -= s[m] > over;
    for (long m = 0; m < n && count < most; m++) {
        if (s[m] == -INFINITY || !(s[m] >= from)) continue;
        if (s[m] > over) found[count++] = m;
        else if (room > 0) found[count++] = m, room--;
    }
    while (count < most) found[count++] = -1;
}

INLINE void one_choice(const Blocks *c, long b, long h, float *room, int bf16) {
    float *q = room, *s = q + up(2 * c->d, LANES), *copy = s + c->count;
    long n = c->counts ? c->counts[b] : c->count, g = h / (c->heads / c->groups);
    const char *row = row_at(&c->q, b, h, 0, bf16);
    for (long t = 0; t < c->d; t++) {
        q[t] = number(row, t, bf16) * (float)c->sign;
        q[c->d + t] = fabsf(q[t]);
    }
    for (long m = 0; m < n; m++) {
        float x = dot(q, row_at(&c->boxes, b, g, m, 0), 2 * c->d, 0);
        s[m] = x == x ? x : INFINITY;
    }
    largest_ones(s, copy, n, c->most, c->found + (b * c->heads + h) * c->most);
}

static void chosen_blocks(const void *call, long n, char *room) {
    const Blocks *c = call;
    if (c->bf16) one_choice(c, n / c->heads, n % c->heads, (float *)room, 1);
    else one_choice(c, n / c->heads, n % c->heads, (float *)room, 0);
}

int tfast_best_blocks(const Blocks *c) {
    long units = c->batch * c->heads;
    return spread(chosen_blocks, c, units, 4 * (up(2 * c->d, LANES) + 2 * c->count),
                  at_work(units * c->count * 2 * c->d, c->threads));
}

/* ---- the keys of the query's buckets ---- */

typedef struct {
    const void *numbers; /* bucket numbers, `wide` bytes each: batch and (head, round) are strides, keys side by side */
    long b, row;
    const int32_t *asked;         /* [rounds batch heads] */
    const int64_t *lows, *highs;  /* [batch], or null */
    int64_t *found;               /* [batch heads rounds most], -1 where there are fewer */
    long batch, heads, groups, rounds, most, low, high, wide, threads;
} Bucket;

/* The last `most` of the first n keys that have number a, newest first: how many. */
#define SCAN(name, type)                                                                                       \
    static long name(const type *x, long n, type a, long most, int64_t *found) {                               \
        long count = 0;                                                                                        \
        while (n > 0 && count < most) {                                                                        \
            long from = n > STRIDE ? n - STRIDE : 0;                                                           \
            type any = from == 0;                                                                              \
            if (from)                                                                                          \
                for (int i = 0; i < STRIDE; i++) any |= (type)(x[from + i] == a);                              \
            for (long i = n; any && i-- > from && count < most;)                                               \
                if (x[i] == a) found[count++] = i;                                                             \
            n = from;                                                                                          \
        }                                                                                                      \
        return count;                                                                                          \
    }
SCAN(scan_bytes, uint8_t)
SCAN(scan_halves, uint16_t)

INLINE int has(const Bucket *c, const char *numbers, long at, int32_t asked) {
    return c->wide == 1 ? ((const uint8_t *)numbers)[at] == (uint8_t)asked
                        : ((const uint16_t *)numbers)[at] == (uint16_t)asked;
}

/* A key in the window is read there, and one of an earlier round in that round. */
static void one_search(const Bucket *c, long b, long h) {
    long low = c->lows ? c->lows[b] : c->low, high = c->highs ? c->highs[b] : c->high, count = 0, oldest[ROUNDS];
    long g = h / (c->heads / c->groups), units = c->batch * c->heads, unit = b * c->heads + h;
    int64_t *found = c->found + unit * c->rounds * c->most;
    const char *first = (const char *)c->numbers + (b * c->b + g * c->rounds * c->row) * c->wide;
    for (long r = 0; r < c->rounds; r++) {
        const char *numbers = first + r * c->row * c->wide;
        int32_t asked = c->asked[r * units + unit];
        int64_t *here = found + count;
        long n = c->wide == 1 ? scan_bytes((const uint8_t *)numbers, high, (uint8_t)asked, c->most, here)
                              : scan_halves((const uint16_t *)numbers, high, (uint16_t)asked, c->most, here);
        oldest[r] = n ? here[n - 1] : high;
        for (long m = 0; m < n; m++) {
            int64_t at = here[m];
            int again = at >= low;
            for (long e = 0; e < r && !again; e++)
                again = at >= oldest[e] && has(c, first + e * c->row * c->wide, at, c->asked[e * units + unit]);
            if (!again) found[count++] = at;
        }
    }
    while (count < c->rounds * c->most) found[count++] = -1;
}

int tfast_bucket_keys(const Bucket *c) {
    long units = c->batch * c->heads;
#pragma omp parallel for schedule(static) num_threads(at_work(units * c->rounds * c->high / 8, c->threads))
    for (long n = 0; n < units; n++) one_search(c, n / c->heads, n % c->heads);
    return 0;
}

/* ---- bucket numbers ---- */

typedef struct {
    Rows x;             /* [batch groups rows d] */
    const float *turns; /* [groups d rounds * columns] */
    int32_t *found;     /* [rounds batch groups rows] */
    long batch, groups, rows, d, bits, rounds, columns, bf16, threads;
} Corners;

enum { MOST_BITS = 8 };

/* x R -> y, all columns. */
INLINE void projected(const Corners *c, const char *row, const float *turns, float *y, int bf16) {
    long wide = c->rounds * c->columns, whole = wide / LANES * LANES;
    memset(y, 0, 4 * wide);
    for (long t = 0; t < c->d; t += 4) {
        float x[4] = {0};
        const float *r[4];
        for (int m = 0; m < 4; m++) {
            int there = t + m < c->d;
            x[m] = there ? number(row, t + m, bf16) : 0;
            r[m] = turns + (there ? t + m : t) * wide;
        }
        for (long n = 0; n < whole; n += LANES)
            *(Vector *)(y + n) += all(x[0]) * *(const Vector *)(r[0] + n) + all(x[1]) * *(const Vector *)(r[1] + n) +
                                  all(x[2]) * *(const Vector *)(r[2] + n) + all(x[3]) * *(const Vector *)(r[3] + n);
        for (long n = whole; n < wide; n++) y[n] += x[0] * r[0][n] + x[1] * r[1][n] + x[2] * r[2][n] + x[3] * r[3][n];
    }
}

/* Which of [y, -y] is largest, n a power of 2: as `_corner` of buckets.py, which says what rides in the lowest bits. */
INLINE int32_t corner(const float *y, int32_t n) {
    int32_t most = -1;
    for (int32_t m = 0; m < n; m++) {
        int32_t bits;
        memcpy(&bits, y + m, 4);
        bits = (bits & 0x7fffffff & -n) | m;
        most = bits > most ? bits : most;
    }
    return (most & (n - 1)) + (y[most & (n - 1)] < 0 ? n : 0);
}

INLINE void one_corner(const Corners *c, long unit, float *y, int bf16) {
    long b = unit / c->groups, g = unit % c->groups;
    for (long m = 0; m < c->rows; m++) {
        projected(c, row_at(&c->x, b, g, m, bf16), c->turns + g * c->d * c->rounds * c->columns, y, bf16);
        for (long r = 0, at = 0; r < c->rounds; r++) {
            int32_t number = 0;
            for (long left = c->bits; left > 0; left -= MOST_BITS) {
                long part = left < MOST_BITS ? left : MOST_BITS;
                number = (number << part) + corner(y + at, 1 << (part - 1));
                at += 1L << (part - 1);
            }
            c->found[(r * c->batch * c->groups + unit) * c->rows + m] = number;
        }
    }
}

static void corners_of(const void *call, long n, char *room) {
    const Corners *c = call;
    if (c->bf16) one_corner(c, n, (float *)room, 1);
    else one_corner(c, n, (float *)room, 0);
}

int tfast_corners(const Corners *c) {
    long units = c->batch * c->groups, wide = c->rounds * c->columns;
    return spread(corners_of, c, units, 4 * wide, at_work(units * c->d * wide, c->threads));
}
