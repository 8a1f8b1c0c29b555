from pathlib import Path

import pytest

STORIES = Path(__file__).resolve().parents[3] / "shared" / "models" / "stories260k"


@pytest.fixture
def stories() -> Path:
    if not STORIES.is_dir():
        pytest.skip(f"no second real model at {STORIES}")
    return STORIES
