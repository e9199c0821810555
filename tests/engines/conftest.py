from tests.models import tiny_embed, tiny_model

__all__ = ["tiny_embed", "tiny_model"]
