"""Inside the build of an image: take out of its packages what only compilers, testers and owners of GPUs need."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

# torch/bin holds compilers and tests but for one program, with which processes share tensors.
KEPT = {"torch_shm_manager"}
NOT_NEEDED = (
    "torch/bin/*",
    "torch/include",
    "torch/share",
    "torch/test",
    "bitsandbytes/libbitsandbytes_cuda*",
    "bitsandbytes/libbitsandbytes_rocm*",
    "bitsandbytes/libbitsandbytes_xpu*",
    "networkx/**/tests",
    "numpy/**/tests",
    "sympy/**/tests",
    "sympy/**/benchmarks",
    "**/*.a",
    "**/*.pyi",
)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all in a folder."""
    return sum(each.stat().st_size for each in (path.rglob("*") if path.is_dir() else [path]) if each.is_file())


def main() -> None:
    site = Path(sysconfig.get_path("purelib"))
    freed = 0
    for pattern in NOT_NEEDED:
        for path in sorted(site.glob(pattern)):
            if not path.exists() or path.name in KEPT:
                continue
            freed += size_of(path)
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    print(f"{freed / 1e6:.0f} MB taken out")


if __name__ == "__main__":
    main()
