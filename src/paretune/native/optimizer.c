/* One optimizer step: AdamW's moments in one pass, δ only where it is kept, its consensus with τ added to θ there.

   paretune.optim is the definition: every function here gives its bits. Where torch rounds once (moments), so does
   fmaf; elsewhere nothing is contracted. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
#define EACH_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#elif defined(__x86_64__) && defined(__GLIBC__) && (!defined(__clang__) || __clang_major__ >= 14)
#define EACH_PROCESSOR __attribute__((target_clones("avx512f", "avx2,fma", "default")))
#else
#define EACH_PROCESSOR
#endif

#define PUBLIC __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))

enum { TILE = 512, LINE = 16, LINES = 256, DIGITS = 2048, PAGE = 65536 };
enum { WEIGHTED_SUM, ELECTION_WEIGHTED, ELECTION_UNWEIGHTED };

static const uint32_t MAGNITUDE_BITS = 0x7FFFFFFF, INFINITE = 0x7F800000;

struct adam {
    float toward;       /* 1 − β₁ */
    float keep, add;    /* β₂, 1 − β₂ */
    float size;         /* the factor of m in δ */
    float root, eps;    /* δ = size·m / (√v/root + eps); root 1 where there is no correction of v */
    float own, weight;  /* 1 − α, α */
    float density;      /* δ and τ are divided by it: 1 for no rescale */
    float clip;         /* τ is then clamped to ±clip: infinite for no clamp */
    double cautious;    /* (size·root)⁻² and a little less: |δ| ≥ b needs m² ≥ cautious·b²·v */
    double least;       /* eps/|size|: |δ| ≥ b needs |m| ≥ least·b */
    int64_t consensus;
};

/* A parameter with its state; gradients and parameters are float32, or bfloat16 where `half` (`low`: the rest of θ). */
struct parameter {
    char *theta;
    int16_t *low;
    float *mean, *square;
    const char *gradient;
    int64_t gradient_half, n;
};

/* F(τ): values and positions, ascending: plain (paretune_add_at), or within pages of 65,536 as paretune.optim.sparse has them. */
struct kept {
    const int64_t *index;
    const int16_t *local;
    const int32_t *pages;
    const float *values;
    int64_t count;
};

INLINE uint32_t magnitude(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits & MAGNITUDE_BITS;
}

INLINE float of_bits(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

INLINE void gradients(const struct parameter *p, int64_t at, int n, float *restrict out)
{
    if (p->gradient_half) {
        const uint16_t *in = (const uint16_t *)p->gradient + at;
        uint32_t bits[TILE];
        for (int i = 0; i < n; i++) bits[i] = (uint32_t)in[i] << 16;
        memcpy(out, bits, (size_t)n * 4);
    } else {
        memcpy(out, (const float *)p->gradient + at, (size_t)n * 4);
    }
}

/* m ← m + (1−β₁)(g − m), v ← β₂v + (1−β₂)g² */
INLINE void advance(const struct adam *adam, int n, const float *restrict g, float *restrict m, float *restrict v)
{
    float toward = adam->toward, keep = adam->keep, add = adam->add;
    if (toward < 0.5f)
        for (int i = 0; i < n; i++) m[i] = fmaf(toward, g[i] - m[i], m[i]);
    else /* torch's lerp starts from the nearer end */
        for (int i = 0; i < n; i++) m[i] = fmaf(toward - 1, g[i] - m[i], g[i]);
    for (int i = 0; i < n; i++) v[i] = fmaf(add * g[i], g[i], v[i] * keep);
}

INLINE void advance_tile(const struct adam *adam, const struct parameter *p, int64_t at, int n)
{
    if (p->gradient_half) {
        float g[TILE];
        gradients(p, at, n, g);
        advance(adam, n, g, p->mean + at, p->square + at);
    } else {
        advance(adam, n, (const float *)p->gradient + at, p->mean + at, p->square + at);
    }
}

INLINE float update(const struct adam *adam, float m, float v)
{
    return m * adam->size / (__builtin_sqrtf(v) / adam->root + adam->eps);
}

PUBLIC EACH_PROCESSOR void paretune_moments(const struct adam *adam, const struct parameter *p)
{
    for (int64_t at = 0; at < p->n; at += TILE)
        advance_tile(adam, p, at, p->n - at < TILE ? (int)(p->n - at) : TILE);
}

/* ---- consensus and θ ------------------------------------------------------------------------------------------ */

INLINE int sign(float x) { return (x > 0) - (x < 0); }

INLINE float consensus(const struct adam *adam, float a, float b)
{
    if (adam->consensus == ELECTION_UNWEIGHTED) {
        int positive = a + b >= 0;
        float x = positive == (a >= 0) || !(a < 0 || a > 0) ? a : 0.0f;
        float y = positive == (b >= 0) || !(b < 0 || b > 0) ? b : 0.0f;
        return adam->own * x + adam->weight * y;
    }
    a *= adam->own;
    b *= adam->weight;
    if (adam->consensus == ELECTION_WEIGHTED && sign(a) * sign(b) < 0)
        return fabsf(a) > fabsf(b) ? a : fabsf(b) > fabsf(a) ? b : 0.0f;
    return a + b;
}

INLINE void add(const struct parameter *p, int64_t at, float value)
{
    if (!p->low) {
        ((float *)p->theta)[at] += value;
        return;
    }
    int16_t *high = (int16_t *)p->theta;
    float x = of_bits(((uint32_t)(int32_t)high[at] << 16) + (uint32_t)(int32_t)p->low[at]) + value;
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x) bits = 0x7FC00000; /* a NaN with a full payload would round over into -0 */
    int32_t upper = (int32_t)(bits + 0x8000) >> 16;
    high[at] = (int16_t)upper;
    p->low[at] = (int16_t)(bits - ((uint32_t)upper << 16));
}

struct cursor {
    const struct kept *tau;
    int64_t next, page, left, at; /* at: the position of entry `next`, INT64_MAX after the last */
};

INLINE void step_on(struct cursor *c)
{
    const struct kept *tau = c->tau;
    if (++c->next >= tau->count) {
        c->at = INT64_MAX;
    } else if (tau->index) {
        c->at = tau->index[c->next];
    } else {
        while (c->left == 0) c->left = tau->pages[++c->page];
        c->left--;
        c->at = c->page * PAGE + tau->local[c->next] + PAGE / 2;
    }
}

INLINE float tau_value(const struct adam *adam, const struct cursor *c)
{
    float x = c->tau->values[c->next] / adam->density;
    return x < -adam->clip ? -adam->clip : x > adam->clip ? adam->clip : x;
}

INLINE void add_own(const struct adam *adam, const struct parameter *p, struct cursor *c, int64_t at, float delta)
{
    for (; c->at < at; step_on(c)) add(p, c->at, consensus(adam, 0, tau_value(adam, c)));
    delta /= adam->density;
    if (c->at == at) {
        add(p, at, consensus(adam, delta, tau_value(adam, c)));
        step_on(c);
    } else {
        add(p, at, consensus(adam, delta, 0));
    }
}

INLINE struct cursor first(const struct kept *tau)
{
    struct cursor c = {tau, -1, -1, 0, 0};
    step_on(&c);
    return c;
}

INLINE void add_rest(const struct adam *adam, const struct parameter *p, struct cursor *c)
{
    for (; c->at != INT64_MAX; step_on(c)) add(p, c->at, consensus(adam, 0, tau_value(adam, c)));
}

/* Moments, and θ += C(δ at `index`, τ) while they are in the cache. */
PUBLIC EACH_PROCESSOR void paretune_add_at(const struct adam *adam, const struct parameter *p, const int64_t *index,
                                           int64_t count, const struct kept *tau)
{
    enum { AHEAD = 8 };
    int64_t width = p->low ? 2 : 4, i = 0;
    struct cursor c = first(tau);
    for (int64_t at = 0; at < p->n; at += TILE) {
        int n = p->n - at < TILE ? (int)(p->n - at) : TILE;
        advance_tile(adam, p, at, n);
        for (; i < count && index[i] < at + n; i++) {
            if (i + AHEAD < count) __builtin_prefetch(p->theta + index[i + AHEAD] * width, 1);
            if (c.next + AHEAD < tau->count) __builtin_prefetch(p->theta + tau->index[c.next + AHEAD] * width, 1);
            add_own(adam, p, &c, index[i], update(adam, p->mean[index[i]], p->square[index[i]]));
        }
    }
    add_rest(adam, p, &c);
}

/* ---- the k largest of δ --------------------------------------------------------------------------------------- */

/* 64 flags, each 0 or 1, as the bits of a word. */
INLINE uint64_t gathered(const uint8_t *flags)
{
    uint64_t found = 0;
    for (int i = 0; i < 8; i++) {
        uint64_t eight;
        memcpy(&eight, flags + 8 * i, 8);
        found |= (eight * 0x0102040810204080u >> 56) << 8 * i;
    }
    return found;
}

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
                int i = start + __builtin_ctzll(set);
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
PUBLIC EACH_PROCESSOR int64_t paretune_add_largest(const struct adam *adam, const struct parameter *p, int64_t k,
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
    if (moving && !done) paretune_moments(adam, p);
    if (!done) choose(adam, p, k, 0, &found);
    struct cursor c = first(tau);
    for (int64_t i = 0; i < found.count; i++) {
        if (i + 16 < found.count) __builtin_prefetch(p->theta + found.index[i + 16] * (p->low ? 2 : 4), 1);
        add_own(adam, p, &c, found.index[i], found.values[i]);
    }
    add_rest(adam, p, &c);
    return found.count;
}

/* θ ← factor·θ, for bfloat16 with its low halves. */
PUBLIC EACH_PROCESSOR void paretune_scale(const struct parameter *p, float factor)
{
    uint16_t *high = (uint16_t *)p->theta;
    for (int64_t at = 0; at < p->n; at++) {
        float x = of_bits(((uint32_t)high[at] << 16) + (uint32_t)(int32_t)p->low[at]) * factor;
        uint32_t bits;
        memcpy(&bits, &x, 4);
        bits = x != x ? 0x7FC00000 : bits;
        uint32_t upper = (bits + 0x8000) >> 16;
        high[at] = (uint16_t)upper;
        p->low[at] = (int16_t)(bits - (upper << 16));
    }
}

/* Whether fmaf is an instruction here; where it is not, torch does not round once either. */
PUBLIC int64_t paretune_fuses(void)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_supports("fma") != 0 && __builtin_cpu_supports("avx2") != 0;
#else
    return 1;
#endif
}
