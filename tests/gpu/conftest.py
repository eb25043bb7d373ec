# SPDX-License-Identifier: Apache-2.0
import untuned  # noqa: F401
