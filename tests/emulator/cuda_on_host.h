// SPDX-License-Identifier: Apache-2.0
// Included before everything else: what nvcc would know, and the part of CUDA's runtime that the
// launches call.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <cmath>

#include "ptx.h"

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __shared__
#define __shared__
#undef __align__
#define __align__(bytes)
#undef __grid_constant__
#define __grid_constant__

using emulator::blockDim;
using emulator::blockIdx;
using emulator::gridDim;
using emulator::threadIdx;
using std::max;
using std::min;

namespace eqx_flash {
// `extern __shared__` names one of them. Shared memory has addresses only: see shared_address().
inline uint8_t dynamic_smem[1], aligned_dynamic_smem[1];
}  // namespace eqx_flash

inline uint32_t __cvta_generic_to_shared(const void* name) {
  return emulator::block.memory.begin(name == eqx_flash::aligned_dynamic_smem ? 1024 : 16);
}

inline void __syncthreads() { emulator::ptx::bar_sync(0, blockDim.x); }
inline void __syncwarp() { emulator::block.exchange(0); }
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  static_assert(sizeof(T) == 4);
  const auto& all = emulator::block.exchange(std::bit_cast<uint32_t>(value));
  return std::bit_cast<T>(static_cast<uint32_t>(all[lane]));
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return __shfl_sync(0, value, threadIdx.x % 32 ^ mask);
}

template <typename T>
T __ldcg(const T* address) {
  return *address;
}
template <typename T>
T __ldcs(const T* address) {
  return *address;
}
inline int atomicAdd(int* address, int value) { return std::exchange(*address, *address + value); }
inline bool __any_sync(unsigned, bool predicate) {
  const auto& all = emulator::block.exchange(predicate);
  return std::any_of(all.begin(), all.end(), [](uint64_t x) { return x != 0; });
}
inline float __log2f(float x) { return std::log2(x); }
inline float __logf(float x) { return std::log(x); }

namespace emulator {

template <typename... Parameters>
auto launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, int shared_bytes,
            cudaStream_t) {
  return [=](const Parameters&... parameters) {
    run_grid(blocks, threads, shared_bytes, [&] { kernel(parameters...); });
  };
}
template <typename... Parameters>
cudaError_t launch_configured(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                              const Parameters&... parameters) {
  launch(kernel, config->gridDim.x, config->blockDim.x, config->dynamicSmemBytes,
         nullptr)(parameters...);
  return cudaGetLastError();
}

inline CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* data,
                             const cuuint64_t* sizes, const cuuint64_t* strides,
                             const cuuint32_t* box, const cuuint32_t*, CUtensorMapInterleave,
                             CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                             CUtensorMapFloatOOBfill) {
  const bool known = rank == 4 && swizzle == CU_TENSOR_MAP_SWIZZLE_128B && box[0] == 64 &&
                     box[1] <= 256 && box[2] == 1 && box[3] == 1;
  const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 && strides[0] % 16 == 0 &&
                       strides[1] % 16 == 0 && strides[2] % 16 == 0;
  if (!known || !aligned) {
    last_error = "a tensor map that is misaligned, or that the emulator does not know";
    return CUDA_ERROR_INVALID_VALUE;
  }
  ptx::TensorMap result{static_cast<uint8_t*>(data), {}, {2}, {}};
  for (int i = 0; i < 4; ++i) result.sizes[i] = sizes[i];
  // Axes of the box: columns, rows. cuTensorMapEncodeTiled leaves out the innermost stride.
  for (int i = 0; i < 3; ++i) result.strides[i + 1] = strides[i];
  result.box = {static_cast<int>(box[0]), static_cast<int>(box[1])};
  static_assert(sizeof(result) <= sizeof(*map));
  std::memcpy(map, &result, sizeof(result));
  return CUDA_SUCCESS;
}

}  // namespace emulator

// ---- CUDA's runtime -----------------------------------------------------------------------------

extern "C" {
inline cudaError_t cudaGetLastError() {
  return emulator::last_error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 2;  // multiprocessors: few, so that a block of a persistent grid gets several tiles
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* target, int value, size_t bytes, cudaStream_t) {
  std::memset(target, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** entry, unsigned,
                                                    unsigned long long,
                                                    cudaDriverEntryPointQueryResult* found) {
  *entry = reinterpret_cast<void*>(&emulator::encode_tiled);
  *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
}
template <typename T>
cudaError_t cudaFuncSetAttribute(T*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
