"""Where the checkout lies that the tests belong to."""

from pathlib import Path

#: The folder with pyproject.toml.
ROOT = Path(__file__).resolve().parent.parent.parent
#: What tests share; child processes that need it put it into sys.path.
HELPERS = str(ROOT / "tests/helpers")
