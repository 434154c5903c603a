"""Whether tensors are finite."""

import math

import pytest
import torch

from distil.models.checks import is_finite

LARGEST = torch.finfo(torch.float32).max


@pytest.mark.parametrize(
    "values, expected",
    [
        ([], True),
        ([1.0, -2.0], True),
        ([LARGEST, LARGEST], True),  # their sum is not
        ([1.0, math.nan], False),
        ([math.inf, -math.inf], False),
        ([-math.inf, LARGEST], False),
    ],
)
def test_a_tensor_is_finite_where_all_its_entries_are(values, expected):
    assert is_finite(torch.tensor(values)) is expected and is_finite(None)
