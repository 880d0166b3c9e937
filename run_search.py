"""Hardware-aware search for ConvFirst networks: `python run_search.py --budget 200`."""

from nas.cli.app import app

if __name__ == "__main__":
    app()
