/* The row pass on a CPU: raw products to divergence, statistics and logit gradient.

   The counterpart of opsdc_kernels/row_pass/eager.py, with its letters; numbers in brackets are the
   equations of opsdc_kernels/reference.py.

   d is shifted by its value at the student's peak before its mean is taken. In a peaked row that
   column has nearly all the mass, and a mean over what is left keeps its digits.
*/
#include "common.h"

#define FARTHEST 60.0f /* log-ratios above this overflow, or meet a student's mass that underflowed */

enum { REVERSE_KL, FORWARD_KL, JSD };
enum { DIVERGENCE, STUDENT_LOGSUMEXP, TEACHER_LOGSUMEXP, STUDENT_ENTROPY, TEACHER_ENTROPY,
       AGREEMENT, STUDENT_LOGPROB, TEACHER_LOGPROB };

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

/* What a panel has gathered; c = (d - anchor) - mean. */
typedef struct {
    float peak[W], anchor[W], mean[W], share[W], log_ratio[W], poison[W], farthest[W];
    float weight[W], middle[W]; /* of the JSD: w of (11), and the mean of its a */
    double total[W], moment[W], value[W], other[W], sum_a[W];
    float peak_s[W], peak_t[W]; /* from here to below_t: of the statistics */
    double total_s[W], below_s[W], total_t[W], below_t[W];
    int doubt[W], doubts;
} Panel;

static inline void read_block(const Job *job, int64_t start, int64_t token, Block *b)
{
    read_both(&job->student, &job->other, job->shared, job->rows, start, token, b);
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

/* The JSD (7) from a and b (6), b = a - r where r is not small. With `gradient`, leaves a from the
   mean of r (11) in `d`, and q times the soft-cap's slope in s. */
static inline void add_jsd(const Job *job, Block *b, Panel *p, const int gradient)
{
    const float beta = job->beta;
    float sum_q[W] = {0}, sum_p[W] = {0}, sum_a[W] = {0};
    EACH_COLUMN(b) LANES {
        float r = LOG_RATIO, q = exponential(b->s[v][j] - p->peak[j]) * p->share[j];
        float minus_one = r + excess(r), a = log_one_plus(beta * minus_one);
        float back = log_one_plus((beta - 1) * minus_one / (1 + minus_one));
        float near = (1 + minus_one) * excess(back);
        float far = (1 + beta * minus_one) - (1 + minus_one) * (1 + a - r);
        sum_q[j] += q * excess(a);
        sum_p[j] += q * (fabsf(r) < 1 ? near : far);
        if (gradient) {
            float c = (b->d[v][j] - p->anchor[j]) - p->mean[j];
            float from_mean = log_one_plus(p->weight[j] * (c + excess(c)));
            sum_a[j] += q * from_mean;
            b->d[v][j] = from_mean;
            b->s[v][j] = q;
        }
    }
    if (gradient && job->student.range) EACH_COLUMN(b) LANES b->s[v][j] *= b->slope[v][j];
    LANES {
        p->other[j] += sum_q[j];
        p->value[j] += sum_p[j];
        p->sum_a[j] += sum_a[j];
    }
}

static void jsd(const Job *job, Block *b, Panel *p) { add_jsd(job, b, p, 0); }

static void jsd_terms(const Job *job, Block *b, Panel *p) { add_jsd(job, b, p, 1); }

/* q (a - E_q[a]) (10) replaces q. */
static void jsd_gradient(const Job *job, Block *b, Panel *p)
{
    (void)job;
    EACH_COLUMN(b) LANES b->s[v][j] = flushed(b->s[v][j] * (b->d[v][j] - p->middle[j]));
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
        for (int64_t i = 0; i < count; i++) {
            Panel *p = panels + i;
            for (int j = 0; j < W; j++) {
                p->weight[j] = (float)(job->beta / (job->beta + (1 - job->beta) * exp(p->value[j])));
                p->value[j] = 0;
            }
        }
        sweep(job, panels, job->gradient ? jsd_terms : jsd, job->gradient ? WRITES_BOTH : READS);
        for (int64_t i = 0; i < count; i++) {
            Panel *p = panels + i;
            for (int j = 0; j < W; j++) {
                p->middle[j] = (float)p->sum_a[j];
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
