"""Encoders of the hub, served on the loopback as the hub serves files: downloaded once, then read from the cache.

python -m pytest tests/local/encoders/test_hub.py
"""

import hashlib
import json
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

from local.encoders.hub import refuse_transformers
from local.encoders.load import load_encoder
from tests.local.encoders.models import assert_same, embed, refusal, write_clip, write_timm

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SERVED = ("hf-hub:owner/clip", "hf-hub:owner/clip-bin", "hf-hub:owner/resnet", "timm:hf-hub:owner/resnet@main")


class Hub(BaseHTTPRequestHandler):
    """The protocol of the hub, as far as the download of a file uses it, over a folder OWNER/NAME/FILE."""

    def do_GET(self):
        self.server.requests.append(f"{self.command} {self.path}")
        repository, _, rest = self.path.partition("/resolve/")
        revision, _, file = rest.partition("/")
        path = self.server.root / repository.strip("/") / file
        if repository.endswith("gated"):
            self.answer(403, {"X-Error-Code": "GatedRepo"})
        elif revision not in ("main", COMMIT):
            self.answer(404, {})
        elif not path.parent.is_dir():
            self.answer(404, {"X-Error-Code": "RepoNotFound"})
        elif not path.is_file():
            self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        else:
            content = path.read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            self.answer(200, {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT}, content)

    do_HEAD = do_GET

    def answer(self, status, headers, content=b""):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


def point_to(patch, port):
    """Have huggingface_hub use a server on the loopback."""
    address = f"http://127.0.0.1:{port}"
    patch.setattr(constants, "ENDPOINT", address)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The server. Its `root` has the served folders, its `requests` what was requested."""
    root, patch = tmp_path_factory.mktemp("hub"), pytest.MonkeyPatch()
    write_clip(root / "owner" / "clip", {"resize_mode": "squash"})
    (root / "owner" / "clip" / "open_clip_pytorch_model.bin").write_bytes(b"must not be requested")
    write_clip(root / "owner" / "clip-bin", suffix=".bin")
    write_timm(root / "owner" / "resnet", arguments={"act_layer": "gelu"})
    configs = {
        "texts": None,
        "transformers": {"model_type": "dinov2", "hidden_size": 768},
        "vit": {"architecture": "vit_tiny_patch16_224", "num_classes": 0},
    }
    for name, config in configs.items():
        (root / "owner" / name).mkdir()
        (root / "owner" / name / "model.safetensors").write_bytes(b"must not be requested")
        if config:
            (root / "owner" / name / "config.json").write_text(json.dumps(config))
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server, patch.context() as changed:
        server.root, server.requests = root, []
        for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
            changed.delenv(name)
        changed.setenv("HF_TOKEN", "")
        point_to(changed, server.server_port)
        changed.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache")))
        changed.setattr(constants, "HF_HUB_OFFLINE", False)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("spec", SERVED)
def test_a_model_of_the_hub_is_that_of_its_folder_also_offline(hub, monkeypatch, photos, spec):
    folder = hub.root / spec.rpartition("hf-hub:")[2].partition("@")[0]
    expected = embed(*load_encoder(str(folder)), photos)
    module, described = load_encoder(spec)
    assert_same(embed(module, described, photos), expected)
    assert described.architecture == ("test_resnet" if "resnet" in spec else spec.removeprefix("hf-hub:"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    requested = len(hub.requests)
    assert load_encoder(spec)[1] == described
    assert len(hub.requests) == requested


def test_a_size_that_the_architecture_does_not_accept_is_refused_before_the_weights_are_downloaded(hub):
    assert "expected a multiple of its patch size, 16" in refusal("hf-hub:owner/vit", image_size=100)
    assert not [request for request in hub.requests if "owner/vit" in request and "config.json" not in request]


@pytest.mark.parametrize("spec", ["hf-hub:owner/clip", "hf-hub:owner/resnet"])
def test_a_model_in_the_cache_is_loaded_when_the_hub_cannot_be_reached(hub, monkeypatch, spec):
    _, described = load_encoder(spec)
    point_to(monkeypatch, 9)  # nothing listens there
    monkeypatch.setattr(time, "sleep", lambda _: None)  # between the attempts of the hub's client
    assert load_encoder(spec)[1] == described
    assert "check the name and the network" in refusal("hf-hub:owner/other")


def test_a_model_that_is_not_in_the_cache_is_refused_offline(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "download it once without HF_HUB_OFFLINE=1" in refusal("hf-hub:owner/other")


def test_only_the_configuration_and_one_file_of_weights_are_downloaded(hub):
    load_encoder("hf-hub:owner/clip")
    downloads = {request.rpartition("/")[2] for request in hub.requests if request.startswith("GET /owner/clip/")}
    assert downloads == {"open_clip_config.json", "open_clip_model.safetensors"}


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ("hf-hub:owner/none", "check the name and the network"),
        ("hf-hub:owner/gated", "log in with `hf auth login`"),
        ("hf-hub:owner/dinov3-gated", "are not gated, such as timm:vit_small_patch16_dinov3.lvd1689m"),
        ("hf-hub:owner/texts", "has no weights with open_clip_config.json or config.json"),
        ("hf-hub:owner/transformers", "timm has timm:vit_base_patch14_dinov2.lvd142m"),
        ("timm:hf-hub:owner/clip", "has no weights with config.json"),
    ],
)
def test_a_repository_that_cannot_be_used_is_refused_with_its_name_and_the_reason(hub, spec, problem):
    message = refusal(spec)
    assert message.startswith(f"{spec} ")
    assert problem in message
    assert not [request for request in hub.requests if "/transformers/" in request and "safetensors" in request]


@pytest.mark.parametrize(
    ("config", "advice"),
    [
        (
            {"model_type": "dinov3_vit", "hidden_size": 384},
            "timm has timm:convnext_small.dinov3_lvd1689m, timm:",
        ),
        ({"model_type": "siglip", "vision_config": {"hidden_size": 768}}, "timm.list_pretrained('*base*siglip*') and"),
        ({"model_type": "hiera", "vision_config": [1], "hidden_size": [96]}, "timm.list_pretrained('*hiera*') and"),
        ({"model_type": "bert"}, "timm.list_pretrained() and open_clip.list_pretrained()"),
        ({"model_type": "[!a]*"}, "timm.list_pretrained() and open_clip.list_pretrained()"),
        ({"model_type": None, "architectures": ["SomeModel"]}, "timm.list_pretrained() and"),
    ],
)
def test_a_folder_in_the_format_of_transformers_is_refused_with_where_to_look(tmp_path, config, advice):
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path} is in the format of transformers (model_type {config['model_type']}), ")
    assert advice in message


def test_a_configuration_of_timm_is_not_taken_for_one_of_transformers():
    refuse_transformers({"architecture": "test_vit", "model_type": "vit"}, "here")
    refuse_transformers({"pretrained_cfg": {}}, "here")
