/* What probes.py looks at: few numbers of a large result.

   Compile without contraction and without fast math: the results are those of torch's operations. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define SIDE 16    /* rows and columns that are computed again, at most */
#define GROUP 4    /* of those that are neighbours */
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

/* Groups of neighbours, evenly spread: where numbers of a column are neighbours, a line of the cache has a group. */
static int64_t place(int64_t number, int64_t size, int64_t at) {
    int64_t from = size < SIDE ? number : number / GROUP * (size * GROUP / SIDE) + number % GROUP;
    return (from + at) % size;
}

struct matrix {
    const void *values;
    int type;
    int64_t row, term; /* from one to the next, in elements */
};

/* Some terms of some rows. */
static void fetch(struct matrix m, const int64_t *rows, int64_t count, int64_t begin, int64_t terms,
                  float into[SIDE][TERMS]) {
    if (m.term == 1)
        for (int64_t i = 0; i < count; i++)
            for (int64_t k = 0; k < terms; k++) into[i][k] = number_at(m.values, m.type, rows[i] * m.row + begin + k);
    else
        for (int64_t k = 0; k < terms; k++)
            for (int64_t i = 0; i < count; i++)
                into[i][k] = number_at(m.values, m.type, rows[i] * m.row + (begin + k) * m.term);
}

/* Computes some of `a [rows, terms] @ b [columns, terms] transposed + bias` again, others with each `at`.

   found: the sums of the squares of those, and of what `result [rows, columns]` is off there. */
void probe(const void *a, int a_type, int64_t a_row, int64_t a_term, const void *b, int b_type, int64_t b_row,
           int64_t b_term, const void *bias, int bias_type, const void *result, int result_type, int64_t rows,
           int64_t columns, int64_t terms, int64_t at, double *found) {
    struct matrix one = {a, a_type, a_row, a_term}, other = {b, b_type, b_row, b_term};
    float left[SIDE][TERMS], right[SIDE][TERMS], exact[SIDE][SIDE] = {{0}};
    int64_t high = rows < SIDE ? rows : SIDE, wide = columns < SIDE ? columns : SIDE;
    int64_t down[SIDE], across[SIDE];
    for (int64_t i = 0; i < high; i++) down[i] = place(i, rows, at);
    for (int64_t j = 0; j < wide; j++) across[j] = place(j, columns, at);
    for (int64_t begin = 0; begin < terms; begin += TERMS) {
        int64_t count = terms - begin < TERMS ? terms - begin : TERMS;
        fetch(one, down, high, begin, count, left);
        fetch(other, across, wide, begin, count, right);
        for (int64_t i = 0; i < high; i++)
            for (int64_t j = 0; j < wide; j++) {
                float sum = 0;
#pragma omp simd reduction(+ : sum)
                for (int64_t k = 0; k < count; k++) sum += left[i][k] * right[j][k];
                exact[i][j] += sum;
            }
    }
    double size = 0, off = 0;
    for (int64_t i = 0; i < high; i++)
        for (int64_t j = 0; j < wide; j++) {
            float should = exact[i][j] + (bias ? number_at(bias, bias_type, across[j]) : 0.0f);
            double difference = number_at(result, result_type, down[i] * columns + across[j]) - should;
            size += (double)should * should, off += difference * difference;
        }
    found[0] = size, found[1] = off;
}
