/* Softmax attention of queries over runs of sorted keys; called from run_native.py, compiled on first use.

   A round is an order of the keys, an order of the queries, and for every query the ranks [low, high) that it reads;
   neither ever falls among the queries of one bucket, so a tile is a few queries next to one another and the keys from
   the first one's low to the last one's high. What a query has read in earlier rounds is hidden, and all rounds are
   merged as (largest score, sum of weights, output).

   Columns are counted from the bucket's first key, so that the lane, and the place in every sum of finite numbers, of a
   key depends on nothing that comes later: which queries share a tile shows nowhere. In bf16, where the processor multiplies it, a
   number is a pair of neighbours in the sum; elsewhere bf16 is widened to fp32. Sums are fp32. */

#include "band_packing.h"

enum { ROWS = 64 };

/* order, rank [rounds units keys]; queries, start, low, high [rounds units per]: units are pairs of a row of the batch
   and a key head, `per` the queries of one, [share i]. o, dq, dk, dv are fp32. */
typedef struct {
    Rows q, k, v, o, grad, dq, dk, dv;
    const int32_t *order, *rank, *queries, *start, *low, *high;
    float *top, *total; /* [units per]; backward: log2 of the sum of weights, and sum(o * grad) */
    long groups, units, share, i, keys, d, e, rounds, pieces, widest;
    float scale;
    int bf16, threads;
} Call;

typedef struct {
    long b, g, unit, round, m, n, base, ld, wide, wider;
    long row[ROWS], low[ROWS], high[ROWS];
    const char *many[ROWS], **keys;
    int32_t *key, *ranks;
    Word *k_turned, *v_turned, *k_across, *v_across, *q, *grad, *q_across, *grad_across, *p, *p_pairs, *ds_pairs;
    float *s, *dp, *out, *dk, *dv, shrink[ROWS];
} Tile;

/* ---- rows from anywhere, packed ---- */

INLINE void turned_rows(const char *const *rows, long end, long d, int bf16, int pairs, Word *to) {
    for (long r = 0; r < end; r += LANES, to += words(d, pairs) * LANES) panel(rows + r, d, bf16, pairs, to);
}

INLINE void across_rows(const char *const *rows, long n, long end, long d, long wide, int bf16, int pairs, Word *to) {
    for (long r = 0; r < end; r += 1 + pairs, to += wide) {
        long t = 0;
        if (r < n && pairs) {
            const uint16_t *low = (const uint16_t *)rows[r], *high = r + 1 < n ? (const uint16_t *)rows[r + 1] : 0;
            if (high)
                for (; t < d; t++) to[t] = low[t] | (Word)high[t] << 16;
            else
                for (; t < d; t++) to[t] = low[t];
        } else if (r < n) {
            plain(rows[r], d, bf16, 0, to);
            t = d;
        }
        for (; t < wide; t++) to[t] = 0;
    }
}

INLINE void halved(const float *from, long n, Word *to) {
    for (long t = 0; t < n; t += LANES) {
        Whole y = half(*(const Vector *)(from + t));
        for (int k = 0; k < LANES; k++) ((uint16_t *)to)[t + k] = (uint16_t)y[k];
    }
}

INLINE void coupled(const float *one, const float *two, long n, Word *to) {
    for (long t = 0; t < n; t += LANES) {
        Whole y = half(*(const Vector *)(one + t));
        if (two) y |= half(*(const Vector *)(two + t)) << 16;
        *(Whole *)(to + t) = y;
    }
}

/* ---- a tile ---- */

INLINE long place(const Call *c, const Tile *x, long round) { return (round * c->units + x->unit) * c->share * c->i; }

/* The next tile of sorted queries [at, end): up to ROWS of one bucket, whose keys fit. Returns where it ends. */
INLINE long cut(const Call *c, Tile *x, long at, long end) {
    const int32_t *queries = c->queries + place(c, x, x->round), *start = c->start + place(c, x, x->round);
    const int32_t *low = c->low + place(c, x, x->round), *high = c->high + place(c, x, x->round);
    long first = 0, last = 0;
    x->m = x->n = 0;
    for (; at < end && x->m < ROWS; at++) {
        long q = queries[at];
        if (low[q] >= high[q]) continue;
        if (!x->m) {
            first = start[q];
            x->base = first + (low[q] - first) / LANES * LANES;
        } else if (start[q] != first || up(high[q] - x->base, LANES) > c->widest) break;
        x->row[x->m] = q, x->low[x->m] = low[q] - x->base, x->high[x->m] = high[q] - x->base;
        last = high[q], x->m++;
    }
    x->n = x->m ? last - x->base : 0;
    return at;
}

INLINE void rows_of(const Call *c, Tile *x, const Rows *from, int bf16) {
    for (long t = 0; t < x->m; t++)
        x->many[t] = row_at(from, x->b, x->g * c->share + x->row[t] / c->i, x->row[t] % c->i, bf16);
}

/* Null behind the last one, up to a whole vector. */
INLINE void keys_of(Tile *x, const Rows *from, int bf16) {
    for (long t = 0; t < x->n; t++) x->keys[t] = row_at(from, x->b, x->g, x->key[t], bf16);
    for (long t = x->n; t < up(x->n, LANES); t++) x->keys[t] = 0;
}

/* Which columns of vector t a row reads: in its range, and not read in an earlier round. */
INLINE Whole seen(const Call *c, const Tile *x, long row, long t) {
    Whole read = inside(t, x->low[row], x->high[row]);
    for (long r = 0; r < x->round; r++) {
        long at = place(c, x, r) + x->row[row];
        Whole rank = *(const Whole *)(x->ranks + r * x->ld + t);
        read &= ~((rank >= c->low[at]) & (rank < c->high[at]));
    }
    return read;
}

/* Scores of the tile, [m ld], not scaled. */
INLINE void scored(const Call *c, Tile *x, int pairs) {
    long terms = words(c->d, pairs), end = up(x->n, LANES);
    const int32_t *order = c->order + (x->round * c->units + x->unit) * c->keys + x->base;
    for (long t = 0; t < x->n; t++) x->key[t] = order[t];
    for (long r = 0; r < x->round; r++) {
        const int32_t *rank = c->rank + (r * c->units + x->unit) * c->keys;
        for (long t = 0; t < end; t++) x->ranks[r * x->ld + t] = t < x->n ? rank[x->key[t]] : 0;
    }
    rows_of(c, x, &c->q, c->bf16);
    for (long t = 0; t < x->m; t++) plain(x->many[t], c->d, c->bf16, pairs, x->q + t * terms);
    keys_of(x, &c->k, c->bf16);
    turned_rows(x->keys, end, c->d, c->bf16, pairs, x->k_turned);
    Product p = {x->q, terms, 1, x->k_turned, LANES, terms * LANES, terms, x->s, x->ld, 0};
    product(p, x->m, end / LANES, pairs);
}

/* Weights [m, ld] (pairs: [m, ld / 2]) times packed rows -> out [m, wide]. */
INLINE void mixed(const Tile *x, const Word *weights, const Word *rows, long wide, int pairs) {
    int per = 1 + pairs;
    Product p = {weights, x->ld / per, 1, rows, wide, LANES, up(x->n, LANES) / per, x->out, wide, 0};
    product(p, x->m, wide / LANES, pairs);
}

/* Weights, turned, times packed rows of the queries -> to [n, wide]. */
INLINE void collected(const Tile *x, const Word *weights, const Word *rows, long wide, float *to, int pairs) {
    Product p = {weights, 1, x->ld, rows, wide, LANES, pairs ? (x->m + 1) / 2 : x->m, to, wide, 0};
    product(p, x->n, wide / LANES, pairs);
}

/* Scores of a row -> 2^(scale s - top), zeros where nothing is read, given what was read before. */
INLINE void softened(const Call *c, Tile *x, long row) {
    long at = x->unit * c->share * c->i + x->row[row], end = up(x->n, LANES);
    float *s = x->s + row * x->ld, before = c->top[at];
    Vector factor = all(c->scale * 1.44269504f), hidden = all(-INFINITY), most = hidden, sums = all(0);
    for (long t = 0; t < end; t += LANES) {
        Vector *y = (Vector *)(s + t);
        *y = (Vector)chosen(seen(c, x, row, t), (Whole)(*y * factor), (Whole)hidden);
        most = larger(*y, most);
    }
    float top = largest(most);
    top = before > top ? before : top;
    x->shrink[row] = before < top ? power(all(before - top))[0] : 1;
    Vector subtracted = all(top == -INFINITY ? 0 : top);
    for (long t = 0; t < end; t += LANES) {
        Vector *y = (Vector *)(s + t);
        *y = (Vector)((Whole)power(*y - subtracted) & ~(Whole)(*y == hidden));
        sums += *y;
    }
    c->top[at] = top;
    c->total[at] = c->total[at] * x->shrink[row] + total(sums);
}

INLINE void forward_tile(const Call *c, Tile *x, int pairs) {
    long end = up(x->n, LANES);
    scored(c, x, pairs);
    for (long t = 0; t < x->m; t++) softened(c, x, t);
    const Word *p = (const Word *)x->s;
    if (pairs) {
        for (long t = 0; t < x->m; t++) halved(x->s + t * x->ld, end, x->p + t * x->ld / 2);
        p = x->p;
    }
    keys_of(x, &c->v, c->bf16);
    across_rows(x->keys, x->n, end, c->e, x->wider, c->bf16, pairs, x->v_across);
    mixed(x, p, x->v_across, x->wider, pairs);
    rows_of(c, x, &c->o, 0);
    for (long t = 0; t < x->m; t++) {
        float *o = (float *)x->many[t], *out = x->out + t * x->wider;
        for (long w = 0; w < c->e; w++) o[w] = o[w] * x->shrink[t] + out[w];
    }
}

/* Scores and dP -> P and dS. */
INLINE void differences(const Call *c, Tile *x, long row) {
    long at = x->unit * c->share * c->i + x->row[row];
    Vector factor = all(c->scale * 1.44269504f), mass = all(c->top[at]), mean = all(c->total[at]);
    Vector scale = all(c->scale);
    for (long t = 0; t < up(x->n, LANES); t += LANES) {
        Vector *s = (Vector *)(x->s + row * x->ld + t), *dp = (Vector *)(x->dp + row * x->ld + t);
        Whole read = seen(c, x, row, t);
        *s = (Vector)((Whole)power(*s * factor - mass) & read);
        *dp = (Vector)((Whole)(*s * (*dp - mean) * scale) & read);
    }
}

INLINE void added(const Call *c, Tile *x, const Rows *to, const float *from, long d, long wide) {
    keys_of(x, to, 0);
    for (long t = 0; t < x->n; t++) {
        float *row = (float *)x->keys[t];
        for (long w = 0; w < d; w++) row[w] += from[t * wide + w];
    }
}

INLINE void backward_tile(const Call *c, Tile *x, int pairs) {
    long terms = words(c->e, pairs), end = up(x->n, LANES), even = up(x->m, 2);
    scored(c, x, pairs); /* x->many, x->keys: queries and keys */
    across_rows(x->keys, x->n, end, c->d, x->wide, c->bf16, pairs, x->k_across);
    across_rows(x->many, x->m, pairs ? even : x->m, c->d, x->wide, c->bf16, pairs, x->q_across);
    rows_of(c, x, &c->grad, c->bf16);
    for (long t = 0; t < x->m; t++) plain(x->many[t], c->e, c->bf16, pairs, x->grad + t * terms);
    across_rows(x->many, x->m, pairs ? even : x->m, c->e, x->wider, c->bf16, pairs, x->grad_across);
    keys_of(x, &c->v, c->bf16);
    turned_rows(x->keys, end, c->e, c->bf16, pairs, x->v_turned);
    Product product_of_gradients = {x->grad, terms, 1, x->v_turned, LANES, terms * LANES, terms, x->dp, x->ld, 0};
    product(product_of_gradients, x->m, end / LANES, pairs);
    for (long t = 0; t < x->m; t++) differences(c, x, t);
    const Word *p = (const Word *)x->s, *ds = (const Word *)x->dp, *ds_rows = ds;
    if (pairs) {
        for (long t = 0; t < x->m; t++) {
            const float *s = x->s + t * x->ld, *dp = x->dp + t * x->ld;
            halved(dp, end, x->p + t * x->ld / 2);
            if (t % 2) continue;
            long more = t + 1 < x->m ? x->ld : 0;
            coupled(s, more ? s + more : 0, end, x->p_pairs + t / 2 * x->ld);
            coupled(dp, more ? dp + more : 0, end, x->ds_pairs + t / 2 * x->ld);
        }
        p = x->p_pairs, ds = x->ds_pairs, ds_rows = x->p;
    }
    mixed(x, ds_rows, x->k_across, x->wide, pairs);
    rows_of(c, x, &c->dq, 0);
    for (long t = 0; t < x->m; t++)
        for (long w = 0; w < c->d; w++) ((float *)x->many[t])[w] += x->out[t * x->wide + w];
    collected(x, ds, x->q_across, x->wide, x->dk, pairs);
    added(c, x, &c->dk, x->dk, c->d, x->wide);
    collected(x, p, x->grad_across, x->wider, x->dv, pairs);
    added(c, x, &c->dv, x->dv, c->e, x->wider);
}

/* ---- a piece: sorted queries of one unit; backward, of whole buckets, so that keys are added to by one thread ---- */

INLINE long border(const Call *c, const Tile *x, long number, int backward) {
    long per = c->share * c->i, at = number * per / c->pieces;
    const int32_t *queries = c->queries + place(c, x, x->round), *start = c->start + place(c, x, x->round);
    while (backward && at > 0 && at < per && start[queries[at]] == start[queries[at - 1]]) at++;
    return at;
}

INLINE void one_piece(const Call *c, Tile *x, long number, int backward, int pairs) {
    long at = border(c, x, number, backward), end = border(c, x, number + 1, backward);
    while (at < end) {
        at = cut(c, x, at, end);
        if (!x->m) break;
        if (backward) backward_tile(c, x, pairs);
        else forward_tile(c, x, pairs);
    }
}

static void piece_of_floats(const Call *c, Tile *x, long number, int backward) {
    if (backward) one_piece(c, x, number, 1, 0);
    else one_piece(c, x, number, 0, 0);
}

static void piece_of_pairs(const Call *c, Tile *x, long number, int backward) {
    if (backward) one_piece(c, x, number, 1, PAIRS);
    else one_piece(c, x, number, 0, PAIRS);
}

INLINE void *taken(char **room, size_t bytes) {
    char *at = *room;
    *room += up(bytes, 64);
    return at;
}

/* Lays the arrays of a thread out from `room` on; where they end. With a null room: how large it has to be. */
static size_t laid_out(const Call *c, Tile *x, char *room, int backward) {
    char *at = room;
    long wide = x->wide = up(c->d, LANES), wider = x->wider = up(c->e, LANES);
    long ld = x->ld = ((c->widest / LANES + 1) | 1) * LANES; /* odd: rows should not fall on one another in the cache */
    x->keys = taken(&at, sizeof(char *) * ld);
    x->key = taken(&at, 4 * ld);
    x->ranks = taken(&at, 4 * ld * c->rounds);
    x->k_turned = taken(&at, 4 * ld * c->d);
    x->v_across = taken(&at, 4 * ld * wider);
    x->q = taken(&at, 4 * ROWS * c->d);
    x->s = taken(&at, 4 * ROWS * ld);
    x->p = taken(&at, 4 * ROWS * ld);
    x->out = taken(&at, 4 * ROWS * (wide > wider ? wide : wider));
    if (!backward) return at - room;
    x->v_turned = taken(&at, 4 * ld * c->e);
    x->k_across = taken(&at, 4 * ld * wide);
    x->grad = taken(&at, 4 * ROWS * c->e);
    x->q_across = taken(&at, 4 * ROWS * wide);
    x->grad_across = taken(&at, 4 * ROWS * wider);
    x->dp = taken(&at, 4 * ROWS * ld);
    x->p_pairs = taken(&at, 4 * ROWS * ld);
    x->ds_pairs = taken(&at, 4 * ROWS * ld);
    x->dk = taken(&at, 4 * ld * wide);
    x->dv = taken(&at, 4 * ld * wider);
    return at - room;
}

/* 0, or 1 where there is no memory. */
static int run(const Call *c, int backward) {
    long failed = 0;
#pragma omp parallel num_threads(c->threads)
    {
        Tile x = {0};
        char *room = aligned_alloc(64, laid_out(c, &x, 0, backward));
        if (!room) {
#pragma omp atomic
            failed++;
        }
#pragma omp barrier
        if (!failed) {
            laid_out(c, &x, room, backward);
            for (x.round = 0; x.round < c->rounds; x.round++) {
#pragma omp for schedule(dynamic)
                for (long n = 0; n < c->units * c->pieces; n++) {
                    x.unit = n / c->pieces, x.b = x.unit / c->groups, x.g = x.unit % c->groups;
                    if (c->bf16 && PAIRS) piece_of_pairs(c, &x, n % c->pieces, backward);
                    else piece_of_floats(c, &x, n % c->pieces, backward);
                }
            }
        }
        free(room);
    }
    return failed != 0;
}

int tfast_runs_forward(const Call *c) { return run(c, 0); }
int tfast_runs_backward(const Call *c) { return run(c, 1); }
