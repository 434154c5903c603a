"""The pieces of distil/kernels/cpu.py, each of which can be switched off to time what it is worth.

The kernels have no switch: a call that is not in their table of handled functions runs torch's own
function, and a model that reports no tied weight gets autograd's own gradient for it.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
import torch.nn.functional as F

from distil.kernels import cpu
from distiller import DistillationModel

# piece: the functions that it handles. The gradient of a tied embedding is not in the table of
# handled functions: the step asks the model for the weight.
PIECES = {
    "dropout": (F.dropout,),
    "attention": (F.scaled_dot_product_attention,),
    "products": (F.linear, torch.addmm),
    "tied": (),
}


@contextlib.contextmanager
def without(piece: str | None) -> Iterator[None]:
    """Switch a piece off within the block, for all models of the process; None: switch off none."""
    off = PIECES[piece] if piece else ()
    handled = {function: ours for function, ours in cpu.HANDLED.items() if function not in off}
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(cpu, "HANDLED", handled))
        if piece == "tied":
            stack.enter_context(mock.patch.object(DistillationModel, "tied_weight", None))
        yield
