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

// Launches a kernel that may start while the one before it in the stream still runs, and that waits
// by itself for what it needs of it: sm90::wait_for_previous_kernel().
template <typename... Args>
cudaError_t launch_early(void (*kernel)(Args...), unsigned blocks, unsigned threads,
                         int shared_memory, cudaStream_t stream, const Args&... args) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_memory;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, args...);
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
