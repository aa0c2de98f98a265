"""What the commands say when they are done: lines for a person, or one object of JSON."""

from __future__ import annotations

import json
import math
from typing import Any


def as_json(found: dict[str, Any]) -> str:
    """One object; numbers that are not finite are null."""
    return json.dumps(_finite(found), allow_nan=False)


def as_lines(found: dict[str, Any]) -> str:
    """A few lines."""
    kinds = {"fit": _fitted, "inspect": _fitted, "export": _exported}
    lines = kinds.get(found["command"], _coded)(found)
    return "\n".join([*lines, f"{found['seconds']:.1f} s in all"])


def _coded(found: dict[str, Any]) -> list[str]:
    shape = " x ".join(map(str, found["shape"])) or "one"
    lines = [f"{found['out']}: {shape}, {found['dtype']}, of {found['vectors']:,} vectors"]
    if found["resumed_at"]:
        lines.append(f"Resumed at row {found['resumed_at']:,}")
    if found["skipped"]:
        lines.append(f"Marked as not finite: {found['skipped']:,}")
    if found["vectors"] > found["resumed_at"]:
        lines.append(f"{found['vectors_per_second']:,.0f} vectors/s")
    return lines


def _exported(found: dict[str, Any]) -> list[str]:
    return [f"{found[name]['path']}: the {name}, {found[name]['nodes']} nodes" for name in ("encoder", "decoder")]


def _fitted(found: dict[str, Any]) -> list[str]:
    lines = [f"{found['file'] if 'file' in found else found['out']}: {found['tokenizer']}"]
    lines.append(f"{found['bits_per_vector']:.4g} bits per vector")
    for number, book in enumerate(found.get("codebooks", ())):
        of = f"Codebook {number + 1}" if len(found["codebooks"]) > 1 else "Codebook"
        text = f"{of}: {book['codewords']} codewords of {book['dimension']} entries"
        if book["copies"]:
            text += f", {book['copies']} of them copies"
        if "nearest" in book:
            text += "; nearest neighbour at {least:.4g} to {most:.4g}, median {median:.4g}".format(**book["nearest"])
        lines.append(text)
    if "data" in found:
        lines.append(f"Data: {found['data']}")
        if found["skipped"]:
            lines.append(f"Left out as not finite: {found['skipped']:,}")
        share = found["distortion"] / found["variance"] if found["variance"] else math.nan
        lines.append(f"Distortion {found['distortion']:.6g}, {share:.2%} of the variance")
        for part in found["parts"]:
            before = f"{part['name'].capitalize()}: p" if part["name"] else "P"
            lines.append(f"{before}erplexity {part['perplexity']:.1f}, {part['used']} of {part['of']} codes used")
    if found["report"]:
        lines.append(f"Picture: {found['report']}")
    return lines


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(x) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
