/* What probes.py looks at: few numbers of a large result.

   Compile without contraction and without fast math: the results are those of torch's operations. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define SIDE 16    /* rows and columns that are computed again, at most */
#define TERMS 256  /* that are summed at a time, in the first cache */

enum { FLOAT32, BFLOAT16 };

static inline float number_at(const void *values, int type, int64_t place) {
    if (type == FLOAT32) return ((const float *)values)[place];
    uint32_t bits = (uint32_t)((const uint16_t *)values)[place] << 16;
    float number;
    memcpy(&number, &bits, 4);
    return number;
}

/* The largest magnitude in every `step`-th run of so many neighbours; NaN if a number there is: of floats that are not
   negative, the order is that of their bits. */
float largest_in_runs(const void *values, int type, int64_t count, int64_t run, int64_t step) {
    int32_t most = 0;
    for (int64_t at = 0; at < count; at += run * step) {
        int64_t end = at + run < count ? at + run : count;
        for (int64_t i = at; i < end; i++) {
            float number = number_at(values, type, i);
            int32_t bits;
            memcpy(&bits, &number, 4);
            bits &= 0x7fffffff;
            most = bits > most ? bits : most;
        }
    }
    float size;
    memcpy(&size, &most, 4);
    return size;
}

static int64_t place(int64_t number, int64_t count, int64_t size, int64_t at) {
    return (number * (size / count) + at) % size;
}

/* Computes some of `x [rows, terms] @ weight [columns, terms] transposed + bias` again, others with each `at`.

   found: the sums of the squares of those, and of what `result [rows, columns]` is off there. */
void probe(const void *x, int x_type, const void *weight, int weight_type, const void *bias, int bias_type,
           const void *result, int result_type, int64_t rows, int64_t columns, int64_t terms, int64_t at,
           double *found) {
    float a[SIDE][TERMS], b[SIDE][TERMS], exact[SIDE][SIDE] = {{0}};
    int64_t high = rows < SIDE ? rows : SIDE, wide = columns < SIDE ? columns : SIDE;
    for (int64_t begin = 0; begin < terms; begin += TERMS) {
        int64_t count = terms - begin < TERMS ? terms - begin : TERMS;
        for (int64_t i = 0; i < high; i++) {
            int64_t from = place(i, high, rows, at) * terms + begin;
            for (int64_t k = 0; k < count; k++) a[i][k] = number_at(x, x_type, from + k);
        }
        for (int64_t j = 0; j < wide; j++) {
            int64_t from = place(j, wide, columns, at) * terms + begin;
            for (int64_t k = 0; k < count; k++) b[j][k] = number_at(weight, weight_type, from + k);
        }
        for (int64_t i = 0; i < high; i++)
            for (int64_t j = 0; j < wide; j++) {
                float sum = 0;
#pragma omp simd reduction(+ : sum)
                for (int64_t k = 0; k < count; k++) sum += a[i][k] * b[j][k];
                exact[i][j] += sum;
            }
    }
    double size = 0, off = 0;
    for (int64_t i = 0; i < high; i++)
        for (int64_t j = 0; j < wide; j++) {
            int64_t row = place(i, high, rows, at), column = place(j, wide, columns, at);
            float right = exact[i][j] + (bias ? number_at(bias, bias_type, column) : 0.0f);
            double difference = number_at(result, result_type, row * columns + column) - right;
            size += (double)right * right, off += difference * difference;
        }
    found[0] = size, found[1] = off;
}
