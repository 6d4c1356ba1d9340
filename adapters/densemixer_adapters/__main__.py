"""``python -m densemixer_adapters`` is the command ``densemixer``, also where another package has taken its name."""

from densemixer_adapters.cli.app import app

app()
