/* One step with the k largest of δ: found in the pass over the moments, chosen exactly, merged with τ. */

#include "adam.h"

enum { LINE = 16, LINES = 256, DIGITS = 2048 };

struct found {
    int32_t *index;
    float *values;
    int64_t count, size; /* count > size − TILE: there was no room for all */
};

/* Collects the elements with |δ| ≥ bound > 0 (bits), after advancing the moments if `moving`. */
INLINE void collect(const struct adam *adam, const struct parameter *p, uint32_t bound, int moving,
                    struct found *found)
{
    double b = of_bits(bound);
    float factor = (float)(adam->cautious * b * b);
    int squares = adam->least * b >= 1e-17; /* else m² could underflow: δ itself is computed */
    found->count = 0;
    for (int64_t at = 0; at < p->n; at += TILE) {
        int n = p->n - at < TILE ? (int)(p->n - at) : TILE;
        if (moving) advance_tile(adam, p, at, n);
        if (found->count > found->size - TILE) {
            if (!moving) return;
            continue;
        }
        const float *m = p->mean + at, *v = p->square + at;
        uint8_t flags[TILE];
        if (squares) /* as a difference, so that ∞ against ∞ is NaN and counts */
            for (int i = 0; i < n; i++) flags[i] = !(v[i] * factor - m[i] * m[i] >= 0);
        else
            for (int i = 0; i < n; i++) flags[i] = magnitude(update(adam, m[i], v[i])) >= bound;
        for (int i = n; i % 64; i++) flags[i] = 0;
        for (int start = 0; start < n; start += 64)
            for (uint64_t set = gathered(flags + start); set; set &= set - 1) {
                int i = start + lowest(set);
                float delta = update(adam, m[i], v[i]);
                found->index[found->count] = (int32_t)(at + i);
                found->values[found->count] = delta;
                found->count += magnitude(delta) >= bound;
            }
    }
}

/* A k-th magnitude, digit by digit: 11, 10 and 10 bits. */
struct descent {
    uint32_t prefix;
    int shift;      /* of the digit to come; the prefix is above shift + bits */
    int64_t left;   /* wanted at or below the prefix */
    int64_t inside; /* how many have the prefix */
};

INLINE int digit_bits(const struct descent *d) { return d->shift == 20 ? 11 : 10; }

INLINE void tally(const struct descent *d, const float *values, int64_t n, int64_t *counts)
{
    int bits = digit_bits(d);
    for (int64_t i = 0; i < n; i++) {
        uint32_t key = magnitude(values[i]);
        if (d->shift == 20 || key >> (d->shift + bits) == d->prefix) counts[key >> d->shift & ((1u << bits) - 1)]++;
    }
}

INLINE void descend(struct descent *d, const int64_t *counts)
{
    int bits = digit_bits(d);
    int64_t digit = (1 << bits) - 1;
    while (counts[digit] < d->left) d->left -= counts[digit--];
    d->prefix = d->prefix << bits | (uint32_t)digit;
    d->inside = counts[digit];
    d->shift -= 10;
}

INLINE void deltas(const struct adam *adam, const struct parameter *p, int64_t at, int n, float *restrict out)
{
    for (int i = 0; i < n; i++) out[i] = update(adam, p->mean[at + i], p->square[at + i]);
}

/* The k-th magnitude of `count` values, or of all of δ where values is NULL. */
INLINE struct descent kth(const struct adam *adam, const struct parameter *p, const float *values, int64_t count,
                          int64_t k)
{
    struct descent d = {0, 20, k, count};
    while (d.shift >= 0) {
        int64_t counts[DIGITS] = {0};
        float some[TILE];
        if (values) {
            tally(&d, values, count, counts);
        } else {
            for (int64_t at = 0; at < count; at += TILE) {
                int n = count - at < TILE ? (int)(count - at) : TILE;
                deltas(adam, p, at, n, some);
                tally(&d, some, n, counts);
            }
        }
        descend(&d, counts);
    }
    return d;
}

/* Whether an element is kept; of `inside` ties those with rank ⌊i·inside/left⌋ for an i < left. */
INLINE int taken(const struct descent *d, uint32_t key, int64_t *rank)
{
    if (key != d->prefix) return key > d->prefix;
    if (key == 0) return 0;
    int64_t i = (*rank * d->left + d->inside - 1) / d->inside;
    int take = i < d->left && i * d->inside / d->left == *rank;
    ++*rank;
    return take;
}

/* The k largest of `found`, or of all of δ. */
INLINE void choose(const struct adam *adam, const struct parameter *p, int64_t k, int among, struct found *found)
{
    int64_t rank = 0, count = 0;
    if (among) {
        struct descent d = kth(adam, p, found->values, found->count, k);
        for (int64_t i = 0; i < found->count; i++) {
            found->index[count] = found->index[i];
            found->values[count] = found->values[i];
            count += taken(&d, magnitude(found->values[i]), &rank);
        }
    } else {
        struct descent d = kth(adam, p, 0, p->n, k);
        float some[TILE];
        for (int64_t at = 0; at < p->n; at += TILE) {
            int n = p->n - at < TILE ? (int)(p->n - at) : TILE;
            deltas(adam, p, at, n, some);
            for (int i = 0; i < n; i++) {
                found->index[count] = (int32_t)(at + i);
                found->values[count] = some[i];
                count += taken(&d, magnitude(some[i]), &rank);
            }
        }
    }
    found->count = count;
}

/* Where to look: a varying place within each stride does not fall into step with the rows of a matrix. */
INLINE int64_t place(const struct parameter *p, int64_t line)
{
    int64_t stride = p->n / LINES;
    return line * stride + (int64_t)((uint32_t)line * 2654435761u >> 8) % (stride - LINE + 1);
}

/* Magnitudes that δ will have after this step, at LINES places spread over the parameter. */
INLINE void sample(const struct adam *adam, const struct parameter *p, float *out)
{
    enum { AHEAD = 12 };
    int64_t width = p->gradient_half ? 2 : 4;
    for (int64_t line = 0; line < LINES + AHEAD; line++) {
        if (line < LINES) {
            int64_t at = place(p, line);
            for (int64_t i = 0; i < LINE + 15; i += 16) {
                int64_t then = at + (i < LINE ? i : LINE - 1);
                __builtin_prefetch(p->mean + then);
                __builtin_prefetch(p->square + then);
                __builtin_prefetch(p->gradient + then * width);
            }
        }
        if (line < AHEAD) continue;
        int64_t at = place(p, line - AHEAD);
        float g[TILE], m[LINE], v[LINE];
        gradients(p, at, LINE, g);
        memcpy(m, p->mean + at, sizeof m);
        memcpy(v, p->square + at, sizeof v);
        advance(adam, LINE, g, m, v);
        for (int i = 0; i < LINE; i++) *out++ = update(adam, m[i], v[i]);
    }
}

/* Moments, F(δ) = the k largest, θ += C(F(δ), τ). `index` and `values` have room for `size` ≥ k + TILE entries, and
   for n + TILE where n ≤ 4·LINE·LINES. Returns how many entries of δ were kept. */
EACH_PROCESSOR int64_t paretune_add_largest(const struct adam *adam, const struct parameter *p, int64_t k,
                                            const struct kept *tau, int32_t *index, float *values,
                                            int64_t size)
{
    struct found found = {index, values, 0, size};
    int done = 0, moving = 1;
    if (p->n <= 4 * LINE * LINES) {
        collect(adam, p, 1, moving, &found); /* all but zeros */
        done = 1;
        if (found.count > k) choose(adam, p, k, 1, &found);
    } else {
        float sampled[LINE * LINES];
        sample(adam, p, sampled);
        double share = (double)(LINE * LINES) * (double)k / (double)p->n;
        int64_t rank = (int64_t)(share + 4 * sqrt(share) + 4);
        for (; !done && rank < LINE * LINES; rank = 2 * rank + 1) {
            uint32_t bound = kth(adam, p, sampled, LINE * LINES, rank + 1).prefix;
            if (bound == 0) break;
            collect(adam, p, bound < INFINITE ? bound : INFINITE, moving, &found);
            moving = 0;
            if (found.count > size - TILE) break;
            if (found.count >= k) {
                choose(adam, p, k, 1, &found);
                done = 1;
            }
        }
    }
    if (moving && !done) advance_all(adam, p);
    if (!done) choose(adam, p, k, 0, &found);
    struct cursor c = first(tau);
    for (int64_t i = 0; i < found.count; i++) {
        if (i + 16 < found.count) __builtin_prefetch(p->theta + found.index[i + 16] * (p->low ? 2 : 4), 1);
        add_own(adam, p, &c, found.index[i], found.values[i]);
    }
    add_rest(adam, p, &c);
    return found.count;
}
