/* Row passes of a chunk on a CPU: raw products to divergence, statistics and logit gradient.

   The counterpart of opsdc_kernels/rows_cpu.py, with its letters; numbers in brackets are the
   equations of opsdc_kernels/reference.py. Logits lie with the tokens of a column side by side, as
   the products are fastest written. A pass walks down the columns, BLOCK at a time, and within them
   over panels of W tokens, one in each lane of a vector. Lanes do not meet, and all are computed,
   whether or not there is a token for them: results do not depend on how tokens are spread over
   threads. Plain C: the compiler makes vectors of the loops over lanes.

   d is shifted by its value at the student's peak before its mean is taken. In a peaked row that
   column has nearly all the mass, and a mean over what is left keeps its digits.
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
#define FARTHEST 60.0f /* log-ratios above this overflow, or meet a student's mass that underflowed */
#define SMALLEST 0x1p-100f /* gradients below it would make denormals of the sums they enter */
#define NO_PEAK -0x1p126f

enum { REVERSE_KL, FORWARD_KL, JSD };
enum { DIVERGENCE, STUDENT_LOGSUMEXP, TEACHER_LOGSUMEXP, STUDENT_ENTROPY, TEACHER_ENTROPY,
       AGREEMENT, STUDENT_LOGPROB, TEACHER_LOGPROB };

typedef struct {
    float *x;          /* [columns, stride] h.W, tokens side by side */
    int64_t stride;
    const float *bias; /* [columns] or null */
    float factor;      /* logit scale over temperature, or over the soft-cap */
    float range;       /* soft-cap over temperature; 0 for none */
} Side;

typedef struct {
    Side student; /* the gradient replaces its products */
    Side other;   /* the teacher's or, shared, the difference's */
    int64_t rows, columns;
    int32_t shared, divergence, gradient, statistics;
    float beta;
    const int64_t *targets; /* [rows] or null */
    float *out;             /* [fields, rows], a field every out_stride floats */
    int64_t out_stride;
} Job;

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

static inline float flushed(float x) { return fabsf(x) < SMALLEST ? 0 : x; }

/* log(1 + y), y > -1, to full relative accuracy: 2 atanh(z) = log((1 + z) / (1 - z)). */
static inline float log_one_plus(float y)
{
    float u = 1 + y;
    int32_t bits;
    memcpy(&bits, &u, 4);
    int32_t n = (bits - 0x3f3504f3) >> 23; /* u = m 2^n with m in [sqrt(1/2), sqrt(2)) */
    bits -= n * (1 << 23);
    float m;
    memcpy(&m, &bits, 4);
    float f = n ? m - 1 : y;
    float z = f / (2 + f), z2 = z * z;
    float p = 1 / 11.f;
    p = p * z2 + 1 / 9.f;
    p = p * z2 + 1 / 7.f;
    p = p * z2 + 1 / 5.f;
    p = p * z2 + 1 / 3.f;
    float l = 2 * z + 2 * z * z2 * p;
    return (float)n * 0.693359375f + (l - (float)n * 2.12194440e-4f);
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

/* What a panel has gathered; c = (d - anchor) - mean. */
typedef struct {
    float peak[W], anchor[W], mean[W], share[W], log_ratio[W], middle[W], poison[W], farthest[W];
    double total[W], moment[W], value[W], other[W];
    float peak_s[W], peak_t[W]; /* from here to below_t: of the statistics */
    double total_s[W], below_s[W], total_t[W], below_t[W];
    int doubt[W], doubts;
} Panel;

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

static inline void read_block(const Job *job, int64_t start, int64_t token, Block *b)
{
    const float cap_s = job->student.range, cap_t = job->other.range;
    const int last = token + W >= job->rows;
    const int64_t next_s = last ? BLOCK * job->student.stride - token : W;
    const int64_t next_t = last ? BLOCK * job->other.stride - token : W;
    read_side(&job->student, start, token, next_s, b, b->s);
    read_side(&job->other, start, token, next_t, b, b->d);
    if (job->shared && cap_s) {
        EACH_COLUMN(b) LANES {
            float none, x = b->s[v][j], delta = b->d[v][j];
            float s = tanh_of(x, &b->slope[v][j]), t = tanh_of(x + delta, &none);
            b->d[v][j] = cap_s * tanh_of(delta, &none) * (1 - s * t);
            b->s[v][j] = cap_s * s;
        }
    } else if (!job->shared) {
        if (cap_s) EACH_COLUMN(b) LANES b->s[v][j] = cap_s * tanh_of(b->s[v][j], &b->slope[v][j]);
        if (cap_t) {
            float none;
            EACH_COLUMN(b) LANES b->d[v][j] = cap_t * tanh_of(b->d[v][j], &none);
        }
        EACH_COLUMN(b) LANES b->d[v][j] -= b->s[v][j];
    }
}

static inline void write_side(const Side *side, int64_t start, int64_t token, const Block *b,
                              const Panel *p, Tile values)
{
    EACH_COLUMN(b) {
        float *x = side->x + (start + v) * side->stride + token;
        if (b->lanes == W && !p->doubts) {
            LANES x[j] = values[v][j];
        } else {
            for (int j = 0; j < b->lanes; j++)
                if (!p->doubt[j]) x[j] = values[v][j];
        }
    }
}

typedef void (*Pass)(const Job *, Block *, Panel *);
enum { READS, WRITES, WRITES_BOTH };

static void sweep(const Job *job, Panel *panels, Pass pass, int writes)
{
    Block b;
    for (int64_t start = 0; start < job->columns; start += BLOCK) {
        b.columns = job->columns - start < BLOCK ? job->columns - start : BLOCK;
        for (int64_t token = 0; token < job->rows; token += W) {
            Panel *p = panels + token / W;
            b.lanes = job->rows - token < W ? job->rows - token : W;
            read_block(job, start, token, &b);
            pass(job, &b, p);
            if (writes >= WRITES) write_side(&job->student, start, token, &b, p, b.s);
            if (writes == WRITES_BOTH) write_side(&job->other, start, token, &b, p, b.d);
        }
    }
}

/* Adds e^(x - peak), and e^(x - peak) (x - peak), the peak of what was read so far. */
static inline void add_logits(const Block *b, Tile x, float *peak, double *total, double *below)
{
    float top[W], sum[W] = {0}, weighted[W] = {0};
    LANES top[j] = peak[j];
    EACH_COLUMN(b) LANES top[j] = x[v][j] > top[j] ? x[v][j] : top[j];
    LANES {
        double shrink = exponential(peak[j] - top[j]);
        below[j] = (below[j] + total[j] * ((double)peak[j] - top[j])) * shrink;
        total[j] *= shrink;
        peak[j] = top[j];
    }
    EACH_COLUMN(b) LANES {
        float z = x[v][j] - top[j], e = exponential(z);
        sum[j] += e;
        weighted[j] += e * z;
    }
    LANES {
        total[j] += sum[j];
        below[j] += weighted[j];
    }
}

/* Peak, anchor, mean and total. */
static void centre(const Job *job, Block *b, Panel *p)
{
    float peak[W], anchor[W], sum[W] = {0}, weighted[W] = {0};
    LANES {
        peak[j] = p->peak[j];
        anchor[j] = p->anchor[j];
    }
    EACH_COLUMN(b) LANES {
        int higher = b->s[v][j] > peak[j];
        peak[j] = higher ? b->s[v][j] : peak[j];
        anchor[j] = higher ? b->d[v][j] : anchor[j];
    }
    LANES {
        double shrink = exponential(p->peak[j] - peak[j]);
        double shift = (double)p->anchor[j] - anchor[j];
        p->moment[j] = (p->moment[j] + p->total[j] * shift) * shrink;
        p->total[j] *= shrink;
        p->peak[j] = peak[j];
        p->anchor[j] = anchor[j];
    }
    float poison[W], farthest[W];
    LANES {
        poison[j] = p->poison[j];
        farthest[j] = p->farthest[j];
    }
    EACH_COLUMN(b) LANES {
        float s = b->s[v][j], d = b->d[v][j], e = exponential(s - peak[j]);
        sum[j] += e;
        weighted[j] += e * (d - anchor[j]);
        poison[j] += 0 * s + 0 * d;
        farthest[j] = d > farthest[j] ? d : farthest[j];
    }
    LANES {
        p->total[j] += sum[j];
        p->moment[j] += weighted[j];
        p->poison[j] = poison[j];
        p->farthest[j] = farthest[j];
    }
    if (job->statistics) {
        Tile t;
        EACH_COLUMN(b) LANES t[v][j] = b->s[v][j] + b->d[v][j];
        add_logits(b, b->s, p->peak_s, p->total_s, p->below_s);
        add_logits(b, t, p->peak_t, p->total_t, p->below_t);
    }
}

/* A row is not for the passes below if a logit is infinite or NaN, or a log-ratio is too large. */
static void finish_centre(Panel *p, int lanes)
{
    p->doubts = 0;
    for (int j = 0; j < W; j++) {
        p->mean[j] = (float)(p->moment[j] / p->total[j]);
        p->share[j] = (float)(1 / p->total[j]);
        float most = p->farthest[j] - p->anchor[j] - p->mean[j];
        p->doubt[j] = !(p->poison[j] == 0 && most <= FARTHEST);
        p->doubts |= j < lanes && p->doubt[j];
    }
}

static inline void finish_gradient(const Job *job, Block *b)
{
    if (job->student.range) EACH_COLUMN(b) LANES b->s[v][j] *= b->slope[v][j];
    EACH_COLUMN(b) LANES b->s[v][j] = flushed(b->s[v][j]);
}

/* KL(q|p) (3); with `gradient`, q c (8) replaces s. */
static inline void add_reverse_kl(const Job *job, Block *b, Panel *p, const int gradient)
{
    float sum[W] = {0};
    EACH_COLUMN(b) LANES {
        float c = (b->d[v][j] - p->anchor[j]) - p->mean[j];
        float q = exponential(b->s[v][j] - p->peak[j]) * p->share[j];
        sum[j] += q * excess(c);
        if (gradient) b->s[v][j] = q * c;
    }
    if (gradient) finish_gradient(job, b);
    LANES p->value[j] += sum[j];
}

static void reverse_kl(const Job *job, Block *b, Panel *p) { add_reverse_kl(job, b, p, 0); }

static void reverse_kl_gradient(const Job *job, Block *b, Panel *p) { add_reverse_kl(job, b, p, 1); }

/* The log-ratio's mean under q is -KL(q|p). */
static void finish_reverse_kl(Panel *p)
{
    for (int j = 0; j < W; j++) {
        double kl = log1p(p->value[j]);
        p->log_ratio[j] = (float)kl;
        p->value[j] = kl;
    }
}

#define LOG_RATIO ((b->d[v][j] - p->anchor[j]) - p->mean[j] - p->log_ratio[j]) /* (4) */

/* KL(p|q) (5), as q e^r f(-r) = q (r e^r - (e^r - 1)); e^r - 1 = r + f(r). p - q (9) replaces s. */
static void forward_kl(const Job *job, Block *b, Panel *p)
{
    float sum[W] = {0};
    EACH_COLUMN(b) LANES {
        float r = LOG_RATIO, q = exponential(b->s[v][j] - p->peak[j]) * p->share[j];
        float minus_one = r + excess(r);
        float near = (1 + minus_one) * excess(-r), far = r * (1 + minus_one) - minus_one;
        sum[j] += q * (fabsf(r) < 1 ? near : far);
        b->s[v][j] = q * minus_one;
    }
    finish_gradient(job, b);
    LANES p->other[j] += sum[j];
}

/* The JSD (7) from a and b (6), b = a - r where r is not small. Leaves a in `d`, and q times the
   soft-cap's slope in s. */
static void jsd(const Job *job, Block *b, Panel *p)
{
    const float beta = job->beta;
    float sum_q[W] = {0}, sum_p[W] = {0};
    EACH_COLUMN(b) LANES {
        float r = LOG_RATIO, q = exponential(b->s[v][j] - p->peak[j]) * p->share[j];
        float minus_one = r + excess(r), a = log_one_plus(beta * minus_one);
        float back = log_one_plus((beta - 1) * minus_one / (1 + minus_one));
        float near = (1 + minus_one) * excess(back);
        float far = (1 + beta * minus_one) - (1 + minus_one) * (1 + a - r);
        sum_q[j] += q * excess(a);
        sum_p[j] += q * (fabsf(r) < 1 ? near : far);
        b->d[v][j] = a;
        b->s[v][j] = q;
    }
    if (job->student.range) EACH_COLUMN(b) LANES b->s[v][j] *= b->slope[v][j];
    LANES {
        p->other[j] += sum_q[j];
        p->value[j] += sum_p[j];
    }
}

/* q (a - E_q[a]) (10) replaces q. */
static void jsd_gradient(const Job *job, Block *b, Panel *p)
{
    (void)job;
    EACH_COLUMN(b) LANES b->s[v][j] = flushed(b->s[v][j] * (b->d[v][j] + p->middle[j]));
}

static void divergences(const Job *job, Panel *panels, int64_t count)
{
    if (job->divergence == REVERSE_KL && job->gradient)
        sweep(job, panels, reverse_kl_gradient, WRITES);
    else
        sweep(job, panels, reverse_kl, READS);
    for (int64_t i = 0; i < count; i++) finish_reverse_kl(panels + i);
    if (job->divergence == FORWARD_KL) {
        sweep(job, panels, forward_kl, job->gradient ? WRITES : READS);
        for (int64_t i = 0; i < count; i++)
            memcpy(panels[i].value, panels[i].other, sizeof panels[i].value);
    }
    if (job->divergence == JSD) {
        for (int64_t i = 0; i < count; i++) memset(panels[i].value, 0, sizeof panels[i].value);
        sweep(job, panels, jsd, job->gradient ? WRITES_BOTH : READS);
        for (int64_t i = 0; i < count; i++) {
            Panel *p = panels + i;
            for (int j = 0; j < W; j++) {
                p->middle[j] = (float)p->other[j];
                p->value[j] = (1 - job->beta) * p->other[j] + job->beta * p->value[j];
            }
        }
        Job as_left = *job;
        as_left.shared = 1;
        as_left.student.bias = as_left.other.bias = 0;
        as_left.student.factor = as_left.other.factor = 1;
        as_left.student.range = as_left.other.range = 0;
        if (job->gradient) sweep(&as_left, panels, jsd_gradient, WRITES);
    }
}

static void give_statistics(const Job *job, const Panel *p, int64_t token)
{
    Block b = {.columns = 1};
    b.lanes = job->rows - token < W ? job->rows - token : W;
    for (int j = 0; j < b.lanes; j++) {
        float *out = job->out + token + j;
        double lse_s = p->peak_s[j] + log(p->total_s[j]), lse_t = p->peak_t[j] + log(p->total_t[j]);
        out[STUDENT_LOGSUMEXP * job->out_stride] = lse_s;
        out[TEACHER_LOGSUMEXP * job->out_stride] = lse_t;
        out[STUDENT_ENTROPY * job->out_stride] = log(p->total_s[j]) - p->below_s[j] / p->total_s[j];
        out[TEACHER_ENTROPY * job->out_stride] = log(p->total_t[j]) - p->below_t[j] / p->total_t[j];
        out[AGREEMENT * job->out_stride] = p->peak[j] + p->anchor[j] == p->peak_t[j];
        if (job->targets) {
            read_block(job, job->targets[token + j], token, &b);
            out[STUDENT_LOGPROB * job->out_stride] = b.s[0][j] - lse_s;
            out[TEACHER_LOGPROB * job->out_stride] = b.s[0][j] + b.d[0][j] - lse_t;
        }
    }
}

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

static void all_passes(const Job *job)
{
    int64_t count = (job->rows + W - 1) / W;
    Panel *panels = calloc(count, sizeof *panels);
    for (int64_t i = 0; i < job->rows; i++) job->out[i] = NAN;
    if (!panels) return;
    for (int64_t i = 0; i < count; i++) {
        Panel *p = panels + i;
        for (int j = 0; j < W; j++) {
            p->peak[j] = p->peak_s[j] = p->peak_t[j] = NO_PEAK;
            p->farthest[j] = -INFINITY;
        }
    }
    sweep(job, panels, centre, READS);
    for (int64_t i = 0; i < count; i++) {
        finish_centre(panels + i, job->rows - i * W < W ? job->rows - i * W : W);
        if (job->statistics) give_statistics(job, panels + i, i * W);
    }
    divergences(job, panels, count);
    for (int64_t i = 0; i < job->rows; i++) {
        const Panel *p = panels + i / W;
        if (!p->doubt[i % W]) job->out[i] = p->value[i % W];
    }
    free(panels);
}

/* Rows whose divergence comes back as NaN are left as they were. */
void opsdc_rows(const Job *job) { WITHOUT_DENORMALS(all_passes(job)); }

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

/* What opsdc_kernels/columns.py asks of the student, by opsdc_kernels/column_sums.py and with its
   letters, from raw products that stay as they are: no tile of probabilities is written. */
typedef struct {
    Side student;
    int64_t rows, columns;
    const float *square;           /* [columns] */
    const float *keeps;            /* [columns] 1 for a column that is kept, else 0 */
    const float *along, *apart;    /* [rows] */
    float *lse, *entropy, *spread; /* [rows] */
    float *mass, *product;         /* [rows] */
    float *peak, *slope, *rest;    /* [columns] */
} ColumnJob;

#define LOWEST -70.0f /* as in opsdc_kernels/column_sums.py */
#define FLOORED(z) ((z) < LOWEST ? LOWEST : (z))

typedef struct {
    float peak[W], share[W], along[W], around[W], lse[W];
    double total[W], below[W], spread[W], mass[W], product[W];
} Student;

typedef struct {
    Tile peak, slope, rest; /* of each lane */
} Totals;

typedef void (*ColumnPass)(const ColumnJob *, int64_t, const Block *, Student *, Totals *);

static void read_student(const ColumnJob *job, int64_t start, int64_t token, Block *b)
{
    const int last = token + W >= job->rows;
    const int64_t ahead = last ? BLOCK * job->student.stride - token : W;
    b->columns = job->columns - start < BLOCK ? job->columns - start : BLOCK;
    b->lanes = job->rows - token < W ? job->rows - token : W;
    read_side(&job->student, start, token, ahead, b, b->s);
    if (job->student.range)
        EACH_COLUMN(b) LANES {
            float none;
            b->s[v][j] = job->student.range * tanh_of(b->s[v][j], &none);
        }
}

static void add_masses(const ColumnJob *job, int64_t start, const Block *b, Student *p, Totals *all)
{
    float top[W], sum[W] = {0}, weighted[W] = {0}, squares[W] = {0};
    (void)all;
    LANES top[j] = p->peak[j];
    EACH_COLUMN(b) LANES top[j] = b->s[v][j] > top[j] ? b->s[v][j] : top[j];
    LANES {
        double shrink = exponential(p->peak[j] - top[j]);
        p->below[j] = (p->below[j] + p->total[j] * ((double)p->peak[j] - top[j])) * shrink;
        p->total[j] *= shrink;
        p->spread[j] *= shrink;
        p->peak[j] = top[j];
    }
    EACH_COLUMN(b) {
        const float square = job->square[start + v];
        LANES {
            float z = b->s[v][j] - top[j], below = FLOORED(z), e = exponential(below);
            sum[j] += e;
            weighted[j] += e * below;
            squares[j] += e * square;
        }
    }
    LANES {
        p->total[j] += sum[j];
        p->below[j] += weighted[j];
        p->spread[j] += squares[j];
    }
}

static void add_columns(const ColumnJob *job, int64_t start, const Block *b, Student *p, Totals *all)
{
    (void)job, (void)start;
    EACH_COLUMN(b) LANES {
        float z = b->s[v][j] - p->peak[j], q = exponential(FLOORED(z)) * p->share[j];
        all->peak[v][j] = q > all->peak[v][j] ? q : all->peak[v][j];
        all->slope[v][j] += p->along[j] * q;
        all->rest[v][j] += p->around[j] * q;
    }
}

static void add_dropped(const ColumnJob *job, int64_t start, const Block *b, Student *p, Totals *all)
{
    float sum[W] = {0}, squares[W] = {0};
    (void)all;
    EACH_COLUMN(b) {
        const float square = job->square[start + v];
        if (job->keeps[start + v]) continue;
        LANES {
            float z = b->s[v][j] - p->lse[j], q = exponential(FLOORED(z));
            sum[j] += q;
            squares[j] += q * square;
        }
    }
    LANES {
        p->mass[j] += sum[j];
        p->product[j] += squares[j];
    }
}

static void sweep_student(const ColumnJob *job, Student *panels, ColumnPass pass, int per_column)
{
    Block b;
    Totals all;
    for (int64_t start = 0; start < job->columns; start += BLOCK) {
        if (per_column) memset(&all, 0, sizeof all);
        for (int64_t token = 0; token < job->rows; token += W) {
            read_student(job, start, token, &b);
            pass(job, start, &b, panels + token / W, &all);
        }
        if (!per_column) continue;
        EACH_COLUMN(&b) {
            float peak = 0, slope = 0, rest = 0;
            for (int j = 0; j < W; j++) {
                peak = all.peak[v][j] > peak ? all.peak[v][j] : peak;
                slope += all.slope[v][j];
                rest += all.rest[v][j];
            }
            job->peak[start + v] = peak;
            job->slope[start + v] = slope;
            job->rest[start + v] = rest;
        }
    }
}

static void student(const ColumnJob *job, Student *panels)
{
    sweep_student(job, panels, add_masses, 0);
    for (int64_t i = 0; i < job->rows; i++) {
        Student *p = panels + i / W;
        const int j = i % W;
        const double total = p->total[j], spread = p->spread[j] / total;
        job->lse[i] = (float)(p->peak[j] + log(total));
        job->entropy[i] = (float)(log(total) - p->below[j] / total);
        job->spread[i] = (float)spread;
        p->share[j] = (float)(1 / total);
        p->along[j] = job->along[i];
        p->around[j] = job->along[i] * (float)sqrt(spread) + job->apart[i];
    }
    sweep_student(job, panels, add_columns, 1);
}

static void dropped(const ColumnJob *job, Student *panels)
{
    for (int64_t i = 0; i < job->rows; i++) panels[i / W].lse[i % W] = job->lse[i];
    sweep_student(job, panels, add_dropped, 0);
    for (int64_t i = 0; i < job->rows; i++) {
        job->mass[i] = (float)panels[i / W].mass[i % W];
        job->product[i] = (float)panels[i / W].product[i % W];
    }
}

/* Without memory for the panels all sums are NaN, of which no bound is within a tolerance. */
static void with_panels(const ColumnJob *job, void (*work)(const ColumnJob *, Student *))
{
    int64_t count = (job->rows + W - 1) / W;
    Student *panels = calloc(count, sizeof *panels);
    if (!panels) {
        float *rowwise[] = {job->entropy, job->spread, job->mass, job->product};
        for (int field = 0; field < 4; field++)
            for (int64_t i = 0; rowwise[field] && i < job->rows; i++) rowwise[field][i] = NAN;
        float *columnwise[] = {job->peak, job->slope, job->rest};
        for (int field = 0; field < 3; field++)
            for (int64_t v = 0; columnwise[field] && v < job->columns; v++)
                columnwise[field][v] = NAN;
        return;
    }
    for (int64_t i = 0; i < count; i++)
        for (int j = 0; j < W; j++) panels[i].peak[j] = NO_PEAK;
    work(job, panels);
    free(panels);
}

void opsdc_student(const ColumnJob *job) { WITHOUT_DENORMALS(with_panels(job, student)); }

void opsdc_dropped(const ColumnJob *job) { WITHOUT_DENORMALS(with_panels(job, dropped)); }

#define SUMMED 1024 /* in float before a double takes over */

typedef struct {
    const float *weight; /* [rows, columns] */
    int64_t rows, columns, stride;
    const float *centre; /* [columns] */
    float *out;          /* [rows] |row - centre|^2 */
} DistanceJob;

void opsdc_distances(const DistanceJob *job)
{
    for (int64_t i = 0; i < job->rows; i++) {
        const float *row = job->weight + i * job->stride, *centre = job->centre;
        double total = 0;
        for (int64_t start = 0; start < job->columns; start += SUMMED) {
            const int64_t end = start + SUMMED < job->columns ? start + SUMMED : job->columns;
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t v = start; v < end; v++) {
                float difference = row[v] - centre[v];
                sum += difference * difference;
            }
            total += sum;
        }
        job->out[i] = (float)total;
    }
}
