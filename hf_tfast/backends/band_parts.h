/* Which keys a row of queries reads, and where they lie among packed keys and in a row of scores. */

#include "band_packing.h"

typedef struct {
    Rows q, k, v, o, grad, dq, dk, dv; /* the last four backward only; dk, dv are fp32 */
    const float *sinks;                /* [h] logits, or null */
    float *dsinks, *dfirst;            /* [chunks b h]; [chunks b g first d + e], null with lists */
    const int64_t *lists;              /* [h or 1, blocks of queries, most] blocks of keys in any order, or null */
    long batch, heads, groups, queries, keys, d, e, before, after, first, offset, chunk, rows;
    long list, most, block; /* numbers from one head's lists to the next; of a list; keys of a block */
    float scale;
    int bf16, threads, banded, causal;
} Call;

enum { FIRST, BAND, LISTED };

/* Some columns of a block's scores: `n` of them, whole vectors, from packed column `from` on, at s[at]. Of listed
   blocks, keys [low, high). */
typedef struct {
    int kind;
    long from, n, at, low, high;
} Part;

typedef struct {
    long b, g, low, keys;  /* packed keys: the first ones, then `keys` from key `low` on; with lists every key, once */
    long firsts, skip, ld, wide, wider; /* columns of the first keys, packed beforehand; of a row of scores; d and e in
                                           whole vectors */
    Word *k_turned, *v_turned, *k_across, *v_across, *q, *q_across, *grad, *grad_across, *p, *p_pairs, *ds_pairs;
    float *s, *dp, *out, *dk, *dv, *sum, *sink;
    Part *parts;
    long *blocks;
} Chunk;

/* Row `r` of the tensor of queries reads the first keys below `first`, keys in [low, high), and listed ones that lie
   in front of `end`. */
typedef struct {
    long first, low, high, end;
} Reach;

INLINE Reach reach(const Call *c, long row) {
    long at = row + c->offset;
    Reach x = {0, at - c->before, at + c->after + 1, c->causal && at < c->keys ? at + 1 : c->keys};
    if (!c->banded) x.low = x.high = x.end;
    x.low = x.low < 0 ? 0 : x.low;
    x.high = x.high > c->keys ? c->keys : x.high;
    x.first = c->first < x.low ? c->first : x.low;
    return x;
}

/* The blocks listed for the queries around `row`: ascending, each once, none that does not exist or lies behind them
   under causality. How many. */
static long listed(const Call *c, long head, long row, long *blocks) {
    long own = (row + c->offset) / c->block, count = (c->keys + c->block - 1) / c->block, n = 0;
    const int64_t *list = c->lists + head * c->list + own * c->most;
    for (long t = 0; t < c->most; t++) {
        long block = list[t], at = n;
        if (block < 0 || block >= count || (c->causal && block > own)) continue;
        while (at && blocks[at - 1] >= block) at--;
        if (at < n && blocks[at] == block) continue;
        memmove(blocks + at + 1, blocks + at, (n - at) * sizeof(long));
        blocks[at] = block;
        n++;
    }
    return n;
}

/* Adds the listed keys of rows [row, row + m), which lie in one block of queries: blocks side by side are one part.
   Keys that every row reads already are left out at either end. How many parts. */
static int listed_parts(const Call *c, Chunk *x, long head, long row, long m, Part *parts, int n, long at) {
    Reach one = reach(c, row), last = reach(c, row + m - 1);
    long *blocks = x->blocks, count = listed(c, head, row, blocks);
    for (long t = 0; t < count;) {
        long low = blocks[t] * c->block, high = low;
        for (; t < count && blocks[t] * c->block == high; t++) high += c->block;
        low = low < c->first ? c->first : low;
        high = high > last.end ? last.end : high;
        if (low >= last.low && low < one.high) low = one.high;
        if (high > last.low && high <= one.high) high = last.low;
        if (low >= high) continue;
        long from = low / LANES * LANES, wide = up(high, LANES) - from;
        parts[n++] = (Part){LISTED, from, wide, at, low, high};
        at += wide;
    }
    x->ld = at | LANES; /* rows of a power of two would meet in few sets of the cache */
    return n;
}

/* The columns that rows [row, row + m) read: how many parts. */
INLINE int parts_of(const Call *c, Chunk *x, long head, long row, long m, Part *parts) {
    Reach one = reach(c, row), last = reach(c, row + m - 1);
    int n = 0;
    long at = x->firsts;
    if (last.first) parts[n++] = (Part){FIRST, 0, x->firsts, 0, 0, 0};
    if (c->banded) {
        long from = (one.low - x->low) / LANES * LANES, wide = up(last.high - x->low, LANES) - from;
        parts[n++] = (Part){BAND, x->skip + from, wide, at, 0, 0};
        at += wide;
    }
    return c->lists ? listed_parts(c, x, head, row, m, parts, n, at) : n;
}

/* What a row reads of a part: columns in [low, high), but for those in [hole, end), which the band has counted. */
typedef struct {
    long low, high, hole, end;
} Range;

INLINE Range range(const Call *c, const Chunk *x, long row, const Part *part, int lists) {
    Reach r = reach(c, row);
    long shift = x->low + part->from - x->skip; /* the key of the first column, but for the first keys */
    if (part->kind == FIRST) return (Range){0, r.first, 0, 0};
    if (!lists || part->kind == BAND) return (Range){r.low - shift, r.high - shift, 0, 0};
    long high = part->high < r.end ? part->high : r.end;
    return (Range){part->low - shift, high - shift, r.low - shift, r.high - shift};
}

/* Are all columns of the vector at t read? */
INLINE int entire(Range x, long t, int lists) {
    return t >= x.low && t + LANES <= x.high && (!lists || t >= x.end || t + LANES <= x.hole);
}

INLINE Whole visible(Range x, long t, int lists) {
    Whole seen = inside(t, x.low, x.high);
    if (lists) seen &= ~inside(t, x.hole, x.end);
    return seen;
}

/* Rows from `row` on that go together: a few, of one block of queries where keys are listed. */
INLINE long together(const Call *c, long row, long to) {
    long m = row + c->rows < to ? c->rows : to - row;
    if (!c->lists) return m;
    long rest = c->block - (row + c->offset) % c->block;
    return m < rest ? m : rest;
}

/* How many parts, and how many columns in them, rows of a block have at most. */
INLINE long most_parts(const Call *c) { return 2 + (c->lists ? c->most : 0); }
INLINE long most_columns(const Call *c) {
    long near = up(c->first, LANES) + up(c->rows + c->before + c->after, LANES) + 2 * LANES, far = 0;
    if (c->lists) {
        long blocks = (c->keys + c->block - 1) / c->block, n = c->most < blocks ? c->most : blocks;
        far = up(n * c->block, LANES) + (2 * n + 1) * LANES;
    }
    return near + far;
}
