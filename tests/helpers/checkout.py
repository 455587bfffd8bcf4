"""Where the checkout lies that the tests belong to."""

from pathlib import Path

#: The folder with pyproject.toml.
ROOT = Path(__file__).resolve().parent.parent.parent
#: Folder of the checkout -> folder of the packages as they are installed.
FOLDERS = {
    "gf_cuda": "gf_cuda",
    "gf_tvm": "gf_tvm",
    "schedules": "gf_tvm/schedules",
    "runners": "gf_tvm/runners",
    "tuning_logs": "gf_tvm/tuning_logs",
}
#: What tests share; child processes that need it put it into sys.path.
HELPERS = str(ROOT / "tests/helpers")
