"""What is kept from one run to the next."""

import os
import subprocess
import sys

import jax
import pytest
from conftest import REPO

from dgm_jax import cache

_COMPILE = """
import jax
from dgm_jax import cache
cache.keep_compiled_programs()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_log_compiles", True)
jax.jit(lambda x: x * 2 + 1)(1.0)
"""


def _kept(folder):
    return sorted(path.name for path in folder.glob("programs-*/*-cache"))


def test_a_second_process_finds_what_the_first_compiled(tmp_path):
    env = {**os.environ, "DGM_JAX_CACHE": str(tmp_path), "PYTHONPATH": str(REPO)}
    env.pop("JAX_COMPILATION_CACHE_DIR", None)
    command = [sys.executable, "-W", "error", "-c", _COMPILE]
    found = []
    for _ in range(2):
        done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
        found.append((_kept(tmp_path), "Persistent compilation cache hit" in done.stderr))
    (names, hit), again = found
    assert names and not hit and again == (names, True)


def test_the_users_own_choice_stands(monkeypatch, tmp_path):
    monkeypatch.setenv("DGM_JAX_CACHE", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
        cache.keep_compiled_programs()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_the_folder_is_the_users_or_the_named_one(monkeypatch, tmp_path):
    monkeypatch.setenv("DGM_JAX_CACHE", str(tmp_path / "named"))
    assert cache.folder() == tmp_path / "named"
    monkeypatch.setenv("DGM_JAX_CACHE", "~/named")
    assert "~" not in str(cache.folder())
    monkeypatch.delenv("DGM_JAX_CACHE")
    assert cache.folder().name == "dgm_jax"


@pytest.mark.parametrize("other", ["flags : sse2", ""])
def test_programs_are_kept_by_the_processors_instructions(other, monkeypatch):
    here = cache._processor()
    assert here == cache._processor() and len(here) == 8
    monkeypatch.setattr(cache.Path, "read_text", lambda self: other)
    monkeypatch.setattr(cache.Path, "exists", lambda self: bool(other))
    assert cache._processor() != here
