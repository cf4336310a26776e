/* Products of int8 matrices on the tiles of Intel's AMX, summed exactly in int32 and converted where they are made.

   Both matrices are packed first: into panels of 32 rows (of the right one: columns), of which each holds, for each 64
   terms of the sum, two tiles of 1 KiB as the multiplication reads them. (Intel 2024, "Intel 64 and IA-32 Architectures
   Optimization Reference Manual", 20.) On another processor `tiles_ready` says no, and nothing else may be called. */

#define _DEFAULT_SOURCE /* syscall */
#include <stdint.h>
#include <string.h>

#if defined(__AMX_INT8__) && defined(__AMX_TILE__) && defined(__AVX512VBMI__) && defined(__linux__)

#include <immintrin.h>
#include <sched.h>
#include <stdatomic.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PANEL 32             /* rows, two tiles */
#define TERMS 64             /* of a tile */
#define STEP (PANEL * TERMS) /* bytes of a panel for so many terms */
#define CHUNK 64             /* steps of a panel that are multiplied at a time: of two they are in the first caches */
#define CACHED (1 << 20)     /* bytes of the right matrix that stay in the second cache */
#define TOGETHER (CACHED / (CHUNK * STEP)) /* panels of a matrix with more steps than that */
#define AT_A_TIME 4          /* panels of rows that a thread takes */

enum { FLOAT32, BFLOAT16 };

/* Whether this process may use the tiles: the kernel gives their memory only to those who ask. */
int tiles_ready(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, TILE_DATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0;
}

/* 16 rows of 16 words of 32 bits become columns. */
static inline void transpose(__m512i *r) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

static inline int64_t at_most(int64_t number, int64_t most) { return number < 0 ? 0 : number < most ? number : most; }

static inline int64_t upward(int64_t number, int64_t unit) { return (number + unit - 1) / unit; }

static inline __mmask64 first_of(int64_t count) {
    return count < 64 ? ((__mmask64)1 << count) - 1 : ~(__mmask64)0;
}

/* 16 rows of 64 terms, zero beyond the matrix, whose terms are neighbours. */
static inline void along(const int8_t *from, int64_t rows, int64_t terms, int64_t apart, __m512i *tile) {
    __mmask64 there = first_of(terms);
    for (int64_t row = 0; row < 16; row++)
        tile[row] = row < rows ? _mm512_maskz_loadu_epi8(there, from + row * apart) : _mm512_setzero_si512();
}

/* 64 rows of 64 terms, likewise, whose rows are neighbours: four tiles, as words of four terms, word by row. */
static inline void across(const int8_t *from, int64_t rows, int64_t terms, int64_t apart, __m512i *tiles) {
    __mmask64 there = first_of(rows);
    for (int64_t word = 0; word < 16; word++) {
        __m512i f[4], q[4], h[4]; /* each of four terms; 16 rows in a quarter: of these four */
        for (int64_t i = 0; i < 4; i++) {
            int64_t term = word * 4 + i;
            f[i] = term < terms ? _mm512_maskz_loadu_epi8(there, from + term * apart) : _mm512_setzero_si512();
        }
        for (int64_t i = 0; i < 2; i++) {
            h[i] = _mm512_unpacklo_epi8(f[2 * i], f[2 * i + 1]);
            h[i + 2] = _mm512_unpackhi_epi8(f[2 * i], f[2 * i + 1]);
        }
        for (int64_t i = 0; i < 2; i++) {
            q[2 * i] = _mm512_unpacklo_epi16(h[2 * i], h[2 * i + 1]);
            q[2 * i + 1] = _mm512_unpackhi_epi16(h[2 * i], h[2 * i + 1]);
        }
        for (int64_t i = 0; i < 2; i++) {
            h[i] = _mm512_shuffle_i32x4(q[2 * i], q[2 * i + 1], 0x44);
            h[i + 2] = _mm512_shuffle_i32x4(q[2 * i], q[2 * i + 1], 0xee);
        }
        for (int64_t i = 0; i < 2; i++) {
            tiles[2 * i * 16 + word] = _mm512_shuffle_i32x4(h[2 * i], h[2 * i + 1], 0x88);
            tiles[(2 * i + 1) * 16 + word] = _mm512_shuffle_i32x4(h[2 * i], h[2 * i + 1], 0xdd);
        }
    }
}

/* Of codes, as they lie, and where they go. */
struct matrix {
    const int8_t *from;
    int64_t rows, apart; /* bytes from one row to the next, or, */
    int64_t across;      /* if not zero: from one term of the sum to the next, for rows are neighbours */
    int8_t *packed;
};

/* A pair of panels of the left matrix, or of the transposed `right` one, whose tiles hold words of four terms. */
static void pack(const struct matrix *matrix, int right, int64_t terms, int64_t pair) {
    int64_t steps = upward(terms, TERMS), panels = upward(matrix->rows, PANEL), apart = matrix->apart;
    for (int64_t step = 0; step < steps; step++) {
        int64_t row = pair * 2 * PANEL, term = step * TERMS, there = at_most(terms - term, TERMS);
        __m512i tiles[4 * 16];
        if (matrix->across) {
            across(matrix->from + term * apart + row, at_most(matrix->rows - row, 2 * PANEL), there, apart, tiles);
        } else {
            for (int64_t i = 0; i < 4; i++)
                along(matrix->from + (row + i * 16) * apart + term, at_most(matrix->rows - row - i * 16, 16), there,
                      apart, tiles + i * 16);
        }
        for (int64_t i = 0; i < 4 && pair * 2 + i / 2 < panels; i++) {
            if (!!matrix->across != right) transpose(tiles + i * 16);
            __m512i *out = (__m512i *)(matrix->packed + ((pair * 2 + i / 2) * steps + step) * STEP + i % 2 * 1024);
            for (int64_t line = 0; line < 16; line++) _mm512_storeu_si512(out + line, tiles[i * 16 + line]);
        }
    }
}

/* 32 x 32 sums over so many steps, added to those in `sums` unless they are `fresh`. */
static inline void multiply(const int8_t *left, const int8_t *right, int64_t steps, int32_t *sums, int fresh) {
    if (fresh) {
        _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    } else {
        _tile_loadd(0, sums, 64); _tile_loadd(1, sums + 256, 64);
        _tile_loadd(2, sums + 512, 64); _tile_loadd(3, sums + 768, 64);
    }
    for (int64_t step = 0; step < steps; step++, left += STEP, right += STEP) {
        _tile_loadd(4, left, 64);
        _tile_loadd(6, right, 64);
        _tile_dpbssd(0, 4, 6);
        _tile_loadd(7, right + 1024, 64);
        _tile_dpbssd(1, 4, 7);
        _tile_loadd(5, left + 1024, 64);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
    }
    _tile_stored(0, sums, 64); _tile_stored(1, sums + 256, 64);
    _tile_stored(2, sums + 512, 64); _tile_stored(3, sums + 768, 64);
}

static inline __m512 number(const int32_t *sums, __mmask16 there, float factor, float again, const float *bias) {
    __m512 row = _mm512_cvtepi32_ps(_mm512_loadu_si512(sums));
    row = _mm512_mul_ps(_mm512_mul_ps(row, _mm512_set1_ps(factor)), _mm512_set1_ps(again));
    return bias ? _mm512_add_ps(row, _mm512_maskz_loadu_ps(there, bias)) : row;
}

/* To the nearest bfloat16, of two the even one. */
static inline __m256i narrowed(__m512 row) {
    __m512i bits = _mm512_castps_si512(row), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    bits = _mm512_mask_mov_epi32(bits, _mm512_cmp_ps_mask(row, row, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16));
}

/* A row of up to 32 sums, of which the second half lies a tile further, as `sum * factor * again + bias`. */
static inline void converted(const int32_t *sums, void *out, int type, int64_t at, int64_t count, float factor,
                             float again, const float *bias) {
    __mmask32 there = (__mmask32)first_of(count);
    __m512 low = number(sums, (__mmask16)there, factor, again, bias);
    __m512 high = number(sums + 256, (__mmask16)(there >> 16), factor, again, bias ? bias + 16 : 0);
    if (type == FLOAT32) {
        _mm512_mask_storeu_ps((float *)out + at, (__mmask16)there, low);
        _mm512_mask_storeu_ps((float *)out + at + 16, (__mmask16)(there >> 16), high);
    } else {
        __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(narrowed(low)), narrowed(high), 1);
        _mm512_mask_storeu_epi16((uint16_t *)out + at, there, both);
    }
}

/* Eight tiles of 16 rows of 64 bytes. (Not a local one: gcc thinks that eight bytes of it are read.) */
static const struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} shape = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

/* `left @ right * factor * again + bias`, by as many threads as come. */
struct job {
    struct matrix left, right; /* the right one transposed: its rows are columns of the result */
    void *out;                 /* [left.rows, right.rows] */
    int64_t type, terms;
    float factor, again;
    const float *bias;
    int64_t seats;
    _Atomic int64_t came, to_pack, packed, to_multiply; /* zero at first: how many parts somebody has taken, or done */
};

/* Some panels of rows of the result by some panels of columns. */
static void part(const struct job *job, int64_t row, int64_t last_row, int64_t first, int64_t last) {
    int64_t rows = job->left.rows, columns = job->right.rows, steps = upward(job->terms, TERMS);
    int64_t chunks = upward(steps, CHUNK);
    _Alignas(64) int32_t sums[TOGETHER * PANEL * PANEL];
    for (; row < last_row; row++)
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
            int64_t from = steps * chunk / chunks, count = steps * (chunk + 1) / chunks - from;
            for (int64_t column = first; column < last; column++) {
                int32_t *here = sums + (chunks > 1 ? (column - first) * PANEL * PANEL : 0);
                multiply(job->left.packed + (row * steps + from) * STEP,
                         job->right.packed + (column * steps + from) * STEP, count, here, chunk == 0);
                if (chunk + 1 < chunks) continue;
                int64_t down = at_most(rows - row * PANEL, PANEL), at = column * PANEL;
                for (int64_t i = 0; i < down; i++)
                    converted(here + i / 16 * 512 + i % 16 * 16, job->out, job->type, (row * PANEL + i) * columns + at,
                              at_most(columns - at, PANEL), job->factor, job->again, job->bias ? job->bias + at : 0);
            }
        }
}

/* Whoever has taken the last part to be packed, or comes later, waits until all are. */
void tiles_multiply(struct job *job) {
    if (atomic_fetch_add(&job->came, 1) >= job->seats) return;
    int64_t down = upward(job->left.rows, PANEL), across = upward(job->right.rows, PANEL), taken;
    int64_t pairs = upward(down, 2), all = pairs + upward(across, 2);
    while ((taken = atomic_fetch_add(&job->to_pack, 1)) < all) {
        if (taken < pairs) pack(&job->left, 0, job->terms, taken);
        else pack(&job->right, 1, job->terms, taken - pairs);
        atomic_fetch_add(&job->packed, 1);
    }
    while (atomic_load(&job->packed) < all) sched_yield();
    _tile_loadconfig(&shape);
    int64_t steps = upward(job->terms, TERMS), together = steps > CHUNK ? TOGETHER : CACHED / (steps * STEP);
    int64_t groups = upward(down, AT_A_TIME);
    while ((taken = atomic_fetch_add(&job->to_multiply, 1)) < groups * upward(across, together)) {
        int64_t row = taken % groups * AT_A_TIME, column = taken / groups * together;
        part(job, row, row + at_most(down - row, AT_A_TIME), column, column + at_most(across - column, together));
    }
    _tile_release();
}

#else

int tiles_ready(void) { return 0; }

#endif
