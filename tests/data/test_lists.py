"""CSV files whose rows are not what they seem, and the files that their rows name."""

import os

import pytest
from test_sources import contents, png, tree

from fastssl.data.beton.reader import Beton
from fastssl.data.convert.convert import convert
from fastssl.data.sources import open_source
from fastssl.errors import UserError


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("path,label\na.png,cod\nb.png,salmon, smoked\n", "line 3 has 3 fields instead of 2: 'b.png,salmon, smoked'"),
        ("a.png,salmon, smoked\nb.png,cod\n", "line 1 has 3 fields instead of 2"),
        ("a.png,salmon, smoked\nb.png,salmon, raw\n", "line 1 has 3 fields instead of 2"),
        ("a.png\nb.png,cod\n", "line 2 has 2 fields instead of 1"),
        ("path,label,\n\na.png,salmon, smoked\n", "line 3 has 3 fields instead of 2"),
        ('path,label\na.png,"cod\nb.png,eel\n', "line 2: unexpected end of data"),
        ('path,label\na.png,cod\nb.png,"eel\na.png,"cod"\n', "line 3: ',' expected after"),
        ('path,label\na.png,cod\nb.png,"eel\na.png,cod"\n', "line 3: a field holds a line break"),
        ('path,label\na.png,cod\n"b\n.png",eel\n', "line 3: a field holds a line break"),
    ],
)
def test_rows_that_are_cut_or_swallowed_are_named_by_their_line(tmp_path, text, named):
    tree(tmp_path, {"a.png": png(1), "b.png": png(2)})
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(UserError) as error:
        open_source(tmp_path / "x.csv")
    assert named in error.value.what


@pytest.mark.parametrize(
    "text",
    [
        'path,label\na.png,"salmon, smoked"\nb.png,cod,,\n',
        'path,label,remark\na.png,"salmon, smoked"\nb.png,cod,"two\nlines"\n',
        'a.png,"salmon, smoked",\nb.png,cod\n',
        "path;label\na.png;salmon, smoked\nb.png;cod\n",
    ],
)
def test_separators_and_line_breaks_where_they_do_no_harm(tmp_path, text):
    tree(tmp_path, {"a.png": png(1), "b.png": png(2)})
    (tmp_path / "x.csv").write_text(text)
    found, _ = contents(open_source(tmp_path / "x.csv"))
    assert [label for _, label in found.values()] == ["salmon, smoked", "cod"]


@pytest.mark.parametrize("suffix", ["", ".png"])
def test_resume_notices_that_an_image_changed_whose_id_has_no_suffix(tmp_path, suffix):
    tree(tmp_path, {f"{i}.png": png(i) for i in range(40)})
    long = "x" * 300  # no file's name
    (tmp_path / "x.csv").write_text("\n".join(["id,label", *(f"{i}{suffix},a" for i in range(40)), f"{long},a"]))

    def interrupt(done, total):
        if done > 20:
            raise KeyboardInterrupt

    options = {"resume": True, "workers": 1, "on_error": "skip"}
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "x.csv", tmp_path / "x.beton", progress=interrupt, **options)
    (tmp_path / "3.png").write_bytes(png(200))
    os.utime(tmp_path / "3.png", ns=(1, 1))
    manifest = convert(tmp_path / "x.csv", tmp_path / "x.beton", **options)
    assert "changed" in " ".join(manifest.account["notes"])
    assert manifest.skipped_count == 1
    beton = Beton(tmp_path / "x.beton")
    assert [int(beton.image(i)[0, 0, 0]) for i in range(len(beton))] == [*range(3), 200, *range(4, 40)]
