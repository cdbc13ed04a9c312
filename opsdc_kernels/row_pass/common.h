/* What the passes in C over a chunk's logits share.

   Logits lie with the tokens of a column side by side, as the products are fastest written. A pass
   walks down the columns, BLOCK at a time, and within them over panels of W tokens, one in each
   lane of a vector. Lanes do not meet, and all are computed, whether or not there is a token for
   them: results do not depend on how tokens are spread over threads. Plain C: the compiler makes
   vectors of the loops over lanes.
*/
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __SSE__
#include <xmmintrin.h>
#endif

#define W 16     /* tokens of a panel: what a cache line holds */
#define BLOCK 64 /* columns, summed in float before a double takes over */
#define LANES _Pragma("omp simd") for (int j = 0; j < W; j++)
#define NO_PEAK -0x1p126f

typedef struct {
    float *x;          /* [columns, stride] h.W, tokens side by side */
    int64_t stride;
    const float *bias; /* [columns] or null */
    float factor;      /* logit scale over temperature, or over the soft-cap */
    float range;       /* soft-cap over temperature; 0 for none */
} Side;

/* x = n ln(2) + r with |r| <= ln(2)/2; 2^n and r. */
static inline float reduced(float x, float *r)
{
    const float magic = 0x1.8p23f; /* added, it rounds to an integer, which the lowest bits hold */
    float shifted = x * 1.44269504f + magic, n = shifted - magic;
    *r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    uint32_t bits;
    memcpy(&bits, &shifted, 4);
    bits = (bits + 127) << 23;
    float scale;
    memcpy(&scale, &bits, 4);
    return scale;
}

/* e^x for x <= 88, by a Taylor polynomial; below -87 as at -87, next to nothing. */
static inline float exponential(float x)
{
    float r, scale = reduced(x < -87 ? -87 : x, &r);
    float p = 1 / 5040.f;
    p = p * r + 1 / 720.f;
    p = p * r + 1 / 120.f;
    p = p * r + 1 / 24.f;
    p = p * r + 1 / 6.f;
    p = p * r + 0.5f;
    p = p * r + 1;
    p = p * r + 1;
    return p * scale;
}

/* f(x) = e^x - 1 - x (2), x <= 88, as 2^n f(r) + (2^n (1 + r) - (1 + x)): near 0 the bracket is 0,
   and the relative accuracy that of f(r). */
static inline float excess(float x)
{
    float r, scale = reduced(x < -87 ? -87 : x, &r);
    float p = 1 / 40320.f;
    p = p * r + 1 / 5040.f;
    p = p * r + 1 / 720.f;
    p = p * r + 1 / 120.f;
    p = p * r + 1 / 24.f;
    p = p * r + 1 / 6.f;
    p = p * r + 0.5f;
    return scale * (r * r * p) + (scale * (1 + r) - (1 + x));
}

/* tanh(x) to full relative accuracy, and its derivative. */
static inline float tanh_of(float x, float *slope)
{
    float y = -2 * fabsf(x), e = exponential(y), near = -(y + excess(y)), far = 1 - e;
    *slope = 4 * e / ((1 + e) * (1 + e));
    return copysignf((y > -1 ? near : far) / (1 + e), x);
}

typedef float Tile[BLOCK][W];

/* Some columns of a panel. */
typedef struct {
    Tile s, d, slope; /* d = t - s; slope: of the student's soft-cap, where it has one */
    int columns, lanes;
} Block;

#define EACH_COLUMN(b) for (int v = 0; v < (b)->columns; v++)

/* Logits, 0 in lanes without a token. `ahead`: how far from these the next ones to be read lie. */
static inline void read_side(const Side *side, int64_t start, int64_t token, int64_t ahead,
                             const Block *b, Tile out)
{
    const float factor = side->factor;
    EACH_COLUMN(b) {
        const float *x = side->x + (start + v) * side->stride + token;
        const float bias = side->bias ? side->bias[start + v] : 0;
        __builtin_prefetch(x + ahead);
        if (b->lanes == W) {
            LANES out[v][j] = (x[j] + bias) * factor;
        } else {
            for (int j = 0; j < W; j++) out[v][j] = j < b->lanes ? (x[j] + bias) * factor : 0;
        }
    }
}

/* Both sides' products of some columns to s and d = t - s. */
static inline void read_both(const Side *student, const Side *other, int shared, int64_t rows,
                             int64_t start, int64_t token, Block *b)
{
    const float cap_s = student->range, cap_t = other->range;
    const int last = token + W >= rows;
    const int64_t next_s = last ? BLOCK * student->stride - token : W;
    const int64_t next_t = last ? BLOCK * other->stride - token : W;
    read_side(student, start, token, next_s, b, b->s);
    read_side(other, start, token, next_t, b, b->d);
    if (shared && cap_s) {
        EACH_COLUMN(b) LANES {
            float none, x = b->s[v][j], delta = b->d[v][j];
            float s = tanh_of(x, &b->slope[v][j]), t = tanh_of(x + delta, &none);
            b->d[v][j] = cap_s * tanh_of(delta, &none) * (1 - s * t);
            b->s[v][j] = cap_s * s;
        }
    } else if (!shared) {
        if (cap_s) EACH_COLUMN(b) LANES b->s[v][j] = cap_s * tanh_of(b->s[v][j], &b->slope[v][j]);
        if (cap_t) {
            float none;
            EACH_COLUMN(b) LANES b->d[v][j] = cap_t * tanh_of(b->d[v][j], &none);
        }
        EACH_COLUMN(b) LANES b->d[v][j] -= b->s[v][j];
    }
}

#define SMALLEST 0x1p-100f /* gradients below it would make denormals of the sums they enter */
static inline float flushed(float x) { return fabsf(x) < SMALLEST ? 0 : x; }

/* Denormal numbers cost this processor a hundred cycles each. */
#ifdef __SSE__
#define WITHOUT_DENORMALS(work) \
    unsigned int mode = _mm_getcsr(); \
    _mm_setcsr(mode | 0x8040); \
    work; \
    _mm_setcsr(mode)
#else
#define WITHOUT_DENORMALS(work) work
#endif

/* Jobs of a pass that threads take one after the other, however many threads there are. */
typedef struct {
    void (*pass)(const void *);
    const char *jobs;
    int64_t size, count, next; /* size: bytes of a job */
} Queue;

void opsdc_work(Queue *queue)
{
    for (;;) {
        int64_t i = __atomic_fetch_add(&queue->next, 1, __ATOMIC_RELAXED);
        if (i >= queue->count) return;
        queue->pass(queue->jobs + i * queue->size);
    }
}
