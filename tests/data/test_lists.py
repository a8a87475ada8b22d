"""CSV files whose rows are not what they seem, and the files that their rows name."""

import pytest
from test_sources import contents, png, tree

from fastssl.data.sources import open_source
from fastssl.errors import UserError


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("path,label\na.png,cod\nb.png,salmon, smoked\n", "line 3 has 3 fields instead of 2: 'b.png,salmon, smoked'"),
        ("a.png,salmon, smoked\nb.png,cod\n", "line 1 has 3 fields instead of 2"),
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
        'a.png,"salmon, smoked",1\nb.png,cod,\n',
        "path;label\na.png;salmon, smoked\nb.png;cod\n",
    ],
)
def test_separators_and_line_breaks_where_they_do_no_harm(tmp_path, text):
    tree(tmp_path, {"a.png": png(1), "b.png": png(2)})
    (tmp_path / "x.csv").write_text(text)
    found, _ = contents(open_source(tmp_path / "x.csv"))
    assert [label for _, label in found.values()] == ["salmon, smoked", "cod"]
