"""``python3 -m gf_cuda info FILE.gfb`` lists a bundle; ``check`` runs its kernels on this machine's GPU and compares,
``bench`` measures them against cuDNN (:mod:`gf_cuda.bench`).

Exit codes: 0, all is well; 1, a kernel is wrong or failed; 2, nothing could be checked.
"""

import argparse
import math
import os
import platform
import sys
from contextlib import ExitStack
from typing import Any, Callable, List, Optional, Sequence, Tuple

from . import bench, board, nvrtc
from .bundle import Bundle, Kernel, load, read
from .driver import Device
from .errors import DriverError, GfCudaError, NoCompilerError, ProgramError

#: Time of a kernel: the median of this many samples, each of launches that take about this many milliseconds together.
_SAMPLES, _SAMPLE_MS = 7, 20.0
_MOST_LAUNCHES = 200


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m gf_cuda", description="Bundles of kernels for NVIDIA GPUs.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    info = commands.add_parser("info", help="what is in a bundle; needs no GPU")
    check = commands.add_parser("check", help="run a bundle's kernels, compare with float64, measure")
    for command in (info, check):
        command.add_argument("bundle", metavar="FILE.gfb")
        command.add_argument("--kernel", metavar="NAME", help="only these, as backward_weight or filter_input")
    check.add_argument("--gpu", type=int, default=0, metavar="N", help="number of the GPU (default: 0)")
    info.set_defaults(run=lambda args: _info(read(args.bundle), args.kernel))
    check.set_defaults(run=lambda args: _check(load(args.bundle), args.kernel, args.gpu))
    bench.add_parser(commands)
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.error("name a command: info, check or bench")
    try:
        code: int = arguments.run(arguments)
        return code
    except GfCudaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2


def _chosen(bundle: Bundle, name: Optional[str]) -> List[Kernel]:
    chosen = [kernel for kernel in bundle.kernels if name in (None, kernel.name)]
    if not chosen:
        known = ", ".join(sorted({kernel.name for kernel in bundle.kernels})) or "none"
        raise GfCudaError(f"{os.path.basename(bundle.path)} has no kernel {name!r}; it has {known}")
    return chosen


def _info(bundle: Bundle, name: Optional[str]) -> int:
    kernels = _chosen(bundle, name)
    _print_pairs(_of_bundle(bundle))
    print()
    rows = [
        (k.name, k.convolution.key, k.dtype, k.schedule, len(k.program.launches), _bytes(k.program.scratch_bytes))
        for k in kernels
    ]
    _print_table(("kernel", "convolution", "dtype", "schedule", "launches", "scratch"), rows)
    return 0


def _of_bundle(bundle: Bundle) -> List[Tuple[str, str]]:
    versions = bundle.manifest.get("versions")
    made = ", ".join(f"{name} {versions[name]}" for name in sorted(versions)) if isinstance(versions, dict) else "?"
    kinds = "/".join(sorted({kernel.image_kind for kernel in bundle.kernels}))
    file = os.path.basename(bundle.path)
    return [
        ("bundle", f"{file}: {len(bundle.kernels)} kernels for {bundle.device} ({bundle.arch}, {kinds})"),
        ("built by", made),
    ]


def _of_machine(device: Device) -> List[Tuple[str, str]]:
    driver = device.driver
    try:
        import torch

        pytorch = f", PyTorch {torch.__version__} (CUDA {torch.version.cuda})"
    except ImportError:
        pytorch = ""
    try:
        compiler = str(nvrtc.find())
    except NoCompilerError:
        compiler = "none (not needed where the bundle fits)"
    free, total = device.free_memory()
    version = f"CUDA {driver.version // 1000}.{driver.version % 1000 // 10}"
    clocks = board.clocks()
    clock = f"{device.clock_khz / 1e3:.0f} MHz" + ("" if clocks is None else f" (now {clocks['now']:.0f})")
    notes = [board.board(), board.l4t() and f"L4T {board.l4t()}", board.advice()]
    return [
        *(("board", note) for note in notes if note),
        ("driver", version + (", emulated: its times say nothing" if driver.emulated else "")),
        (
            f"GPU {device.ordinal}",
            f"{device.name} ({device.arch}), {device.multiprocessors} multiprocessor(s), {clock}, "
            f"L2 {_bytes(device.l2_bytes)}",
        ),
        ("memory", f"{_bytes(free)} free of {_bytes(total)}"),
        ("Python", f"{platform.python_version()}{pytorch}, {platform.machine()}"),
        ("compiler", compiler),
    ]


def _check(bundle: Bundle, name: Optional[str], ordinal: int) -> int:
    try:
        from . import reference
    except ImportError as error:
        raise GfCudaError(f"the results are compared by PyTorch, which cannot be imported: {error}") from None
    kernels = _chosen(bundle, name)
    device = bundle.check_device(ordinal)
    _print_pairs(_of_machine(device) + _of_bundle(bundle))
    print()
    rows = []
    bad = 0
    for kernel in kernels:
        row: List[Any] = [kernel.name, kernel.convolution.key, kernel.dtype, kernel.schedule]
        try:
            executable = kernel.prepare(ordinal)
            functions = executable.functions.values()
            row.append("/".join(str(function.registers) for function in functions))
            excess, ms = _measure(kernel, device, reference)
            row += [f"{ms:.3f}", f"{excess:.2g}", "right" if excess <= 1 else "WRONG"]
            bad += excess > 1
        except (DriverError, ProgramError) as failure:
            # Once the context is lost, giving memory back fails as well: what went wrong is the first error.
            first: BaseException = failure
            while isinstance(first.__context__, DriverError):
                first = first.__context__
            if isinstance(first, DriverError) and first.sticky:
                raise first from None
            bad += 1
            row += ["-"] * (7 - len(row)) + [f"FAILED: {first}"]
        rows.append(row)
    headers = ("kernel", "convolution", "dtype", "schedule", "registers", "ms", "error", "result")
    _print_table(headers, rows)
    print()
    print("error: the largest, in units of what float32 sums and the storage allow; compared in float64")
    print(f"{len(kernels) - bad} of {len(kernels)} kernels are right" + (f", {bad} are not" if bad else ""))
    return 1 if bad else 0


def _measure(kernel: Kernel, device: Device, reference: Any) -> Tuple[float, float]:
    """The error of a kernel's results, in units of what is allowed, and its time in milliseconds."""
    import torch

    arguments = kernel.program.arguments
    shapes = {a.name: (a.shape, getattr(torch, a.dtype)) for a in arguments}
    inputs = reference.random_inputs({a.name: shapes[a.name] for a in arguments if not a.output}, seed=0)
    with ExitStack() as stack:
        memory = {a.name: stack.enter_context(device.alloc(a.nbytes)) for a in arguments}
        scratch = stack.enter_context(device.alloc(kernel.program.scratch_bytes)).pointer
        for a in arguments:
            tensor = inputs[a.name] if not a.output else _poisoned(kernel, a.name, shapes[a.name], reference)
            device.upload(memory[a.name].pointer, _buffer(tensor))
        pointers = [memory[a.name].pointer for a in arguments]

        def launch() -> None:
            kernel(pointers, scratch, 0, device.ordinal)

        launch()
        device.synchronize()
        outputs = {}
        for a in arguments:
            if a.output:
                outputs[a.name] = torch.empty(a.shape, dtype=shapes[a.name][1])
                device.download_into(memory[a.name].pointer, _buffer(outputs[a.name]))
        ms = _time(launch, device)
    found = reference.compared(kernel.name, kernel.convolution, inputs, outputs)
    return max(reference.excess(output, want) for _, output, want in found), ms


def _poisoned(kernel: Kernel, name: str, spec: Tuple[Tuple[int, ...], Any], reference: Any) -> Any:
    """What an output holds before: NaN, but zero where the kernel does not write, which is the caller's part."""
    import torch

    tensor = torch.full(spec[0], math.nan).to(spec[1])
    return tensor.masked_fill(~reference.covered(kernel.convolution), 0) if name == "grad_x" else tensor


def _buffer(tensor: Any) -> Any:
    """A tensor's memory as Python sees it. Not by NumPy: a board may lack it, or have one that PyTorch cannot use."""
    import ctypes

    size = tensor.numel() * tensor.element_size()
    return (ctypes.c_ubyte * size).from_address(tensor.data_ptr())


def _time(launch: Callable[[], None], device: Device) -> float:
    """Milliseconds of a launch: the median of several samples between two events."""
    with device.event() as start, device.event() as end:

        def sample(count: int) -> float:
            start.record()
            for _ in range(count):
                launch()
            end.record()
            end.synchronize()
            return end.elapsed_ms(start) / count

        count = max(1, min(_MOST_LAUNCHES, int(_SAMPLE_MS / max(sample(1), 1e-3))))
        return sorted(sample(count) for _ in range(_SAMPLES))[_SAMPLES // 2]


def _bytes(value: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value} B"


def _print_pairs(pairs: Sequence[Tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in pairs)
    for name, value in pairs:
        print(f"{name:{width}}  {value}")


def _print_table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    lines = [[str(cell) for cell in line] for line in [headers, *rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headers))]
    lines.insert(1, ["-" * width for width in widths])
    for line in lines:
        print("  ".join(f"{cell:{width}}" for cell, width in zip(line, widths)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
