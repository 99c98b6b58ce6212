"""Files are written atomically."""

import json

import pytest
import torch
from safetensors.torch import load_file

from kernel.inputs import InputError
from local.base.files import read_json, write_json, write_table, write_tensors


@pytest.mark.parametrize(
    ("write", "good", "bad"),
    [
        (write_json, {"é": 1}, {"a": object()}),
        (write_table, [{"a": 1, "b": "x, y"}], [{"a": 1}, None]),
        (write_tensors, {"a": torch.arange(6).view(2, 3).T}, {"a": "no tensor"}),
    ],
)
def test_a_failed_write_keeps_the_old_file(tmp_path, write, good, bad):
    path = tmp_path / "made" / "file"
    write(good, path)
    before = path.read_bytes()
    with pytest.raises((AttributeError, TypeError)):
        write(bad, path)
    assert path.read_bytes() == before


def test_what_is_written_reads_the_same(tmp_path):
    write_json({"é": [1, 2]}, tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"é": [1, 2]}
    write_table([{"a": 1, "b": "x, y", "c": 0}], tmp_path / "a.csv", ("a", "b"))
    assert (tmp_path / "a.csv").read_text(encoding="utf-8") == 'a,b\n1,"x, y"\n'
    turned = torch.arange(6.0).view(2, 3).T
    write_tensors({"a": turned}, tmp_path / "a.safetensors")
    assert torch.equal(load_file(tmp_path / "a.safetensors")["a"], turned)
    shared = torch.arange(6.0)
    tied = {"a": shared, "b": shared, "part": shared[2:], "rows": shared.view(2, 3)}
    write_tensors(tied, tmp_path / "a.safetensors")
    written = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(written[name], value) for name, value in tied.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "a.json", "a.safetensors"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"{", "cannot be read as JSON"),
        (b"\xff", "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b"[1]", "holds [1], expected a JSON object"),
        (None, "cannot be read as JSON"),
    ],
)
def test_a_file_that_is_not_one_json_object_is_refused_with_its_path(tmp_path, content, problem):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_json(path)
    assert str(error.value).startswith(f"{path} {problem}")
    path.write_text('{"a": 1}')
    assert read_json(path) == {"a": 1}
