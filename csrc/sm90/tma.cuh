// SPDX-License-Identifier: Apache-2.0
// Tiles of [batch, seq, heads, head_dim] tensors through the tensor memory accelerator.
// PTX ISA: "cp.async.bulk.tensor", "Async proxy", "createpolicy"; CUDA driver API:
// cuTensorMapEncodeTiled.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "sm90/device.cuh"

namespace eqx_flash::sm90 {

// Where a box of rows starts, in the order of the map's axes.
struct TmaCoordinates {
  int col;
  int row;
  int head;
  int batch;
};

enum class L2Policy { kEvictFirst, kEvictLast };

template <L2Policy kPolicy>
EQX_DEVICE uint64_t l2_policy() {
  uint64_t policy;
  if constexpr (kPolicy == L2Policy::kEvictFirst) {
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  } else {
    asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  }
  return policy;
}

// Loads one box; its bytes arrive at the mbarrier `full`. Rows and columns outside are zeros.
EQX_DEVICE void tma_load(const CUtensorMap& map, uint32_t destination, uint32_t full,
                         uint64_t l2_policy, TmaCoordinates at) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(destination),
      "l"(&map), "r"(full), "r"(at.col), "r"(at.row), "r"(at.head), "r"(at.batch), "l"(l2_policy)
      : "memory");
}

// The same without a word on L2.
EQX_DEVICE void tma_load(const CUtensorMap& map, uint32_t destination, uint32_t full,
                         TmaCoordinates at) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(destination),
      "l"(&map), "r"(full), "r"(at.col), "r"(at.row), "r"(at.head), "r"(at.batch)
      : "memory");
}

// Stores one box, dropping what lies outside. Part of the thread's current bulk group.
EQX_DEVICE void tma_store(const CUtensorMap& map, uint32_t source, TmaCoordinates at) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(
          &map),
      "r"(source), "r"(at.col), "r"(at.row), "r"(at.head), "r"(at.batch)
      : "memory");
}

EQX_DEVICE void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until this thread's stores have read shared memory, so that it may be written again.
EQX_DEVICE void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// Makes this thread's ordinary shared-memory writes visible to TMA and wgmma. A barrier follows.
EQX_DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ------------------------------------------------------------------------------------------- host

struct TensorShape {  // [batch, seq, heads, head_dim], dense
  int batch;
  int seq;
  int heads;
  int head_dim;
};

// The driver's entry point, looked up at run time: linking libcuda would make the module
// impossible to import on a machine without a driver.
inline cudaError_t tensor_map_encoder(decltype(&cuTensorMapEncodeTiled)* encoder) {
  static decltype(&cuTensorMapEncodeTiled) cached = nullptr;
  if (cached == nullptr) {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry,
                                                               12000, cudaEnableDefault, &found);
    if (error != cudaSuccess) return error;
    if (found != cudaDriverEntryPointSuccess) return cudaErrorSymbolNotFound;
    cached = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry);
  }
  *encoder = cached;
  return cudaSuccess;
}

template <typename Element>
inline constexpr CUtensorMapDataType kTensorMapType = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
template <>
inline constexpr CUtensorMapDataType kTensorMapType<__half> = CU_TENSOR_MAP_DATA_TYPE_FLOAT16;

// A map whose boxes are `box_rows` rows of one head by 64 columns, as SmemTile lays out a slab.
template <typename Element>
cudaError_t encode_tensor_map(CUtensorMap* map, const void* data, TensorShape shape, int box_rows) {
  decltype(&cuTensorMapEncodeTiled) encode;
  if (const cudaError_t error = tensor_map_encoder(&encode); error != cudaSuccess) return error;
  const cuuint64_t row_bytes = static_cast<cuuint64_t>(shape.head_dim) * sizeof(Element);
  const cuuint64_t dims[4] = {
      static_cast<cuuint64_t>(shape.head_dim), static_cast<cuuint64_t>(shape.seq),
      static_cast<cuuint64_t>(shape.heads), static_cast<cuuint64_t>(shape.batch)};
  const cuuint64_t strides[3] = {dims[2] * row_bytes, row_bytes, dims[1] * dims[2] * row_bytes};
  const cuuint32_t box[4] = {64, static_cast<cuuint32_t>(box_rows), 1, 1};
  const cuuint32_t element_strides[4] = {1, 1, 1, 1};
  const CUresult result =
      encode(map, kTensorMapType<Element>, 4, const_cast<void*>(data), dims, strides, box,
             element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace eqx_flash::sm90
