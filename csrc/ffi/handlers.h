// SPDX-License-Identifier: Apache-2.0
// The XLA handlers, as opaque addresses: XLA's headers stay out of the Python module's source.
#pragma once

namespace eqx_flash {

void* forward_handler();
void* backward_handler();

}  // namespace eqx_flash
