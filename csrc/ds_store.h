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

// The destination, indexed by rows and columns of the whole matrix.
struct DsChunk {
  void *ds;
  int64_t stride;  // elements, a multiple of 8
  int64_t row_begin, row_end, col_begin, col_end;

  // Eight 16-bit elements at columns col to col + 7; col - col_begin is a multiple of 8.
  BETACLIP_HD void store(int64_t row, int64_t col, const uint32_t (&words)[4]) const {
    if (row >= row_end || col >= col_end) return;
    uint16_t *to = static_cast<uint16_t *>(ds) + (row - row_begin) * stride + (col - col_begin);
    if (col + 8 <= col_end) {
      *reinterpret_cast<uint4 *>(to) = make_uint4(words[0], words[1], words[2], words[3]);
      return;
    }
    BETACLIP_UNROLL
    for (int k = 0; k < 8; ++k) {
      if (col + k < col_end) to[k] = static_cast<uint16_t>(words[k / 2] >> (16 * (k % 2)));
    }
  }
};

}  // namespace betaclip
