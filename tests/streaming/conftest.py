import mlx.core as mx
import pytest


@pytest.fixture
def eager():
    """As that of all tests, for one test: some here compile again, for the compiled step itself."""
    mx.disable_compile()
    yield
    mx.enable_compile()
