"""Pickles of 0.1.0, whose modules lay elsewhere, still load."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

import gf_tvm
from gf_tvm.bundle.library import Library


def renamed(value: object, **modules: str) -> bytes:
    """``value`` pickled, its modules named as they were: ``new_name="old.name"``, dots as two underscores."""
    data = pickle.dumps(value, protocol=2)  # which names modules as lines of text
    for new, old in modules.items():
        line = f"c{new.replace('__', '.')}\n".encode()
        assert line in data
        data = data.replace(line, f"c{old}\n".encode())
    return data


def test_a_filtered_convolution() -> None:
    conv = gf_tvm.FilteredConv2d(3, 4, 3, patch=(2, 3))
    again = pickle.loads(renamed(conv, gf_tvm__nn="gf_tvm.filtered"))
    assert type(again) is gf_tvm.FilteredConv2d
    assert again.patch == (2, 3)
    torch.testing.assert_close(again.weight, conv.weight, rtol=0, atol=0)


def test_a_model_whose_library_is_found_by_its_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library(Path("host.gfb"), "digest", {"device": "host"}, [])
    monkeypatch.setattr("gf_tvm.bundle.library._loaded", {"digest": library})
    model = gf_tvm.filter_model(nn.Sequential(nn.Conv2d(3, 4, 3)), patch=2, last=1, library=library)
    data = renamed(model, gf_tvm__nn="gf_tvm.filtered", gf_tvm__bundle__library="gf_tvm.library")
    assert pickle.loads(data)[0].library is library


def test_a_pickle_names_the_public_module() -> None:
    """So that it loads whatever file the class lies in next."""
    assert gf_tvm.FilteredConv2d.__module__ == "gf_tvm.nn"
    assert getattr(gf_tvm.nn, gf_tvm.FilteredConv2d.__qualname__) is gf_tvm.FilteredConv2d
