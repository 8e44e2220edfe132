"""Strategies of Hypothesis that build valid models, and the names and recipes that go with them."""

from .models import models, siblings
from .recipes import recipe_texts

__all__ = ["models", "recipe_texts", "siblings"]
