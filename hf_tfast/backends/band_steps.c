/* Softmax attention in a band around the diagonal, over the first keys and over listed blocks of keys; called from
   fused.py, compiled on first use.

   Queries come in chunks, chunks in blocks of a few rows. A chunk packs the keys and values that it reads, once for all
   query heads that share them. A block makes its scores, their softmax and its output while they lie in the cache:

       S = Q K^T     P = softmax(S)     O = P V                                                            forward
       dP = dO V^T   dS = P (dP - sum P dP)   dQ = dS K   dK += dS^T Q   dV += P^T dO                      backward

   Every row has its own range of columns in each part of its scores (band_parts.h), so that there are no masks. Listed
   blocks may lie anywhere: a chunk packs every key then, and backward it holds every query of its key head, so that no
   other chunk adds to the same gradients. All five products are one function: rows of numbers, each spread over a
   vector, times vectors that lie side by side. In bf16, where the processor multiplies it (AVX-512 BF16), a number is a
   pair of neighbours in the sum; elsewhere bf16 is widened to fp32 when it is packed. Sums are fp32. */

#include "band_parts.h"

/* One row of scores -> exp(scale s - top), zeros where nothing is read; the sum of these, and the sink's part of it. */
INLINE float softened(const Call *c, const Chunk *x, long row, float *s, const Part *parts, int n, long head,
                      float *sink, int lists) {
    const float base2 = 1.44269504f;
    Vector factor = all(c->scale * base2), tops = all(-INFINITY);
    for (int i = 0; i < n; i++) {
        Range own = range(c, x, row, parts + i, lists);
        for (long t = own.low / LANES * LANES; t < own.high; t += LANES) {
            Vector *at = (Vector *)(s + parts[i].at + t), y = *at * factor;
            if (!entire(own, t, lists)) y = (Vector)chosen(visible(own, t, lists), (Whole)y, (Whole)all(-INFINITY));
            tops = larger(y, tops);
        }
    }
    float logit = c->sinks ? c->sinks[head] * base2 : -INFINITY, top = largest(tops);
    top = logit > top ? logit : top;
    Vector sums = all(0), most = all(top);
    for (int i = 0; i < n; i++) {
        Range own = range(c, x, row, parts + i, lists);
        float *at = s + parts[i].at;
        long t = 0, end = parts[i].n;
        for (; t + LANES <= own.low; t += LANES) *(Vector *)(at + t) = all(0);
        for (; t < own.high; t += LANES) {
            Vector y = power(*(Vector *)(at + t) * factor - most);
            if (!entire(own, t, lists)) y = (Vector)((Whole)y & visible(own, t, lists));
            sums += y;
            *(Vector *)(at + t) = y;
        }
        for (; t < end; t += LANES) *(Vector *)(at + t) = all(0);
    }
    *sink = logit != -INFINITY ? power(all(logit - top))[0] : 0;
    return total(sums) + *sink;
}

/* S or dP of a block: rows [m, words] times packed columns. */
INLINE void scores(const Chunk *x, const Word *rows, const Word *columns, long m, long terms, const Part *parts, int n,
                   float *s, int pairs) {
    for (int i = 0; i < n; i++) {
        const Part *part = parts + i;
        Product p = {rows, terms, 1, columns + part->from * terms, LANES, terms * LANES, terms, s + part->at, x->ld, 0};
        product(p, m, part->n / LANES, pairs);
    }
}

/* Rows of weights [m, ld] times packed rows, `wide` across -> out [m, wide]. */
INLINE void gathered(const Chunk *x, const Word *weights, const Word *rows, long m, long wide, const Part *parts, int n,
                     int pairs) {
    int per = 1 + pairs;
    if (!n) memset(x->out, 0, 4 * m * wide);
    for (int i = 0; i < n; i++) {
        const Part *part = parts + i;
        Product p = {weights + part->at / per, x->ld / per, 1, rows + part->from / per * wide, wide, LANES,
                     part->n / per, x->out, wide, i};
        product(p, m, wide / LANES, pairs);
    }
}

/* Columns of weights times the block's rows, added to to [columns, wide]. */
INLINE void scattered(const Chunk *x, const Word *weights, const Word *rows, long m, long wide, const Part *parts, int n,
                      float *to, int pairs) {
    for (int i = 0; i < n; i++) {
        const Part *part = parts + i;
        Product p = {weights + part->at, 1, x->ld, rows, wide, LANES, pairs ? (m + 1) / 2 : m,
                     to + part->from * wide, wide, 1};
        product(p, part->n, wide / LANES, pairs);
    }
}

INLINE void halves(const float *from, long n, Word *to) {
    for (long t = 0; t < n; t += LANES) {
        Whole y = half(*(const Vector *)(from + t));
        for (int k = 0; k < LANES; k++) ((uint16_t *)to)[t + k] = (uint16_t)y[k];
    }
}

/* Two rows to pairs; the second may be null. */
INLINE void paired(const float *one, const float *two, long n, Word *to) {
    for (long t = 0; t < n; t += LANES) {
        Whole y = half(*(const Vector *)(one + t));
        if (two) y |= half(*(const Vector *)(two + t)) << 16;
        *(Whole *)(to + t) = y;
    }
}

INLINE void weights(const Call *c, Chunk *x, long head, long row, long m, const Part *parts, int n, int pairs) {
    long terms = words(c->d, pairs);
    for (long r = 0; r < m; r++)
        plain(row_at(&c->q, x->b, head, row + r, c->bf16), c->d, c->bf16, pairs, x->q + r * terms);
    scores(x, x->q, x->k_turned, m, terms, parts, n, x->s, pairs);
    for (long r = 0; r < m; r++) {
        float *s = x->s + r * x->ld, *sink = x->sink + r;
        if (c->lists) x->sum[r] = softened(c, x, row + r, s, parts, n, head, sink, 1);
        else x->sum[r] = softened(c, x, row + r, s, parts, n, head, sink, 0);
    }
}

/* 1 / the sum of a row's weights; 0 where it reads nothing. */
INLINE float share(const Chunk *x, long r) { return x->sum[r] == 0 ? 0 : 1 / x->sum[r]; }

INLINE void forward_block(const Call *c, Chunk *x, long head, long row, long m, int pairs) {
    Part *parts = x->parts;
    int n = parts_of(c, x, head, row, m, parts);
    weights(c, x, head, row, m, parts, n, pairs);
    const Word *p = (const Word *)x->s;
    if (pairs) {
        for (long r = 0; r < m; r++)
            for (int i = 0; i < n; i++)
                halves(x->s + r * x->ld + parts[i].at, parts[i].n, x->p + (r * x->ld + parts[i].at) / 2);
        p = x->p;
    }
    gathered(x, p, x->v_across, m, x->wider, parts, n, pairs);
    for (long r = 0; r < m; r++) put(&c->o, x->b, head, row + r, x->out + r * x->wider, share(x, r), c->e, c->bf16);
}

/* P, and dP -> dS; the gradient of the sink's logit. */
INLINE void differences(const Call *c, Chunk *x, long m, const Part *parts, int n, float *dsink) {
    for (long r = 0; r < m; r++) {
        float *s = x->s + r * x->ld, *dp = x->dp + r * x->ld;
        Vector sums = all(0), factor = all(share(x, r)), scale = all(c->scale);
        for (int i = 0; i < n; i++)
            for (long t = parts[i].at; t < parts[i].at + parts[i].n; t += LANES) {
                Vector p = *(Vector *)(s + t) * factor;
                *(Vector *)(s + t) = p;
                sums += p * *(Vector *)(dp + t);
            }
        Vector mean = all(total(sums));
        *dsink -= x->sink[r] * share(x, r) * mean[0];
        for (int i = 0; i < n; i++)
            for (long t = parts[i].at; t < parts[i].at + parts[i].n; t += LANES) {
                Vector *at = (Vector *)(dp + t);
                *at = *(Vector *)(s + t) * (*at - mean) * scale;
            }
    }
}

INLINE void backward_block(const Call *c, Chunk *x, long head, long row, long m, float *dsink, int pairs) {
    Part *parts = x->parts;
    int n = parts_of(c, x, head, row, m, parts);
    long terms = words(c->e, pairs), ld = x->ld;
    weights(c, x, head, row, m, parts, n, pairs);
    for (long r = 0; r < m; r++)
        plain(row_at(&c->grad, x->b, head, row + r, c->bf16), c->e, c->bf16, pairs, x->grad + r * terms);
    scores(x, x->grad, x->v_turned, m, terms, parts, n, x->dp, pairs);
    differences(c, x, m, parts, n, dsink);
    const Word *p = (const Word *)x->s, *ds = (const Word *)x->dp, *ds_rows = ds;
    if (pairs) {
        for (long r = 0; r < m; r++)
            for (int i = 0; i < n; i++) {
                long at = r * ld + parts[i].at;
                halves(x->dp + at, parts[i].n, x->p + at / 2);
                if (r % 2) continue;
                long more = r + 1 < m ? ld : 0, to = r / 2 * ld + parts[i].at;
                paired(x->s + at, more ? x->s + at + more : 0, parts[i].n, x->p_pairs + to);
                paired(x->dp + at, more ? x->dp + at + more : 0, parts[i].n, x->ds_pairs + to);
            }
        p = x->p_pairs, ds = x->ds_pairs, ds_rows = x->p;
    }
    gathered(x, ds_rows, x->k_across, m, x->wide, parts, n, pairs);
    for (long r = 0; r < m; r++) put(&c->dq, x->b, head, row + r, x->out + r * x->wide, 1, c->d, c->bf16);
    across(&c->q, x->b, head, row, m, m, c->d, x->wide, c->bf16, pairs, x->q_across);
    across(&c->grad, x->b, head, row, m, m, c->e, x->wider, c->bf16, pairs, x->grad_across);
    scattered(x, ds, x->q_across, m, x->wide, parts, n, x->dk, pairs);
    scattered(x, p, x->grad_across, m, x->wider, parts, n, x->dv, pairs);
}

/* Gradients of a chunk's keys or values: [columns, wide] to the tensor, those of the first keys to a room of their own,
   which holds `width` numbers a key. */
INLINE void returned(const Call *c, const Chunk *x, const Rows *to, const float *from, long d, long wide, float *first,
                     long width) {
    for (long r = 0; first && r < c->first; r++) memcpy(first + r * width, from + r * wide, 4 * d);
    for (long r = 0; r < x->keys; r++) {
        float *row = (float *)row_at(to, x->b, x->g, x->low + r, 0);
        for (long t = 0; t < d; t++) row[t] += from[(x->skip + r) * wide + t];
    }
}

/* Keys or values of the chunk, packed both ways where there is room for them. */
INLINE void packed(const Call *c, const Chunk *x, const Rows *from, long d, long wide, Word *to_turned, Word *to_across,
                   int pairs) {
    long terms = words(d, pairs);
    if (to_turned) {
        if (x->skip) turned(from, x->b, x->g, 0, c->first, d, c->bf16, pairs, to_turned);
        turned(from, x->b, x->g, x->low, x->keys, d, c->bf16, pairs, to_turned + x->skip * terms);
    }
    if (to_across) {
        if (x->skip) across(from, x->b, x->g, 0, c->first, x->skip, d, wide, c->bf16, pairs, to_across);
        across(from, x->b, x->g, x->low, x->keys, up(x->keys, LANES), d, wide, c->bf16, pairs,
               to_across + x->skip / (1 + pairs) * wide);
    }
}

INLINE void one_chunk(const Call *c, Chunk *x, long number, int backward, int pairs) {
    long each = c->heads / c->groups, from = number * c->chunk;
    long to = from + c->chunk < c->queries ? from + c->chunk : c->queries, side = number * c->batch + x->b;
    x->low = c->lists ? 0 : reach(c, from).low;
    x->keys = c->lists ? c->keys : reach(c, to - 1).high - x->low;
    packed(c, x, &c->k, c->d, x->wide, x->k_turned, x->k_across, pairs);
    packed(c, x, &c->v, c->e, x->wider, x->v_turned, x->v_across, pairs);
    if (backward) {
        memset(x->dk, 0, 4 * (x->skip + up(x->keys, LANES)) * x->wide);
        memset(x->dv, 0, 4 * (x->skip + up(x->keys, LANES)) * x->wider);
    }
    for (long head = x->g * each; head < (x->g + 1) * each; head++) {
        float dsink = 0;
        for (long row = from, m; row < to; row += m) {
            m = together(c, row, to);
            if (backward) backward_block(c, x, head, row, m, &dsink, pairs);
            else forward_block(c, x, head, row, m, pairs);
        }
        if (c->dsinks) c->dsinks[side * c->heads + head] = dsink;
    }
    if (!backward) return;
    long width = c->d + c->e;
    float *first = c->dfirst ? c->dfirst + (side * c->groups + x->g) * c->first * width : 0;
    returned(c, x, &c->dk, x->dk, c->d, x->wide, first, width);
    returned(c, x, &c->dv, x->dv, c->e, x->wider, first ? first + c->d : 0, width);
}

static void chunk_of_floats(const Call *c, Chunk *x, long number, int backward) {
    if (backward) one_chunk(c, x, number, 1, 0);
    else one_chunk(c, x, number, 0, 0);
}

static void chunk_of_pairs(const Call *c, Chunk *x, long number, int backward) {
    if (backward) one_chunk(c, x, number, 1, PAIRS);
    else one_chunk(c, x, number, 0, PAIRS);
}

/* ---- memory of a thread ---- */

INLINE void *taken(char **room, size_t count) {
    char *at = *room;
    *room += up(4 * count, 64);
    return at;
}

/* Lays the chunk's arrays out from `room` on; where they end. With a null room: how large it has to be. */
static size_t laid_out(const Call *c, Chunk *x, char *room, int backward) {
    char *at = room;
    long m = c->rows, near = up(c->chunk + c->before + c->after, LANES);
    x->firsts = up(c->first, LANES), x->wide = up(c->d, LANES), x->wider = up(c->e, LANES);
    x->skip = c->lists ? 0 : x->firsts, x->ld = most_columns(c);
    long rows = c->lists ? up(c->keys, LANES) : x->skip + near, wide = x->wide, wider = x->wider;
    x->parts = taken(&at, most_parts(c) * sizeof(Part) / 4);
    x->blocks = taken(&at, (c->lists ? c->most : 0) * sizeof(long) / 4);
    x->k_turned = taken(&at, rows * c->d);
    x->v_across = taken(&at, rows * wider);
    x->q = taken(&at, m * c->d);
    x->s = taken(&at, m * x->ld);
    x->p = taken(&at, m * x->ld);
    x->out = taken(&at, m * (wide > wider ? wide : wider));
    x->sum = taken(&at, m);
    x->sink = taken(&at, m);
    x->v_turned = x->k_across = 0;
    if (!backward) return at - room;
    x->v_turned = taken(&at, rows * c->e);
    x->k_across = taken(&at, rows * wide);
    x->grad = taken(&at, m * c->e);
    x->q_across = taken(&at, m * wide);
    x->grad_across = taken(&at, m * wider);
    x->dp = taken(&at, m * x->ld);
    x->p_pairs = taken(&at, m * x->ld);
    x->ds_pairs = taken(&at, m * x->ld);
    x->dk = taken(&at, rows * wide);
    x->dv = taken(&at, rows * wider);
    return at - room;
}

/* 0, or 1 where there is no memory. Backward, chunks that lie next to one another share keys: every other one first. */
static int run(const Call *c, int backward) {
    long chunks = (c->queries + c->chunk - 1) / c->chunk, failed = 0;
#pragma omp parallel num_threads(c->threads)
    {
        Chunk x = {0};
        char *room = aligned_alloc(64, laid_out(c, &x, 0, backward));
        if (!room) {
#pragma omp atomic
            failed++;
        }
#pragma omp barrier
        if (!failed) {
            laid_out(c, &x, room, backward);
            for (int turn = 0; turn <= backward; turn++) {
                long each = backward ? (chunks + 1 - turn) / 2 : chunks;
#pragma omp for schedule(dynamic)
                for (long n = 0; n < c->batch * c->groups * each; n++) {
                    x.b = n / each / c->groups, x.g = n / each % c->groups;
                    long number = backward ? n % each * 2 + turn : n % each;
                    if (c->bf16 && PAIRS) chunk_of_pairs(c, &x, number, backward);
                    else chunk_of_floats(c, &x, number, backward);
                }
            }
        }
        free(room);
    }
    return failed != 0;
}

int tfast_band_forward(const Call *c) { return run(c, 0); }
int tfast_band_backward(const Call *c) { return run(c, 1); }
