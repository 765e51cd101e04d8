"""`python -m quire_attn`: what `quire info` shows."""

import argparse

from . import _binding


def main() -> None:
    """Prints it."""
    parser = argparse.ArgumentParser(
        prog="python -m quire_attn",
        description="Version, backends, devices and what each backend supports",
    )
    parser.add_argument(
        "--kernels",
        action="store_true",
        help="print the CUDA kernels in this build instead, and which calls each serves",
    )
    print(_binding.kernels() if parser.parse_args().kernels else _binding.info(), end="")


if __name__ == "__main__":
    main()
