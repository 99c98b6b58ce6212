"""Everything that can be checked offline is checked before the first request to Kaggle."""

import json
import zipfile

import pytest
from safetensors.torch import load_file, save_file

from kernel.inputs import InputError, sha256
from kernel.manifest import MANIFEST
from local.base.files import write_json
from local.bundling.record import PLAIN, RECORD
from local.publishing.credentials import Credentials
from local.publishing.preflight import SECRETS, find_secret
from tests.conftest import command
from tests.local.publishing.conftest import DATASET, KERNEL, set_credentials
from tests.local.publishing.loopback import KEY, OWNER, TOKEN


def test_a_dry_run_says_what_would_be_sent_and_sends_nothing(world, capsys):
    world.publish(is_dry=True, submits=True)
    said = capsys.readouterr().out
    for name in (DATASET, KERNEL, "fungi-clef-2025", "1-encoder.safetensors", "manifest.json", "private", "plain"):
        assert name in said
    assert world.kaggle.requests == []


def test_a_dry_run_does_not_sign_in(world, monkeypatch):
    """Kaggle's client sends a token to Kaggle as soon as it is imported."""
    set_credentials(monkeypatch, KAGGLE_API_TOKEN=TOKEN)
    code = "from pathlib import Path; from local.publish import publish; "
    code += f"publish(Path('{world.build}'), is_dry=True, metadata=Path('{world.folder}/kernel-metadata.json'))"
    result = command("-c", code)
    assert result.returncode == 0, result.stderr
    assert "nothing was sent" in result.stdout
    assert world.kaggle.requests == []


def test_a_dry_run_needs_no_credentials(world, monkeypatch, capsys):
    set_credentials(monkeypatch)
    world.describe()
    world.publish(is_dry=True)
    said = capsys.readouterr().out
    assert "stands for your Kaggle name" in said
    assert "nothing was sent" in said
    world.append("weights/manifest.json", "")
    assert "no Kaggle credentials" in world.refusal()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda world: world.change("id", "another/few-shot-species"), "belong to tester"),
        (lambda world: world.change("title", "Another title"), "title"),
        (lambda world: world.change("dataset_sources", [f"{OWNER}/other-weights"]), "bundle again"),
        (lambda world: (world.build / "kernel.py").unlink(), "python bundle.py"),
        (lambda world: world.append("kernel.py", "#" * 1_000_000), "less than 1,000,000"),
        (lambda world: world.append("kernel.py", "# changed"), "was changed after its rehearsal"),
        (lambda world: world.append("weights/manifest.json", "\n"), "does not belong to the weights"),
        (lambda world: world.append("weights/1-bank.safetensors", "x"), "SHA-256"),
        (lambda world: (world.build / "weights" / "1-bank.safetensors").unlink(), "missing"),
        (lambda world: world.append("weights/notes.txt", "x"), "does not belong to the bundle"),
        (lambda world: (world.build / RECORD).unlink(), "has not been rehearsed"),
        (lambda world: (world.build / RECORD).write_text('{"scenarios": []}'), "has not been rehearsed"),
        (lambda world: world.append("rehearsal/plain/submission.csv", "x"), "not the submission of the rehearsal"),
        (lambda world: world.record(hostile=False), "failed in hostile"),
        (lambda world: (world.bundle_again(), (world.build / RECORD).unlink(), world.record(gone=True)), "gone only"),
    ],
)
def test_a_wrong_bundle_is_refused_before_the_first_request(world, change, says):
    change(world)
    assert says in world.refusal()
    assert world.kaggle.requests == []


def test_a_bundle_for_another_competition_is_not_published(world):
    world.describe(owner=OWNER, competition="herbarium-2020-fgvc7")
    assert "attaches herbarium-2020-fgvc7, but the run was trained on" in world.refusal()
    assert world.kaggle.requests == []


def test_a_rehearsal_without_observations_is_not_published(world):
    submission = world.build / PLAIN
    header, *_ = submission.read_text(encoding="utf-8").splitlines(keepends=True)
    submission.write_text(header, encoding="utf-8")
    record = json.loads((world.build / RECORD).read_text(encoding="utf-8"))
    write_json(record | {"submission": sha256(submission)}, world.build / RECORD)
    assert "has no observations" in world.refusal()
    assert world.kaggle.requests == []


def test_fewer_classes_than_a_row_has_room_for_are_a_warning(world, capsys):
    manifest = json.loads((world.build / "weights" / MANIFEST).read_text(encoding="utf-8"))
    classes = manifest["class_ids"]
    submission = world.build / PLAIN
    header, *rows = submission.read_text(encoding="utf-8").splitlines()
    rows = [f"{row.partition(',')[0]},{' '.join(classes[:3])}" for row in rows]
    submission.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    world.bundle_again(class_ids=classes[:3], class_counts=[1, 1, 1])
    world.publish(is_dry=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("warning: a row of the submission has room for 10 classes, and the run was trained on 3")


SECRET_LINES = [
    f"token = '{KEY}'",
    TOKEN,
    "hf_" + "a1B2" * 9,
    "-----BEGIN RSA PRIVATE KEY-----",
    '"key": "' + "6" * 32 + '"',
]


@pytest.mark.parametrize("secret", SECRET_LINES)
def test_no_secret_is_sent_in_the_script(world, secret):
    world.append("kernel.py", f"# {secret}\n")
    world.record(plain=True)
    lines = len((world.build / "kernel.py").read_text(encoding="utf-8").splitlines())
    message = world.refusal()
    assert f"{world.build / 'kernel.py'} has what looks like a secret in line {lines}" in message
    assert secret not in message
    assert world.kaggle.requests == []


@pytest.mark.parametrize(
    "name",
    [
        "fungitastic-multitask-convnext-384-lr1e-4-seed1",
        "desk-top_risk-averse_mask-rcnn-resnext101-32x8d",
        "bookshelf_convnextlargemlpclip320laion2b",
        "xKGAT_0123456789abcdef0123456789abcdef",
    ],
)
def test_a_name_that_contains_the_letters_of_a_token_is_not_a_secret(world, name):
    world.bundle_again(note=name)
    world.publish(is_dry=True)


@pytest.mark.parametrize("before", [' "', "=", ":", "\n", "(", "Bearer "])
@pytest.mark.parametrize("token", ["sk-proj-" + "a1B2" * 9, "ghp_" + "a1B2" * 9, "AKIA" + "A1B2" * 4])
def test_a_token_at_a_word_boundary_is_a_secret(before, token):
    assert SECRETS.search(f'{before}{token}"'.encode())


@pytest.mark.parametrize("secret", [KEY, TOKEN])
@pytest.mark.parametrize("name", [MANIFEST, "1-bank.safetensors"])
def test_no_secret_is_sent_with_the_weights(world, secret, name):
    if name == MANIFEST:
        world.bundle_again(note=secret)
    else:
        path = world.build / "weights" / name
        save_file(load_file(path), path, metadata={"made by": secret})
        manifest = json.loads((world.build / "weights" / MANIFEST).read_text(encoding="utf-8"))
        world.bundle_again(files={**manifest["files"], name: sha256(path)})
    message = world.refusal()
    assert f"{world.build / 'weights' / name} has what looks like a secret" in message
    assert world.kaggle.requests == []


def test_a_secret_in_a_zip_is_found_and_bytes_of_the_zip_itself_are_none(tmp_path):
    path, credentials = tmp_path / "kit.zip", Credentials("kaggle.json", OWNER, (KEY,))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("local/fine.py", "print()\n" * 9)
        archive.comment = b"://somebody:password@"  # as compressed bytes may look by chance
    find_secret([path], credentials)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("local/secret.py", f"\nkey = '{KEY}'\n")
    with pytest.raises(InputError, match=r"kit\.zip/local/secret\.py has .* a secret in line 2") as refused:
        find_secret([path], credentials)
    assert KEY not in str(refused.value)
