/* A range of a merge: its tensors, read tile by tile, and which entries of their task vectors are kept. */

#ifndef PARETUNE_VECTORS_H
#define PARETUNE_VECTORS_H

#include "numbers.h"

enum { ALL, RANDOM, MAGNITUDE }; /* which entries of a task vector are kept */
enum { LANES = 64, BLOCK = 65536 };

struct source {
    const char *data; /* the first element of the range */
    int64_t kind;
};

struct keep {
    int64_t how;
    uint64_t key; /* RANDOM: kept where the hash of the element's number, read as signed, is below limit */
    int64_t limit;
    int64_t threshold, tied, wanted; /* MAGNITUDE: as paretune.merging.selection.Cut has them */
    const int64_t *before;
};

struct range {
    const struct source *sources; /* `count` models, then the base where there is one */
    int64_t count, based;
    int64_t start, n; /* start is a multiple of BLOCK, counted in elements of the whole tensor */
    int64_t kind;     /* of the results */
    int64_t election;
    int64_t careful; /* NaN is written as one and the same */
    float *scratch;  /* (3·count + 6) TILE */
};

/* ---- tiles ---------------------------------------------------------------------------------------------------- */

INLINE void widen(const struct source *source, int64_t at, int n, float *restrict out)
{
    word *restrict bits = (word *)out;
    if (source->kind == BF16) {
        const half_word *in = (const half_word *)source->data + at;
        for (int i = 0; i < n; i++) bits[i] = (uint32_t)in[i] << 16;
    } else if (source->kind == F16) {
        const half_word *in = (const half_word *)source->data + at;
        for (int i = 0; i < n; i++) bits[i] = from_half(in[i]);
    } else {
        memcpy(out, source->data + at * 4, (size_t)n * 4);
    }
}

/* Starts reading the tile at `at`: streams as short as tiles are not foreseen by the processor. */
INLINE void fetch(const struct source *source, int64_t at)
{
    int64_t size = source->kind == F32 ? 4 : 2;
    const char *first = source->data + at * size;
    for (int64_t i = 0; i < TILE * size; i += 64) __builtin_prefetch(first + i);
}

/* The models' elements, or their task vectors where there is a base, whose elements go to `base`. */
INLINE void load(const struct source *sources, int64_t count, int64_t based, int64_t at, int n, float *vectors,
                 float *restrict base)
{
    if (based) widen(&sources[count], at, n, base);
    for (int64_t i = 0; i < count; i++) {
        float *vector = vectors + i * TILE;
        widen(&sources[i], at, n, vector);
        if (based)
            for (int j = 0; j < n; j++) vector[j] -= base[j];
    }
}

/* ---- which entries are kept ----------------------------------------------------------------------------------- */

INLINE void keep_random(const struct keep *keep, int64_t first, int n, const word *restrict in, word *restrict out)
{
    struct mask mask = mask_at(keep->key, keep->limit, first);
    if (keep->limit > INT32_MAX) {
        if (in != out) memcpy(out, in, (size_t)n * 4);
        return;
    }
    for (int i = 0; i < n; i++) out[i] = kept_at(&mask, i) ? in[i] : 0;
}

/* `rank` counts the ties before this tile; returns those before the next. `kept` becomes all ones or zero. */
INLINE int64_t keep_largest(const struct keep *keep, int64_t rank, int n, const word *restrict in,
                            word *restrict out, word *restrict kept)
{
    uint32_t threshold = (uint32_t)keep->threshold;
    uint32_t ties = 0;
    for (int i = 0; i < n; i++) {
        uint32_t magnitude = in[i] & MAGNITUDE_BITS;
        ties += magnitude == threshold;
        kept[i] = magnitude >= threshold ? 0xFFFFFFFF : 0;
    }
    if (keep->before && ties) {
        uint8_t flags[TILE];
        for (int i = 0; i < n; i++) flags[i] = (in[i] & MAGNITUDE_BITS) == threshold;
        for (int i = n; i % 64; i++) flags[i] = 0;
        /* rank t is kept if it is ⌊i·tied/wanted⌋ for some i < wanted; next and rest follow that quotient */
        int64_t tied = keep->tied, wanted = keep->wanted;
        int64_t i = (rank * wanted + tied - 1) / tied;
        int64_t next = i * tied / wanted, rest = i * tied % wanted, at = rank;
        for (int first = 0; first < n; first += 64)
            for (uint64_t set = gathered(flags + first); set; set &= set - 1, at++) {
                if (at != next || i >= wanted) {
                    kept[first + lowest(set)] = 0;
                    continue;
                }
                i++;
                next += tied / wanted;
                rest += tied % wanted;
                if (rest >= wanted) rest -= wanted, next++;
            }
    }
    for (int i = 0; i < n; i++) out[i] = in[i] & kept[i];
    return rank + ties;
}

INLINE int64_t sparsify(const struct keep *keep, int64_t first, int n, int64_t rank, const float *in, float *out,
                        float *kept)
{
    if (keep->how == RANDOM) {
        keep_random(keep, first, n, (const word *)in, (word *)out);
    } else if (keep->how == MAGNITUDE) {
        if (first % BLOCK == 0) rank = keep->before ? keep->before[first / BLOCK] : 0;
        return keep_largest(keep, rank, n, (const word *)in, (word *)out, (word *)kept);
    } else {
        memcpy(out, in, (size_t)n * 4);
    }
    return rank;
}

#endif
