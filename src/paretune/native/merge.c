/* The arithmetic of merging on one range of one tensor, in passes over tiles that stay in the first-level cache.

   paretune.merging.eager is the definition: every function here gives its bits, on any processor. Hence no contraction
   of multiply and add, no reassociation, and sums in LANES partial sums whose order is fixed. Nothing is allocated and
   nothing is kept; Python calls these through ctypes, which releases the interpreter's lock. */

#include "vectors.h"

#define PARETUNE_KERNELS_VERSION 3

struct result {
    const double *coefficients; /* one a source */
    const float *weights;       /* of those who agree, for normalize */
    const struct keep *keep;    /* one a source */
    char *out;
    float scale;
    int32_t normalize;
};

/* Rounds once, half to even; returns the largest magnitude of what is stored. */
INLINE uint32_t narrow(const float *restrict values, int64_t kind, int64_t careful, int64_t at, int n, char *out)
{
    const word *bits = (const word *)values;
    uint32_t largest = 0;
    if (kind == F32) {
        loose_word *to = (loose_word *)out + at;
        for (int i = 0; i < n; i++) {
            uint32_t x = bits[i], magnitude = x & MAGNITUDE_BITS;
            if (careful) x = magnitude > INFINITE ? 0x7FC00000 : x;
            largest = magnitude > largest ? magnitude : largest;
            to[i] = x;
        }
    } else if (kind == F16) {
        half_word *to = (half_word *)out + at;
        for (int i = 0; i < n; i++) {
            uint32_t x = to_half(bits[i]), magnitude = x & 0x7FFF;
            if (careful) x = magnitude > 0x7C00 ? 0x7E00 : x;
            largest = magnitude > largest ? magnitude : largest;
            to[i] = (uint16_t)x;
        }
    } else {
        half_word *to = (half_word *)out + at;
        for (int i = 0; i < n; i++) {
            uint32_t x = bits[i];
            uint32_t rounded = (x + 0x7FFF + (x >> 16 & 1)) >> 16;
            if (careful) rounded = (x & MAGNITUDE_BITS) > INFINITE ? 0x7FC0 : rounded;
            uint32_t magnitude = rounded & 0x7FFF;
            largest = magnitude > largest ? magnitude : largest;
            to[i] = (uint16_t)rounded;
        }
    }
    return largest;
}

INLINE uint32_t largest_of(const float *values, int n)
{
    const word *bits = (const word *)values;
    uint32_t largest = 0;
    for (int i = 0; i < n; i++) {
        uint32_t magnitude = bits[i] & MAGNITUDE_BITS;
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest;
}

INLINE void scale(const float *in, float factor, int n, float *out)
{
    for (int i = 0; i < n; i++) out[i] = in[i] * factor;
}

/* base + Σ cᵢvᵢ; in float64 where the result is stored as float32, whose last place the products' rounding reaches */
INLINE void sum(const struct range *range, const struct result *result, const float *vectors, const float *base,
                int n, float *restrict total, double *restrict wide)
{
    const double *c = result->coefficients;
    int64_t count = range->count, ones = 0, alone = -1;
    if (!range->based) {
        for (int64_t i = 0; i < count; i++) {
            if (c[i] == 1) ones++, alone = i;
            if (c[i] != 0 && c[i] != 1) ones = count + 1;
        }
        if (ones == 1) { /* to the bit: adding 0·x would turn -0 into 0 */
            memcpy(total, vectors + alone * TILE, (size_t)n * 4);
            return;
        }
    }
    if (range->kind == F32) {
        for (int j = 0; j < n; j++) wide[j] = (double)vectors[j] * c[0];
        for (int64_t i = 1; i < count; i++) {
            const float *vector = vectors + i * TILE;
            for (int j = 0; j < n; j++) wide[j] += (double)vector[j] * c[i];
        }
        if (range->based)
            for (int j = 0; j < n; j++) wide[j] += (double)base[j];
        for (int j = 0; j < n; j++) total[j] = (float)wide[j];
        return;
    }
    if (count == 2) { /* the usual case: one pass */
        const float *restrict other = vectors + TILE;
        float a = (float)c[0], b = (float)c[1];
        if (range->based)
            for (int j = 0; j < n; j++) total[j] = vectors[j] * a + other[j] * b + base[j];
        else
            for (int j = 0; j < n; j++) total[j] = vectors[j] * a + other[j] * b;
        return;
    }
    scale(vectors, (float)c[0], n, total);
    for (int64_t i = 1; i < count; i++) {
        const float *restrict vector = vectors + i * TILE;
        float factor = (float)c[i];
        for (int j = 0; j < n; j++) total[j] += vector[j] * factor;
    }
    if (range->based)
        for (int j = 0; j < n; j++) total[j] += base[j];
}

INLINE uint32_t unless_zero(uint32_t bits) { return bits & MAGNITUDE_BITS ? 0xFFFFFFFF : 0; }

INLINE uint32_t same_sign(uint32_t a, uint32_t b) { return (uint32_t)((int32_t)~(a ^ b) >> 31); }

/* base + the sum, or weighted mean, of the entries that have the sign of the weighted sum of all */
INLINE void elect(const struct range *range, const struct result *result, float *vectors, const float *base,
                  const float *kept, int n, float *restrict total, float *restrict divisor)
{
    int64_t count = range->count;
    for (int64_t i = 0; i < count; i++) {
        float *vector = vectors + i * TILE, factor = (float)result->coefficients[i];
        scale(vector, factor, n, vector);
    }
    if (count == 1 && !result->normalize) {
        scale(vectors, result->scale, n, total);
    } else {
        const word *sums = (const word *)total;
        int negative = 0;
        memcpy(total, vectors, (size_t)n * 4);
        for (int64_t i = 1; i < count; i++) {
            const float *vector = vectors + i * TILE;
            for (int j = 0; j < n; j++) total[j] += vector[j];
        }
        for (int64_t i = 0; i < count; i++) {
            word *restrict bits = (word *)(vectors + i * TILE);
            if (!result->normalize) {
                for (int j = 0; j < n; j++) bits[j] &= same_sign(bits[j], sums[j]);
                continue;
            }
            const word *restrict stays = (const word *)(kept + i * TILE);
            float weight = result->weights[i];
            uint32_t weight_bits;
            memcpy(&weight_bits, &weight, 4);
            negative |= weight < 0;
            if (i == 0)
                for (int j = 0; j < n; j++) divisor[j] = 1e-37f; /* what is divided by it where nobody agrees is 0 */
            if (result->keep && result->keep[i].how == MAGNITUDE) /* what is kept is not zero */
                for (int j = 0; j < n; j++) {
                    uint32_t agrees = same_sign(bits[j], sums[j]);
                    bits[j] &= agrees;
                    divisor[j] += of_bits(agrees & stays[j] & weight_bits);
                }
            else
                for (int j = 0; j < n; j++) {
                    uint32_t agreeing = bits[j] & same_sign(bits[j], sums[j]);
                    bits[j] = agreeing;
                    divisor[j] += of_bits(unless_zero(agreeing) & weight_bits);
                }
        }
        for (int64_t i = 1; i < count; i++) {
            const float *vector = vectors + i * TILE;
            for (int j = 0; j < n; j++) vectors[j] += vector[j];
        }
        word *restrict chosen = (word *)vectors;
        for (int j = 0; j < n; j++) chosen[j] &= unless_zero(sums[j]); /* a sum of zero elects nobody */
        if (negative)
            for (int j = 0; j < n; j++) divisor[j] = (divisor[j] < 0 ? -divisor[j] : divisor[j]) < 1e-8f ? 1.0f : divisor[j];
        if (result->normalize)
            for (int j = 0; j < n; j++) vectors[j] /= divisor[j];
        scale(vectors, result->scale, n, total);
    }
    if (range->based)
        for (int j = 0; j < n; j++) total[j] += base[j];
}

/* A tile of the usual merge: two models, or two task vectors and the base, all bf16 and so the result; in one pass. */
INLINE uint32_t two_halves(const struct range *range, const struct result *result, int64_t at, int n)
{
    const half_word *a = (const half_word *)range->sources[0].data + at;
    const half_word *b = (const half_word *)range->sources[1].data + at;
    half_word *restrict out = (half_word *)result->out + at;
    float first = (float)result->coefficients[0], second = (float)result->coefficients[1];
    uint32_t largest = 0;
    if (range->based) {
        const half_word *base = (const half_word *)range->sources[2].data + at;
        for (int i = 0; i < n; i++) {
            float c = from_bf16(base[i]);
            uint32_t rounded = to_bf16((from_bf16(a[i]) - c) * first + (from_bf16(b[i]) - c) * second + c);
            uint32_t magnitude = rounded & 0x7FFF;
            largest = magnitude > largest ? magnitude : largest;
            out[i] = (uint16_t)rounded;
        }
        return largest;
    }
    for (int i = 0; i < n; i++) {
        uint32_t rounded = to_bf16(from_bf16(a[i]) * first + from_bf16(b[i]) * second);
        uint32_t magnitude = rounded & 0x7FFF;
        largest = magnitude > largest ? magnitude : largest;
        out[i] = (uint16_t)rounded;
    }
    return largest;
}

/* Whether `two_halves` does it: no NaN to care for, and no model alone, whose -0 would have to stay. */
INLINE int are_two_halves(const struct range *range, const struct result *result, int64_t number)
{
    const struct source *each = range->sources;
    if (range->count != 2 || number != 1 || range->kind != BF16) return 0;
    if (result->keep || range->election || range->careful) return 0;
    if (range->based) return each[0].kind == BF16 && each[1].kind == BF16 && each[2].kind == BF16;
    return each[0].kind == BF16 && each[1].kind == BF16 && result->coefficients[0] != 0 && result->coefficients[1] != 0;
}

/* Every result of a range. `largest` gets the largest magnitudes, as bits: of the vectors, then of each result. */
EACH_PROCESSOR void paretune_merge(const struct range *range, const struct result *results, int64_t number,
                                   int64_t *ranks, uint32_t *largest)
{
    int64_t count = range->count;
    float *vectors = range->scratch, *copies = vectors + count * TILE, *kept = copies + count * TILE;
    float *base = kept + count * TILE, *total = base + TILE, *divisor = total + TILE;
    double *wide = (double *)(divisor + TILE);
    memset(largest, 0, (size_t)(count + number) * sizeof *largest);
    int plain = are_two_halves(range, results, number);
    for (int64_t at = 0; at < range->n; at += TILE) {
        int n = range->n - at < TILE ? (int)(range->n - at) : TILE;
        for (int64_t i = 0; i < count + range->based; i++) fetch(&range->sources[i], at + TILE);
        if (plain) {
            uint32_t found = two_halves(range, results, at, n);
            largest[count] = found > largest[count] ? found : largest[count];
            continue;
        }
        load(range->sources, count, range->based, at, n, vectors, base);
        int looked = 0;
        for (int64_t r = 0; r < number; r++) {
            const struct result *result = &results[r];
            const float *used = vectors;
            if (result->keep) {
                for (int64_t i = 0; i < count; i++) {
                    const float *vector = vectors + i * TILE;
                    if (result->keep[i].how == RANDOM && !looked) {
                        uint32_t found = largest_of(vector, n);
                        largest[i] = found > largest[i] ? found : largest[i];
                    }
                    int64_t *rank = &ranks[r * count + i];
                    *rank = sparsify(&result->keep[i], range->start + at, n, *rank, vector, copies + i * TILE,
                                     kept + i * TILE);
                }
                looked = 1;
                used = copies;
            }
            if (range->election)
                elect(range, result, copies, base, kept, n, total, divisor);
            else
                sum(range, result, used, base, n, total, wide);
            uint32_t found = narrow(total, range->kind, range->careful, at, n, result->out);
            largest[count + r] = found > largest[count + r] ? found : largest[count + r];
        }
    }
}

int64_t paretune_kernels_version(void) { return PARETUNE_KERNELS_VERSION; }
