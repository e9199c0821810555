from tests.models import tiny_model

__all__ = ["tiny_model"]
