/* What all kernels are built of: processor variants, and numbers as they are stored. */

#ifndef PARETUNE_NUMBERS_H
#define PARETUNE_NUMBERS_H

#include <stdint.h>
#include <string.h>

/* One copy of a function for each kind of processor, chosen when the library is loaded. */
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
#define EACH_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#elif defined(__x86_64__) && defined(__GLIBC__) && (!defined(__clang__) || __clang_major__ >= 14)
#define EACH_PROCESSOR __attribute__((target_clones("avx512f", "fma", "default")))
#else
#define EACH_PROCESSOR
#endif

#if defined(__FLT_EVAL_METHOD__) && (__FLT_EVAL_METHOD__ == 1 || __FLT_EVAL_METHOD__ == 2)
#error "float arithmetic does not round as numpy's does: merging stays with numpy"
#endif

#define INLINE static inline __attribute__((always_inline))

enum { BF16, F16, F32 }; /* stored numbers */
enum { TILE = 512 };       /* elements handled at a time: they stay in the first-level cache */

static const uint32_t MAGNITUDE_BITS = 0x7FFFFFFF, INFINITE = 0x7F800000;

/* Stored numbers may lie at any address; words are also read as floats. */
typedef uint16_t half_word __attribute__((aligned(1), may_alias));
typedef uint32_t word __attribute__((may_alias));
typedef uint32_t loose_word __attribute__((aligned(1), may_alias));
typedef int32_t signed_word __attribute__((may_alias));
typedef float real __attribute__((may_alias));

INLINE float of_bits(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

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

/* A random mask at some elements of a tensor, as paretune.operators.masks has it: those whose hash, read as signed, is
   below a limit; all of them where that is above the largest integer. */
struct mask {
    uint32_t low, key_low, key_high;
    int32_t below;
};

/* For a tile that begins at element `first`; no tile straddles a multiple of 2^32. */
INLINE struct mask mask_at(uint64_t key, int64_t limit, int64_t first)
{
    uint32_t upper = (uint32_t)((uint64_t)first >> 32) * 0x9E3779B9u;
    return (struct mask){(uint32_t)first, (uint32_t)key, (uint32_t)(key >> 32) + upper, (int32_t)limit};
}

INLINE uint32_t mix(uint32_t x)
{
    x ^= x >> 16;
    x *= 0x21F0AAADu;
    x ^= x >> 15;
    x *= 0xD35A2D97u;
    return x ^ x >> 15;
}

INLINE int kept_at(const struct mask *mask, int i)
{
    return (int32_t)mix(mix((mask->low + (uint32_t)i) ^ mask->key_low) + mask->key_high) < mask->below;
}

#endif
