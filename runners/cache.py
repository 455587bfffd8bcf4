"""gf-tvm cache: what the kernel cache has, and clearing it."""

from __future__ import annotations

import argparse
import math
from collections import Counter
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._output import check_writable, format_table, write_json

if TYPE_CHECKING:
    from ..on_demand.cache import KernelCache
    from ..on_demand.store import Entry

_DAY = 24 * 60 * 60


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "cache",
        help="show or clear the cache of kernels built on demand",
        description="Show the kernels that were built on demand for this machine's CPU: one bundle for each model that "
        "wanted them. GF_TVM_CACHE_DIR names the folder (default: ~/.cache/gf_tvm/kernels), GF_TVM_CACHE_SIZE limits "
        "its size (default: 2GiB); the entries that were not used for the longest time are deleted.",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the list as JSON")
    parser.set_defaults(run=run_show)
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    clear = actions.add_parser(
        "clear",
        help="delete entries",
        description="Delete all entries but those that a running process has loaded. They are built again when they "
        "are wanted.",
    )
    clear.add_argument(
        "--older-than", type=_days, default=0.0, metavar="DAYS", help="only those that were not used for so long"
    )
    clear.add_argument("--json", type=Path, default=argparse.SUPPRESS, metavar="FILE", help="write the lists as JSON")
    clear.set_defaults(run=run_clear)


def _days(text: str) -> float:
    try:
        days = float(text)
    except ValueError:
        days = math.nan
    if not 0 <= days < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of days that is not negative, got {text!r}")
    return days


def run_show(args: argparse.Namespace) -> int:
    cache = _cache(args)
    entries = cache.entries()
    headers = ("entry", "last used", "size", "device", "kernels", "tuned", "versions", "note")
    print(format_table(headers, map(_row, entries)))
    total = sum(entry.size for entry in entries)
    count = "1 entry" if len(entries) == 1 else f"{len(entries)} entries"
    print(f"{cache.folder}: {count}, {_size(total)} of at most {_size(cache.limit)}")
    if args.json is not None:
        write_json(args.json, {**_folder(cache), "bytes": total, "entries": [_values(entry) for entry in entries]})
    return 0


def run_clear(args: argparse.Namespace) -> int:
    cache = _cache(args)
    cleared = cache.clear(args.older_than * _DAY)
    freed = sum(entry.size for entry in cleared.removed)
    print(f"{cache.folder}: deleted {len(cleared.removed)}, {_size(freed)}")
    for entry in cleared.kept:
        print(f"kept {_name(entry)}: {'a running process has loaded it' if entry.in_use else 'it cannot be deleted'}")
    if args.json is not None:
        lists = {"removed": cleared.removed, "kept": cleared.kept}
        values = {name: [_values(entry) for entry in entries] for name, entries in lists.items()}
        write_json(args.json, {**_folder(cache), "freed_bytes": freed, **values})
    return 0


def _cache(args: argparse.Namespace) -> KernelCache:
    from ..on_demand.cache import KernelCache

    if args.json is not None:
        check_writable(args.json)
    return KernelCache()


def _folder(cache: KernelCache) -> dict[str, Any]:
    return {"folder": cache.folder, "limit_bytes": cache.limit}


def _values(entry: Entry) -> dict[str, Any]:
    used = datetime.fromtimestamp(entry.used).astimezone().isoformat(timespec="seconds")
    return {**asdict(entry), "used": used}


def _row(entry: Entry) -> tuple[object, ...]:
    # A key begins with the kernel's name and "_n", which no kernel's name contains.
    counts = Counter(key.partition("_n")[0] for key in entry.workloads)
    if entry.programs:
        counts["program" if len(entry.programs) == 1 else "programs"] = len(entry.programs)
    return (
        *(_name(entry), f"{datetime.fromtimestamp(entry.used):%Y-%m-%d %H:%M}", _size(entry.size)),
        *(entry.device or None, ", ".join(f"{count} {name}" for name, count in counts.items()) or None),
        None if entry.damaged else f"{entry.tuned} of {len(entry.workloads)}",
        ", ".join(f"{name} {version}" for name, version in entry.versions.items()) or None,
        f"damaged: {entry.damaged}" if entry.damaged else "in use" if entry.in_use else None,
    )


def _name(entry: Entry) -> str:
    return entry.path.stem[:12]


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 999.5:  # what is shown as at most 999
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} GiB"
