// SPDX-License-Identifier: Apache-2.0
// What every launch needs: tensor maps, the device, its shared-memory limit. Nothing in a launch
// allocates or synchronises, so that XLA can capture the launch into a CUDA graph.
#pragma once

#include <atomic>

#include "params.h"
#include "sm90/tma.cuh"
#include "tile_config.h"

namespace eqx_flash {

struct DeviceInfo {
  int ordinal;
  int multiprocessors;
};

inline cudaError_t current_device(DeviceInfo* device) {
  if (const cudaError_t error = cudaGetDevice(&device->ordinal); error != cudaSuccess) return error;
  return cudaDeviceGetAttribute(&device->multiprocessors, cudaDevAttrMultiProcessorCount,
                                device->ordinal);
}

// Raises a kernel's shared-memory limit, once per device and kernel.
template <auto* kKernel>
cudaError_t allow_shared_memory(int device, int bytes) {
  static std::atomic<uint64_t> done{0};
  const uint64_t bit = uint64_t{1} << (device % 64);
  if (done.load(std::memory_order_relaxed) & bit) return cudaSuccess;
  const cudaError_t error =
      cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) done.fetch_or(bit, std::memory_order_relaxed);
  return error;
}

// Encodes the maps of a launch one after the other and keeps the first error.
template <typename Element>
struct TensorMapEncoder {
  cudaError_t error = cudaSuccess;

  void operator()(CUtensorMap* map, const void* data, sm90::TensorShape shape, int box_rows) {
    if (error == cudaSuccess) {
      error = sm90::encode_tensor_map<Element>(map, data, shape, box_rows);
    }
  }
};

inline sm90::TensorShape query_shape(const ForwardParams& params) {
  return {params.batch, params.seq_q, params.heads, params.head_dim};
}
inline sm90::TensorShape key_shape(const ForwardParams& params) {
  return {params.batch, params.seq_k, params.heads_k, params.head_dim};
}

}  // namespace eqx_flash
