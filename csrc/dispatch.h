// SPDX-License-Identifier: Apache-2.0
// From run-time values to the kernel compiled for them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <string>

#include "params.h"
#include "tile_config.h"

namespace eqx_flash {

// Launch the kernels of one pass. Defined in launch_*.cuh, instantiated in the generated files.
template <typename Element, int kHeadDim, Mask kMask>
cudaError_t run_forward(const ForwardParams& params, cudaStream_t stream);
template <typename Element, int kHeadDim, Mask kMask>
cudaError_t run_backward(const BackwardParams& params, cudaStream_t stream);

// Calls body.template operator()<kHeadDim>() with the smallest built tile that holds head_dim, and
// returns false if there is none.
template <typename Body>
bool with_head_dim_tile(int head_dim, Body&& body) {
#define EQX_FLASH_TRY(dim)           \
  if (head_dim <= dim) {             \
    body.template operator()<dim>(); \
    return true;                     \
  }
#ifdef EQX_FLASH_HAVE_64
  EQX_FLASH_TRY(64)
#endif
#ifdef EQX_FLASH_HAVE_128
  EQX_FLASH_TRY(128)
#endif
#ifdef EQX_FLASH_HAVE_256
  EQX_FLASH_TRY(256)
#endif
#undef EQX_FLASH_TRY
  return false;
}

// Calls body.template operator()<kMask>().
template <typename Body>
void with_mask(Mask mask, Body&& body) {
  if (mask == Mask::kCausal) {
    body.template operator()<Mask::kCausal>();
  } else {
    body.template operator()<Mask::kFull>();
  }
}

}  // namespace eqx_flash
