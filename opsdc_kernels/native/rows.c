/* Row passes of a chunk on a CPU: raw products to divergence, statistics and logit gradient.

   The counterpart of opsdc_kernels/rows_cpu.py, with its letters; numbers in brackets are the
   equations of opsdc_kernels/reference.py. A row is read from memory once, stays in the core's
   cache for two or three passes more, and is written once. Rows are independent, so results do not
   depend on how they are spread over threads. Plain C: the compiler makes vectors of the loops.

   d is shifted by its value at the student's peak before its mean is taken. In a peaked row that
   column has nearly all the mass, and a mean over what is left keeps its digits.
*/
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __SSE__
#include <xmmintrin.h>
#endif

#define BLOCK 1024 /* columns summed in float before a double takes over */
#define SIMD _Pragma("omp simd")
#define FARTHEST 60.0f /* log-ratios above this overflow, or meet a student's mass that underflowed */
#define SMALLEST 0x1p-100f /* gradients below it would make denormals of the sums they enter */

enum { REVERSE_KL, FORWARD_KL, JSD };
enum { DIVERGENCE, STUDENT_LOGSUMEXP, TEACHER_LOGSUMEXP, STUDENT_ENTROPY, TEACHER_ENTROPY,
       AGREEMENT, STUDENT_LOGPROB, TEACHER_LOGPROB };

typedef struct {
    float *student;       /* [rows, columns] h.W; the gradient replaces it */
    float *other;         /* [rows, columns] the teacher's, or, shared, the difference's */
    int64_t rows, columns, student_stride, other_stride;
    const float *student_bias, *teacher_bias; /* [columns] or null */
    float student_factor, other_factor;       /* logit scale over temperature */
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

#define BLOCKS(size) \
    for (int64_t start = 0, end; end = start + BLOCK < size ? start + BLOCK : size, start < size; \
         start = end)
#define EACH_COLUMN for (int64_t v = start; v < end; v++)

static void affine(float *x, int64_t size, const float *bias, float factor)
{
    if (bias) {
        SIMD for (int64_t v = 0; v < size; v++) x[v] = (x[v] + bias[v]) * factor;
    } else if (factor != 1) {
        SIMD for (int64_t v = 0; v < size; v++) x[v] *= factor;
    }
}

static float largest(const float *x, int64_t size)
{
    float top = -INFINITY;
#pragma omp simd reduction(max : top)
    for (int64_t v = 0; v < size; v++) top = x[v] > top ? x[v] : top;
    return top;
}

static int64_t first_largest(const float *x, int64_t size)
{
    float top = -INFINITY;
    int64_t at = 0;
    BLOCKS(size) {
        float here = largest(x + start, end - start);
        if (here > top) top = here, at = start;
    }
    while (at < size - 1 && x[at] != top) at++;
    return at;
}

static float largest_sum(const float *x, const float *y, int64_t size)
{
    float top = -INFINITY;
#pragma omp simd reduction(max : top)
    for (int64_t v = 0; v < size; v++) top = x[v] + y[v] > top ? x[v] + y[v] : top;
    return top;
}

/* One row, and what its passes share. `t` is s + other where `shared`, else other. */
typedef struct {
    float *s, *other;
    int64_t size, at; /* at: the first column with the peak */
    float peak, anchor, mean; /* c = (d - anchor) - mean */
    double total;             /* sum of e^(s - peak) */
} Row;

#define DIFFERENCE(row, v) ((shared ? row.other[v] : row.other[v] - row.s[v]) - row.anchor)

/* Peak, anchor, mean and total; 0 if the row is not for the passes below: a logit is infinite or
   NaN, or a log-ratio is too large. */
static inline int centre(Row *whole, const int shared)
{
    Row row = *whole;
    const float *s = row.s;
    row.at = first_largest(s, row.size);
    row.peak = s[row.at];
    row.anchor = 0;
    row.anchor = DIFFERENCE(row, row.at);
    double total = 0, moment = 0;
    float poison = 0, farthest = -INFINITY;
    BLOCKS(row.size) {
        float sum = 0, weighted = 0;
#pragma omp simd reduction(+ : sum, weighted, poison) reduction(max : farthest)
        EACH_COLUMN {
            float d = DIFFERENCE(row, v), e = exponential(s[v] - row.peak);
            sum += e;
            weighted += e * d;
            poison += 0 * s[v] + 0 * d;
            farthest = d > farthest ? d : farthest;
        }
        total += sum;
        moment += weighted;
    }
    row.total = total;
    row.mean = (float)(moment / total);
    *whole = row;
    return poison == 0 && farthest - row.mean <= FARTHEST;
}

/* KL(q|p) (3); with `gradient`, q c (8) replaces s. */
static inline double reverse_kl(const Row row, const int shared, const int gradient)
{
    float *s = row.s, share = (float)(1 / row.total);
    double total = 0;
    BLOCKS(row.size) {
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        EACH_COLUMN {
            float c = DIFFERENCE(row, v) - row.mean, q = exponential(s[v] - row.peak) * share;
            sum += q * excess(c);
            if (gradient) s[v] = flushed(q * c);
        }
        total += sum;
    }
    return log1p(total);
}

/* KL(p|q) (5) from r (4), as q e^r f(-r) = q (r e^r - (e^r - 1)); e^r - 1 = r + f(r). With
   `gradient`, p - q (9) replaces s. */
static inline double forward_kl(const Row row, double kl, const int shared, const int gradient)
{
    float *s = row.s, share = (float)(1 / row.total), log_ratio = (float)kl;
    double total = 0;
    BLOCKS(row.size) {
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        EACH_COLUMN {
            float r = DIFFERENCE(row, v) - row.mean - log_ratio;
            float q = exponential(s[v] - row.peak) * share, minus_one = r + excess(r);
            float near = (1 + minus_one) * excess(-r), far = r * (1 + minus_one) - minus_one;
            sum += q * (fabsf(r) < 1 ? near : far);
            if (gradient) s[v] = flushed(q * minus_one);
        }
        total += sum;
    }
    return total;
}

/* The JSD (7) from a and b (6), b = a - r where r is not small. Leaves a in `other` and q in s. */
static inline double jsd(const Row row, double kl, float beta, double *centre, const int shared)
{
    float *s = row.s, share = (float)(1 / row.total), log_ratio = (float)kl;
    double from_student = 0, from_teacher = 0;
    BLOCKS(row.size) {
        float sum_q = 0, sum_p = 0;
#pragma omp simd reduction(+ : sum_q, sum_p)
        EACH_COLUMN {
            float r = DIFFERENCE(row, v) - row.mean - log_ratio;
            float q = exponential(s[v] - row.peak) * share, minus_one = r + excess(r);
            float a = log_one_plus(beta * minus_one);
            float b = log_one_plus((beta - 1) * minus_one / (1 + minus_one));
            float near = (1 + minus_one) * excess(b);
            float far = (1 + beta * minus_one) - (1 + minus_one) * (1 + a - r);
            sum_q += q * excess(a);
            sum_p += q * (fabsf(r) < 1 ? near : far);
            row.other[v] = a;
            s[v] = q;
        }
        from_student += sum_q;
        from_teacher += sum_p;
    }
    *centre = from_student;
    return (1 - beta) * from_student + beta * from_teacher;
}

/* q (a - E_q[a]) (10) replaces q. */
static void jsd_gradient(const Row row, double centre)
{
    float *s = row.s, shift = (float)centre;
    SIMD for (int64_t v = 0; v < row.size; v++) s[v] = flushed(s[v] * (row.other[v] + shift));
}

/* Log-sum-exp (`peak` + log of the sum) and entropy of logits below `peak`: log sum e^x - E[x]. */
static inline double entropy(const float *x, const float *more, int64_t size, float peak, double *lse)
{
    double total = 0, moment = 0;
    BLOCKS(size) {
        float sum = 0, weighted = 0;
#pragma omp simd reduction(+ : sum, weighted)
        EACH_COLUMN {
            float below = (more ? x[v] + more[v] : x[v]) - peak, e = exponential(below);
            sum += e;
            weighted += e * below;
        }
        total += sum;
        moment += weighted;
    }
    *lse = peak + log(total);
    return log(total) - moment / total;
}

static inline void one_row(const Job *job, int64_t i, const int shared)
{
    Row row = {.s = job->student + i * job->student_stride,
               .other = job->other + i * job->other_stride,
               .size = job->columns};
    float *out = job->out + i;
    affine(row.s, row.size, job->student_bias, job->student_factor);
    affine(row.other, row.size, job->teacher_bias, job->other_factor);
    if (!centre(&row, shared)) {
        out[0] = NAN;
        return;
    }
    double lse_s = 0, target_s = 0, target_t = 0;
    if (job->statistics) {
        const float *t = shared ? row.s : row.other, *more = shared ? row.other : 0;
        float peak_t = shared ? largest_sum(t, more, row.size) : largest(t, row.size);
        double lse_t;
        out[STUDENT_ENTROPY * job->out_stride] = entropy(row.s, 0, row.size, row.peak, &lse_s);
        out[TEACHER_ENTROPY * job->out_stride] = entropy(t, more, row.size, peak_t, &lse_t);
        out[STUDENT_LOGSUMEXP * job->out_stride] = lse_s;
        out[TEACHER_LOGSUMEXP * job->out_stride] = lse_t;
        out[AGREEMENT * job->out_stride] = (shared ? t[row.at] + more[row.at] : t[row.at]) == peak_t;
        if (job->targets) {
            int64_t target = job->targets[i];
            target_s = row.s[target] - lse_s;
            target_t = (shared ? t[target] + more[target] : t[target]) - lse_t;
            out[STUDENT_LOGPROB * job->out_stride] = target_s;
            out[TEACHER_LOGPROB * job->out_stride] = target_t;
        }
    }
    double value;
    if (job->divergence == REVERSE_KL) {
        value = job->gradient ? reverse_kl(row, shared, 1) : reverse_kl(row, shared, 0);
    } else {
        double kl = reverse_kl(row, shared, 0), middle;
        if (job->divergence == FORWARD_KL) {
            value = forward_kl(row, kl, shared, job->gradient);
        } else {
            value = jsd(row, kl, job->beta, &middle, shared);
            if (job->gradient) jsd_gradient(row, middle);
        }
    }
    out[DIVERGENCE] = value;
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

static void each_row(const Job *job)
{
    for (int64_t i = 0; i < job->rows; i++)
        if (job->shared)
            one_row(job, i, 1);
        else
            one_row(job, i, 0);
}

/* Rows whose divergence comes back as NaN are left as they were but for bias and factor. */
void opsdc_rows(const Job *job) { WITHOUT_DENORMALS(each_row(job)); }

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
    const float *student; /* [rows, columns] h.W */
    int64_t rows, columns, stride;
    const float *bias;        /* [columns] or null */
    float factor;             /* logit scale over temperature */
    const float *square;      /* [columns] */
    const float *keeps;       /* [columns] 1 for a column that is kept, else 0 */
    const float *along, *apart; /* [rows] */
    float *lse, *entropy, *spread; /* [rows] */
    float *mass, *product;    /* [rows] */
    float *peak, *slope, *rest; /* [columns], of earlier rows too */
} ColumnJob;

#define LOWEST -70.0f /* as in opsdc_kernels/column_sums.py */
#define LOGIT(v) ((bias ? x[v] + bias[v] : x[v]) * factor)
#define FLOORED(z) ((z) < LOWEST ? LOWEST : (z))

static inline void student_row(const ColumnJob *job, int64_t i, const float *bias)
{
    const float *x = job->student + i * job->stride, *square = job->square;
    float *peak = job->peak, *slope = job->slope, *rest = job->rest;
    const float factor = job->factor;
    const int64_t size = job->columns;
    float top = -INFINITY;
#pragma omp simd reduction(max : top)
    for (int64_t v = 0; v < size; v++) top = LOGIT(v) > top ? LOGIT(v) : top;
    double total = 0, moment = 0, spread = 0;
    BLOCKS(size) {
        float sum = 0, weighted = 0, squares = 0;
#pragma omp simd reduction(+ : sum, weighted, squares)
        EACH_COLUMN {
            float z = LOGIT(v) - top, below = FLOORED(z), e = exponential(below);
            sum += e;
            weighted += e * below;
            squares += e * square[v];
        }
        total += sum;
        moment += weighted;
        spread += squares;
    }
    job->lse[i] = (float)(top + log(total));
    job->entropy[i] = (float)(log(total) - moment / total);
    job->spread[i] = (float)(spread / total);
    const float share = (float)(1 / total), along = job->along[i];
    const float around = along * (float)sqrt(spread / total) + job->apart[i];
    SIMD for (int64_t v = 0; v < size; v++) {
        float z = LOGIT(v) - top, q = exponential(FLOORED(z)) * share;
        peak[v] = q > peak[v] ? q : peak[v];
        slope[v] += along * q;
        rest[v] += around * q;
    }
}

static inline void dropped_row(const ColumnJob *job, int64_t i, const float *bias)
{
    const float *x = job->student + i * job->stride, *square = job->square, *keeps = job->keeps;
    const float factor = job->factor, lse = job->lse[i];
    double mass = 0, product = 0;
    BLOCKS(job->columns) {
        float sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum, squares)
        EACH_COLUMN {
            float z = LOGIT(v) - lse, q = exponential(FLOORED(z)) * (1 - keeps[v]);
            sum += q;
            squares += q * square[v];
        }
        mass += sum;
        product += squares;
    }
    job->mass[i] = (float)mass;
    job->product[i] = (float)product;
}

#define EACH_ROW(row) \
    for (int64_t i = 0; i < job->rows; i++) \
        if (job->bias) \
            row(job, i, job->bias); \
        else \
            row(job, i, 0)

void opsdc_student(const ColumnJob *job) { WITHOUT_DENORMALS(EACH_ROW(student_row)); }

void opsdc_dropped(const ColumnJob *job) { WITHOUT_DENORMALS(EACH_ROW(dropped_row)); }

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
        BLOCKS(job->columns) {
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            EACH_COLUMN {
                float difference = row[v] - centre[v];
                sum += difference * difference;
            }
            total += sum;
        }
        job->out[i] = (float)total;
    }
}
