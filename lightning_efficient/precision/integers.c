/* Tensors as integers of 8 bits with one shared exponent: each pass over memory that integers.py needs, once.

   Compile without contraction and without fast math: the results are those of torch's operations. */

#if defined(__AVX512F__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("prefer-vector-width=512") /* which gcc thinks too much, and is a quarter faster here */
#endif

#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

#define LARGEST 127.0f
#define BLOCK 4096 /* numbers whose sums stay exact enough in float32, and in the first cache */
#define RUN 64     /* neighbours that are looked at together */
#define SIDE 16    /* columns that are kept */

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

/* The largest magnitude; NaN if a number is: of floats that are not negative, the order is that of their bits. */
static float largest_of(const float *x, int64_t count) {
    int32_t most = 0;
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < count; i++) {
        int32_t bits;
        memcpy(&bits, x + i, 4);
        bits &= 0x7fffffff;
        most = bits > most ? bits : most;
    }
    float size;
    memcpy(&size, &most, 4);
    return size;
}

/* Likewise of numbers `start` to `end` - 1. */
float largest(const void *values, int type, int64_t start, int64_t end) {
    float memory[BLOCK], most = 0;
    int strange = 0;
    for (int64_t at = start; at < end; at += BLOCK) {
        int64_t count = end - at < BLOCK ? end - at : BLOCK;
        float size = largest_of(block(values, type, at, count, memory), count);
        strange |= size != size;
        most = size > most ? size : most;
    }
    return strange ? NAN : most;
}

static inline float rounded(float scaled, const float *u, int64_t i) {
    return u ? floorf(scaled + u[i]) : rintf(scaled);
}

static inline int8_t coded(float number) {
    number = number > LARGEST ? LARGEST : number;
    return (int8_t)(int32_t)(number < -LARGEST ? -LARGEST : number);
}

struct seen {
    int64_t beyond, gone, some, all; /* the largest code; not zero, but zero as a code; not zero; whatever they are */
    double before, after;            /* sums of magnitudes, in codes' units */
};

static void look(const float *x, const float *u, const int8_t *codes, int64_t count, float scale, float again, int large,
                 struct seen *seen) {
    float before = 0;
    int32_t over = 0, none = 0, zero = 0, after = 0;
#pragma omp simd reduction(+ : before, none)
    for (int64_t i = 0; i < count; i++) {
        before += fabsf(x[i] * scale * again);
        none += x[i] == 0;
    }
#pragma omp simd reduction(+ : after, zero)
    for (int64_t i = 0; i < count; i++) {
        int32_t code = codes[i];
        after += code < 0 ? -code : code;
        zero += code == 0;
    }
    if (large)
        for (int64_t i = 0; i < count; i++) over += fabsf(rounded(x[i] * scale * again, u, i)) > LARGEST;
    seen->beyond += over, seen->gone += zero - none, seen->some += count - none, seen->all += count;
    seen->before += before, seen->after += after;
}

/* Some columns of a matrix, and what is kept of them. */
struct kept {
    int64_t width;         /* of the matrix */
    const int64_t *places; /* SIDE of its columns */
    float *columns;        /* `[rows, SIDE]`, or null */
};

/* Of numbers `at` to `at + count` - 1, which are in the first cache. */
static void keep(const float *x, int64_t at, int64_t count, struct kept kept) {
    for (int64_t row = at / kept.width; row * kept.width < at + count; row++) {
        int64_t begin = row * kept.width - at;
        float *into = kept.columns + row * SIDE;
        for (int j = 0; j < SIDE; j++) {
            int64_t i = begin + kept.places[j];
            if (i >= 0 && i < count) into[j] = x[i];
        }
    }
}

/* Codes of numbers `start` to `end` - 1: `x * factor * again`, to nearest, or with `noise` up or down at random.

   Returns what `largest` does, so that who guessed the factor sees whether it was right. Each loop has little to do,
   on what is in the first cache: compilers make vectors of such, and of one loop for all of it they do not.
   every: of so many runs of neighbours one is looked at; 1: all numbers are.
   seen: of those; null: nothing is looked at. */
static float quantize(const void *values, int type, int64_t start, int64_t end, float factor, float again,
                      const float *noise, int8_t *codes, int64_t every, struct seen *seen, struct kept kept) {
    float memory[BLOCK], most = 0;
    int strange = 0;
    for (int64_t at = start; at < end; at += BLOCK) {
        int64_t count = end - at < BLOCK ? end - at : BLOCK;
        const float *x = block(values, type, at, count, memory);
        if (kept.columns) keep(x, at, count, kept);
        int8_t *out = codes + at;
        const float *u = noise ? noise + (at - start) : 0;
        float size = largest_of(x, count);
        strange |= size != size;
        most = size > most ? size : most;
        if (u) {
#pragma omp simd
            for (int64_t i = 0; i < count; i++) out[i] = coded(rounded(x[i] * factor * again, u, i));
        } else {
#pragma omp simd
            for (int64_t i = 0; i < count; i++) out[i] = coded(rounded(x[i] * factor * again, 0, i));
        }
        if (!seen) continue;
        int large = size * factor * again > LARGEST;
        if (every == 1) {
            look(x, u, out, count, factor, again, large, seen);
            continue;
        }
        int64_t first = (every - at / RUN % every) % every * RUN;
        for (int64_t i = first; i + RUN <= count; i += every * RUN)
            look(x + i, u ? u + i : 0, out + i, RUN, factor, again, large, seen);
    }
    return strange ? NAN : most;
}

/* Of a whole tensor, by as many threads as come. */
struct quantizing {
    const void *values;
    int64_t type, count, part; /* numbers, and in a part of them */
    float factor, again;
    const float *noise;      /* or null */
    const int64_t *noise_at; /* of each part, in it */
    int8_t *codes;
    int64_t every;
    struct seen *seen; /* of each part, or null */
    float *largest;    /* likewise */
    struct kept kept;
    int64_t seats; /* of threads; who finds them taken goes */
    _Atomic int64_t came, taken;
};

void quantize_all(struct quantizing *job) {
    int64_t number;
    if (atomic_fetch_add(&job->came, 1) >= job->seats) return;
    while ((number = atomic_fetch_add(&job->taken, 1)) * job->part < job->count) {
        int64_t start = number * job->part, end = start + job->part < job->count ? start + job->part : job->count;
        job->largest[number] =
            quantize(job->values, (int)job->type, start, end, job->factor, job->again,
                     job->noise ? job->noise + job->noise_at[number] : 0, job->codes, job->every,
                     job->seen ? job->seen + number : 0, job->kept);
    }
}

static inline uint16_t narrowed(float number) {
    uint32_t bits;
    memcpy(&bits, &number, 4);
    return number != number ? 0x7fc0 : (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

/* Rows `start` to `end` - 1 of sums, as numbers `sum * factor * again + bias`; float32 may lie where the sums do. */
void convert(const int32_t *sums, void *out, int type, int64_t columns, float factor, float again, const float *bias,
             int64_t start, int64_t end) {
    for (int64_t row = start; row < end; row++) {
        const int32_t *from = sums + row * columns;
        float *wide = (float *)out + row * columns;
        uint16_t *narrow = (uint16_t *)out + row * columns;
        if (type == BFLOAT16 && bias) {
#pragma omp simd
            for (int64_t i = 0; i < columns; i++) narrow[i] = narrowed((float)from[i] * factor * again + bias[i]);
        } else if (type == BFLOAT16) {
#pragma omp simd
            for (int64_t i = 0; i < columns; i++) narrow[i] = narrowed((float)from[i] * factor * again);
        } else if (bias) {
#pragma omp simd
            for (int64_t i = 0; i < columns; i++) wide[i] = (float)from[i] * factor * again + bias[i];
        } else {
#pragma omp simd
            for (int64_t i = 0; i < columns; i++) wide[i] = (float)from[i] * factor * again;
        }
    }
}
