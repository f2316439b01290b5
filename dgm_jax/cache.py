"""What is kept from one run to the next: decoded data sets and compiled programs."""

import hashlib
import os
import platform
from pathlib import Path

import jax


def folder() -> Path:
    """`DGM_JAX_CACHE` where it is set, else the user's cache directory."""
    if chosen := os.environ.get("DGM_JAX_CACHE"):
        return Path(chosen).expanduser()
    import pooch  # late: it takes a moment to import

    return Path(pooch.os_cache("dgm_jax"))


def keep_compiled_programs(most_bytes: int = 2**31) -> None:
    """Let JAX keep what it compiles, so that the next run of a program starts in seconds.

    Several processes may share it: JAX locks a cache whose size is limited. Programs are kept by
    the instructions that the processor knows, since a home directory may be seen from machines of
    several kinds. A choice that the user has made in JAX's own variables stands.

    Args:
      most_bytes: of all programs; those not used for longest go first.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder() / f"programs-{_processor()}"))
    jax.config.update("jax_compilation_cache_max_size", most_bytes)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _processor() -> str:
    """Eight letters for the kind of processor and its instructions."""
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(f"{platform.machine()} {flags}".encode()).hexdigest()[:8]
