"""The command line: reads arguments, calls the layers below, prints."""

from fomoe.cli.main import main, make_app

__all__ = ["main", "make_app"]
