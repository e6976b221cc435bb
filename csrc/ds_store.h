// Writing a tile of dS: 16 bytes at a time straight from registers, without a stop in shared memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>

#include "host_device.h"

namespace betaclip {

// Two values rounded to the nearest Element, the first in the lower half.
template <class Element>
BETACLIP_HD uint32_t pack(float first, float second);

template <>
BETACLIP_HD uint32_t pack<__nv_bfloat16>(float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  uint32_t word;
  memcpy(&word, &pair, sizeof word);
  return word;
}

template <>
BETACLIP_HD uint32_t pack<__half>(float first, float second) {
  const __half2 pair = __floats2half2_rn(first, second);
  uint32_t word;
  memcpy(&word, &pair, sizeof word);
  return word;
}

// Four lanes of one row hold, each, one pair of columns of four blocks of eight columns; afterwards each lane holds one
// block, its own number: word k of lane q and word q of lane k change places.
template <class Warpgroup>
BETACLIP_HD void transpose_quad(uint32_t (&words)[4], Warpgroup &warpgroup) {
  BETACLIP_UNROLL
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = (warpgroup.thread() & bit) != 0;
    BETACLIP_UNROLL
    for (int k = 0; k < 4; ++k) {
      if (k & bit) continue;
      const uint32_t received = warpgroup.shuffle_xor(upper ? words[k] : words[k | bit], bit);
      if (upper) {
        words[k] = received;
      } else {
        words[k | bit] = received;
      }
    }
  }
}

// Where one tile goes: as far as it lies within the chunk, rounded up to whole blocks of eight columns.
struct DsTile {
  uint16_t *origin;
  int64_t stride;
  int32_t rows, cols;

  // Eight elements at columns col to col + 7; col is a multiple of 8.
  BETACLIP_HD void store(int row, int col, const uint32_t (&words)[4]) const {
    if (row >= rows || col >= cols) return;
    auto *to = reinterpret_cast<uint4 *>(origin + row * stride + col);
    const uint4 value = make_uint4(words[0], words[1], words[2], words[3]);
#if defined(__CUDA_ARCH__)
    __stwb(to, value);  // an assignment may be taken apart into four stores
#else
    *to = value;
#endif
  }
};

// The destination, indexed by rows and columns of the whole matrix.
struct DsChunk {
  void *ds;
  int64_t stride;  // elements, a multiple of 8
  int64_t row_begin, row_end, col_begin, col_end;

  // The tile that starts at (row, col), whole multiples of a tile from the chunk's own start.
  BETACLIP_HD DsTile tile(int64_t row, int64_t col) const {
    const int64_t rows = row_end - row, cols = col_end - col;
    return {static_cast<uint16_t *>(ds) + (row - row_begin) * stride + (col - col_begin), stride,
            int32_t(rows < kTile ? rows : kTile), int32_t(cols < kTile ? cols : kTile)};
  }
};

}  // namespace betaclip
