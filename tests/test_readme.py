"""The README's links lead somewhere; its Python example is run in test_main.py."""

import re

import pytest
from conftest import REPO

README = (REPO / "README.md").read_text()


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_links_lead_somewhere(link):
    assert (REPO / link).exists()
