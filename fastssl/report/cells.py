"""Values as people read them, in the page's tables and in the terminal's."""

import json
from collections.abc import Mapping
from typing import Any


def changes_text(changes: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value_text(value)}" for key, value in changes.items())


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} %"


def clock(seconds: float | None) -> str:
    """Seconds as a person says them: 9 s, 9.4 min, 3.2 h."""
    if seconds is None:
        return ""
    if seconds < 100:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def value_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
