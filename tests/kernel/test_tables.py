"""Tables and ids are read as they were before programs changed them."""

import pytest

from kernel.inputs import InputError
from kernel.tables import clean_id, read_header, read_table, respell


def test_bytes_that_are_not_text_are_refused_in_one_line(tmp_path):
    (tmp_path / "table.csv").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(InputError, match=r"table\.csv"):
        read_table(tmp_path / "table.csv", ("a",))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_quote_that_is_not_closed_is_refused_with_its_line(tmp_path, end):
    lines = ["id,note", "1,fine", '2,"open', "3,lost", "4,lost"]
    (tmp_path / "table.csv").write_bytes(end.join(lines).encode())
    with pytest.raises(InputError, match=r"table\.csv, line 3: a quote is not closed"):
        read_table(tmp_path / "table.csv", ("id",))


@pytest.mark.parametrize("last", ['2,"of two\nlines"', '2,"cut o', '2,"a" b'])
def test_a_last_row_that_takes_in_no_other_is_read(tmp_path, last):
    (tmp_path / "table.csv").write_text(f"id,note\n1,fine\n{last}")
    assert [row["id"] for row in read_table(tmp_path / "table.csv", ("id",))] == ["1", "2"]


def test_cells_may_be_separated_by_semicolons_where_the_header_has_no_comma(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text('id;note\n1;"a, b;c"\n2;d\n', encoding="utf-8-sig")
    assert read_header(path) == ["id", "note"]
    assert read_table(path, ("id",)) == [{"id": "1", "note": "a, b;c"}, {"id": "2", "note": "d"}]
    path.write_text("id,a;b\n1,c;d\n")
    assert read_table(path, ("id",)) == [{"id": "1", "a;b": "c;d"}]
    path.write_text('id;note\n1;"open\n2;lost\n')
    with pytest.raises(InputError, match=r"table\.csv, line 2: a quote is not closed"):
        read_table(path, ("id",))


def test_a_cell_may_be_longer_than_128_kib(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text(f"id,authors\n1,{'a' * 200_000}\n2,b\n")
    assert [len(row["authors"]) for row in read_table(path, ("id",))] == [200_000, 1]
    path.write_text('id,authors\n1,"open\n' + "2,b\n" * 50_000)
    with pytest.raises(InputError, match=r"table\.csv, line 2: a quote is not closed"):
        read_table(path, ("id",))


@pytest.mark.parametrize(
    ("text", "id"),
    [
        ("7", "7"), ("7.0", "7"), (" 7 ", "7"), ("7.", "7."), ("1e+05", "100000"), ("2.38e+03", "2380"), ("0", "0"),
        ("0.0", "0"), ("-1.0", "-1"), ("0100", "0100"), ("7.5", "7.5"), ("12e4", "12e4"), ("oak 2.0", "oak 2.0"),
    ],
)  # fmt: skip
def test_an_id_that_a_program_read_as_a_float_is_a_whole_number_again(text, id):
    assert clean_id(text) == id


def test_ids_are_spelt_as_in_the_sample_submission_or_else_as_they_are():
    assert respell(["7", "12", "oak"], ["007"]) == {"7": "007", "12": "12", "oak": "oak"}
    assert respell(["7", "007"], ["007"]) == {"7": "007", "007": "007"}
    assert respell(["7", "007"], ["007", "7"]) == {"7": "7", "007": "007"}
    with pytest.raises(InputError, match="'7' and '007' differ only in leading zeros"):
        respell(["7", "007"], [])


def test_ids_are_the_same_in_both_of_unicodes_forms():
    composed, decomposed = "Öl 7", "O\u0308l 7"
    assert respell([composed], [decomposed]) == {composed: decomposed}
    assert respell([decomposed, composed, "7"], []) == {decomposed: decomposed, composed: decomposed, "7": "7"}
    assert respell([decomposed, composed], [decomposed, composed]) == {decomposed: decomposed, composed: composed}


def test_blank_lines_before_the_header_are_skipped(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("\n \nid;größe\n1;b\n", encoding="utf-8-sig")
    assert read_header(path) == ["id", "größe"]
    assert read_table(path, ("id",)) == [{"id": "1", "größe": "b"}]
    path.write_text("\n\n")
    assert (read_header(path), read_table(path, ())) == ([], [])


@pytest.mark.parametrize("first", ["sep=;\r\n", '"sep=;"\n', "\nsep=;\n\n"])
def test_a_line_that_says_what_separates_the_cells_is_not_the_header(tmp_path, first):
    path = tmp_path / "table.csv"
    path.write_bytes(f'\ufeff{first}id;a,b\n1;"c;d"\n'.encode())
    assert read_header(path) == ["id", "a,b"]
    assert read_table(path, ("id",)) == [{"id": "1", "a,b": "c;d"}]
    path.write_text(first + '1;2\n3;"open\n4;lost\n')
    with pytest.raises(InputError, match=rf"table\.csv, line {first.count(chr(10)) + 2}: a quote is not closed"):
        read_table(path, ())


def test_any_character_that_is_said_to_separate_the_cells_does(tmp_path):
    path = tmp_path / "table.csv"
    for sign in "\t|,":
        path.write_text(f"sep={sign}\nid{sign}a;b\n1{sign}c\n")
        assert read_table(path, ("id",)) == [{"id": "1", "a;b": "c"}]


@pytest.mark.parametrize("comment", ["# made by me, 2024", "#exported", '"# made by me, 2024"', "# id,label"])
def test_a_comment_before_the_header_is_refused_with_its_line(tmp_path, comment):
    path = tmp_path / "table.csv"
    path.write_text(f"\n{comment}\nid,label\n1,oak\n")
    with pytest.raises(InputError, match=r"table\.csv, line 2 begins with '#': remove the line if it is a comment"):
        read_table(path, ())
    assert read_header(path) == []


@pytest.mark.parametrize("name", ["#", "#id"])
def test_the_name_of_a_column_may_begin_with_a_hash_sign(tmp_path, name):
    (tmp_path / "table.csv").write_text(f"{name},label\n1,oak\n")
    assert read_table(tmp_path / "table.csv", (name,)) == [{name: "1", "label": "oak"}]
