"""A run is trained on Kaggle as it would be here: Kaggle's own client sends it, and the pushed script really runs.

A local Kaggle receives the datasets and the script. It runs the script as Kaggle would: alone in a folder, with the
datasets and the competition mounted read-only, without network.
"""

import io
import json
import shutil
import zipfile
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from kernel.encoders import open_encoder, pick_devices
from kernel.forward import Encoder
from kernel.inputs import InputError, sha256
from kernel.manifest import MANIFEST, read_manifest, read_weights
from local.base.console import Terminated
from local.base.files import link_or_copy
from local.base.run_folder import CACHE
from local.data.cache import EmbeddingCache
from local.data.competition import read_competition
from local.data.observations import select_observations
from local.recipes.recipe import read_recipe
from local.rehearsal.sandbox import Sandbox, find_isolation, run_isolated
from local.remote.adoption import adopt_embeddings, cache_keys
from local.remote.on_kaggle import OUTPUT
from local.remote.order import Order, train_on_kaggle
from local.remote.parcel import files_of, pack
from local.training.checkpoints import read_notes
from local.training.checks import CHECKPOINTS, partial_of
from tests import layouts
from tests.conftest import kernel_metadata, photo
from tests.local.publishing.conftest import set_credentials
from tests.local.publishing.loopback import KEY, OWNER, SECRETS, TOKEN, Loopback, Refusal, hang_up, http

KIT, KERNEL = f"{OWNER}/few-shot-species-kit", f"{OWNER}/few-shot-species-train-remote"
TINY = ("encoder=timm:test_resnet", "pretrained=false", "image_size=64", "reference=train", 'views=["plain"]')
# Sends SIGTERM to the script some epochs after the training began.
STOP_WHILE_TRAINING = """
import os, signal, threading, time
from pathlib import Path
def stop():
    while not any(Path.cwd().glob("runs/.*.partial/tensorboard/*")):
        time.sleep(0.1)
    time.sleep(3)
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=stop, daemon=True).start()
"""


class Machine:
    """What runs the pushed script."""

    def __init__(self, kaggle: Loopback, competition: Path, folder: Path):
        self.kaggle, self.competition, self.folder = kaggle, competition, folder
        self.bootstrap, self.unpacks, self.sessions = "", True, 0
        self.isolation = find_isolation(folder)

    def run(self, body: dict) -> None:
        """Run a script that was pushed, until it ends."""
        self.sessions += 1
        folder = self.folder / str(self.sessions)
        inputs, working, source = (folder / name for name in ("input", "working", "src"))
        for made in (working, source):
            made.mkdir(parents=True)
        for reference in body["datasetDataSources"]:
            for name, content in self.kaggle.stored(reference).items():
                self.mount(inputs / "datasets" / reference, name, content)
        [slug] = body["competitionDataSources"]
        target = inputs / "competitions" / slug
        shutil.copytree(self.competition, target, copy_function=lambda a, b: link_or_copy(Path(a), Path(b)))
        (source / "script.py").write_text(body["text"], encoding="utf-8")
        lines: list[str] = []
        sandbox = Sandbox(working, (inputs, source), self.isolation, bootstrap=self.bootstrap)
        arguments = ["--input", str(inputs), "--working", str(working)]
        outcome = run_isolated(source / "script.py", arguments, sandbox, 300, lines.append)
        self.kaggle.log = "\n".join(lines)
        self.kaggle.running = ["RUNNING", "ERROR" if outcome.code else "COMPLETE"]
        self.kaggle.output = {path.name: path.read_bytes() for path in working.iterdir() if path.is_file()}

    def mount(self, folder: Path, name: str, content: bytes) -> None:
        """A file of a dataset; Kaggle unpacks a zip."""
        folder.mkdir(parents=True, exist_ok=True)
        if name.endswith(".zip") and self.unpacks:
            zipfile.ZipFile(io.BytesIO(content)).extractall(folder / name.removesuffix(".zip"))
        else:
            (folder / name).write_bytes(content)


@pytest.fixture
def machine(kaggle, drawn, tmp_path):
    (tmp_path / "machine").mkdir()
    machine = Machine(kaggle, drawn.competition, tmp_path / "machine")
    kaggle.on_push = machine.run
    return machine


class Home:
    """A competitor's folder, and a clock that does not wait."""

    def __init__(self, folder: Path, data: Path):
        self.folder, self.data, self.slept = folder, data, []
        self.out = folder / "runs" / "remote"
        folder.mkdir()

    def train(
        self, *settings: str, data: bool = True, encoder: str | list[str] | None = None, recipe: str = "demo", **options
    ) -> None:
        """What the command does."""
        from local.publishing.client import Clock

        settings = (*TINY, *(("pretrained=true", "image_size=0") if encoder else ()), *settings)
        metadata = kernel_metadata(self.folder / "kernel-metadata.json")
        built = read_recipe(recipe, settings, encoder)
        order = Order(
            recipe,
            settings,
            [encoder] if isinstance(encoder, str) else encoder or [],
            built,
            self.data if data else None,
            self.out,
        )
        train_on_kaggle(order, metadata=metadata, clock=Clock(lambda: sum(self.slept), self.slept.append), **options)

    def refusal(self, *settings: str, **options) -> str:
        """The error that the command ends with: one line."""
        with pytest.raises(InputError) as refused:
            self.train(*settings, **options)
        message = str(refused.value)
        assert "\n" not in message
        assert not any(secret in message for secret in SECRETS)
        return message


@pytest.fixture
def home(tmp_path, drawn, kaggle):
    yield Home(tmp_path / "competitor", drawn.competition)
    for method in ("CreateDataset", "SaveKernel"):
        assert all(body["isPrivate"] is True for body in kaggle.bodies[method])


def test_a_run_is_trained_on_kaggle_and_put_in_place_here(home, machine, capfd):
    home.train("epochs=1")
    run = read_weights(home.out)
    for name in run.manifest.files:
        run.file(name)
    said = capfd.readouterr()
    assert run.manifest.members[0].validation
    [pushed] = machine.kaggle.bodies["SaveKernel"]
    assert pushed["slug"] == KERNEL
    assert pushed["isPrivate"] is True
    assert pushed["enableInternet"] is True
    assert pushed["competitionDataSources"] == ["fungi-clef-2025"]
    assert pushed["sessionTimeoutSeconds"] == 12 * 3600 - 60
    assert all(body["isPrivate"] for body in machine.kaggle.bodies["CreateDataset"])
    assert list(machine.kaggle.datasets) == pushed["datasetDataSources"] == [KIT]
    assert KEY not in said.out + said.err + pushed["text"]
    assert "done after" in said.out
    home.train("epochs=1", resumes=True)
    assert "is done already" in capfd.readouterr().out
    assert machine.sessions == 1
    assert any((home.out.parent / CACHE).rglob("*.safetensors"))


@pytest.mark.slow
def test_a_stopped_training_goes_on_in_the_next_session(home, machine):
    machine.bootstrap = STOP_WHILE_TRAINING
    message = home.refusal("epochs=1000", "patience=1000")
    assert "was stopped at the session's limit" in message
    trained = read_notes(partial_of(home.out) / CHECKPOINTS)["trained"]
    machine.bootstrap, machine.unpacks = "", False
    home.train(f"epochs={max(1, trained + 1)}", resumes=True)
    assert "continuing from" in machine.kaggle.log
    assert read_manifest(home.out / MANIFEST)
    assert not partial_of(home.out).exists()
    assert machine.kaggle.count("CreateDataset") == 2  # the kit was not sent again


@pytest.mark.slow
def test_an_encoder_here_is_sent_and_the_embeddings_come_back(home, machine, trained):
    home.train("epochs=0", encoder=str(trained), data=False)
    [pushed] = machine.kaggle.bodies["SaveKernel"]
    [_, encoder] = pushed["datasetDataSources"]
    assert set(machine.kaggle.stored(encoder)) == {MANIFEST, "encoder.safetensors"}
    assert str(trained) not in pushed["text"]
    parts = list((home.out.parent / CACHE).rglob("*.safetensors"))
    assert sum(len(load_file(part)["keys"]) for part in parts) > 0
    assert json.loads((home.out / "metrics.json").read_text(encoding="utf-8"))["validation"]


# Faults. The machine does not run the script here: its output is a parcel of a run that was trained before.


@pytest.fixture
def arrived(kaggle, trained, tmp_path):
    """A local Kaggle whose sessions leave the output of a finished training."""
    cache = tmp_path / "cache" / "0123" / "plain" / "part.safetensors"
    cache.parent.mkdir(parents=True)
    cache.write_bytes(b"embeddings")
    deliver(kaggle, tmp_path, {**dict(files_of(trained, "run")), "embeddings/0123/plain/part.safetensors": cache})
    return kaggle


def deliver(kaggle: Loopback, folder: Path, files: dict[str, Path], **said) -> None:
    """Make a parcel the output of the next sessions."""
    pack(folder / OUTPUT, files, **said)
    kaggle.output = {"other.txt": b"x", OUTPUT: (folder / OUTPUT).read_bytes()}
    kaggle.log = "done after 1:00"


def test_the_local_process_may_die_while_kaggle_trains(home, arrived, trained):
    def die(body: dict) -> None:
        raise Refusal(400, "the local process died")

    arrived.fail("GetKernelSessionStatus", die)
    home.refusal("epochs=1")
    assert "is being trained on Kaggle" in home.refusal("epochs=1")
    assert "with another recipe, encoder or --set" in home.refusal("epochs=2", resumes=True)
    home.train("epochs=1", resumes=True)
    assert arrived.count("SaveKernel") == 1
    assert sha256(home.out / MANIFEST) == sha256(trained / MANIFEST)


def test_the_local_process_may_die_between_the_push_and_its_answer(home, arrived):
    arrived.fail("SaveKernel", lambda body: (arrived._SaveKernel(body), http(400)(body)))
    home.refusal("epochs=1")
    home.train("epochs=1", resumes=True)
    assert arrived.count("SaveKernel") == 1
    assert home.out.is_dir()


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "html"])
def test_a_run_that_was_damaged_on_the_way_is_downloaded_again(home, arrived, damage):
    whole = arrived.output[OUTPUT]
    middle = len(whole) // 2
    arrived.output[OUTPUT] = {
        "cut": whole[:middle],
        "changed": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        "empty": b"",
        "html": b"<html>try again</html>",
    }[damage]
    message = home.refusal("epochs=1")
    assert "run.zip is damaged" in message
    assert "--resume" in message
    assert not home.out.exists()
    arrived.output[OUTPUT] = whole
    home.train("epochs=1", resumes=True)
    assert arrived.count("SaveKernel") == 1
    assert read_weights(home.out).file("encoder.safetensors")
    assert (home.out.parent / CACHE / "0123" / "plain" / "part.safetensors").read_bytes() == b"embeddings"
    assert sorted(path.name for path in home.out.parent.iterdir()) == [CACHE, ".kaggle", "remote"]


def test_a_path_that_leads_out_of_the_parcel_is_refused(home, arrived, trained, tmp_path):
    deliver(arrived, tmp_path, {"run/../../../evil": trained / MANIFEST})
    assert "is damaged" in home.refusal("epochs=1")
    assert not (tmp_path / "evil").exists()


def test_a_training_that_fails_on_kaggle_is_reported_with_its_last_line(home, kaggle, tmp_path):
    said = {"code": 2, "last_line": "error: the GPU is out of memory while training: choose a smaller batch"}
    deliver(kaggle, tmp_path, {}, **said)
    kaggle.running = ["RUNNING", "ERROR"]
    message = home.refusal("epochs=1")
    assert "exit code 2 (the GPU is out of memory while training" in message
    assert not home.out.exists()
    assert "1 session" not in home.refusal("epochs=1")  # it is pushed again
    assert kaggle.count("SaveKernel") == 2


def test_a_training_that_was_stopped_at_the_limit_continues_in_the_next_session(home, arrived, trained, tmp_path):
    checkpoint, part = tmp_path / "checkpoint", tmp_path / "part"
    checkpoint.write_bytes(b"weights")
    part.write_bytes(b"embeddings")
    name = f"{CHECKPOINTS}/000001.0123456789abcdef.safetensors"
    whole = arrived.output
    left = {f"partial/{name}": checkpoint, "embeddings/4567/plain/part.safetensors": part}
    deliver(arrived, tmp_path, left, code=143, is_stopped=True, last_line="terminated")
    assert "was stopped at the session's limit" in home.refusal("epochs=1")
    assert (partial_of(home.out) / name).read_bytes() == b"weights"
    arrived.output = whole
    home.train("epochs=1", resumes=True)
    [_, parcel] = arrived.bodies["SaveKernel"][1]["datasetDataSources"]
    with zipfile.ZipFile(io.BytesIO(arrived.stored(parcel)["parcel.zip"])) as sent:
        assert {f"partial/{name}", "embeddings/4567/plain/part.safetensors"} <= set(sent.namelist())
    assert read_weights(home.out).file("encoder.safetensors")
    assert not partial_of(home.out).exists()


def test_no_training_starts_without_quota_or_while_two_sessions_run(home, arrived):
    arrived.hours = 29.9
    assert "this week's GPU quota is spent: 0.1 of 30 hours" in home.refusal("epochs=1")
    arrived.hours, arrived.others = 0, {"tester/one-kernel": "RUNNING", "tester/two-kernel": "QUEUED"}
    assert "tester/one-kernel and tester/two-kernel are running" in home.refusal("epochs=1")
    assert arrived.count("SaveKernel") == 0
    arrived.others["tester/one-kernel"] = "COMPLETE"
    home.train("epochs=1")
    assert home.out.is_dir()


def test_wait_starts_the_training_when_a_session_ends(home, arrived, capsys):
    def end_one(body: dict) -> None:
        arrived.others["tester/one-kernel"] = "ERROR"

    arrived.others = {"tester/one-kernel": "RUNNING", "tester/two-kernel": "RUNNING"}
    arrived.fail("GetAcceleratorQuotaStatistics", lambda body: None, end_one)
    home.train("epochs=1", waits=True)
    assert "waiting for a session: tester/one-kernel and tester/two-kernel are running" in capsys.readouterr().out
    assert home.out.is_dir()


def test_a_push_that_arrived_although_it_timed_out_is_not_repeated(home, arrived, capsys):
    def arrive(body: dict) -> None:
        arrived._SaveKernel(body)
        raise ConnectionAbortedError

    arrived.fail("SaveKernel", arrive)
    home.train("epochs=1")
    assert arrived.count("SaveKernel") == 1
    assert "it had arrived, as version 1" in capsys.readouterr().out
    assert home.out.is_dir()


def test_a_log_that_is_cut_is_continued_and_no_line_is_printed_twice(home, arrived, capsys):
    lines = [f"epoch {number}: loss 0.5" for number in range(4)]
    arrived.live = [[*lines[:2], None], [lines[0], None], lines]
    arrived.running = ["RUNNING"] * 3 + ["COMPLETE"]
    home.train("epochs=1")
    printed = [line[4:] for line in capsys.readouterr().out.splitlines() if line.startswith("  | epoch")]
    assert printed == lines


def test_a_run_is_found_on_any_page_of_the_output(home, arrived):
    arrived.output = {**{f"{number}.txt": b"x" for number in range(5)}, **arrived.output, "z.txt": b"x"}
    home.train("epochs=1")
    assert arrived.count("ListKernelSessionOutput") == 8
    assert home.out.is_dir()


def test_a_download_that_is_cut_is_repeated(home, arrived, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # of the client
    arrived.fail("GET", hang_up, hang_up)
    home.train("epochs=1")
    assert arrived.count("GET") == 3
    assert read_weights(home.out).file("encoder.safetensors")


def test_a_download_whose_address_has_expired_is_tried_again_by_the_next_command(home, arrived):
    arrived.fail("GET", http(403))
    assert "run the same command again" in home.refusal("epochs=1")
    home.train("epochs=1", resumes=True)
    assert arrived.count("SaveKernel") == 1
    assert home.out.is_dir()


def test_a_run_that_was_damaged_before_it_was_packed_is_trained_again(home, arrived, trained, tmp_path):
    whole, damaged = arrived.output, tmp_path / "encoder.safetensors"
    damaged.write_bytes(b"damaged")
    deliver(arrived, tmp_path, {**dict(files_of(trained, "run")), "run/encoder.safetensors": damaged})
    message = home.refusal("epochs=1")
    assert "has left a damaged run" in message
    assert "to train it again" in message
    assert not home.out.exists()
    arrived.output = whole
    home.train("epochs=1", resumes=True)
    assert arrived.count("SaveKernel") == 2
    assert home.out.is_dir()


def test_a_session_that_somebody_deleted_is_started_again_by_the_next_command(home, arrived):
    arrived.fail("GetKernelSessionStatus", lambda body: arrived.kernels.clear())
    message = home.refusal("epochs=1")
    assert f"asking for {KERNEL}/1: Kaggle does not find it" in message
    assert "to start it again" in message
    home.train("epochs=1", resumes=True)
    assert home.out.is_dir()


def test_when_the_local_process_is_ended_the_session_goes_on(home, arrived, capsys):
    class Ended(list):
        def append(self, seconds: float) -> None:
            raise Terminated("terminated")

    arrived.running, home.slept = ["RUNNING", "COMPLETE"], Ended()
    with pytest.raises(Terminated):
        home.train("epochs=1")
    assert f"{KERNEL} continues on Kaggle" in capsys.readouterr().out
    home.slept = []
    home.train("epochs=1", resumes=True)
    assert arrived.count("SaveKernel") == 1
    assert home.out.is_dir()


def test_no_token_is_printed_sent_or_stored(home, arrived, monkeypatch, capfd):
    set_credentials(monkeypatch, KAGGLE_API_TOKEN=TOKEN)
    arrived.live = [["done after 1:00"]]
    home.train("epochs=1")
    said = capfd.readouterr()
    sent = json.dumps([arrived.bodies[name] for name in ("SaveKernel", "CreateDataset", "StartBlobUpload")])
    stored = [path.read_bytes() for path in home.folder.rglob("*") if path.is_file()]
    stored += [content for versions in arrived.datasets.values() for content in versions[-1].values()]
    for secret in SECRETS:
        assert secret not in said.out + said.err + sent
        assert not any(secret.encode() in content for content in stored)


def test_a_session_that_crashed_and_stays_running_is_ended(home, kaggle):
    kaggle.running, kaggle.live = ["RUNNING"], [["Traceback (most recent call last):", "MemoryError", None]]
    message = home.refusal("epochs=1")
    assert "it ended (MemoryError)" in message
    assert f"{KERNEL} was deleted" in message
    assert kaggle.kernels == {}


def test_a_session_without_output_is_reported(home, kaggle):
    kaggle.running = ["RUNNING", "CANCEL_ACKNOWLEDGED"]
    assert "ended with cancel_acknowledged and left no run.zip" in home.refusal("epochs=1")


def test_what_a_killed_session_has_left_comes_back_and_goes_to_the_next_one(home, kaggle):
    checkpoint, part = (
        "runs/.remote.partial/checkpoints/000000.0123456789abcdef.safetensors",
        "0123/plain/a.safetensors",
    )
    kaggle.output = {checkpoint: b"weights", f"runs/.embeddings/{part}": b"embeddings", "other.txt": b"x"}
    kaggle.running = ["RUNNING", "ERROR"]
    assert "ended with error (out of memory) and left no run.zip" in home.refusal("epochs=1")
    assert [path.read_bytes() for path in (partial_of(home.out) / CHECKPOINTS).iterdir()] == [b"weights"]
    assert (home.out.parent / CACHE / part).read_bytes() == b"embeddings"
    assert "was interrupted: continue with --resume" in home.refusal("epochs=1")
    home.refusal("epochs=1", resumes=True)
    [_, parcel] = kaggle.bodies["SaveKernel"][1]["datasetDataSources"]
    with zipfile.ZipFile(io.BytesIO(kaggle.stored(parcel)["parcel.zip"])) as sent:
        assert sent.read(checkpoint.replace("runs/.remote.partial", "partial")) == b"weights"
        assert sent.read(f"embeddings/{part}") == b"embeddings"


def test_the_session_is_no_longer_than_the_quota(home, arrived):
    arrived.hours = 28
    home.train("epochs=1")
    [pushed] = arrived.bodies["SaveKernel"]
    assert pushed["sessionTimeoutSeconds"] == 2 * 3600
    assert "seconds=5400" in pushed["text"]
    arrived.hours = 29.5
    home.out = home.out.with_name("another")
    assert "only 30:00 of GPU time are left" in home.refusal("epochs=1")


def test_the_same_code_is_not_sent_twice(home, arrived):
    home.train("epochs=1")
    home.out = home.out.with_name("another")
    home.train("epochs=2")
    assert arrived.count("CreateDataset") == 1
    assert arrived.count("CreateDatasetVersion") == 0
    [notes] = [body for body in arrived.bodies["CreateDataset"]]
    assert notes["isPrivate"] is True


def test_an_own_recipe_is_in_the_script_and_its_path_is_not(home, arrived, tmp_path):
    recipe = tmp_path / "secret-place" / "mine.toml"
    recipe.parent.mkdir()
    recipe.write_text('[train]\nepochs = 7\n[encoder]\nencoder = "timm:test_resnet"\n', encoding="utf-8")
    home.train(recipe=str(recipe))
    [pushed] = arrived.bodies["SaveKernel"]
    assert "epochs = 7" in pushed["text"]
    assert "secret-place" not in pushed["text"]


def test_several_encoders_keep_their_order_and_those_that_are_paths_are_sent(home, arrived, trained):
    home.train("epochs=0", encoder=["timm:test_vit", str(trained), "timm:test_resnet"])
    [pushed] = arrived.bodies["SaveKernel"]
    [_, dataset] = pushed["datasetDataSources"]
    order = [pushed["text"].index(name) for name in ("'timm:test_vit'", f"dataset='{dataset}'", "'timm:test_resnet'")]
    assert order == sorted(order)
    assert str(trained) not in pushed["text"]


def test_a_secret_in_a_recipe_is_not_pushed(home, arrived, tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text(f'# {KEY}\n[encoder]\nencoder = "timm:test_resnet"\n', encoding="utf-8")
    message = home.refusal(recipe=str(recipe))
    assert "what looks like a secret" in message
    assert KEY not in message
    assert arrived.count("SaveKernel") == 0


def test_another_competition_than_the_attached_one_is_refused_before_signing_in(home, kaggle, tmp_path):
    for name in ("amanita", "boletus"):
        photo(tmp_path / "photos" / "train" / name / "1.png")
    home.data = tmp_path / "photos"
    assert "kernel-metadata.json attaches fungi-clef-2025, but" in home.refusal("epochs=1")
    assert kaggle.requests == []


def test_settings_that_kaggle_does_not_have_are_refused_before_signing_in(home, kaggle, tmp_path):
    layouts.table(tmp_path / "photos")
    (tmp_path / "photos" / "competition.toml").write_text("guesses = 1")
    home.data = tmp_path / "photos"
    assert "competition.toml is not on Kaggle, and would not be used there: train here" in home.refusal()
    assert kaggle.requests == []


def test_embeddings_from_kaggle_are_used_by_other_devices_and_versions(trained, drawn, tmp_path, monkeypatch):
    """Their key there has another device and other versions."""
    labelled = read_competition(drawn.competition)
    observations = select_observations(labelled, True, 0, 0).observations
    weights = read_weights(trained)
    [spec] = weights.manifest.members[0].encoders
    cache = EmbeddingCache(tmp_path / "cache", open_encoder(weights.file(spec.file), spec, pick_devices()))
    first = cache.embed(observations, ("plain",))
    [key] = [path.name for path in (tmp_path / "cache").iterdir() if (path / "plain").is_dir()]
    (tmp_path / "cache" / key).rename(tmp_path / "cache" / "made-on-kaggle")
    [mode] = [mode for mode, name in cache_keys(trained).items() if name == key]
    assert adopt_embeddings(trained, tmp_path / "cache", {mode: "made-on-kaggle"}) > 0
    for name in ("embed", "submit"):
        monkeypatch.setattr(Encoder, name, lambda *_: pytest.fail("embedded again"))
    assert (cache.embed(observations, ("plain",)).values == first.values).all()
