"""`python -m bench.peers`: which peers run here, and how to install the others; --download fetches the wheels."""

import argparse

import torch

from . import everyone, offers, wheels


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__)
    parser.add_argument(
        "--download", action="store_true", help="fetch the releases that are imported from their wheels"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    if options.download:
        for requirement in wheels.download():
            print(f"WARNING: {requirement} could not be downloaded; the benchmark goes without it and says so")
        return
    for peer in everyone():
        offered, reason = offers(peer, torch.device(options.device))
        print(f"{peer.name:24}{peer.version() if offered else '':16}{', '.join(offered) or reason}")


if __name__ == "__main__":
    main()
