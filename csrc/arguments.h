// What the arguments of a call must satisfy, and the job they describe. Plain C++, the same on a machine without CUDA.
#pragma once

#include <initializer_list>

#include "betaclip.h"
#include "consumer.h"

namespace betaclip {

inline bool is_aligned(const void *pointer, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

inline bool is_count(int64_t rows) { return rows >= 1 && rows <= BETACLIP_MAX_ROWS; }

// The tensor memory accelerator wants strides of whole 16 bytes, below 2^40 bytes.
inline bool is_stride(int64_t stride, int64_t width) {
  return stride >= width && stride % 8 == 0 && stride < (int64_t(1) << 39);
}

// Checks pointers to float or int32.
inline int vector_error(std::initializer_list<const void *> pointers) {
  for (const void *pointer : pointers) {
    if (pointer == nullptr) return BETACLIP_ERROR_NULL;
  }
  for (const void *pointer : pointers) {
    if (!is_aligned(pointer, 4)) return BETACLIP_ERROR_ALIGNMENT;
  }
  return BETACLIP_SUCCESS;
}

inline int operands_error(const betaclip_operands *o) {
  if (o == nullptr || o->x == nullptr || o->y == nullptr || o->scale == nullptr) return BETACLIP_ERROR_NULL;
  if (o->dtype != BETACLIP_BFLOAT16 && o->dtype != BETACLIP_FLOAT16) return BETACLIP_ERROR_DTYPE;
  if (!is_count(o->n) || !is_count(o->m)) return BETACLIP_ERROR_SIZE;
  if (o->d < 8 || o->d > 1024 || o->d % 8 != 0) return BETACLIP_ERROR_DEPTH;
  if (!is_stride(o->x_stride, o->d) || !is_stride(o->y_stride, o->d)) return BETACLIP_ERROR_STRIDE;
  if (!is_aligned(o->x, 16) || !is_aligned(o->y, 16) || !is_aligned(o->scale, 4)) return BETACLIP_ERROR_ALIGNMENT;
  if (!is_aligned(o->x_group, 4) || !is_aligned(o->y_group, 4)) return BETACLIP_ERROR_ALIGNMENT;
  if (!is_aligned(o->x_text, 4) || !is_aligned(o->y_text, 4)) return BETACLIP_ERROR_ALIGNMENT;
  if ((o->x_group == nullptr) != (o->y_group == nullptr)) return BETACLIP_ERROR_GROUPS;
  if ((o->x_text == nullptr) != (o->y_text == nullptr)) return BETACLIP_ERROR_GROUPS;
  return BETACLIP_SUCCESS;
}

inline int chunk_error(const betaclip_chunk *c, const betaclip_operands &o) {
  if (c == nullptr || c->ds == nullptr) return BETACLIP_ERROR_NULL;
  if (c->row_begin < 0 || c->row_end <= c->row_begin || c->row_end > o.n) return BETACLIP_ERROR_CHUNK;
  if (c->col_begin < 0 || c->col_end <= c->col_begin || c->col_end > o.m) return BETACLIP_ERROR_CHUNK;
  if (!is_stride(c->ds_stride, c->col_end - c->col_begin)) return BETACLIP_ERROR_STRIDE;
  return is_aligned(c->ds, 16) ? BETACLIP_SUCCESS : BETACLIP_ERROR_ALIGNMENT;
}

inline int workspace_error(const void *workspace) {
  if (workspace == nullptr) return BETACLIP_ERROR_NULL;
  return is_aligned(workspace, 16) ? BETACLIP_SUCCESS : BETACLIP_ERROR_ALIGNMENT;
}

inline Groups x_groups(const betaclip_operands &o, int64_t end) { return {o.x_group, o.x_text, 0, end}; }
inline Groups y_groups(const betaclip_operands &o, int64_t end) { return {o.y_group, o.y_text, 1, end}; }

// The chunk that is the whole matrix, for operations that write no dS.
inline betaclip_chunk whole_matrix(const betaclip_operands &o) { return {nullptr, 0, 0, o.n, 0, o.m}; }

inline Grid grid_of(const betaclip_chunk &c, int32_t multiprocessors) {
  return make_grid(c.row_end - c.row_begin, c.col_end - c.col_begin, multiprocessors);
}

inline Job job_of(const betaclip_chunk &c, const Grid &grid, float *row_sums, float *col_sums,
                  const LostRows &lost = {}) {
  return {c.row_begin, c.col_begin, grid,
          {row_sums, col_sums, c.row_end - c.row_begin, c.col_end - c.col_begin},
          {c.ds, c.ds_stride, c.row_begin, c.row_end, c.col_begin, c.col_end},
          lost};
}

}  // namespace betaclip
