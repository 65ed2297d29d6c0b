/* Softmax attention between many rows and few; called from few_native.py, compiled on first use.

   means     the few are the means of segments of the many.
   keys      many queries read few keys: a row of scores is whole, and its softmax lies across vectors.
   queries   few queries read many keys: scores are made turned, [many few], so that a vector holds as many queries, and
             what is read of the keys before is kept as (largest score, sum of weights, output).

   Rows come in chunks, chunks in blocks of a few rows, whose scores stay in the cache. Everything is computed in fp32;
   bf16 is widened where it is read. What belongs to the few is summed up for each chunk by itself, so that numbers do
   not depend on the threads. */

#include "band_packing.h"

enum { BLOCK = 64 };

/* few [units n d] is scaled; value [units n e]: what the few keys carry, or the gradient of what few queries read. */
typedef struct {
    Rows x, y, dx, dy; /* many: queries, and outputs or their gradient; or keys and values. dx, dy are written */
    const float *few, *value, *bias, *lse, *rest; /* bias, lse, rest [units n]; bias may be null */
    float *dfew, *dvalue, *top, *total;           /* [chunks units n ..]; dvalue: outputs of few queries, forward */
    long heads, units, rows, n, d, e, chunk;
    int bf16, threads;
} Call;

typedef struct {
    long b, h, unit, wide, wider, ld; /* d, e and n in whole vectors */
    Word *few_turned, *few_across, *value_turned, *value_across, *x, *y;
    float *s, *dp, *out, *dfew, *dvalue, *bias, *top, *total, *sum;
} Room;

/* Rows of numbers as a product takes them: where they lie if that will do, else a copy in fp32. */
typedef struct {
    const Word *at;
    long step;
} Lines;

INLINE Lines lines(const Call *c, const Rows *from, const Room *r, long row, long m, long d, long wide, Word *copy) {
    if (!c->bf16 && d == wide) return (Lines){(const Word *)row_at(from, r->b, r->h, row, 0), from->row};
    across(from, r->b, r->h, row, m, m, d, wide, c->bf16, 0, copy);
    return (Lines){copy, wide};
}

/* Rows [m, terms] times columns of the few, turned -> to [m, ld]. */
INLINE void scored(const Room *r, Lines rows, const Word *columns, long m, long terms, float *to) {
    Product p = {rows.at, rows.step, 1, columns, LANES, terms * LANES, terms, to, r->ld, 0};
    product(p, m, r->ld / LANES, 0);
}

/* Weights [m, ld] of the few times rows of the few, `wide` across -> out. */
INLINE void mixed(const Room *r, const float *weights, const Word *rows, long m, long n, long wide) {
    Product p = {(const Word *)weights, r->ld, 1, rows, wide, LANES, n, r->out, wide, 0};
    product(p, m, wide / LANES, 0);
}

/* Weights [m, ld], turned, times m of the many rows, added to [n, wide]. */
INLINE void collected(const Room *r, const float *weights, Lines rows, long m, long n, long wide, float *to) {
    Product p = {(const Word *)weights, 1, r->ld, rows.at, rows.step, LANES, m, to, wide, 1};
    product(p, n, wide / LANES, 0);
}

#define BASE2 1.44269504f

/* A row of scores -> e^(s - largest), zeros beyond n; their sum. */
INLINE float softened(const Room *r, float *s, long n) {
    Vector most = all(-INFINITY), sums = all(0), factor = all(BASE2);
    for (long t = 0; t < r->ld; t += LANES) {
        Vector y = *(Vector *)(s + t) * factor;
        if (r->bias) y += *(Vector *)(r->bias + t);
        if (t + LANES > n) y = (Vector)chosen(inside(t, 0, n), (Whole)y, (Whole)all(-INFINITY));
        *(Vector *)(s + t) = y;
        most = larger(y, most);
    }
    most = all(largest(most));
    for (long t = 0; t < r->ld; t += LANES) {
        Vector y = power(*(Vector *)(s + t) - most);
        if (t + LANES > n) y = (Vector)((Whole)y & inside(t, 0, n));
        sums += y;
        *(Vector *)(s + t) = y;
    }
    return total(sums);
}

INLINE void keys_forward(const Call *c, Room *r, long row, long m) {
    scored(r, lines(c, &c->x, r, row, m, c->d, r->wide, r->x), r->few_turned, m, c->d, r->s);
    for (long i = 0; i < m; i++) r->sum[i] = softened(r, r->s + i * r->ld, c->n);
    mixed(r, r->s, r->value_across, m, c->n, r->wider);
    for (long i = 0; i < m; i++)
        put(&c->y, r->b, r->h, row + i, r->out + i * r->wider, 1 / r->sum[i], c->e, c->bf16);
}

INLINE void keys_backward(const Call *c, Room *r, long row, long m) {
    Lines x = lines(c, &c->x, r, row, m, c->d, r->wide, r->x), y = lines(c, &c->y, r, row, m, c->e, r->wider, r->y);
    scored(r, x, r->few_turned, m, c->d, r->s);
    scored(r, y, r->value_turned, m, c->e, r->dp);
    for (long i = 0; i < m; i++) {
        float *s = r->s + i * r->ld, *dp = r->dp + i * r->ld;
        Vector factor = all(1 / softened(r, s, c->n)), sums = all(0);
        for (long t = 0; t < r->ld; t += LANES) {
            *(Vector *)(s + t) *= factor;
            sums += *(Vector *)(s + t) * *(Vector *)(dp + t);
        }
        Vector mean = all(total(sums));
        for (long t = 0; t < r->ld; t += LANES)
            *(Vector *)(dp + t) = *(Vector *)(s + t) * (*(Vector *)(dp + t) - mean);
    }
    mixed(r, r->dp, r->few_across, m, c->n, r->wide);
    for (long i = 0; i < m; i++) put(&c->dx, r->b, r->h, row + i, r->out + i * r->wide, 1, c->d, c->bf16);
    collected(r, r->dp, x, m, c->n, r->wide, r->dfew);
    collected(r, r->s, y, m, c->n, r->wider, r->dvalue);
}

INLINE void queries_forward(const Call *c, Room *r, long row, long m) {
    scored(r, lines(c, &c->x, r, row, m, c->d, r->wide, r->x), r->few_turned, m, c->d, r->s);
    for (long t = 0; t < r->ld; t += LANES) {
        Vector factor = all(BASE2), before = *(Vector *)(r->top + t), most = before, sums = all(0);
        for (long i = 0; i < m; i++) {
            Vector y = *(Vector *)(r->s + i * r->ld + t) * factor;
            *(Vector *)(r->s + i * r->ld + t) = y;
            most = larger(y, most);
        }
        for (int k = 0; k < LANES && t + k < c->n; k++) {
            if (most[k] == before[k]) continue;
            float shrink = power(all(before[k] - most[k]))[0], *o = r->dvalue + (t + k) * r->wider;
            r->total[t + k] *= shrink;
            for (long w = 0; w < r->wider; w += LANES) *(Vector *)(o + w) *= all(shrink);
        }
        for (long i = 0; i < m; i++) {
            Vector y = power(*(Vector *)(r->s + i * r->ld + t) - most);
            sums += y;
            *(Vector *)(r->s + i * r->ld + t) = y;
        }
        *(Vector *)(r->top + t) = most;
        *(Vector *)(r->total + t) += sums;
    }
    collected(r, r->s, lines(c, &c->y, r, row, m, c->e, r->wider, r->y), m, c->n, r->wider, r->dvalue);
}

INLINE void queries_backward(const Call *c, Room *r, long row, long m) {
    Lines x = lines(c, &c->x, r, row, m, c->d, r->wide, r->x), y = lines(c, &c->y, r, row, m, c->e, r->wider, r->y);
    scored(r, x, r->few_turned, m, c->d, r->s);
    scored(r, y, r->value_turned, m, c->e, r->dp);
    for (long t = 0; t < r->ld; t += LANES) { /* top and total hold what is subtracted and what is added */
        Vector factor = all(BASE2), lse = *(Vector *)(r->top + t), rest = *(Vector *)(r->total + t);
        for (long i = 0; i < m; i++) {
            Vector *s = (Vector *)(r->s + i * r->ld + t), *dp = (Vector *)(r->dp + i * r->ld + t);
            Vector p = power(*s * factor - lse);
            *s = p;
            *dp = p * (*dp + rest);
        }
    }
    mixed(r, r->s, r->value_across, m, c->n, r->wider);
    for (long i = 0; i < m; i++) put(&c->dy, r->b, r->h, row + i, r->out + i * r->wider, 1, c->e, c->bf16);
    mixed(r, r->dp, r->few_across, m, c->n, r->wide);
    for (long i = 0; i < m; i++) put(&c->dx, r->b, r->h, row + i, r->out + i * r->wide, 1, c->d, c->bf16);
    collected(r, r->dp, x, m, c->n, r->wide, r->dfew);
}

/* ---- a chunk ---- */

INLINE void given(const float *from, long n, long ld, float factor, float beyond, float *to) {
    for (long t = 0; t < ld; t++) to[t] = t < n ? from[t] * factor : beyond;
}

INLINE void returned(const float *from, long n, long d, long wide, float *to) {
    for (long t = 0; t < n; t++) memcpy(to + t * d, from + t * wide, 4 * d);
}

INLINE void one_chunk(const Call *c, Room *r, long number, int queries, int backward) {
    long from = number * c->chunk, to = from + c->chunk < c->rows ? from + c->chunk : c->rows, n = c->n;
    long few = (number * c->units + r->unit) * n;
    Rows one = {(void *)(c->few + r->unit * n * c->d), 0, 0, c->d};
    Rows two = {(void *)(c->value + r->unit * n * c->e), 0, 0, c->e};
    turned(&one, 0, 0, 0, n, c->d, 0, 0, r->few_turned);
    if (!queries || backward) across(&two, 0, 0, 0, n, n, c->e, r->wider, 0, 0, r->value_across);
    if (backward) {
        across(&one, 0, 0, 0, n, n, c->d, r->wide, 0, 0, r->few_across);
        turned(&two, 0, 0, 0, n, c->e, 0, 0, r->value_turned);
        memset(r->dfew, 0, 4 * n * r->wide);
    }
    if (c->bias) given(c->bias + r->unit * n, n, r->ld, BASE2, 0, r->bias);
    memset(r->dvalue, 0, 4 * n * r->wider);
    if (queries && backward) {
        given(c->lse + r->unit * n, n, r->ld, BASE2, 0, r->top);
        given(c->rest + r->unit * n, n, r->ld, 1, 0, r->total);
    } else if (queries) {
        for (long t = 0; t < r->ld; t++) r->top[t] = -INFINITY, r->total[t] = 0;
    }
    for (long row = from; row < to; row += BLOCK) {
        long m = row + BLOCK < to ? BLOCK : to - row;
        if (queries && backward) queries_backward(c, r, row, m);
        else if (queries) queries_forward(c, r, row, m);
        else if (backward) keys_backward(c, r, row, m);
        else keys_forward(c, r, row, m);
    }
    if (backward) returned(r->dfew, n, c->d, r->wide, c->dfew + few * c->d);
    if (backward != queries) returned(r->dvalue, n, c->e, r->wider, c->dvalue + few * c->e);
    if (queries && !backward) {
        memcpy(c->top + few, r->top, 4 * n);
        memcpy(c->total + few, r->total, 4 * n);
    }
}

INLINE void *taken(char **room, size_t count) {
    char *at = *room;
    *room += up(4 * count, 64);
    return at;
}

/* Lays the arrays of a thread out from `room` on; where they end. With a null room: how large it has to be. */
static size_t laid_out(const Call *c, Room *r, char *room) {
    char *at = room;
    r->wide = up(c->d, LANES), r->wider = up(c->e, LANES), r->ld = up(c->n, LANES);
    long most = r->wide > r->wider ? r->wide : r->wider;
    r->few_turned = taken(&at, r->ld * c->d);
    r->few_across = taken(&at, c->n * r->wide);
    r->value_turned = taken(&at, r->ld * c->e);
    r->value_across = taken(&at, c->n * r->wider);
    r->x = taken(&at, BLOCK * r->wide);
    r->y = taken(&at, BLOCK * r->wider);
    r->s = taken(&at, BLOCK * r->ld);
    r->dp = taken(&at, BLOCK * r->ld);
    r->out = taken(&at, BLOCK * most);
    r->dfew = taken(&at, c->n * r->wide);
    r->dvalue = taken(&at, c->n * r->wider);
    r->top = taken(&at, r->ld);
    r->total = taken(&at, r->ld);
    r->sum = taken(&at, BLOCK);
    r->bias = taken(&at, r->ld);
    if (!c->bias) r->bias = 0;
    return at - room;
}

/* 0, or 1 where there is no memory. */
INLINE int run(const Call *c, int queries, int backward) {
    long chunks = (c->rows + c->chunk - 1) / c->chunk, failed = 0;
#pragma omp parallel num_threads(c->threads)
    {
        Room r = {0};
        char *room = aligned_alloc(64, laid_out(c, &r, 0));
        if (!room) {
#pragma omp atomic
            failed++;
        }
#pragma omp barrier
        if (!failed) {
            laid_out(c, &r, room);
#pragma omp for schedule(dynamic)
            for (long n = 0; n < c->units * chunks; n++) {
                r.unit = n / chunks, r.b = r.unit / c->heads, r.h = r.unit % c->heads;
                one_chunk(c, &r, n % chunks, queries, backward);
            }
        }
        free(room);
    }
    return failed != 0;
}

/* dfew [units n d]: the means of n segments of x, whose sizes differ by one at most, the longer ones first. */
int tfast_few_means(const Call *c) {
    long batch = c->units / c->heads, size = c->rows / c->n, longer = c->rows % c->n;
#pragma omp parallel for num_threads(c->threads)
    for (long at = 0; at < batch * c->n; at++) {
        long b = at / c->n, s = at % c->n, rows = size + (s < longer), first = s * size + (s < longer ? s : longer);
        for (long h = 0; h < c->heads; h++) memset(c->dfew + ((b * c->heads + h) * c->n + s) * c->d, 0, 4 * c->d);
        for (long r = 0; r < rows; r++)
            for (long h = 0; h < c->heads; h++) {
                const char *row = row_at(&c->x, b, h, first + r, c->bf16);
                float *to = c->dfew + ((b * c->heads + h) * c->n + s) * c->d;
                if (c->bf16)
                    for (long t = 0; t < c->d; t++) to[t] += widened(((const uint16_t *)row)[t]);
                else
                    for (long t = 0; t < c->d; t++) to[t] += ((const float *)row)[t];
            }
        for (long h = 0; h < c->heads; h++) {
            float *to = c->dfew + ((b * c->heads + h) * c->n + s) * c->d;
            for (long t = 0; t < c->d; t++) to[t] /= rows;
        }
    }
    return 0;
}

/* Its gradient: few [units n d], spread over the rows of dx, to which it is added. */
int tfast_few_means_backward(const Call *c) {
    long batch = c->units / c->heads, size = c->rows / c->n, longer = c->rows % c->n;
#pragma omp parallel for num_threads(c->threads)
    for (long at = 0; at < batch * c->n; at++) {
        long b = at / c->n, s = at % c->n, rows = size + (s < longer), first = s * size + (s < longer ? s : longer);
        for (long r = 0; r < rows; r++)
            for (long h = 0; h < c->heads; h++) {
                char *to = (char *)row_at(&c->dx, b, h, first + r, c->bf16);
                const float *each = c->few + ((b * c->heads + h) * c->n + s) * c->d;
                if (c->bf16)
                    for (long t = 0; t < c->d; t++)
                        ((uint16_t *)to)[t] = narrowed(widened(((uint16_t *)to)[t]) + each[t] / rows);
                else
                    for (long t = 0; t < c->d; t++) ((float *)to)[t] += each[t] / rows;
            }
    }
    return 0;
}

int tfast_few_keys(const Call *c) { return run(c, 0, 0); }
int tfast_few_keys_backward(const Call *c) { return run(c, 0, 1); }
int tfast_few_queries(const Call *c) { return run(c, 1, 0); }
int tfast_few_queries_backward(const Call *c) { return run(c, 1, 1); }
