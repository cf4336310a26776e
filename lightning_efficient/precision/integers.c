/* Tensors as integers of 8 bits with one shared exponent: each pass over memory that integers.py needs, once.

   Compile without contraction and without fast math: the results are those of torch's operations. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define LARGEST 127.0f
#define BLOCK 4096 /* numbers whose sums stay exact enough in float32, and in the first cache */

enum { FLOAT32, BFLOAT16 };

static inline float widened(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float number;
    memcpy(&number, &bits, 4);
    return number;
}

static const float *block(const void *values, int type, int64_t start, int64_t count, float *memory) {
    if (type == FLOAT32) return (const float *)values + start;
    const uint16_t *source = (const uint16_t *)values + start;
    for (int64_t i = 0; i < count; i++) memory[i] = widened(source[i]);
    return memory;
}

/* The largest magnitude of numbers `start` to `end` - 1; NaN if one is. */
float largest(const void *values, int type, int64_t start, int64_t end) {
    float memory[BLOCK], most = 0;
    int strange = 0;
    for (int64_t at = start; at < end; at += BLOCK) {
        int64_t count = end - at < BLOCK ? end - at : BLOCK;
        const float *x = block(values, type, at, count, memory);
#pragma omp simd reduction(max : most) reduction(| : strange)
        for (int64_t i = 0; i < count; i++) {
            float size = fabsf(x[i]);
            most = size > most ? size : most;
            strange |= x[i] != x[i];
        }
    }
    return strange ? NAN : most;
}

/* Codes of numbers `start` to `end` - 1: `x * factor * again`, to nearest, or with `noise` up or down at random.

   counts: beyond the largest code, of those that are not zero those that become zero, not zero.
   sums: of the magnitudes, in codes' units, before and after. */
void quantize(const void *values, int type, int64_t start, int64_t end, float factor, float again, const float *noise,
              int8_t *codes, int64_t *counts, double *sums) {
    float memory[BLOCK];
    for (int64_t at = start; at < end; at += BLOCK) {
        int64_t count = end - at < BLOCK ? end - at : BLOCK;
        const float *x = block(values, type, at, count, memory);
        int8_t *out = codes + at;
        const float *u = noise ? noise + (at - start) : 0;
        int32_t over = 0, under = 0, some = 0;
        float before = 0, after = 0;
#pragma omp simd reduction(+ : over, under, some, before, after)
        for (int64_t i = 0; i < count; i++) {
            float scaled = x[i] * factor * again;
            float rounded = u ? floorf(scaled + u[i]) : rintf(scaled);
            float code = rounded > LARGEST ? LARGEST : rounded < -LARGEST ? -LARGEST : rounded;
            out[i] = (int8_t)code;
            over += code != rounded;
            under += (code == 0) & (x[i] != 0);
            some += x[i] != 0;
            before += fabsf(scaled);
            after += fabsf(code);
        }
        counts[0] += over, counts[1] += under, counts[2] += some;
        sums[0] += before, sums[1] += after;
    }
}

/* Rows `start` to `end` - 1 of sums, as numbers `sum * factor * again + bias`, which may lie where the sums do. */
void convert(const int32_t *sums, float *out, int64_t columns, float factor, float again, const float *bias,
             int64_t start, int64_t end) {
    for (int64_t row = start; row < end; row++) {
        const int32_t *from = sums + row * columns;
        float *to = out + row * columns;
        if (bias) {
#pragma omp simd
            for (int64_t i = 0; i < columns; i++) to[i] = (float)from[i] * factor * again + bias[i];
        } else {
#pragma omp simd
            for (int64_t i = 0; i < columns; i++) to[i] = (float)from[i] * factor * again;
        }
    }
}
