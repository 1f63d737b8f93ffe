/* What is found out about whole tensors before they are merged: inner products, norms, k-th magnitudes. */

#include "vectors.h"

/* Inner products of all pairs i ≤ j: float32 products, added in float64 to LANES sums for each block of each pair. */
EACH_PROCESSOR void paretune_products(const struct range *range, double *restrict lanes)
{
    int64_t count = range->count;
    float *vectors = range->scratch, *base = vectors + count * TILE;
    for (int64_t at = 0; at < range->n; at += TILE) {
        int n = range->n - at < TILE ? (int)(range->n - at) : TILE;
        for (int64_t i = 0; i < count + range->based; i++) fetch(&range->sources[i], at + TILE);
        load(range->sources, count, range->based, at, n, vectors, base);
        int rows = (n + LANES - 1) / LANES;
        for (int64_t i = 0; i < count; i++) memset(vectors + i * TILE + n, 0, (size_t)(rows * LANES - n) * 4);
        double *sums = lanes;
        for (int64_t i = 0; i < count; i++)
            for (int64_t j = i; j < count; j++, sums += LANES) {
                const float *a = vectors + i * TILE, *b = vectors + j * TILE;
                for (int row = 0; row < rows; row++, a += LANES, b += LANES)
                    for (int lane = 0; lane < LANES; lane++) sums[lane] += (double)(a[lane] * b[lane]);
            }
    }
}

/* Σ|x| and Σ|F(x)| of every vector, in LANES sums each. */
EACH_PROCESSOR void paretune_norms(const struct range *range, const struct keep *keep, int64_t *ranks,
                                   double *restrict lanes)
{
    int64_t count = range->count;
    float *vectors = range->scratch, *kept = vectors + TILE * count, *base = kept + TILE, *copy = base + TILE;
    for (int64_t at = 0; at < range->n; at += TILE) {
        int n = range->n - at < TILE ? (int)(range->n - at) : TILE;
        for (int64_t i = 0; i < count + range->based; i++) fetch(&range->sources[i], at + TILE);
        load(range->sources, count, range->based, at, n, vectors, base);
        int rows = (n + LANES - 1) / LANES;
        for (int64_t i = 0; i < count; i++) {
            float *each[2] = {vectors + i * TILE, copy};
            ranks[i] = sparsify(&keep[i], range->start + at, n, ranks[i], each[0], copy, kept);
            for (int which = 0; which < 2; which++) {
                double *restrict sums = lanes + (2 * i + which) * LANES;
                word *bits = (word *)each[which];
                memset(bits + n, 0, (size_t)(rows * LANES - n) * 4);
                for (int j = 0; j < rows * LANES; j++) bits[j] &= MAGNITUDE_BITS;
                const float *a = each[which];
                for (int row = 0; row < rows; row++, a += LANES)
                    for (int lane = 0; lane < LANES; lane++) sums[lane] += (double)a[lane];
            }
        }
    }
}

/* ---- magnitudes of a task vector ------------------------------------------------------------------------------ */

INLINE void magnitudes(const struct source *pair, int64_t at, int n, float *vector, float *base)
{
    fetch(&pair[0], at + TILE);
    fetch(&pair[1], at + TILE);
    load(pair, 1, 1, at, n, vector, base);
    word *bits = (word *)vector;
    for (int i = 0; i < n; i++) bits[i] &= MAGNITUDE_BITS;
}

/* `run` magnitudes at each of some places. */
EACH_PROCESSOR void paretune_sample(const struct source *pair, const int64_t *places, int64_t count,
                                    int64_t run, uint32_t *out)
{
    float vector[TILE], base[TILE];
    for (int64_t i = 0; i < count; i++, out += run) {
        magnitudes(pair, places[i], (int)run, vector, base);
        memcpy(out, vector, (size_t)run * 4);
    }
}

/* For each block: how many magnitudes are above `high`, above `middle` and equal to it, and how many others lie in
   low … high; these are copied out while there is room for a tile more. Returns the largest magnitude. */
EACH_PROCESSOR uint32_t paretune_bracket(const struct source *pair, int64_t n, uint32_t low, uint32_t middle,
                                         uint32_t high, int64_t *counts, uint32_t *room, int64_t size)
{
    float vector[TILE], base[TILE];
    const word *bits = (const word *)vector;
    uint32_t largest = 0, width = high - low;
    int64_t used = 0;
    for (int64_t block = 0; block < n; block += BLOCK, counts += 4) {
        int64_t stop = n - block < BLOCK ? n : block + BLOCK;
        memset(counts, 0, 4 * sizeof *counts);
        for (int64_t at = block; at < stop; at += TILE) {
            int m = stop - at < TILE ? (int)(stop - at) : TILE;
            magnitudes(pair, at, m, vector, base);
            uint32_t above = 0, greater = 0, equal = 0, inside = 0;
            for (int i = 0; i < m; i++) {
                above += bits[i] > high;
                greater += bits[i] > middle;
                equal += bits[i] == middle;
                inside += bits[i] - low <= width; /* unsigned: what lies below wraps to above */
                largest = bits[i] > largest ? bits[i] : largest;
            }
            counts[0] += above;
            counts[1] += greater;
            counts[2] += equal;
            counts[3] += inside - equal;
            if (inside == equal || used + TILE > size) continue;
            uint8_t flags[TILE];
            for (int i = 0; i < m; i++) flags[i] = (bits[i] - low <= width) & (bits[i] != middle);
            for (int i = m; i % 64; i++) flags[i] = 0;
            for (int first = 0; first < m; first += 64)
                for (uint64_t set = gathered(flags + first); set; set &= set - 1)
                    room[used++] = bits[first + lowest(set)];
        }
    }
    return largest;
}

/* For each block: how many magnitudes are above `threshold`, how many equal it. */
EACH_PROCESSOR void paretune_count(const struct source *pair, int64_t n, uint32_t threshold, int64_t *counts)
{
    float vector[TILE], base[TILE];
    const word *bits = (const word *)vector;
    for (int64_t block = 0; block < n; block += BLOCK, counts += 2) {
        int64_t stop = n - block < BLOCK ? n : block + BLOCK;
        counts[0] = counts[1] = 0;
        for (int64_t at = block; at < stop; at += TILE) {
            int m = stop - at < TILE ? (int)(stop - at) : TILE;
            magnitudes(pair, at, m, vector, base);
            uint32_t above = 0, equal = 0;
            for (int i = 0; i < m; i++) {
                above += bits[i] > threshold;
                equal += bits[i] == threshold;
            }
            counts[0] += above;
            counts[1] += equal;
        }
    }
}

/* Adds the magnitudes' high halves to a histogram, or the low halves of those whose high half is `high` ≥ 0. */
EACH_PROCESSOR void paretune_histogram(const struct source *pair, int64_t n, int64_t high, int64_t *counts)
{
    float vector[TILE], base[TILE];
    const word *bits = (const word *)vector;
    for (int64_t at = 0; at < n; at += TILE) {
        int m = n - at < TILE ? (int)(n - at) : TILE;
        magnitudes(pair, at, m, vector, base);
        for (int i = 0; i < m; i++) {
            if (high < 0)
                counts[bits[i] >> 16]++;
            else if (bits[i] >> 16 == high)
                counts[bits[i] & 0xFFFF]++;
        }
    }
}
