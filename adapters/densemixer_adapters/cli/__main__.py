"""``python -m densemixer_adapters.cli``, as ``densemixer``."""

from densemixer_adapters.cli.app import app

if __name__ == "__main__":
    app()
