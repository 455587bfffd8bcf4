"""Links to files of the repository, such as ``[reference](../gf_tvm/reference.py)``.

The source folder of the site is the repository, so such a link means here what it means on GitHub, and MyST complains
where the file is missing. It would offer a copy under another name as a download; here the file lies in the site where
it lies in the repository, so that a page of HTML finds what it links to beside it.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util.osutil import relative_uri


def link_files(app: Sphinx, doctree: nodes.document) -> None:
    """Turn a page's downloads into links, and copy what they lead to."""
    if app.builder.format != "html":
        return
    page = app.env.current_document.docname
    for node in list(doctree.findall(addnodes.download_reference)):
        name, file = app.env.relfn2path(node["reftarget"], page)
        if not Path(file).is_file():
            continue  # Sphinx itself warns
        uri = relative_uri(app.builder.get_target_uri(page), name)
        node.replace_self(nodes.reference("", "", *node.children, refuri=uri, internal=True))
        target = app.outdir / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix == ".html":
            shutil.copytree(Path(file).parent, target.parent, dirs_exist_ok=True)
        else:
            shutil.copy(file, target)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("doctree-read", link_files, priority=400)  # before Sphinx collects downloads, at 500
    return {"parallel_read_safe": True}
