"""Credentials are found as Kaggle's client finds them, and their owner owns the bundle."""

import json
import re
from pathlib import Path

import pytest

from bundle import bundle
from kernel.inputs import InputError
from local.publishing.credentials import find_credentials
from tests.conftest import kernel_metadata
from tests.local.publishing.conftest import DATASET, KERNEL, set_credentials
from tests.local.publishing.loopback import KEY, OWNER, TOKEN


def test_a_bundle_gets_the_owner_of_the_credentials(trained, tmp_path, monkeypatch):
    for name, value in {"KAGGLE_USERNAME": OWNER, "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    for name in ("KAGGLE_KEY", "KAGGLE_API_TOKEN", "KAGGLE_CONFIG_DIR"):
        monkeypatch.delenv(name, raising=False)
    bundle([trained], tmp_path / "build", kernel_metadata(tmp_path / "kernel-metadata.json"))
    for name, reference in (("kernel-metadata.json", KERNEL), ("weights/dataset-metadata.json", DATASET)):
        assert json.loads((tmp_path / "build" / name).read_text(encoding="utf-8"))["id"] == reference


def test_without_credentials_it_says_where_to_put_them(world, monkeypatch):
    set_credentials(monkeypatch)
    assert str(Path.home() / ".kaggle" / "access_token") in world.refusal()
    assert world.kaggle.requests == []


def test_a_key_of_somebody_else_in_a_file_is_reported_with_its_path(world, monkeypatch, tmp_path):
    set_credentials(monkeypatch)
    path = tmp_path / "home" / "kaggle.json"
    path.write_text(json.dumps({"username": "somebody", "key": KEY}), encoding="utf-8")
    message = world.refusal(is_dry=True)
    assert "somebody" in message
    assert str(path) in message


KEY_FILE = json.dumps({"username": OWNER, "key": KEY})


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("access_token", TOKEN.encode("utf-16"), "UTF-16"),
        ("access_token", TOKEN.encode("utf-16-be"), "UTF-16"),
        ("access_token.txt", TOKEN.encode("utf-8-sig"), "UTF-8 text with a byte order mark"),
        ("access_token", TOKEN.encode("utf-32"), "UTF-32"),
        ("access_token", TOKEN.encode() + b"\xff", "not UTF-8"),
        ("kaggle.json", KEY_FILE.encode("utf-8-sig"), "UTF-8 text with a byte order mark"),
        ("kaggle.json", KEY_FILE.encode("utf-16-le"), "UTF-16"),
        ("kaggle.json", KEY_FILE[:-1].encode(), "cannot be read as JSON"),
        ("kaggle.json", b'{"username": "tester"}', "cannot be read as JSON with a username and a key"),
    ],
)
def test_credentials_that_the_client_cannot_read_are_reported(name, content, kind, monkeypatch, tmp_path):
    for variable in ("KAGGLE_API_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY", "KAGGLE_CONFIG_DIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / ".kaggle" / name
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"^{re.escape(str(path))} .*{kind}") as refused:
        find_credentials()
    assert not any(secret in str(refused.value) for secret in (TOKEN, KEY))
    path.write_bytes((TOKEN if name.startswith("access") else KEY_FILE).encode() + b"\r\n")
    found = find_credentials()
    assert (found.source, found.secrets) == (str(path), (TOKEN if name.startswith("access") else KEY,))


def test_credentials_that_kaggle_does_not_accept_are_reported_with_their_source(world, monkeypatch):
    monkeypatch.setenv("KAGGLE_KEY", "0" * 32)
    message = world.refusal()
    assert "KAGGLE_KEY" in message
    assert "settings/api" in message
    assert "CreateDataset" not in world.kaggle.requests
