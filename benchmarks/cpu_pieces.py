"""The pieces of distil/kernels/cpu.py, each of which can be switched off to time its gain.

The kernels have no switch. Calls of functions that are missing from their table run torch's
function; a model without a tied weight gets autograd's gradient for the embedding.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
import torch.nn.functional as F

from distil.kernels import cpu
from distiller import DistillationModel

# piece: the functions that it handles. The table has none for the gradient of a tied embedding:
# the step reads the weight from the model.
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
