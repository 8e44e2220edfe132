"""Feeds in a folder: ONNX test data sets, or .npz files with one feed each."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from onnx_lowrank.calibrate.feeds import Feeds, folder, holds_feeds
from onnx_lowrank.calibrate.sources.source import Claim, Kind, Need


def _claim(path: Path) -> Claim:
    if not path.is_dir():
        return Claim.NONE
    return Claim.SURE if holds_feeds(path) else Claim.REST


def _read(path: Path, need: Need, files: ExitStack) -> Feeds:
    return folder(path, need.specs, need.most)


KIND = Kind("a folder of feeds", _claim, _read)
