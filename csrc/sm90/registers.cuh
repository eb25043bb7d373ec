// SPDX-License-Identifier: Apache-2.0
// Register-level helpers: register budgets, packed conversions, matrix loads and stores, exp2.
// PTX ISA: "setmaxnreg", "cvt", "ldmatrix", "stmatrix", "ex2", "red".
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "sm90/device.cuh"

namespace eqx_flash::sm90 {

// Executed by all warps of a warpgroup; the block's total must fit the register file.
template <int kRegisters>
EQX_DEVICE void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
EQX_DEVICE void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// exp2 with -inf -> 0; denormal results flush to zero.
EQX_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two fp32 values as a pair of 16-bit ones, `low` in the lower half.
template <typename Element>
EQX_DEVICE uint32_t pack(float low, float high);
template <>
EQX_DEVICE uint32_t pack<__nv_bfloat16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
template <>
EQX_DEVICE uint32_t pack<__half>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// The two values of a pair, exactly.
template <typename Element>
EQX_DEVICE float2 unpack(uint32_t pair);
template <>
EQX_DEVICE float2 unpack<__nv_bfloat16>(uint32_t pair) {
  float2 values;
  asm("mov.b32 %0, %1;" : "=f"(values.x) : "r"(pair << 16));
  asm("mov.b32 %0, %1;" : "=f"(values.y) : "r"(pair & 0xffff0000u));
  return values;
}
template <>
EQX_DEVICE float2 unpack<__half>(uint32_t pair) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

// Adds four consecutive floats to global memory, without waiting.
EQX_DEVICE void reduce_add_x4(float* destination, const float* values) {
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(destination), "f"(values[0]),
               "f"(values[1]), "f"(values[2]), "f"(values[3])
               : "memory");
}

// Four words of shared memory.
EQX_DEVICE int4 load_shared_x4(uint32_t address) {
  int4 words;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "r"(address)
               : "memory");
  return words;
}
EQX_DEVICE void store_shared_x4(uint32_t address, int x, int y, int z, int w) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x), "r"(y), "r"(z),
               "r"(w)
               : "memory");
}

// Four floats.
EQX_DEVICE void load_shared_x4(uint32_t address, float* values) {
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(values[0]), "=f"(values[1]), "=f"(values[2]), "=f"(values[3])
               : "r"(address)
               : "memory");
}
EQX_DEVICE void store_shared_x4(uint32_t address, const float* values) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(values[0]),
               "f"(values[1]), "f"(values[2]), "f"(values[3])
               : "memory");
}

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
EQX_DEVICE void load_matrix_x4(uint32_t address, uint32_t* registers) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(address)
               : "memory");
}
EQX_DEVICE void store_matrix_x4(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

// The same four matrices, each written transposed.
EQX_DEVICE void store_matrix_x4_transposed(uint32_t address, const uint32_t* registers) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
      "r"(registers[0]), "r"(registers[1]), "r"(registers[2]), "r"(registers[3])
      : "memory");
}

}  // namespace eqx_flash::sm90
