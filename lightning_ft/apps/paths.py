"""Where the configuration lies; imports nothing, since the command line's help must answer at once."""

from pathlib import Path


def conf_dir() -> Path:
    """The folder conf/: in an installed wheel inside the package, in a checkout beside it."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"
