"""The data sets: what their images and classes are, and where the Hub has them."""

from dataclasses import dataclass, field

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from tamzoo.class_names import CIFAR10, CIFAR100


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A tag: what the images and the classes are, and how they are normalised."""

    tag: str
    title: str
    num_classes: int
    class_names: tuple[str, ...] | None
    input_size: tuple[int, int, int]  # c h w
    stem: str  # "3x3" (stride 1, no max-pool) or "7x7" (stride 2, max-pool)
    mean: tuple[float, ...]  # of the training set, pixels in [0, 1]
    std: tuple[float, ...]
    crop_pct: float = 1.0
    hub_id: str = ""  # of the data set
    hub_revision: str = ""
    hub_folder: str = ""  # of the shards in the Hub's repository
    label_column: str = ""
    image_column: str = ""
    counts: dict[str, tuple[int, ...]] = field(default_factory=dict, hash=False)  # images a class, by split
    pixel_mean: tuple[float, ...] = ()  # of the training set, where `mean` does not say it
    pixel_std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise ValueError(f"{self.tag}: {self.num_classes} classes, but {len(self.class_names)} names")
        for split, counts in self.counts.items():
            if len(counts) != self.num_classes:
                raise ValueError(f"{self.tag}: {self.num_classes} classes, but {len(counts)} {split} counts")


# The order is the order in which a bare model name looks for weights.
DATASETS = {
    row.tag: row
    for row in (
        Dataset(
            tag="cifar100",
            title="CIFAR-100",
            num_classes=100,
            class_names=CIFAR100,
            input_size=(3, 32, 32),
            stem="3x3",
            mean=(0.5071, 0.4865, 0.4409),
            std=(0.2673, 0.2564, 0.2762),
            hub_id="uoft-cs/cifar100",
            hub_revision="aadb3af77e9048adbea6b47c21a81e47dd092ae5",
            hub_folder="cifar100",
            image_column="img",
            label_column="fine_label",
            counts={"train": (500,) * 100, "test": (100,) * 100},
        ),
        Dataset(
            tag="cifar10",
            title="CIFAR-10",
            num_classes=10,
            class_names=CIFAR10,
            input_size=(3, 32, 32),
            stem="3x3",
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2470, 0.2435, 0.2616),
            hub_id="uoft-cs/cifar10",
            hub_revision="0b2714987fa478483af9968de7c934580d0bb9a2",
            hub_folder="plain_text",
            image_column="img",
            label_column="label",
            counts={"train": (5000,) * 10, "test": (1000,) * 10},
        ),
        Dataset(
            tag="svhn",
            title="SVHN",
            num_classes=10,
            class_names=tuple("0123456789"),
            input_size=(3, 32, 32),
            stem="3x3",
            mean=(0.0, 0.0, 0.0),  # section 3.3: only scaled to [0, 1]
            std=(1.0, 1.0, 1.0),
            hub_id="ufldl-stanford/svhn",
            hub_revision="f9e1717d73324ebbc1ece84267ccd80d0aca0690",
            hub_folder="cropped_digits",
            image_column="image",
            label_column="label",
            counts={
                "train": (4948, 13861, 10585, 8497, 7458, 6882, 5727, 5595, 5045, 4659),
                "test": (1744, 5099, 4149, 2882, 2523, 2384, 1977, 2019, 1660, 1595),
            },
            pixel_mean=(0.4377, 0.4438, 0.4728),
            pixel_std=(0.1980, 0.2010, 0.1970),
        ),
        Dataset(
            tag="untrained_in1k",
            title="ImageNet-1k (architecture only)",
            num_classes=1000,
            class_names=None,
            input_size=(3, 224, 224),
            stem="7x7",
            mean=IMAGENET_DEFAULT_MEAN,
            std=IMAGENET_DEFAULT_STD,
            crop_pct=0.875,
        ),
    )
}
