# SPDX-License-Identifier: Apache-2.0
"""`reverse_mode_only`: refuses forward-mode differentiation with an error of our own.

JAX differentiates forward first in both modes, and a `custom_vjp` cannot tell which it is. What
can is the tangent: in reverse mode it is only ever transposed, in forward mode it is computed. So
the tangent passes through a linear operation that can be transposed and nothing else.
"""

import functools
from typing import TypeVar

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

FORWARD_MODE = (
    "attention has no forward-mode derivatives (jax.jvp, jax.jacfwd, jax.linearize); use reverse "
    "mode (jax.grad, jax.vjp, jax.jacrev), or jax.nn.dot_product_attention with "
    'implementation="xla"'
)

Tree = TypeVar("Tree")


def reverse_mode_only(arrays: Tree, message: str = FORWARD_MODE) -> Tree:
    """`arrays`, whose tangents cannot be computed: that raises NotImplementedError(message)."""
    return jax.tree.map(functools.partial(_identity.bind, message=message), arrays)


def _refuse(*_, message, **__):
    raise NotImplementedError(message)


_identity = Primitive("eqx_flash_reverse_mode_only")
_tangent = Primitive("eqx_flash_tangent")

_identity.def_impl(lambda x, message: x)
_identity.def_abstract_eval(lambda x, message: x)
mlir.register_lowering(_identity, lambda ctx, x, message: [x])
batching.defvectorized(_identity)
ad.deflinear2(_tangent, lambda cotangent, _, message: [cotangent])


def _jvp(primals, tangents, message):
    # x itself, not _identity(x): forward mode over reverse mode, as in jax.hessian, may go on.
    (x,), (tangent,) = primals, tangents
    zero = isinstance(tangent, ad.Zero)
    return x, tangent if zero else _tangent.bind(tangent, message=message)


ad.primitive_jvps[_identity] = _jvp

_tangent.def_impl(_refuse)
_tangent.def_abstract_eval(lambda tangent, message: tangent)
mlir.register_lowering(_tangent, _refuse)
# In reverse mode _identity is mapped before it is differentiated.
batching.primitive_batchers[_tangent] = _refuse
