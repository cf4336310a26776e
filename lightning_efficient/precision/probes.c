/* What probes.py looks at: few numbers of a large result.

   Compile without contraction and without fast math: the results are those of torch's operations. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define SIDE 16   /* rows and columns that are computed again, at most */
#define GROUP 4   /* of those that are neighbours */
#define TERMS 256 /* that are summed at a time, in the first cache */
#define AHEAD 16  /* terms, each in a page of its own, that are on their way from memory */

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
    const float *kept; /* what the rows that are looked at were, `[terms, SIDE]`, or null */
};

static inline const void *address(struct matrix m, int64_t place) {
    return (const char *)m.values + place * (m.type == FLOAT32 ? 4 : 2);
}

/* Some terms of some rows; zeros where there are less than SIDE of these. */
static inline void fetch_as(struct matrix m, int type, const int64_t *rows, int64_t count, int64_t begin, int64_t terms,
                            float into[TERMS][SIDE]) {
    if (count < SIDE) memset(into, 0, TERMS * sizeof *into);
    if (m.term == 1) {
        for (int64_t i = 0; i < count; i++) {
            int64_t from = rows[i] * m.row + begin;
            for (int64_t k = 0; k < terms; k++) into[k][i] = number_at(m.values, type, from + k);
        }
        return;
    }
    for (int64_t k = 0; k < terms; k++) {
        int64_t from = (begin + k) * m.term;
        for (int64_t i = 0; i < count; i += GROUP) __builtin_prefetch(address(m, rows[i] * m.row + from + AHEAD * m.term));
        for (int64_t i = 0; i < count; i++) into[k][i] = number_at(m.values, type, rows[i] * m.row + from);
    }
}

/* Whether the rows still are what was kept, as far as some terms tell, others with each `at`. */
static int is_as_kept(struct matrix m, const int64_t *rows, int64_t terms, int64_t at) {
    int64_t some[SIDE];
    for (int64_t s = 0; s < SIDE; s++) {
        some[s] = (s * terms / SIDE + at) % terms;
        for (int64_t i = 0; i < SIDE; i += GROUP) __builtin_prefetch(address(m, rows[i] * m.row + some[s] * m.term));
    }
    for (int64_t s = 0; s < SIDE; s++)
        for (int64_t i = 0; i < SIDE; i++)
            if (number_at(m.values, m.type, rows[i] * m.row + some[s] * m.term) != m.kept[some[s] * SIDE + i]) return 0;
    return 1;
}

typedef const float (*terms_of_rows)[SIDE];

static terms_of_rows fetch(struct matrix m, const int64_t *rows, int64_t count, int64_t begin, int64_t terms,
                           float into[TERMS][SIDE]) {
    if (m.kept) return (terms_of_rows)(m.kept + begin * SIDE);
    if (m.type == FLOAT32) fetch_as(m, FLOAT32, rows, count, begin, terms, into); /* a loop for each type */
    else fetch_as(m, BFLOAT16, rows, count, begin, terms, into);
    return (terms_of_rows)into;
}

/* Computes some of `a [rows, terms] @ b [columns, terms] transposed + bias` again, others with each `at`, which may
   differ between the two. What was kept is of SIDE rows; where these have changed since, they are read.

   found: the sums of the squares of those, and of what `result [rows, columns]` is off there. */
void probe(const void *a, int a_type, int64_t a_row, int64_t a_term, const float *a_kept, int64_t a_at, const void *b,
           int b_type, int64_t b_row, int64_t b_term, const float *b_kept, int64_t b_at, const void *bias, int bias_type,
           const void *result, int result_type, int64_t rows, int64_t columns, int64_t terms, double *found) {
    struct matrix one = {a, a_type, a_row, a_term, a_kept}, other = {b, b_type, b_row, b_term, b_kept};
    struct matrix there = {result, result_type, columns, 1, 0};
    float memory[2][TERMS][SIDE], exact[SIDE][SIDE] = {{0}};
    int64_t high = rows < SIDE ? rows : SIDE, wide = columns < SIDE ? columns : SIDE;
    int64_t down[SIDE], across[SIDE];
    for (int64_t i = 0; i < high; i++) down[i] = place(i, rows, a_at);
    for (int64_t j = 0; j < wide; j++) across[j] = place(j, columns, b_at);
    for (int64_t i = 0; i < high; i++) /* they come while the sums are made */
        for (int64_t j = 0; j < wide; j += GROUP) __builtin_prefetch(address(there, down[i] * columns + across[j]));
    if (one.kept && !is_as_kept(one, down, terms, b_at)) one.kept = 0;
    if (other.kept && !is_as_kept(other, across, terms, a_at)) other.kept = 0;
    for (int64_t begin = 0; begin < terms; begin += TERMS) {
        int64_t count = terms - begin < TERMS ? terms - begin : TERMS;
        terms_of_rows left = fetch(one, down, high, begin, count, memory[0]);
        terms_of_rows right = fetch(other, across, wide, begin, count, memory[1]);
        for (int64_t k = 0; k < count; k++)
            for (int i = 0; i < SIDE; i++)
#pragma omp simd
                for (int j = 0; j < SIDE; j++) exact[i][j] += left[k][i] * right[k][j];
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
