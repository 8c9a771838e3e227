"""hypothesis, or stand-ins for it that skip what it would test: the tests beside those run without it, too."""

import pytest

try:
    from hypothesis import assume, given, settings
    from hypothesis import strategies as st
    from hypothesis.extra import numpy as st_numpy
except ModuleNotFoundError:

    class _Anything:
        """Stands for whatever is made of strategies; nothing is drawn from it."""

        def __call__(self, *args, **kwargs):
            return self

        def __getattr__(self, name):
            return self

        def __or__(self, other):
            return self

    def given(*args, **kwargs):
        return pytest.mark.skip(reason="hypothesis is not installed")

    def settings(*args, **kwargs):
        return lambda test: test

    assume = st = st_numpy = _Anything()

__all__ = ["assume", "given", "settings", "st", "st_numpy"]
