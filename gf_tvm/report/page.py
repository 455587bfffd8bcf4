"""Writing a report: one HTML page that needs no other file, and its plots as SVG and PNG beside it."""

from __future__ import annotations

import base64
import importlib.util
import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .._version import __version__
from ..errors import ReportError
from ..files import make_folder, replacing
from . import comparisons, settings, training, tuning
from .exhibits import Column, Exhibit, Section, common_conditions, without
from .sources import Source, read_all

PAGE = "index.html"
TITLE = "Gradient filtering: what it gains and what it costs"
_TEMPLATE = "page.html"

#: Dots per inch of the PNG files.
_DPI = 200


def write_report(
    files: Iterable[str | os.PathLike[str]], out: str | os.PathLike[str], title: str | None = None
) -> Path:
    """Make a page from results.

    Args:
        files: JSON files of ``gf-tvm compare``, ``tune``, ``train`` and ``evaluate``, and tuning logs; several of one
            kind are allowed. Kinds that are missing are left out.
        out: folder for ``index.html`` and the plots; made if it is not there. Files of the same names are replaced,
            others stay.
        title: of the page.

    Returns:
        The page's path.

    Raises:
        ReportError: matplotlib or jinja2 is missing, a file that cannot be reported (see
            :func:`gf_tvm.report.sources.read`), files that cannot go together, or ``out`` cannot be written.
    """
    check_packages()
    import matplotlib

    sources = read_all(files)
    # The files are only written when everything could be drawn.
    contents: dict[str, bytes] = {}
    images: dict[str, str] = {}
    # Names from files are no formulas. The ids in an SVG are random without a salt.
    with matplotlib.rc_context({"text.parse_math": False, "svg.hashsalt": "gf_tvm"}):
        made = numbered(sections_of(sources))
        for exhibit in (exhibit for section in made for exhibit in section.exhibits):
            for ending in ("svg", "png"):
                contents[f"{exhibit.name}.{ending}"] = _picture(exhibit, ending)
                exhibit.figure.set_layout_engine("none")  # it is laid out now; twice takes twice the time
            images[exhibit.name] = (
                "data:image/svg+xml;base64," + base64.b64encode(contents[f"{exhibit.name}.svg"]).decode()
            )
    page = render(made, images, title or TITLE, [source.name for source in sources])
    contents[PAGE] = page.encode()  # the last, so that a page never shows what is not there
    folder = Path(out)
    _write(folder, contents)
    return folder / PAGE


def check_packages() -> None:
    """Raise ReportError where a page cannot be made: no matplotlib, or no jinja2."""
    for package in ("matplotlib", "jinja2"):
        if importlib.util.find_spec(package) is None:
            raise ReportError(f"a report needs {package}: pip install 'gf-tvm[plot]'")


def check_folder(out: str | os.PathLike[str]) -> None:
    """Make the folder and see whether files can be written there. Raises ReportError."""
    folder = Path(out)
    try:
        make_folder(folder)
        if (folder / PAGE).is_dir():
            raise IsADirectoryError(21, "its index.html is a folder")
    except OSError as error:
        raise _cannot_write(folder, error) from None


def _cannot_write(folder: Path, error: OSError) -> ReportError:
    reason = "it is a file" if isinstance(error, FileExistsError) else error.strerror or str(error)
    return ReportError(f"cannot write the folder '{folder}': {reason}")


def sections_of(sources: Sequence[Source]) -> list[Section]:
    """Everything that these files have to show, in the order of the reader's questions. Raises ReportError."""
    by_kind = {kind: [source for source in sources if source.kind == kind] for kind in _KINDS}
    studies = [settings.of_evaluation(source) for source in by_kind["evaluate"]]
    studies += settings.of_training(by_kind["train"])
    return [
        *(training.section(study) for study in studies),
        *(comparisons.section(source) for source in by_kind["compare"]),
        *tuning.sections([*by_kind["tune"], *by_kind["log"]]),
    ]


_KINDS = ("evaluate", "train", "compare", "tune", "log")


def numbered(sections: Sequence[Section]) -> list[Section]:
    """The same with names of exhibits that are all different: speedup, speedup-2, ..."""
    count: dict[str, int] = {}

    def rename(exhibit: Exhibit) -> Exhibit:
        count[exhibit.name] = count.get(exhibit.name, 0) + 1
        return exhibit if count[exhibit.name] == 1 else replace(exhibit, name=f"{exhibit.name}-{count[exhibit.name]}")

    return [replace(section, exhibits=tuple(rename(exhibit) for exhibit in section.exhibits)) for section in sections]


def render(sections: Sequence[Section], images: dict[str, str], title: str, files: Sequence[str]) -> str:
    """The page's HTML. Everything from files is escaped.

    Args:
        images: address of each exhibit's picture.
        files: names, for the footer.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader(__package__, package_path="")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(_TEMPLATE).render(
        sections=sections,
        images=images,
        title=title,
        files=files,
        version=__version__,
        cell=_cell,
        common_conditions=common_conditions,
        without=without,
    )


def _cell(column: Column, value: Any) -> Any:
    """A cell of a table; numbers are also there as they are in the file, for programs that read the page."""
    from markupsafe import Markup

    if value is None:
        return Markup("<td>–</td>")
    several = isinstance(value, tuple)
    values = value if several else (value,)
    if all(isinstance(item, int | float) for item in values):
        data = Markup(", ").join(
            Markup('<data value="{}">{}</data>').format(repr(item), column.write(item)) for item in values
        )
        return Markup('<td class="{}">{}</td>').format("several" if several and len(values) > 1 else "number", data)
    return Markup("<td>{}</td>").format(", ".join(column.write(item) for item in values))


def _picture(exhibit: Exhibit, ending: str) -> bytes:
    """The exhibit's figure, with its conditions in the file; equal input gives equal bytes."""
    buffer = io.BytesIO()
    conditions = "; ".join(f"{what}: {value}" for what, value in exhibit.conditions)
    metadata: dict[str, str | None] = {
        "Title": exhibit.title,
        "Description": f"{exhibit.text} ({exhibit.basis}) {conditions}",
    }
    if ending == "svg":
        metadata["Date"] = None  # it would be the time of drawing
    exhibit.figure.savefig(buffer, format=ending, dpi=_DPI, metadata=metadata)
    return buffer.getvalue()


def _write(folder: Path, contents: dict[str, bytes]) -> None:
    """Write the files, each whole or not at all. Raises ReportError."""
    check_folder(folder)
    for name, content in contents.items():
        try:
            with replacing(folder / name) as file:
                file.write(content)
        except OSError as error:
            raise ReportError(f"cannot write '{folder / name}': {error.strerror or error}") from None
