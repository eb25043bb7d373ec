# SPDX-License-Identifier: Apache-2.0
"""PEP 517 backend: scikit-build-core, plus what only a build with kernels requires.

A build without them needs neither a CUDA compiler nor the FFI headers, which come with 130 MB of
jaxlib and its own requirements.
"""

from build_settings import build_requirements
from scikit_build_core import build
from scikit_build_core.build import *  # noqa: F403  (every hook; two are extended below)


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    return build.get_requires_for_build_wheel(config_settings) + build_requirements()


def get_requires_for_build_editable(config_settings=None) -> list[str]:
    return build.get_requires_for_build_editable(config_settings) + build_requirements()
