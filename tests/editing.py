"""Plan files as a user edits them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from onnx_lowrank import Result


def edited_plan(result: Result, folder: Path, **changes: Any) -> Path:
    """Save a plan with changes of its rows, by layer, and of its other keys."""
    path = folder / "plan.json"
    result.save_plan(path)
    table = json.loads(path.read_text())
    table.update({key: value for key, value in changes.items() if key in table})
    for row in table["layers"]:
        row.update(changes.get(row["id"], {}))
    path.write_text(json.dumps(table))
    return path
