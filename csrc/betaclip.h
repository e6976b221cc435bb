/* Two-sided statistics of all pairwise similarities on NVIDIA Hopper, without the matrix of similarities.
 *
 *     S_ij = scale * <x_i, y_j> (+ bias)        i < n, j < m
 *
 * A pair (i, j) takes part unless x_group[i] == y_group[j] or one of the two is negative (padding), or x_text[i] and
 * y_text[j] are equal and not negative. What padded rows hold, NaN included, reaches nothing. Products are formed in the
 * inputs' 16-bit type with float32 accumulation; statistics are float32, in nats. Results are deterministic: no atomics, and one summation order for given sizes and
 * multiprocessor count.
 *
 * Every pointer except `betaclip_operands *`, `betaclip_chunk *` and `betaclip_logsumexp_gradient *` is a device
 * pointer, owned by the caller and in use until the work queued on `stream` has finished. The structures themselves
 * are read during the call only. Functions that launch work run on the calling thread's current device, queue work on
 * `stream` (a cudaStream_t; NULL is the default stream) and return without waiting for it: they allocate nothing,
 * synchronise with nothing, print nothing (but what CUTLASS says on stderr if CUDA refuses a tensor map), and may be
 * captured into a CUDA graph, whose replays read scale, bias and everything else from the same addresses. The first
 * call of each function makes CUDA load its code: let that be outside of a capture. Two calls may overlap in time if
 * their workspaces and outputs do not.
 *
 * They return 0, a positive cudaError_t from CUDA (35 where there is no driver), or a negative BETACLIP_ERROR_*;
 * arguments are checked before the device is looked at. After an error nothing usable was written.
 */
#ifndef BETACLIP_H
#define BETACLIP_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define BETACLIP_API __attribute__((visibility("default")))
#else
#define BETACLIP_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Changes when a structure or a signature below does. */
#define BETACLIP_VERSION 2

enum {
  BETACLIP_SUCCESS = 0,
  BETACLIP_ERROR_NULL = -1,         /* a pointer that must be given is NULL */
  BETACLIP_ERROR_DTYPE = -2,        /* dtype is not a betaclip_dtype */
  BETACLIP_ERROR_SIZE = -3,         /* n or m below 1 or above BETACLIP_MAX_ROWS */
  BETACLIP_ERROR_DEPTH = -4,        /* d is not a multiple of 8 from 8 to 1024 */
  BETACLIP_ERROR_STRIDE = -5,       /* a row stride is less than a row, not a multiple of 8 elements, or 2^39 or more */
  BETACLIP_ERROR_ALIGNMENT = -6,    /* x, y, ds or workspace is not aligned to 16 bytes, another pointer not to 4 */
  BETACLIP_ERROR_GROUPS = -7,       /* of x_group and y_group, or of x_text and y_text, one is NULL alone */
  BETACLIP_ERROR_CHUNK = -8,        /* a chunk is empty or reaches beyond (n, m) */
  BETACLIP_ERROR_WORKSPACE = -9,    /* workspace_bytes is below what the size function says for this device */
  BETACLIP_ERROR_ARCHITECTURE = -10 /* the current device has no compute capability 9.0 */
};

enum betaclip_dtype { BETACLIP_BFLOAT16 = 0, BETACLIP_FLOAT16 = 1 };

/* Row coordinates of the tensor memory accelerator are 32-bit, and may run past the end; all else is 64-bit. */
#define BETACLIP_MAX_ROWS ((int64_t)1 << 30)

/* The two sides of an operation. */
typedef struct betaclip_operands {
  const void *x;          /* (n, d) dtype, rows contiguous, 16-byte aligned */
  const void *y;          /* (m, d) likewise */
  const int32_t *x_group; /* (n) or NULL, together with y_group */
  const int32_t *y_group; /* (m) */
  const int32_t *x_text;  /* (n) or NULL, together with y_text */
  const int32_t *y_text;  /* (m) */
  const float *scale;     /* () read on the device */
  int64_t x_stride;       /* elements from one row of x to the next, a multiple of 8, at least d */
  int64_t y_stride;
  int64_t n;
  int64_t m;
  int64_t d;     /* a multiple of 8, at most 1024; zero columns may be appended to reach one */
  int32_t dtype; /* enum betaclip_dtype */
} betaclip_operands;

/* A rectangle of the matrix of similarities, and where its gradient dS is written: element (i, j), for
 * row_begin <= i < row_end and col_begin <= j < col_end, goes to ds[(i - row_begin) * ds_stride + j - col_begin].
 * Pairs that take no part become 0, and so do elements of these rows up to the next multiple of 8 columns; nothing else
 * is touched. */
typedef struct betaclip_chunk {
  void *ds;          /* dtype of the operands, 16-byte aligned */
  int64_t ds_stride; /* elements, a multiple of 8, at least col_end - col_begin */
  int64_t row_begin;
  int64_t row_end;
  int64_t col_begin;
  int64_t col_end;
} betaclip_chunk;

/* What the gradient of the two-sided log-sum-exp takes from the whole matrix, prepared by the caller on the device:
 *
 *     stat_x, stat_y      lse_x, lse_y, with +inf in place of -inf (rows without any pair)
 *     weight_x, weight_y  incoming gradients; for float16 their scale should leave dS, which is at most their sum in
 *                         magnitude, inside that type's range
 *     least               = min stat_y
 *     narrow              = (largest stat_x other than +inf) - least < 55
 *     factor_x            = exp(stat_x - least), 0 where stat_x is +inf
 *     factor_y            = weight_y * exp(least - stat_y), 0 where stat_y is +inf
 *
 * With p = exp(S - stat_x), weight_y exp(S - stat_y) equals p factor_x factor_y: where the statistics are narrow, one
 * exponential serves both directions, and no product leaves float32's range. Otherwise factors are not used. */
typedef struct betaclip_logsumexp_gradient {
  const float *stat_x;   /* (n) */
  const float *stat_y;   /* (m) */
  const float *weight_x; /* (n) */
  const float *weight_y; /* (m) */
  const float *factor_x; /* (n) */
  const float *factor_y; /* (m) */
  const int32_t *narrow; /* () 0 or 1 */
} betaclip_logsumexp_gradient;

/* BETACLIP_VERSION of the library that was loaded. */
BETACLIP_API int betaclip_version(void);

/* Architectures the library holds code for, such as "sm_90a"; static text. */
BETACLIP_API const char *betaclip_architectures(void);

/* A sentence for any code returned by the functions below; static text. */
BETACLIP_API const char *betaclip_error_string(int error);

/* Bytes of workspace for betaclip_logsumexp_forward on a device with that many multiprocessors: O(n + m) for any
 * count. A workspace is scratch, need not be initialised, and may be reused by later work on the same stream.
 * 0 if a size is out of range. */
BETACLIP_API size_t betaclip_logsumexp_workspace_bytes(int64_t n, int64_t m, int32_t multiprocessors);

/* Bytes of workspace for betaclip_softplus_forward over (n, m), or betaclip_softplus_ds over a chunk of that size. */
BETACLIP_API size_t betaclip_softplus_workspace_bytes(int64_t rows, int64_t cols, int32_t multiprocessors);

/* lse_x[i] = log sum_j exp(S_ij), (n); lse_y[j] = log sum_i exp(S_ij), (m); -inf for a row without any pair, NaN
 * where a pair's similarity is NaN, +inf where one is beyond float32. Rows may have any norms: where these differ so
 * much, or S is so large, that one exponential cannot serve both directions, a second pass does what is missing. */
BETACLIP_API int betaclip_logsumexp_forward(const betaclip_operands *operands, float *lse_x, float *lse_y,
                                            void *workspace, size_t workspace_bytes, void *stream);

/* dS_ij = weight_x[i] exp(S_ij - lse_x[i]) + weight_y[j] exp(S_ij - lse_y[j]) over a chunk. */
BETACLIP_API int betaclip_logsumexp_ds(const betaclip_operands *operands, const betaclip_logsumexp_gradient *gradient,
                                       const betaclip_chunk *chunk, void *stream);

/* softplus[i] = sum_j log(1 + exp(S_ij)), (n); 0 for a row without any pair. bias () may be NULL. */
BETACLIP_API int betaclip_softplus_forward(const betaclip_operands *operands, const float *bias, float *softplus,
                                           void *workspace, size_t workspace_bytes, void *stream);

/* dS_ij = weight[i] sigmoid(S_ij) over a chunk, with weight (n) the incoming gradient of the row sums; and in the same
 * pass adds the chunk's row sums of softplus(S) to softplus (n) and, unless it is NULL, those of sigmoid(S) to
 * sigmoid (n): the gradient of the bias is their product with weight. The caller zeroes both before the first chunk. */
BETACLIP_API int betaclip_softplus_ds(const betaclip_operands *operands, const float *bias, const float *weight,
                                      const betaclip_chunk *chunk, float *softplus, float *sigmoid, void *workspace,
                                      size_t workspace_bytes, void *stream);

#ifdef __cplusplus
}
#endif

#endif
