"""The weights that the zoo has: one file an entry, known by its hash."""

from dataclasses import dataclass

from tamzoo import __version__
from tamzoo.recipes import RECIPES

TAG = f"v{__version__}"  # of Hub repositories: every version is published with all its weights


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Weights that exist: what ties the catalogue to one file."""

    sha256: str  # of model.safetensors
    recipe: str
    revision: str = TAG  # of the Hub repository: the tag under which it is published

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES or len(self.sha256) != 64:
            raise ValueError(f"expected a recipe of {', '.join(RECIPES)} and a sha256, got {self}")


_SHA256 = {  # of model.safetensors, by recipe
    "short": {
        "wrn16_8_tam.cifar100": "9dff65f51736706ff33c6f862fc23db40eeb4d5b63746bdd74f5e37d635deea6",
        "resnet50_tam.cifar10": "e7a8de22ace2cf91ad8ce10af9a40c4dfcf6aed5124a4d26aa1ea84b5bd12ce6",
        "resnet50_tam.cifar100": "27d891bfb68068c29e47a0a019fd91b0a3b6eb43e4a4d48a8d0c58ad06a0e597",
    },
    "short-cpu": {
        "resnet18_tam.cifar100": "480ae37b2698c9b4d520648cfb83a45b00ae1b52f065d7aa2ad93674a99b144f",
        "resnet18_plain.cifar100": "670c529302a944ea7380d0bb81e495d791e6fe944f716c39bcd12353a0368467",
        "wrn10_4_tam.cifar10": "719d7ceb0bfe0cfbcccb0e98cc7b2696e819c76cc2d3f4f3b5e87944033936c0",
        "wrn10_4_plain.cifar10": "c4fb9d448b69c56e7820d70a38cc74cf458fdc116832e161e57d2e1064d7ce53",
        "wrn10_4_scalar.cifar10": "95273988574a9ce8e9f7bc61ca0dd4231a00323f91692d40901e95d0134f0f7d",
        "wrn10_4_se.cifar10": "b01e1d9c2537d12afe74e6d605736232ea5a69b9fe4d0ac74ba8cc52c53fd51d",
        "wrn10_4_cbam.cifar10": "ced9d60e465e62ebf66272c781156c405345c55a7dc1e87807aebfc32ca8c21f",
        "resnet20_tam.cifar10": "cc32067d41ee4147b1952d4499e69b7f9b565da1748a1c7b9c1be1dd0bf4e669",
    },
    "restart-cpu": {
        "resnext50_32x4d_tam.cifar100": "4937d51952eda355204e4b2facc90ebae0ff7af96a1742ce9c8fb4bbe6a88c6b",
        "resnext50_32x4d_tam.cifar10": "473a6302181ae94d107635968bd3954eafad38221464c396968f1f3cc1d0150a",
        "wrn16_8_tam.cifar10": "7a31102b3f5981ec163213134184578d71ce9659dd4e52b0ff0a23597eeed4ab",
        "resnet18_tam.cifar10": "1ff1b2bc2cdc15802cd4b679936ea36eb8ba455c97c056794bb2a2d139989477",
    },
}
TRAINED = {  # entry -> its weights
    name: Trained(sha256=sha256, recipe=recipe)
    for recipe, files in _SHA256.items()
    for name, sha256 in files.items()
}
