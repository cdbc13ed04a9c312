/* Sums of the student's probabilities, and distances in its head: opsdc_kernels/columns/sums.py and
   bound.py, with their letters, from raw products that stay as they are: no tile of probabilities
   is written.
*/
#include "../row_pass/common.h"

typedef struct {
    Side student;
    int64_t rows, columns;
    const float *square;           /* [columns] */
    const float *keeps;            /* [columns] 1 for a column that is kept, else 0 */
    const float *along, *apart;    /* [rows] */
    float *lse, *entropy, *spread; /* [rows] */
    float *mass, *product;         /* [rows] */
    float *peak, *slope, *rest;    /* [columns]; peak null: only rest, of (along*q)^2 */
} ColumnJob;

#define LOWEST -70.0f /* as in sums.py */
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

static void add_squares(const ColumnJob *job, int64_t start, const Block *b, Student *p, Totals *all)
{
    (void)job, (void)start;
    EACH_COLUMN(b) LANES {
        float z = b->s[v][j] - p->peak[j], mass = exponential(FLOORED(z)) * p->around[j];
        all->rest[v][j] += mass * mass;
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
            job->rest[start + v] = rest;
            if (!job->peak) continue;
            job->peak[start + v] = peak;
            job->slope[start + v] = slope;
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
        p->share[j] = (float)(1 / total);
        p->along[j] = job->along[i];
        if (job->spread) job->spread[i] = (float)spread;
        p->around[j] = job->peak ? job->along[i] * (float)sqrt(spread) + job->apart[i]
                                 : job->along[i] * p->share[j];
    }
    sweep_student(job, panels, job->peak ? add_columns : add_squares, 1);
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

/* A sample of the columns: dZ (15) of unbiased.py in place of the student's products, and the sums of
   `SampleSums` in sums.py. */

enum { SHIFT, EXCESS, MORE, MORE_C, ONLY_C, ERROR, CONCENTRATION, MASS, WEIGHTED, SUMS };
enum { AGREEMENT = SUMS, TARGET_Q, TARGET_P, FIELDS };

typedef struct {
    Side student, other;
    int64_t rows, columns;
    int32_t shared, statistics;
    const float *weight, *doubt; /* [columns] a and (1 - pi)/pi^2 */
    const float *lse, *base;     /* [rows] the student's normalizer, and m_0 */
    const int64_t *targets;      /* [rows] places among these columns, or null */
    float *out;                  /* [FIELDS, rows], a field every out_stride floats */
    int64_t out_stride;
} SampleJob;

#define MOST 80.0f /* log-ratios above count as this: their exponentials would overflow */

typedef struct {
    double sums[SUMS][W];
    float lse[W], base[W], top_q[W], top_p[W], target_q[W], target_p[W];
    float at_q[W], at_p[W]; /* the columns of the tops */
} Drawn;

typedef void (*SamplePass)(const SampleJob *, int64_t, int64_t, Block *, Drawn *);

static void add_sample(const SampleJob *job, int64_t start, int64_t token, Block *b, Drawn *p)
{
    float shift[W] = {0}, extra[W] = {0}, more_2[W] = {0}, more_c[W] = {0}, only_c[W] = {0};
    (void)token;
    EACH_COLUMN(b) {
        const float a = job->weight[start + v], doubt = job->doubt[start + v];
        LANES {
            float z = b->s[v][j] - p->lse[j], q = exponential(FLOORED(z));
            float d = b->d[v][j] - p->base[j], c = d > MOST ? MOST : d, f = excess(c);
            float more = q * (f + c), qc = q * c;
            shift[j] += a * qc;
            extra[j] += a * (q * f);
            more_2[j] += doubt * (more * more);
            more_c[j] += doubt * (more * qc);
            only_c[j] += doubt * (qc * qc);
        }
    }
    LANES {
        p->sums[SHIFT][j] += shift[j];
        p->sums[EXCESS][j] += extra[j];
        p->sums[MORE][j] += more_2[j];
        p->sums[MORE_C][j] += more_c[j];
        p->sums[ONLY_C][j] += only_c[j];
    }
}

static void add_statistics(const SampleJob *job, int64_t start, int64_t token, Block *b, Drawn *p)
{
    float mass[W] = {0}, weighted[W] = {0};
    EACH_COLUMN(b) {
        const float a = job->weight[start + v], at = (float)(start + v);
        LANES {
            float z = b->s[v][j] - p->lse[j], log_q = FLOORED(z);
            float log_p = log_q + (b->d[v][j] - p->base[j]), e = a * exponential(log_p);
            mass[j] += e;
            weighted[j] += e * log_p;
            p->at_q[j] = log_q > p->top_q[j] ? at : p->at_q[j];
            p->top_q[j] = log_q > p->top_q[j] ? log_q : p->top_q[j];
            p->at_p[j] = log_p > p->top_p[j] ? at : p->at_p[j];
            p->top_p[j] = log_p > p->top_p[j] ? log_p : p->top_p[j];
        }
    }
    LANES {
        p->sums[MASS][j] += mass[j];
        p->sums[WEIGHTED][j] += weighted[j];
    }
    for (int j = 0; job->targets && j < b->lanes; j++) {
        const int64_t v = job->targets[token + j] - start;
        if (v < 0 || v >= b->columns) continue;
        p->target_q[j] = b->s[v][j] - p->lse[j];
        p->target_p[j] = p->target_q[j] + (b->d[v][j] - p->base[j]);
    }
}

static void write_sample(const SampleJob *job, int64_t start, int64_t token, Block *b, Drawn *p)
{
    float error[W] = {0}, squares[W] = {0}, shift[W];
    LANES shift[j] = (float)p->sums[SHIFT][j];
    EACH_COLUMN(b) {
        const float a = job->weight[start + v], doubt = job->doubt[start + v];
        LANES {
            float z = b->s[v][j] - p->lse[j], q = exponential(FLOORED(z));
            float c = b->d[v][j] - p->base[j], apart = c - shift[j], term = q * apart;
            error[j] += doubt * (term * term);
            squares[j] += q * q;
            b->s[v][j] = -(a * q) * (apart + (a - 1) * q * c);
        }
    }
    LANES {
        p->sums[ERROR][j] += error[j];
        p->sums[CONCENTRATION][j] += squares[j];
    }
    if (job->student.range) EACH_COLUMN(b) LANES b->s[v][j] *= b->slope[v][j];
    EACH_COLUMN(b) {
        float *x = job->student.x + (start + v) * job->student.stride + token;
        for (int j = 0; j < b->lanes; j++) x[j] = flushed(b->s[v][j]);
    }
}

static void sweep_sample(const SampleJob *job, Drawn *panels, SamplePass pass)
{
    Block b;
    for (int64_t start = 0; start < job->columns; start += BLOCK) {
        b.columns = job->columns - start < BLOCK ? job->columns - start : BLOCK;
        for (int64_t token = 0; token < job->rows; token += W) {
            b.lanes = job->rows - token < W ? job->rows - token : W;
            read_both(&job->student, &job->other, job->shared, job->rows, start, token, &b);
            pass(job, start, token, &b, panels + token / W);
        }
    }
}

static void sample(const SampleJob *job)
{
    Drawn *panels = calloc((job->rows + W - 1) / W, sizeof *panels);
    for (int64_t i = 0; i < job->rows && panels; i++) {
        Drawn *p = panels + i / W;
        p->lse[i % W] = job->lse[i];
        p->base[i % W] = job->base[i];
        p->top_q[i % W] = p->top_p[i % W] = NO_PEAK;
    }
    if (panels) {
        sweep_sample(job, panels, add_sample);
        if (job->statistics) sweep_sample(job, panels, add_statistics);
        sweep_sample(job, panels, write_sample);
    }
    for (int64_t i = 0; i < job->rows; i++) {
        float *out = job->out + i;
        for (int field = 0; field < FIELDS; field++, out += job->out_stride) {
            const Drawn *p = panels + i / W;
            const int j = i % W;
            *out = !panels               ? NAN /* no memory for them */
                   : field < SUMS        ? (float)p->sums[field][j]
                   : field == AGREEMENT  ? p->at_q[j] == p->at_p[j]
                   : field == TARGET_Q   ? p->target_q[j]
                                         : p->target_p[j];
        }
    }
    free(panels);
}

void opsdc_sample(const SampleJob *job) { WITHOUT_DENORMALS(sample(job)); }

/* Rows of a block, added to rows of a matrix. */
typedef struct {
    const float *block; /* [rows, columns] */
    int64_t rows, columns;
    const int64_t *to;  /* [rows] rows of `matrix`, each named once */
    float *matrix;
    int64_t stride;
    const uint8_t *touched; /* of the matrix's rows; others are zero */
    float *square;          /* [rows] |row of the block|^2 */
} RowsJob;

void opsdc_add_rows(const RowsJob *job)
{
    for (int64_t i = 0; i < job->rows; i++) {
        const float *row = job->block + i * job->columns;
        float *sum = job->matrix + job->to[i] * job->stride, square = 0;
        if (!job->touched[job->to[i]]) {
            memcpy(sum, row, job->columns * sizeof *row);
        } else {
#pragma omp simd
            for (int64_t v = 0; v < job->columns; v++) sum[v] += row[v];
        }
#pragma omp simd reduction(+ : square)
        for (int64_t v = 0; v < job->columns; v++) square += row[v] * row[v];
        job->square[i] = square;
    }
}

/* The numbers of `uniforms` in draw.py. */
typedef struct {
    int64_t start, size;
    double *out;
} NumbersJob;

void opsdc_uniforms(const NumbersJob *job)
{
    uint64_t counter = (uint64_t)job->start;
    for (int64_t v = 0; v < job->size; v++) {
        uint64_t x = counter += 0x9E3779B97F4A7C15u;
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
        x = (x ^ x >> 27) * 0x94D049BB133111EBu;
        job->out[v] = (double)((x ^ x >> 31) >> 11) * 0x1p-53;
    }
}

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
