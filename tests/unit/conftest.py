import pytest

from tests.boxes import FARM, LAPTOP, Box
from tests.models import tiny_embed, tiny_model

__all__ = ["tiny_embed", "tiny_model"]


@pytest.fixture
async def box(tmp_path):
    made = Box(tmp_path, [LAPTOP])
    await made.fill()
    return made


@pytest.fixture
async def farm(tmp_path):
    made = Box(tmp_path, [FARM])
    await made.fill()
    return made
