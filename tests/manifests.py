"""Small manifests for tests that need one."""

from kernel.manifest import CompetitionSpec, EncoderSpec, Manifest, Member, Preprocessing


def encoder_spec(**changes: object) -> EncoderSpec:
    """timm's tiny ResNet at 64 pixels."""
    values = {
        "library": "timm",
        "architecture": "test_resnet",
        "arguments": {},
        "preprocessing": Preprocessing(64, (0.5, 0.4, 0.3), (0.1, 0.2, 0.3), "bilinear", 1.0, "crop"),
        "features": 96,
        "precision": "half",
        "file": "encoder.safetensors",
    }
    return EncoderSpec(**{**values, **changes})


def member(**changes: object) -> Member:
    """A member of one view, without a metadata prior and without scores."""
    values = {
        "name": "test_resnet",
        "encoders": (encoder_spec(),),
        "views": ("plain",),
        "pooling": "mean",
        "banks": ("bank.safetensors",),
        "metadata_prior": None,
        "metadata_prior_weight": 0.0,
        "weight": 1.0,
        "validation": {},
        "recipe": {"epochs": 0},
        "data_sha256": "0" * 64,
        "versions": {"timm": "1.0.20", "torch": "2.8.0"},
    }
    return Member(**{**values, **changes})


def manifest(**changes: object) -> Manifest:
    """A manifest of one member and two classes."""
    values = {
        "competition": CompetitionSpec(name="class-folders", resolution="300p", time_limit=32400),
        "class_ids": ("elm", "oak"),
        "fallback_classes": ("oak", "elm"),
        "members": (member(),),
        "files": {},
    }
    return Manifest(**{**values, **changes})
