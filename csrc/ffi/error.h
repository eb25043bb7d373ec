// SPDX-License-Identifier: Apache-2.0
// Early returns from XLA handlers, with messages that name what was wrong.
#pragma once

#include <cuda_runtime.h>

#include <string>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace eqx_flash {

inline xla::ffi::Error invalid_argument(std::string message) {
  return xla::ffi::Error::InvalidArgument("eqx_flash: " + std::move(message));
}

inline xla::ffi::Error from_cuda(cudaError_t error, const char* doing) {
  if (error == cudaSuccess) return xla::ffi::Error::Success();
  return xla::ffi::Error::Internal(std::string("eqx_flash: ") + doing +
                                   " failed: " + cudaGetErrorString(error));
}

}  // namespace eqx_flash
