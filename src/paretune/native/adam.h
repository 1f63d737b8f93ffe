/* AdamW's update of one parameter, and how it and τ change θ where either is kept. */

#ifndef PARETUNE_ADAM_H
#define PARETUNE_ADAM_H

#include <math.h>

#include "numbers.h"

enum { PAGE = 65536 };
enum { WEIGHTED_SUM, ELECTION_WEIGHTED, ELECTION_UNWEIGHTED };

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

INLINE void advance_all(const struct adam *adam, const struct parameter *p)
{
    for (int64_t at = 0; at < p->n; at += TILE)
        advance_tile(adam, p, at, p->n - at < TILE ? (int)(p->n - at) : TILE);
}

INLINE float update(const struct adam *adam, float m, float v)
{
    return m * adam->size / (__builtin_sqrtf(v) / adam->root + adam->eps);
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

INLINE float clipped(const struct adam *adam, float x)
{
    x /= adam->density;
    return x < -adam->clip ? -adam->clip : x > adam->clip ? adam->clip : x;
}

INLINE float tau_value(const struct adam *adam, const struct cursor *c)
{
    return clipped(adam, c->tau->values[c->next]);
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

#endif
