"""``python -m tandem`` is the ``tandem`` command."""

from tandem.cli.main import process

if __name__ == "__main__":
    process()
