/* csrc/betaclip.h in naive loops over host memory: lets the tests run all of the Python binding without a GPU.
 *
 * It is as strict as the header: arguments are checked, the workspace is overwritten to its last byte, what the caller
 * need not initialise is not read. The last stream is kept for tests to ask for. */
#include "betaclip.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

void *stand_in_stream;

static float wide(const void *data, int64_t index, int32_t dtype) {
  if (dtype == BETACLIP_FLOAT16) return (float)((const _Float16 *)data)[index];
  uint32_t bits = (uint32_t)((const uint16_t *)data)[index] << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

static void store(void *data, int64_t index, int32_t dtype, float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if (dtype == BETACLIP_FLOAT16)
    ((_Float16 *)data)[index] = (_Float16)value;
  else
    ((uint16_t *)data)[index] = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* Row i of a chunk's dS, with zeros up to the next multiple of 8 columns. */
static void store_row(const betaclip_operands *o, const betaclip_chunk *c, int64_t i, const float *ds) {
  int64_t cols = c->col_end - c->col_begin;
  for (int64_t j = 0; j < (cols + 7) / 8 * 8; j++)
    store(c->ds, (i - c->row_begin) * c->ds_stride + j, o->dtype, j < cols ? ds[j] : 0);
}

/* -inf for a pair that takes no part. */
static float logit(const betaclip_operands *o, const float *bias, int64_t i, int64_t j) {
  if (o->x_group && (o->x_group[i] < 0 || o->y_group[j] < 0 || o->x_group[i] == o->y_group[j])) return -INFINITY;
  if (o->x_text && o->x_text[i] >= 0 && o->x_text[i] == o->y_text[j]) return -INFINITY;
  float sum = 0;
  for (int64_t k = 0; k < o->d; k++)
    sum += wide(o->x, i * o->x_stride + k, o->dtype) * wide(o->y, j * o->y_stride + k, o->dtype);
  return *o->scale * sum + (bias ? *bias : 0);
}

static float softplus_of(float s) { return fmaxf(s, 0) + log1pf(expf(-fabsf(s))); }

static int unaligned(const void *pointer, uintptr_t bytes) { return (uintptr_t)pointer % bytes != 0; }

static int check_operands(const betaclip_operands *o, void *stream) {
  stand_in_stream = stream;
  if (!o || !o->x || !o->y || !o->scale) return BETACLIP_ERROR_NULL;
  if (o->dtype != BETACLIP_BFLOAT16 && o->dtype != BETACLIP_FLOAT16) return BETACLIP_ERROR_DTYPE;
  if (o->n < 1 || o->m < 1) return BETACLIP_ERROR_SIZE;
  if (o->d < 8 || o->d > 1024 || o->d % 8) return BETACLIP_ERROR_DEPTH;
  if (o->x_stride < o->d || o->y_stride < o->d || o->x_stride % 8 || o->y_stride % 8) return BETACLIP_ERROR_STRIDE;
  if (unaligned(o->x, 16) || unaligned(o->y, 16) || unaligned(o->scale, 4)) return BETACLIP_ERROR_ALIGNMENT;
  if (!o->x_text != !o->y_text) return BETACLIP_ERROR_GROUPS;
  return !o->x_group != !o->y_group ? BETACLIP_ERROR_GROUPS : BETACLIP_SUCCESS;
}

static int check_chunk(const betaclip_operands *o, const betaclip_chunk *c) {
  if (!c || !c->ds) return BETACLIP_ERROR_NULL;
  if (c->row_begin < 0 || c->row_begin >= c->row_end || c->row_end > o->n) return BETACLIP_ERROR_CHUNK;
  if (c->col_begin < 0 || c->col_begin >= c->col_end || c->col_end > o->m) return BETACLIP_ERROR_CHUNK;
  if (c->ds_stride < c->col_end - c->col_begin || c->ds_stride % 8) return BETACLIP_ERROR_STRIDE;
  return unaligned(c->ds, 16) ? BETACLIP_ERROR_ALIGNMENT : BETACLIP_SUCCESS;
}

static int use_workspace(void *workspace, size_t given, size_t needed) {
  if (!workspace) return BETACLIP_ERROR_NULL;
  if (unaligned(workspace, 16)) return BETACLIP_ERROR_ALIGNMENT;
  if (given < needed) return BETACLIP_ERROR_WORKSPACE;
  memset(workspace, 0xff, needed);
  return BETACLIP_SUCCESS;
}

enum { MULTIPROCESSORS = 4 };

int betaclip_version(void) { return BETACLIP_VERSION; }

const char *betaclip_architectures(void) { return "cpu"; }

const char *betaclip_error_string(int error) {
  return error == BETACLIP_ERROR_WORKSPACE ? "the workspace is too small" : "the stand-in refuses";
}

size_t betaclip_logsumexp_workspace_bytes(int64_t n, int64_t m, int32_t multiprocessors) {
  return (size_t)((n + m) * multiprocessors) * sizeof(float);
}

size_t betaclip_softplus_workspace_bytes(int64_t rows, int64_t cols, int32_t multiprocessors) {
  return (size_t)(rows * multiprocessors + cols) * sizeof(float);
}

/* The log-sum-exp of row i's logits, or of column i's. */
static float logsumexp_of(const betaclip_operands *o, int columns, int64_t i) {
  float most = -INFINITY, sum = 0;
  int64_t others = columns ? o->n : o->m;
  float *logits = malloc((size_t)others * sizeof(float));
  for (int64_t j = 0; j < others; j++) {
    logits[j] = columns ? logit(o, NULL, j, i) : logit(o, NULL, i, j);
    most = fmaxf(most, logits[j]);
  }
  for (int64_t j = 0; j < others && most > -INFINITY; j++) sum += expf(logits[j] - most);
  free(logits);
  return most > -INFINITY ? most + logf(sum) : -INFINITY;
}

int betaclip_logsumexp_forward(const betaclip_operands *o, float *lse_x, float *lse_y, void *workspace,
                               size_t workspace_bytes, void *stream) {
  int error = check_operands(o, stream);
  if (!error && (!lse_x || !lse_y)) error = BETACLIP_ERROR_NULL;
  if (!error)
    error = use_workspace(workspace, workspace_bytes, betaclip_logsumexp_workspace_bytes(o->n, o->m, MULTIPROCESSORS));
  if (error) return error;
  for (int64_t i = 0; i < o->n; i++) lse_x[i] = logsumexp_of(o, 0, i);
  for (int64_t j = 0; j < o->m; j++) lse_y[j] = logsumexp_of(o, 1, j);
  return BETACLIP_SUCCESS;
}

int betaclip_logsumexp_ds(const betaclip_operands *o, const betaclip_logsumexp_gradient *g, const betaclip_chunk *c,
                          void *stream) {
  int error = check_operands(o, stream);
  if (!error) error = check_chunk(o, c);
  if (!error && (!g || !g->stat_x || !g->stat_y || !g->weight_x || !g->weight_y || !g->factor_x || !g->factor_y ||
                 !g->narrow))
    error = BETACLIP_ERROR_NULL;
  if (error) return error;
  float *ds = malloc((size_t)(c->col_end - c->col_begin) * sizeof(float));
  for (int64_t i = c->row_begin; i < c->row_end; i++) {
    for (int64_t j = c->col_begin; j < c->col_end; j++) {
      float s = logit(o, NULL, i, j), p = expf(s - g->stat_x[i]), *out = &ds[j - c->col_begin];
      if (s == -INFINITY)
        *out = 0;
      else if (*g->narrow)
        *out = p * (g->weight_x[i] + g->factor_x[i] * g->factor_y[j]);
      else
        *out = p * g->weight_x[i] + expf(s - g->stat_y[j]) * g->weight_y[j];
    }
    store_row(o, c, i, ds);
  }
  free(ds);
  return BETACLIP_SUCCESS;
}

int betaclip_softplus_forward(const betaclip_operands *o, const float *bias, float *softplus, void *workspace,
                              size_t workspace_bytes, void *stream) {
  int error = check_operands(o, stream);
  if (!error && !softplus) error = BETACLIP_ERROR_NULL;
  if (!error)
    error = use_workspace(workspace, workspace_bytes, betaclip_softplus_workspace_bytes(o->n, o->m, MULTIPROCESSORS));
  if (error) return error;
  for (int64_t i = 0; i < o->n; i++) {
    softplus[i] = 0;
    for (int64_t j = 0; j < o->m; j++) softplus[i] += softplus_of(logit(o, bias, i, j));
  }
  return BETACLIP_SUCCESS;
}

int betaclip_softplus_ds(const betaclip_operands *o, const float *bias, const float *weight, const betaclip_chunk *c,
                         float *softplus, float *sigmoid, void *workspace, size_t workspace_bytes, void *stream) {
  int error = check_operands(o, stream);
  if (!error) error = check_chunk(o, c);
  if (!error && (!weight || !softplus)) error = BETACLIP_ERROR_NULL;
  if (!error)
    error = use_workspace(
        workspace, workspace_bytes,
        betaclip_softplus_workspace_bytes(c->row_end - c->row_begin, c->col_end - c->col_begin, MULTIPROCESSORS));
  if (error) return error;
  float *ds = malloc((size_t)(c->col_end - c->col_begin) * sizeof(float));
  for (int64_t i = c->row_begin; i < c->row_end; i++) {
    for (int64_t j = c->col_begin; j < c->col_end; j++) {
      float s = logit(o, bias, i, j), p = 1 / (1 + expf(-s));
      softplus[i] += softplus_of(s);
      if (sigmoid) sigmoid[i] += p;
      ds[j - c->col_begin] = weight[i] * p;
    }
    store_row(o, c, i, ds);
  }
  free(ds);
  return BETACLIP_SUCCESS;
}
