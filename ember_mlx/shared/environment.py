"""On which machine, and with which versions, numbers were made."""

import datetime
import os
import platform
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["device", "environment", "version_of"]

PACKAGES = ("ember-mlx", "mlx", "mlx-lm", "numpy", "torch", "transformers", "triton")


def version_of(package: str) -> str | None:
    """The version of a package, None if it is not installed; of this one in a checkout, what that says of itself."""
    try:
        return version(package)
    except PackageNotFoundError:
        project = Path(__file__).parents[2] / "pyproject.toml"
        if package != "ember-mlx" or not project.is_file():
            return None
        return tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"]


def environment() -> dict:
    """Machine, versions and date, as JSON takes them; what is not installed has no version."""
    versions = {"python": platform.python_version()} | {package: version_of(package) for package in PACKAGES}
    return {
        "machine": {
            "system": platform.platform(),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "gpu": _gpu(),
        },
        "versions": versions,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def device(implementation: str) -> str:
    """The name of what an implementation runs on: the GPU, or the processor."""
    on_cpu = implementation.endswith(("cpu", "interpreted"))
    return _processor() if on_cpu else _gpu() or "an unnamed GPU"


def _processor():
    try:
        with open("/proc/cpuinfo") as lines:
            found = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), None)
    except OSError:  # not Linux
        found = None
    return found or platform.processor() or platform.machine()


def _gpu():
    """The name of the GPU that one of the frameworks already imported sees, or None."""
    torch, mlx = sys.modules.get("torch"), sys.modules.get("mlx.core")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    if mlx is not None and (mlx.metal.is_available() or mlx.cuda.is_available()):
        return mlx.device_info(mlx.gpu).get("device_name", "GPU")
    return None
