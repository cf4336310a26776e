/* Encoding and decoding on a CPU: what core/quantization.py does with torch's operations, in one pass, bit for bit.

   So that the bits are the same, each line does the operations of torch in their order, every one rounded to float32:
   compile without contraction (a * b + c in one rounding) and without fast math. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define CHUNK (1 << 18)     /* quantization.CHUNK: numbers whose codes are packed together */
#define TABLE (1 << 18)     /* random.TABLE */
#define MAX_GROUP (1 << 16) /* quantization.MAX_GROUP */
#define BLOCK 4096          /* numbers of which what lies between two loops stays in the first cache */

enum { FLOAT32, BFLOAT16, FLOAT16 };
enum { FP8 = 0 }; /* in the place of a number of bits */

static _Thread_local uint8_t codes[CHUNK];
static _Thread_local float group[MAX_GROUP];

static inline float from_bits(uint32_t bits) {
    float number;
    memcpy(&number, &bits, 4);
    return number;
}

static inline uint32_t to_bits(float number) {
    uint32_t bits;
    memcpy(&bits, &number, 4);
    return bits;
}

static inline float from_bfloat16(uint16_t bits) { return from_bits((uint32_t)bits << 16); }

static inline uint16_t to_bfloat16(float number) {
    uint32_t bits = to_bits(number);
    uint16_t rounded = (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16); /* to nearest, ties to even */
    return number != number ? 0x7FC0 : rounded;
}

/* Numbers of another type, as float32. */
static const float *widened(const void *values, int type, int64_t start, int64_t count) {
    if (type == FLOAT32) return (const float *)values + start;
    if (type == BFLOAT16) {
        const uint16_t *source = (const uint16_t *)values + start;
        for (int64_t i = 0; i < count; i++) group[i] = from_bfloat16(source[i]);
    }
#ifdef __FLT16_MAX__
    if (type == FLOAT16) {
        const _Float16 *source = (const _Float16 *)values + start;
        for (int64_t i = 0; i < count; i++) group[i] = (float)source[i];
    }
#endif
    return group;
}

static void narrow(const float *numbers, void *values, int type, int64_t start, int64_t count) {
    if (type == BFLOAT16) {
        uint16_t *out = (uint16_t *)values + start;
        for (int64_t i = 0; i < count; i++) out[i] = to_bfloat16(numbers[i]);
    }
#ifdef __FLT16_MAX__
    if (type == FLOAT16) {
        _Float16 *out = (_Float16 *)values + start;
        for (int64_t i = 0; i < count; i++) out[i] = (_Float16)numbers[i];
    }
#endif
}

/* random.noise_at */
static int64_t noise_at(uint64_t key, uint64_t counter) {
    uint64_t z = key + (counter + 1) * 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return (int64_t)((z ^ z >> 31) % TABLE);
}

/* The float of 8 bits (e4m3) that is nearest to a number of magnitude 448 at most; ties to even. */
static inline uint8_t to_float8(float number) {
    uint32_t bits = to_bits(number), sign = bits >> 24 & 0x80, size = bits & 0x7FFFFFFF;
    uint32_t small = to_bits(from_bits(size) + 16384.0f) - 0x46800000; /* below 2^-6 their step is that of 16384 */
    uint32_t normal = (size + 0x7FFFF + (size >> 20 & 1) - (120u << 23)) >> 20;
    return (uint8_t)(sign | (size < 0x3C800000 ? small : normal));
}

/* One plane of the codes: a byte holds those of one place in each part of the chunk. */
static inline void pack_plane(uint8_t *restrict out, int64_t part, const int width, int shift) {
    const uint8_t low = (1 << width) - 1;
    for (int64_t i = 0; i < part; i++) {
        uint8_t byte = 0;
        for (int place = 8 / width - 1; place >= 0; place--)
            byte = (uint8_t)(byte << width) | ((uint8_t)(codes[place * part + i] >> shift) & low);
        out[i] = byte;
    }
}

static inline void unpack_plane(const uint8_t *restrict packed, int64_t part, const int width, int shift) {
    const uint8_t low = (1 << width) - 1;
    for (int place = 0; place < 8 / width; place++) {
        uint8_t *out = codes + place * part;
        const int down = place * width;
        for (int64_t i = 0; i < part; i++) {
            uint8_t code = (uint8_t)((uint8_t)(packed[i] >> down & low) << shift);
            out[i] = shift ? out[i] | code : code;
        }
    }
}

/* quantization.pack_bits */
static void pack(uint8_t *out, int bits, int64_t filled) {
    if (bits == 8 || bits == FP8) {
        memcpy(out, codes, filled);
        return;
    }
    int shift = 0;
    if (bits & 4) pack_plane(out, filled / 2, 4, shift), out += filled / 2, shift += 4;
    if (bits & 2) pack_plane(out, filled / 4, 2, shift), out += filled / 4, shift += 2;
    if (bits & 1) pack_plane(out, filled / 8, 1, shift);
}

/* quantization.unpack_bits */
static void unpack(const uint8_t *packed, int bits, int64_t filled) {
    if (bits == 8 || bits == FP8) {
        memcpy(codes, packed, filled);
        return;
    }
    int shift = 0;
    if (bits & 4) unpack_plane(packed, filled / 2, 4, shift), packed += filled / 2, shift += 4;
    if (bits & 2) unpack_plane(packed, filled / 4, 2, shift), packed += filled / 4, shift += 2;
    if (bits & 1) unpack_plane(packed, filled / 8, 1, shift);
}

static void encode_group(const float *x, int64_t count, int bits, const float *noise, float factor, float least,
                         uint16_t *scale, uint16_t *minimum, uint8_t *out) {
    float low = x[0], high = x[0];
    int strange = 0;
#pragma omp simd reduction(min : low) reduction(max : high) reduction(| : strange)
    for (int64_t i = 0; i < count; i++) {
        low = x[i] < low ? x[i] : low;
        high = x[i] > high ? x[i] : high;
        strange |= x[i] != x[i];
    }
    float floor_ = 0, spread;
    if (bits == FP8) {
        spread = high > -low ? high : -low;
    } else {
        *minimum = to_bfloat16(low - fabsf(low) * 0.00390625f);
        floor_ = from_bfloat16(*minimum);
        spread = high - floor_;
    }
    float wide = spread * factor;
    *scale = to_bfloat16(wide < least ? least : wide);
    float step = from_bfloat16(*scale), inverse = 1.0f / step;
    if (strange || !isfinite(step)) {
        *scale = 0x7FC0;
        if (bits != FP8) *minimum = 0;
        memset(out, 0, count); /* lest they spill into their neighbours' */
        return;
    }
    if (bits == FP8) {
        for (int64_t i = 0; i < count; i++) out[i] = to_float8(x[i] * inverse);
    } else if (bits == 8) {
        if (noise)
            for (int64_t i = 0; i < count; i++)
                out[i] = (uint8_t)(int32_t)floorf(noise[i] + (x[i] - floor_) * inverse - 128.0f);
        else
            for (int64_t i = 0; i < count; i++)
                out[i] = (uint8_t)(int32_t)floorf((x[i] - floor_) * inverse + 0.5f - 128.0f);
    } else if (noise) {
        for (int64_t i = 0; i < count; i++) out[i] = (uint8_t)(int32_t)(noise[i] + (x[i] - floor_) * inverse);
    } else {
        for (int64_t i = 0; i < count; i++) out[i] = (uint8_t)(int32_t)((x[i] - floor_) * inverse + 0.5f);
    }
}

static void decode_group(float *out, const uint8_t *from, int64_t count, int bits, const float *noise, float step,
                         float floor_) {
    const int8_t *code = (const int8_t *)from;
    if (bits == FP8) {
        for (int64_t i = 0; i < count; i++)
            out[i] = from_bits((uint32_t)(int32_t)code[i] << 20 & 0x87F00000u) * 0x1p120f * step;
    } else if (noise) {
        for (int64_t i = 0; i < count; i++) out[i] = ((float)code[i] - noise[i]) * step + floor_;
    } else {
        for (int64_t i = 0; i < count; i++) out[i] = (float)code[i] * step + floor_;
    }
}

/* Chunks first to last - 1 of `numel` numbers. `table`: of noise; null: round to nearest. */
void encode(const void *values, int type, int64_t numel, int64_t width, int bits, const float *table, uint64_t key,
            float factor, float least, uint16_t *scale, uint16_t *minimum, uint8_t *payload, int64_t first,
            int64_t last, int64_t whole_chunks) {
    for (int64_t piece = first; piece < last; piece++) {
        /* groups that are whole, then the shorter last one, which is a piece of its own */
        int64_t start = piece < whole_chunks ? piece * CHUNK : numel / width * width;
        int64_t whole = numel / width * width;
        int64_t end = piece < whole_chunks ? (start + CHUNK < whole ? start + CHUNK : whole) : numel;
        int64_t count = end - start, filled = (count + 63) / 64 * 64;
        const float *noise = table ? table + noise_at(key, piece) : 0;
        for (int64_t at = start; at < end; at += width) {
            int64_t size = at + width < end ? width : end - at, index = at / width;
            encode_group(widened(values, type, at, size), size, bits, noise ? noise + (at - start) : 0, factor, least,
                         scale + index, minimum ? minimum + index : 0, codes + (at - start));
        }
        memset(codes + count, 0, filled - count);
        pack(payload + start * (bits == FP8 ? 8 : bits) / 8, bits, filled);
    }
}

/* Likewise; into `out`, which begins with the numbers of chunk `first`. `dither`: the noise is subtracted again. */
void decode(void *out, int type, int64_t numel, int64_t width, int bits, const float *table, uint64_t key,
            const uint16_t *scale, const uint16_t *minimum, const uint8_t *payload, int64_t first, int64_t last,
            int64_t whole_chunks) {
    int64_t whole = numel / width * width, origin = first < whole_chunks ? first * CHUNK : whole;
    for (int64_t piece = first; piece < last; piece++) {
        int64_t start = piece < whole_chunks ? piece * CHUNK : whole;
        int64_t end = piece < whole_chunks ? (start + CHUNK < whole ? start + CHUNK : whole) : numel;
        int64_t filled = (end - start + 63) / 64 * 64;
        const float *noise = table ? table + noise_at(key, piece) : 0;
        unpack(payload + start * (bits == FP8 ? 8 : bits) / 8, bits, filled);
        for (int64_t at = start; at < end; at += width) {
            int64_t size = at + width < end ? width : end - at, index = at / width;
            float step = from_bfloat16(scale[index]), floor_ = 0;
            if (bits != FP8) {
                float shift = (bits == 8 ? 128.0f : 0.0f) + (table ? 0.5f : 0.0f);
                floor_ = from_bfloat16(minimum[index]) + shift * step;
            }
            float *numbers = type == FLOAT32 ? (float *)out + (at - origin) : group;
            decode_group(numbers, codes + (at - start), size, bits, noise ? noise + (at - start) : 0, step, floor_);
            narrow(numbers, out, type, at - origin, size);
        }
    }
}

/* Bits of numbers of which each is `low` or `high`, as pack_bits puts them; 0 if one is neither. */
int pack_two(const float *values, int64_t numel, float low, float high, uint8_t *packed) {
    int64_t part = (numel + 63) / 64 * 8;
    for (int64_t from = 0; from < part; from += BLOCK) {
        int64_t to = from + BLOCK < part ? from + BLOCK : part;
        memset(packed + from, 0, to - from);
        for (int place = 0; place < 8; place++) {
            const float *x = values + place * part;
            int64_t end = numel - place * part < to ? numel - place * part : to;
            int other = 0;
#pragma omp simd reduction(| : other)
            for (int64_t i = from; i < end; i++) {
                int upper = x[i] == high;
                other |= !upper & (x[i] != low);
                packed[i] |= (uint8_t)(upper << place);
            }
            if (other) return 0;
        }
    }
    return 1;
}

void unpack_two(float *out, int64_t numel, float low, float high, const uint8_t *packed) {
    int64_t part = (numel + 63) / 64 * 8;
    for (int place = 0; place < 8; place++) {
        float *x = out + place * part;
        int64_t end = numel - place * part < part ? numel - place * part : part;
        for (int64_t i = 0; i < end; i++) x[i] = packed[i] >> place & 1 ? high : low;
    }
}

int half_is_known(void) {
#ifdef __FLT16_MAX__
    return 1;
#else
    return 0;
#endif
}
