"""The fixture that the ops' tests rely on to see what an op leaves unwritten."""

import pytest
import torch

MAKERS = {
    "empty": lambda x: torch.empty(x.shape, dtype=x.dtype),
    "empty_like": torch.empty_like,
    "new_empty": lambda x: x.new_empty(x.shape),
    "other layout": lambda x: torch.empty_like(x, memory_format=torch.channels_last),
}


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("maker", MAKERS)
def test_memory_that_nothing_wrote_is_not_a_number(maker, dtype):
    assert MAKERS[maker](torch.zeros(2, 3, 4, 5).to(dtype)).float().isnan().all()
