"""The networks of `networks.py`, each made once."""

import pytest
from networks import POLICIES, make


@pytest.fixture(scope="session")
def trained():
    """Name of a policy -> (function of variables and images, variables)."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = make(POLICIES[name])
        return made[name]

    return get
