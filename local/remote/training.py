"""Train a run on Kaggle: send the kit, push the script, wait, and put the run folder in place. Called by order.py.

Each step can be resumed. What was sent and what runs on Kaggle is stored, so that `--resume` picks up a session that
the local process did not see end.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from slugify import slugify

from kernel.inputs import InputError, sha256
from kernel.manifest import MANIFEST, read_manifest, read_weights
from kernel.progress import clock_time
from local.base.console import counted, say
from local.base.files import link_or_copy, write_json, write_text
from local.base.run_folder import CACHE, keep_note
from local.bundling.metadata import DATASET_METADATA, dataset_metadata
from local.encoders.source import SUFFIXES, WEIGHTS, Source, find_source
from local.publishing.client import MAX_SESSION, Busy, GpuQuota, Kaggle, NotFound
from local.publishing.credentials import Credentials
from local.publishing.preflight import find_secret
from local.publishing.session import LAST_LINES, STOPPED, STUCK, Watch, start_session
from local.publishing.uploads import SentFiles, Upload, send
from local.remote.kit import read_kit
from local.remote.on_kaggle import OUTPUT, PARCEL, LocalEncoder, Plan
from local.remote.order import Order, Session, State, save_state
from local.remote.parcel import (
    EMBEDDINGS,
    PARTIAL,
    RUN,
    Contents,
    add_embeddings,
    files_of,
    pack,
    replace_folder,
    unpack,
)
from local.remote.script import write_script
from local.training.checks import CHECKPOINTS, has_checkpoint, partial_of

MARGIN = 1800  # seconds of a session for installing, for the last checkpoint, and for packing what comes back
PACKAGES = ("timm", "open_clip_torch", "ftfy")  # pure Python; Kaggle's image has an older one, or none
MAX_SLUG = 50
AGAIN = "run the same command again with --resume"


class RemoteTraining:
    """One run on Kaggle.

    Attributes:
        order: what to train.
        state: what was done already.
        metadata: the repository's kernel-metadata.json, with the owner.
    """

    def __init__(self, order: Order, state: State, metadata: dict, kaggle: Kaggle):
        self.order, self.state, self.metadata, self.kaggle = order, state, metadata, kaggle
        self.folder = order.folder

    @property
    def owner(self) -> str:
        return self.metadata["id"].partition("/")[0]

    def reference(self, suffix: str) -> str:
        """owner/slug of a dataset or a kernel; a slug that would be too long ends with a digest instead."""
        slug = slugify(f"{self.metadata['id'].partition('/')[2]}-{suffix}")
        if len(slug) > MAX_SLUG:
            slug = f"{slug[: MAX_SLUG - 9].rstrip('-')}-{hashlib.sha256(suffix.encode()).hexdigest()[:8]}"
        return f"{self.owner}/{slug}"

    @property
    def kernel(self) -> str:
        return self.reference(f"train-{self.order.out.name}")

    def find_session(self) -> Session | None:
        """The session to wait for; None if one has to be started."""
        if self.state.session:
            return self.state.session
        pushing, script = self.state.pushing, self.folder / "script.py"
        if not pushing or not script.is_file() or pushing.order != self.order.digest:
            return None
        try:
            found = self.kaggle.kernel_version(pushing.kernel)
        except NotFound:
            return None
        if not found.has_script(script.read_text(encoding="utf-8")):
            return None
        say(f"{pushing.kernel}: version {found.number} had arrived")
        session = replace(pushing, version=found.number)
        self.save(session=session, pushing=None)
        return session

    def push(self, credentials: Credentials, waits: bool) -> Session:
        """Send what the training needs, and start it.

        Raises:
            Busy: there is no quota, or no session can start now.
            InputError: something cannot be sent.
        """
        order, kit = self.order, read_kit()
        find_secret(kit.files.values(), credentials, "push again")
        kit_reference = self.reference("kit")
        kit.write(folder := self.folder.parent / "kit")
        self.send(credentials, folder, kit_reference, kit.digest, f"commit {kit.commit}")
        encoders = self.send_encoders(credentials)
        parcel = self.send_parcel(credentials)
        arguments = [] if order.is_own_recipe else ["--recipe", order.recipe]
        arguments += [part for text in order.settings for part in ("--set", text)]
        datasets = [one.dataset for one in encoders if isinstance(one, LocalEncoder)]
        plan = Plan(
            name=order.out.name,
            arguments=arguments,
            competition=self.metadata["competition_sources"][0],
            seconds=0,
            is_finetuned=order.built.train.epochs > 0,
            packages=installed(PACKAGES),
            recipe=Path(order.recipe).read_text(encoding="utf-8") if order.is_own_recipe else "",
            encoders=encoders if datasets or order.encoders else (),
            parcel=parcel,
        )
        metadata = {
            **self.metadata,
            "id": self.kernel,
            "title": self.kernel.partition("/")[2].replace("-", " "),
            "is_private": True,
            "enable_internet": True,  # for the weights of the hub, and for pip
            "dataset_sources": [kit_reference, *dict.fromkeys(datasets), *([parcel] if parcel else [])],
            "model_sources": [],
            "kernel_sources": [],
        }

        def push(quota: GpuQuota | None) -> Session:
            limit = int(min(MAX_SESSION, quota.left if quota else MAX_SESSION))
            if limit < 2 * MARGIN:
                raise Busy(f"only {clock_time(limit)} of GPU time are left this week, renewed {quota.renewed}")
            script = self.folder / "script.py"
            write_text(write_script(replace(plan, seconds=limit - MARGIN), kit, kit_reference), script)
            find_secret([script], credentials, "push again")
            pushing = Session(self.kernel, 0, limit, self.order.digest)
            self.save(pushing=pushing)
            version, url = self.kaggle.push(metadata, script, limit)
            session = replace(pushing, version=version)
            self.save(session=session, pushing=None)
            say(f"{self.kernel}: version {version} pushed, {url}; it trains for {clock_time(limit - MARGIN)} at most")
            return session

        return start_session(self.kaggle, waits, push)

    def send(self, credentials: Credentials, folder: Path, reference: str, digest: str, note: str) -> None:
        """Send a folder as a private dataset, unless Kaggle has it."""
        find_secret([path for path in folder.iterdir() if path.is_file()], credentials, "push again")
        write_json(dataset_metadata({"dataset_sources": [reference]}), folder / DATASET_METADATA)
        record = self.folder.parent / "sent.json"

        def read() -> dict:
            try:
                return json.loads(record.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                return {}

        def save(sent: SentFiles | None) -> None:
            write_json(read() | {reference: sent and asdict(sent)}, record)

        try:
            sent = SentFiles(**read()[reference])
        except (KeyError, TypeError):
            sent = None
        send(self.kaggle, Upload(folder, reference, digest, note), sent, save)

    def send_encoders(self, credentials: Credentials) -> tuple[str | LocalEncoder, ...]:
        """Send the files of the encoders that are paths here; returns all encoders of the recipe, in their order."""
        settings = self.order.built.encoder
        return tuple(
            self.send_encoder(credentials, one.name, source) if source.form in ("run", "folder", "pair") else one.name
            for one in settings.each
            for source in [find_source(one.name, settings.pretrained)]
        )

    def send_encoder(self, credentials: Credentials, spec: str, source: Source) -> LocalEncoder:
        """Send the files of an encoder."""
        path, files = Path(source.name), []
        if source.form == "run":
            encoders = read_manifest(path / MANIFEST).members[0].encoders
            files = [path / name for name in (MANIFEST, *(one.file for one in encoders))]
        elif source.form == "folder":
            files = [one for one in sorted(path.iterdir()) if one.name in WEIGHTS or one.name.endswith(SUFFIXES)]
        else:
            files = [path.with_name(path.name + suffix) for suffix in (".json", ".safetensors")]
        digest = hashlib.sha256("".join(f"{one.name} {sha256(one)}\n" for one in files).encode()).hexdigest()
        folder = self.folder.parent / f"encoder-{digest[:8]}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for one in files:
            link_or_copy(one, folder / one.name)
        reference = self.reference(f"encoder-{digest[:8]}")
        self.send(credentials, folder, reference, digest, f"encoder {path.name}")
        prefix = spec[: len(spec) - len(source.name)] if spec.endswith(source.name) else ""
        return LocalEncoder(reference, prefix, files[0].name, path.name if source.form == "pair" else "")

    def send_parcel(self, credentials: Credentials) -> str:
        """Send what earlier sessions, or a training here, have left to continue from; "" if there is nothing."""
        out, cache = self.order.out, self.order.out.parent / CACHE
        files = {f"{EMBEDDINGS}/{name}": cache / name for name in self.state.embeddings if (cache / name).is_file()}
        if has_checkpoint(partial_of(out) / CHECKPOINTS):
            files |= files_of(partial_of(out), PARTIAL)
        if out.is_dir():  # a finished run that is trained further
            files |= {f"{RUN}/{MANIFEST}": out / MANIFEST} | dict(files_of(out / CHECKPOINTS, f"{RUN}/{CHECKPOINTS}"))
        if not files:
            return ""
        folder, reference = self.folder / "parcel", self.reference(f"parcel-{out.name}")
        pack(folder / PARCEL, files)
        self.send(credentials, folder, reference, sha256(folder / PARCEL), f"what {out} continues from")
        (folder / PARCEL).unlink()
        return reference

    def collect(self, session: Session) -> None:
        """Wait for a session, bring back what it has left, and put it in place.

        Raises:
            InputError: the training failed, or was stopped before its end; or what it has left cannot be brought back.
        """
        what = f"{session.kernel}, version {session.version}"
        watch = Watch(self.kaggle, session.kernel, session.version, session.limit, can_delete=True, again=AGAIN)
        try:
            state, reason = watch.wait()
        except NotFound as gone:
            self.end_session()
            raise InputError(f"{gone}; {AGAIN}, to start it again") from gone
        if state in (STUCK, STOPPED):
            write_text("\n".join(watch.lines), self.folder / f"{session.kernel.partition('/')[2]}.log")
            self.end_session()
            raise InputError(f"{what}: {reason}; {AGAIN}, to start it again")
        archive, log = self.kaggle.download_output(watch.reference, OUTPUT, self.folder)
        if not watch.lines:
            watch.show(watch.add(log)[-LAST_LINES:])
        if archive is None:
            self.rescue(watch.reference)
            problem = f"ended with {state.lower()}{reason and f' ({reason})'} and left no {OUTPUT}"
            raise InputError(f"{what} {problem}: see its log in {self.folder}, then {AGAIN}")
        try:
            contents = unpack(archive, self.folder / "arrived")
        except InputError as error:
            raise InputError(f"{error}: {AGAIN}, to download it again") from error
        self.put_in_place(contents, archive, what)

    def rescue(self, reference: str) -> None:
        """Bring back what a session has left that was killed before it could pack: checkpoints and embeddings.

        Both are checked where they are read.
        """
        out, raw = self.order.out, self.folder / "arrived"
        shutil.rmtree(raw, ignore_errors=True)
        self.kaggle.download_matching(reference, r"^runs/\.", raw)
        parts = add_embeddings(raw / "runs" / CACHE, out.parent / CACHE)
        if has_checkpoint(partial_of(raw / "runs" / out.name) / CHECKPOINTS):
            replace_folder(partial_of(raw / "runs" / out.name), partial_of(out))
            say(f"{partial_of(out) / CHECKPOINTS}: the checkpoints of the session")
        shutil.rmtree(raw)
        self.end_session((*self.state.embeddings, *parts))

    def put_in_place(self, contents: Contents, archive: Path, what: str) -> None:
        """Move what has arrived to where a training here would have left it.

        Raises:
            InputError: the run is not done.
        """
        out, arrived = self.order.out, self.folder / "arrived"
        parts = add_embeddings(arrived / EMBEDDINGS, out.parent / CACHE)
        if parts:
            say(f"{out.parent / CACHE}: {counted(len(parts), 'file')} of embeddings")
        is_done = contents.code == 0
        if is_done:
            self.check_run(arrived / RUN, archive, what, parts)
            keep_note(partial_of(out), arrived / RUN)
            keep_note(out, arrived / RUN)
            replace_folder(arrived / RUN, out)
            shutil.rmtree(partial_of(out), ignore_errors=True)
        elif has_checkpoint(arrived / PARTIAL / CHECKPOINTS):
            replace_folder(arrived / PARTIAL, partial_of(out))
        shutil.rmtree(arrived, ignore_errors=True)
        archive.unlink()
        self.end_session(() if is_done else (*self.state.embeddings, *parts))
        if is_done:
            self.adopt(contents, parts)
            say(f"{out}: done")
        elif contents.is_stopped:
            raise InputError(f"{what} was stopped at the session's limit; {out} is not done: {AGAIN}, to go on")
        else:
            reason = contents.last_line.removeprefix("error: ")
            raise InputError(
                f"{what}: the training ended with exit code {contents.code} ({reason}): fix it, then {AGAIN}"
            )

    def check_run(self, run: Path, archive: Path, what: str, parts: Sequence[str]) -> None:
        """Check a run that arrived as Kaggle packed it. If it is damaged, downloading it again does not help.

        Args:
            parts: of the embedding cache, that came with it.
        """
        try:
            weights = read_weights(run)
            for name in weights.manifest.files:
                weights.file(name)
        except InputError as error:
            shutil.rmtree(run.parent, ignore_errors=True)
            archive.unlink()
            self.end_session((*self.state.embeddings, *parts))
            raise InputError(f"{what} has left a damaged run ({error}): {AGAIN}, to train it again") from error

    def adopt(self, contents: Contents, parts: Sequence[str]) -> None:
        """Make the embeddings that have arrived usable here."""
        if not (parts and contents.cache_keys):
            return
        from local.remote.adoption import adopt_embeddings  # imports torch

        out = self.order.out
        if adopt_embeddings(out, out.parent / CACHE, contents.cache_keys):
            say(f"Kaggle's embeddings are used here, too, with --encoder {out} and by local/evaluate.py {out}")

    def end_session(self, embeddings: tuple[str, ...] | None = None) -> None:
        """Store that there is no session to wait for."""
        (self.folder / "script.py").unlink(missing_ok=True)
        kept = self.state.embeddings if embeddings is None else embeddings
        self.save(session=None, pushing=None, embeddings=tuple(dict.fromkeys(kept)))

    def save(self, **changes: object) -> None:
        self.state = replace(self.state, **changes)
        save_state(self.state, self.folder)


def installed(names: Sequence[str]) -> dict[str, str]:
    """Name and version of those libraries that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
