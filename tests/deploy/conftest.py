"""The networks of `networks.py`, each made and lowered once."""

import functools

import pytest
from networks import POLICIES, SHAPE, make

from qflax.deploy.lowering import lower


@pytest.fixture(scope="session")
def trained():
    """Name of a policy -> (function of variables and images, variables)."""
    return functools.cache(lambda name: make(POLICIES[name]))


@pytest.fixture(scope="session")
def lowered(trained):
    """Name of a policy -> graph."""

    def get(name):
        function, variables = trained(name)
        return lower(functools.partial(function, variables), SHAPE)

    return functools.cache(get)
