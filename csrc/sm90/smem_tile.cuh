// SPDX-License-Identifier: Apache-2.0
// Shared-memory tiles as TMA writes them and wgmma reads them.
// PTX ISA: "Asynchronous Warpgroup Level Matrix Shared Memory Layout", "Matrix Descriptor Format".
#pragma once

#include "sm90/device.cuh"

namespace eqx_flash::sm90 {

// The variable half of a wgmma matrix descriptor: start address and leading-dimension offset.
// The other half is the same for every operand here, so that stepping along k is one 32-bit add.
struct Descriptor {
  uint32_t low;

  // Of an address alone; SmemTile adds how its operands lie from there.
  EQX_DEVICE static Descriptor origin(uint32_t address) { return {address >> 4}; }

  EQX_DEVICE Descriptor operator+(int bytes) const {
    return {low + (static_cast<uint32_t>(bytes) >> 4)};
  }
  EQX_DEVICE uint64_t bits() const {
    constexpr uint32_t kRowGroup = 1024 >> 4;    // eight rows of 128 bytes
    constexpr uint32_t kSwizzle128B = 1u << 30;  // layout type, bits 62-63
    uint64_t descriptor;
    asm("mov.b64 %0, {%1, %2};" : "=l"(descriptor) : "r"(low), "n"(kRowGroup | kSwizzle128B));
    return descriptor;
  }
};

// kRows x kCols elements of 16 bits, cut along the columns into slabs of 64 (one 128-byte swizzle
// span), one after the other. A slab starts on a multiple of 1024 bytes.
template <int kRows_, int kCols_>
struct SmemTile {
  static constexpr int kRows = kRows_;
  static constexpr int kCols = kCols_;
  static constexpr int kSlabCols = 64;
  static constexpr int kSlabs = kCols / kSlabCols;
  static constexpr int kSlabBytes = kRows * 128;
  static constexpr int kBytes = kSlabs * kSlabBytes;
  static constexpr int kMmaK = 16;  // elements along k of one wgmma
  static_assert(kCols % kSlabCols == 0 && kRows % 8 == 0);

  // The columns are the k axis of the product (Q and K in S = Q K^T).
  EQX_DEVICE static Descriptor k_major(uint32_t base) { return k_major(Descriptor::origin(base)); }
  EQX_DEVICE static Descriptor k_major(Descriptor at) { return with_leading(at, 16); }
  static constexpr int k_major_step(int k) {
    constexpr int kStepsPerSlab = kSlabCols / kMmaK;
    return (k / kStepsPerSlab) * kSlabBytes + (k % kStepsPerSlab) * kMmaK * 2;
  }

  // The rows are the k axis (V in O = P V). One descriptor spans all slabs.
  EQX_DEVICE static Descriptor mn_major(uint32_t base) {
    return mn_major(Descriptor::origin(base));
  }
  EQX_DEVICE static Descriptor mn_major(Descriptor at) { return with_leading(at, kSlabBytes); }
  static constexpr int mn_major_step(int k) { return k * kMmaK * 128; }

  // Byte offset of the 16-byte piece `piece` (of 8 elements) of a row: what TMA's 128-byte swizzle
  // does to it. For ldmatrix and stmatrix.
  EQX_DEVICE static uint32_t piece_offset(int row, int piece) {
    return (piece / 8) * kSlabBytes + row * 128 + (((piece % 8) ^ (row % 8)) << 4);
  }

 private:
  EQX_DEVICE static Descriptor with_leading(Descriptor at, uint32_t leading_bytes) {
    // An address has 14 bits, counted from 16 bytes.
    return {at.low + ((leading_bytes >> 4) << 16)};
  }
};

}  // namespace eqx_flash::sm90
