"""What a source held and what was passed over, in a few lines."""

from collections.abc import Iterable, Mapping
from typing import Any

from fastssl.data.manifest import Manifest

MOST_REASONS, MOST_SKIPPED = 6, 20


def account_lines(manifest: Manifest, name: str) -> list[str]:
    """Images, classes, labels, splits, and what was passed over; lines with nothing to say are left out."""
    counts = [many(manifest.count, "image"), many(len(manifest.classes), "class", "classes")]
    if manifest.classes and manifest.unlabeled:
        counts.append(f"{manifest.unlabeled} without a label")
    if manifest.skipped_count:
        counts.append(f"{manifest.skipped_count} skipped")
    return [f"{name}: {', '.join(counts)}.", *source_lines(manifest.account), *skipped_lines(manifest)]


def source_lines(account: Mapping[str, Any]) -> list[str]:
    """The lines of an account's JSON."""
    lines = []
    if account.get("columns"):
        lines.append(f"Columns: {', '.join(account['columns'])}.")
    if account.get("label_from") or account.get("columns"):
        images = account.get("image_from") or "the only image"
        lines.append(f"Images from {images}, labels from {account.get('label_from') or 'nowhere'}.")
    if account.get("splits"):
        lines.append("Splits: " + ", ".join(f"{split} {count}" for split, count in account["splits"].items()) + ".")
    passed = sorted(dict(account.get("passed_over") or {}).items(), key=lambda pair: -pair[1])
    if passed:
        shown = [f"{count} x {reason}" for reason, count in passed[:MOST_REASONS]]
        rest = sum(count for _, count in passed[MOST_REASONS:])
        lines.append(f"Passed over: {', '.join(shown)}" + (f", and {rest} others." if rest else "."))
    return lines + [f"{note}." for note in account.get("notes") or ()]


def warning_lines(warnings: Iterable[Mapping[str, Any]]) -> list[str]:
    """One line for each kind of notice about images that were read, from the JSON of `Warned`."""
    lines = []
    for warned in warnings:
        first = f", first {warned['first']}" if warned["first"] else ""
        lines.append(f"Warning: {warned['text']} ({many(warned['item_count'], 'image')}{first}).")
    return lines


def skipped_lines(manifest: Manifest) -> list[str]:
    """One line for each image that could not be read, the first of many."""
    lines = [f"Skipped: {entry.reason}." for entry in manifest.skipped[:MOST_SKIPPED]]
    more = manifest.skipped_count - len(lines)
    return [*lines, f"Skipped: {more} more, listed in the manifest."] if more else lines


def many(count: int, what: str, several: str | None = None) -> str:
    """A count with its noun."""
    return f"{count} {what}" if count == 1 else f"{count} {several or what + 's'}"
