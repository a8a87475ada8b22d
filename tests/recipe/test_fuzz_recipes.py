"""Ten thousand hostile recipes: each is a recipe or a UserError, in bounded time and memory, never anything else."""

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastssl.errors import UserError
from fastssl.recipe.load import dump, load, parse, shipped
from fastssl.recipe.schema import Recipe

MUTATIONS, TREES = 3_000, 1_000
SCRAPS = [
    *(b"\0", b"\xff\xfe", b"&a [*a]", b"!!python/object/apply:os.system [true]", b"? ", b"- " * 40, b"{" * 200),
    *(b"1e999", b".nan", b"-.inf", b"0x" + b"f" * 400, b"9" * 5000, b"~", b"2026-01-01", b"<<: {}", b"'", b'"', b"|\n"),
    *(b"\t", b"---\n", b"%YAML 9.9\n", b"null", b"[]", b"{}", "\u202eé".encode(), b"seed: -1\n", b"views: 1e9\n"),
]


def outcome(path: Path) -> str:
    """recipe or error; anything else escapes."""
    try:
        made = load(path)
    except UserError as error:
        check_words(error)
        return "error"
    assert load(parse_text(dump(made), path)) == made
    return "recipe"


def check_words(error: UserError) -> None:
    assert error.what.strip()
    assert error.fix.strip()


def parse_text(text: str, neighbor: Path) -> dict[str, Any]:
    path = neighbor.with_suffix(".dump.yaml")
    path.write_text(text, encoding="utf-8")
    found: dict[str, Any] = parse(path)
    return found


def mutated(text: bytes, dice: random.Random) -> bytes:
    for _ in range(dice.randint(1, 4)):
        at, to = sorted(dice.randrange(len(text) + 1) for _ in range(2))
        match dice.randrange(5):
            case 0:
                text = text[:at] + dice.choice(SCRAPS) + text[at:]
            case 1:
                text = text[:at] + text[min(to, at + 30) :]
            case 2:
                text = text[:at] + bytes([dice.randrange(256)]) + text[at + 1 :]
            case 3:
                text = text[:at] + text[at:to] * dice.randint(1, 3) + text[to:]
            case _:
                lines = text.splitlines(keepends=True)
                dice.shuffle(lines)
                text = b"".join(lines)
    return text[:20_000]


def test_mutated_yaml_is_a_recipe_or_a_clear_error(tmp_path: Path) -> None:
    dice, path, seen = random.Random(0), tmp_path / "recipe.yaml", dict[str, int]()
    # without the headers, or most mutations would only change a comment
    texts = [
        b"\n".join(line for line in p.read_bytes().splitlines() if not line.startswith(b"#")) + b"\n" for p in shipped()
    ]
    for _ in range(MUTATIONS):
        path.write_bytes(mutated(dice.choice(texts), dice))
        kind = outcome(path)
        seen[kind] = seen.get(kind, 0) + 1
    assert min(seen["recipe"], seen["error"]) > MUTATIONS // 50  # both sides of the line were tried


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from([-1, 0, 2**63, "auto"])
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def fields() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, field in Recipe.model_fields.items():
        inner = getattr(field.annotation, "model_fields", {})
        found[name] = list(inner) or ["name", "redundancy_weight", "form"]
    return found


@st.composite
def trees(draw: st.DrawFn) -> dict[str, Any]:
    """Sections and keys that exist, holding anything at all."""
    tree: dict[str, Any] = {"data": {"path": "a.beton"}, "train": {"epochs": 1}}
    for section in draw(st.lists(st.sampled_from(sorted(fields())), max_size=3)):
        if draw(st.booleans()):
            keys = st.sampled_from(fields()[section])
            before = tree.get(section)
            changes = draw(st.dictionaries(keys, values, max_size=3))
            tree[section] = {**before, **changes} if isinstance(before, dict) else changes
        else:
            tree[section] = draw(values)
    return tree


@settings(max_examples=TREES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(trees())
def test_any_value_in_any_field_is_a_recipe_or_a_clear_error(tree: dict[str, Any]) -> None:
    try:
        made = load(tree)
    except UserError as error:
        check_words(error)
    else:
        assert load(made.model_dump(mode="json")) == made


@pytest.mark.parametrize(
    "text",
    [
        "a: " + "[" * 100_000 + "]" * 100_000,
        "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: [*c, *c]\n",
        "name: " + "x" * (2 << 20),
        "{" * 5_000,
        "data: {path: a.beton}\ntrain: {epochs: 1}\n? {a: b}\n: c\n",
    ],
    ids=["deep", "aliases", "large", "open", "odd-key"],
)
def test_size_depth_and_aliases_have_limits(tmp_path: Path, text: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    assert outcome(tmp_path / "recipe.yaml") == "error"
