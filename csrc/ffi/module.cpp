// SPDX-License-Identifier: Apache-2.0
// The compiled module eqx_flash._C: handlers for XLA, and what the build contains.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <string>

#include "ffi/handlers.h"
#include "params.h"
#include "tile_config.h"

namespace nb = nanobind;

namespace eqx_flash {
namespace {

nb::dict registrations() {
  nb::dict targets;
#if EQX_FLASH_WITH_CUDA
  targets["eqx_flash_forward"] = nb::capsule(forward_handler(), "xla._CUSTOM_CALL_TARGET");
  targets["eqx_flash_backward"] = nb::capsule(backward_handler(), "xla._CUSTOM_CALL_TARGET");
#endif
  return targets;
}

nb::dict build_info() {
  nb::dict info;
#if EQX_FLASH_WITH_CUDA
  info["cuda"] = EQX_FLASH_CUDA_VERSION;
  info["architectures"] = "sm_90a";
  info["head_dims"] = EQX_FLASH_HEAD_DIMS_LIST;
#else
  info["cuda"] = "off";
  info["architectures"] = "";
  info["head_dims"] = "";
#endif
  return info;
}

nb::dict describe(const char* dtype, int head_dim, Mask mask) {
  const ForwardTile tile = forward_tile(head_dim, mask);
  nb::dict row;
  row["dtype"] = dtype;
  row["head_dim"] = head_dim;
  row["mask"] = mask == Mask::kCausal ? "causal" : "full";
  row["block_m"] = tile.block_m();
  row["block_n"] = tile.block_n;
  row["k_stages"] = tile.k_stages;
  row["v_stages"] = tile.v_stages;
  row["own_output_buffer"] = tile.own_output_buffer;
  row["consumer_warpgroups"] = tile.consumer_warpgroups;
  row["shared_memory_bytes"] = tile.shared_memory_bytes(head_dim);
  return row;
}

// The tile table is compiled into every build: it can be read and tested without a GPU.
nb::list tile_config() {
  nb::list rows;
  for (const char* dtype : {"bfloat16", "float16"}) {
    for (const int head_dim : {64, 128, 256}) {
      for (const Mask mask : {Mask::kFull, Mask::kCausal}) {
        rows.append(describe(dtype, head_dim, mask));
      }
    }
  }
  return rows;
}

}  // namespace
}  // namespace eqx_flash

NB_MODULE(_C, module) {
  module.doc() = "Compiled part of eqx_flash.";
  module.def("registrations", &eqx_flash::registrations,
             "XLA handlers by target name; empty in a build without kernels.");
  module.def("build_info", &eqx_flash::build_info, "How this module was built.");
  module.def("tile_config", &eqx_flash::tile_config, "The tile sizes of every kernel.");
}
