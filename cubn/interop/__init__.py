"""Trained batch-norm layers in and out of other libraries, exactly.

    bn = cubn.interop.from_keras(layer)            # a layer of the library, or a dictionary of NumPy arrays
    cubn.interop.to_torch(bn, into=module)         # into a layer of the library, or, without `into`, as a dictionary

Names, epsilon, the two meanings of momentum, axes and missing parameters are translated by one table,
`cubn.interop.CONVENTIONS`.  Numbers are copied, so that inference is the same on both sides and a round trip changes
no bit.  No library is imported that is not loaded already.
"""

from cubn.interop.checkpoint import Plan, fold_safetensors, plan_folding
from cubn.interop.conventions import CONVENTIONS, Convention, State
from cubn.interop.flax import from_flax, to_flax
from cubn.interop.keras import from_keras, to_keras
from cubn.interop.onnx import from_onnx, to_onnx
from cubn.interop.pytorch import from_torch, to_torch

__all__ = [
    "CONVENTIONS",
    "Convention",
    "Plan",
    "State",
    "fold_safetensors",
    "from_flax",
    "from_keras",
    "from_onnx",
    "from_torch",
    "plan_folding",
    "to_flax",
    "to_keras",
    "to_onnx",
    "to_torch",
]
