/* The arithmetic of merging on one range of one tensor, in passes over tiles that stay in the first-level cache.

   paretune.merging.eager is the definition: every function here gives its bits, on any processor. Hence no contraction
   of multiply and add, no reassociation, and sums in LANES partial sums whose order is fixed. Nothing is allocated and
   nothing is kept; Python calls these through ctypes, which releases the interpreter's lock. */

#include <stdint.h>
#include <string.h>

#define PARETUNE_KERNELS_VERSION 2

#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
#define EACH_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#elif defined(__x86_64__) && defined(__GLIBC__) && (!defined(__clang__) || __clang_major__ >= 14)
#define EACH_PROCESSOR __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define EACH_PROCESSOR
#endif

#if defined(__FLT_EVAL_METHOD__) && (__FLT_EVAL_METHOD__ == 1 || __FLT_EVAL_METHOD__ == 2)
#error "float arithmetic does not round as numpy's does: merging stays with numpy"
#endif

#define PUBLIC __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))

enum { BF16, F16, F32 };         /* stored numbers */
enum { ALL, RANDOM, MAGNITUDE }; /* which entries of a task vector are kept */
enum { TILE = 512, LANES = 64, BLOCK = 65536 };

static const uint32_t MAGNITUDE_BITS = 0x7FFFFFFF, INFINITE = 0x7F800000;

/* Stored numbers may lie at any address; words are also read as floats. */
typedef uint16_t half_word __attribute__((aligned(1), may_alias));
typedef uint32_t word __attribute__((may_alias));
typedef uint32_t loose_word __attribute__((aligned(1), may_alias));
typedef int32_t signed_word __attribute__((may_alias));
typedef float real __attribute__((may_alias));

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

struct result {
    const double *coefficients; /* one a source */
    const float *weights;       /* of those who agree, for normalize */
    const struct keep *keep;    /* one a source */
    char *out;
    float scale;
    int32_t normalize;
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

/* ---- stored numbers and float32 ------------------------------------------------------------------------------- */

INLINE uint32_t from_half(uint32_t h)
{
    uint32_t bits = (h & 0x7FFF) << 13, one = bits + 0x38800000; /* a subnormal half, and 2^-14 more */
    const uint32_t least = 0x38800000;
    float value, less;
    memcpy(&value, &one, 4);
    memcpy(&less, &least, 4);
    value -= less;
    uint32_t small;
    memcpy(&small, &value, 4);
    uint32_t found = bits + (bits >= 0x0F800000 ? 0x70000000 : 0x38000000);
    found = bits < 0x00800000 ? small : found;
    return found | (h & 0x8000) << 16;
}

INLINE uint32_t to_half(uint32_t bits)
{
    uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & MAGNITUDE_BITS;
    float value;
    memcpy(&value, &magnitude, 4);
    value += 0.5f; /* the last place of numbers near 1/2 is that of subnormal halves */
    uint32_t small;
    memcpy(&small, &value, 4);
    small -= 0x3F000000;
    uint32_t normal = (magnitude - 0x38000000 + 0xFFF + (magnitude >> 13 & 1)) >> 13;
    uint32_t found = magnitude < 0x38800000 ? small : normal;
    found = magnitude >= 0x47800000 ? 0x7C00 : found;
    found = magnitude > INFINITE ? 0x7E00 : found;
    return found | sign;
}

INLINE float from_bf16(uint32_t half)
{
    uint32_t bits = half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE uint32_t to_bf16(float value)
{
    uint32_t x;
    memcpy(&x, &value, 4);
    return (x + 0x7FFF + (x >> 16 & 1)) >> 16;
}

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

INLINE uint32_t mix(uint32_t x)
{
    x ^= x >> 16;
    x *= 0x21F0AAADu;
    x ^= x >> 15;
    x *= 0xD35A2D97u;
    return x ^ x >> 15;
}

INLINE void keep_random(const struct keep *keep, int64_t first, int n, const word *restrict in, word *restrict out)
{
    /* No tile straddles a multiple of 2^32. */
    uint32_t low = (uint32_t)first, upper = (uint32_t)((uint64_t)first >> 32) * 0x9E3779B9u;
    uint32_t key_low = (uint32_t)keep->key, key_high = (uint32_t)(keep->key >> 32) + upper;
    int64_t limit = keep->limit;
    if (limit > INT32_MAX) {
        if (in != out) memcpy(out, in, (size_t)n * 4);
        return;
    }
    int32_t below = (int32_t)limit;
    for (int i = 0; i < n; i++) {
        uint32_t hash = mix(mix((low + (uint32_t)i) ^ key_low) + key_high);
        out[i] = (int32_t)hash < below ? in[i] : 0;
    }
}

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

INLINE int lowest(uint64_t set) { return __builtin_ctzll(set); }

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

/* ---- merging -------------------------------------------------------------------------------------------------- */

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

INLINE float as_float(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

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
                    divisor[j] += as_float(agrees & stays[j] & weight_bits);
                }
            else
                for (int j = 0; j < n; j++) {
                    uint32_t agreeing = bits[j] & same_sign(bits[j], sums[j]);
                    bits[j] = agreeing;
                    divisor[j] += as_float(unless_zero(agreeing) & weight_bits);
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
PUBLIC EACH_PROCESSOR void paretune_merge(const struct range *range, const struct result *results, int64_t number,
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

/* ---- sums over a whole tensor --------------------------------------------------------------------------------- */

/* Inner products of all pairs i ≤ j: float32 products, added in float64 to LANES sums for each block of each pair. */
PUBLIC EACH_PROCESSOR void paretune_products(const struct range *range, double *restrict lanes)
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
PUBLIC EACH_PROCESSOR void paretune_norms(const struct range *range, const struct keep *keep, int64_t *ranks,
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
PUBLIC EACH_PROCESSOR void paretune_sample(const struct source *pair, const int64_t *places, int64_t count,
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
PUBLIC EACH_PROCESSOR uint32_t paretune_bracket(const struct source *pair, int64_t n, uint32_t low, uint32_t middle,
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
PUBLIC EACH_PROCESSOR void paretune_count(const struct source *pair, int64_t n, uint32_t threshold, int64_t *counts)
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
PUBLIC EACH_PROCESSOR void paretune_histogram(const struct source *pair, int64_t n, int64_t high, int64_t *counts)
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

PUBLIC int64_t paretune_kernels_version(void) { return PARETUNE_KERNELS_VERSION; }
