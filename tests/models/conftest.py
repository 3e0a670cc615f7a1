"""One thread: the models are tiny, and the tests run beside others."""

import pytest
import torch
from torch import Tensor

from modtrain.models import sequence, transformer
from tests.helpers import reference


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def _poisoned_memory():
    """Uninitialized memory is NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def _rotary_in_float64(monkeypatch):
    """Rotary factors as precise as a float64 model: gradients amplify float32's rounding a
    hundredfold."""

    def rotary(positions_BS: Tensor, head_width: int, theta: float, _scaling) -> tuple:
        angle_BSW = reference.angles(positions_BS, head_width, theta)
        return angle_BSW.cos(), angle_BSW.sin()

    for module in (sequence, transformer):
        monkeypatch.setattr(module, "rotary", rotary)
