# SPDX-License-Identifier: Apache-2.0
"""Imported before anything compiles: XLA takes the first algorithm for each product.

Else it tries them all for each product of the formula that kernels are compared with, for a minute
where a test takes six seconds. Not for what is timed.
"""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"
