import os
import sys
from pathlib import Path

import pytest
import torch

# Where there is no GPU, Triton's kernels run in its interpreter. The variable counts when triton itself is first imported, by
# whichever test that is.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
