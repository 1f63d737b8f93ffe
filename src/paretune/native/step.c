/* One optimizer step: AdamW's moments in one pass, δ only where it is kept, its consensus with τ added to θ there.

   paretune.optim is the definition: every function here gives its bits. Where torch rounds once (moments), so does
   fmaf; elsewhere nothing is contracted. */

#include "adam.h"

EACH_PROCESSOR void paretune_moments(const struct adam *adam, const struct parameter *p)
{
    advance_all(adam, p);
}

/* Moments, and θ += C(δ at `index`, τ) while they are in the cache. */
EACH_PROCESSOR void paretune_add_at(const struct adam *adam, const struct parameter *p, const int64_t *index,
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

/* The same with masks of many elements: δ and τ (dense) are kept where their hashes are below `limit`; `first` is the
   parameter's first element in the whole tensor, a multiple of TILE. */
EACH_PROCESSOR void paretune_add_masked(const struct adam *adam, const struct parameter *p, int64_t first,
                                        uint64_t own, uint64_t other, int64_t limit, const float *tau)
{
    int all = limit > INT32_MAX;
    for (int64_t at = 0; at < p->n; at += TILE) {
        int n = p->n - at < TILE ? (int)(p->n - at) : TILE;
        struct mask mine = mask_at(own, limit, first + at), theirs = mask_at(other, limit, first + at);
        const float *m = p->mean + at, *v = p->square + at;
        float a[TILE], b[TILE];
        advance_tile(adam, p, at, n);
        for (int i = 0; i < n; i++) {
            float delta = update(adam, m[i], v[i]) / adam->density, other = clipped(adam, tau[at + i]);
            a[i] = all | kept_at(&mine, i) ? delta : 0.0f;
            b[i] = all | kept_at(&theirs, i) ? other : 0.0f;
        }
        if (adam->consensus == WEIGHTED_SUM) /* a loop of its own: it has no branches */
            for (int i = 0; i < n; i++) a[i] = adam->own * a[i] + adam->weight * b[i];
        else
            for (int i = 0; i < n; i++) a[i] = consensus(adam, a[i], b[i]);
        if (p->low)
            for (int i = 0; i < n; i++) add(p, at + i, a[i]);
        else
            for (int i = 0; i < n; i++) ((float *)p->theta)[at + i] += a[i];
    }
}

/* θ ← factor·θ, for bfloat16 with its low halves. */
EACH_PROCESSOR void paretune_scale(const struct parameter *p, float factor)
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
int64_t paretune_fuses(void)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_supports("fma") != 0 && __builtin_cpu_supports("avx2") != 0;
#else
    return 1;
#endif
}
