"""The words of the model cards."""

from collections.abc import Sequence
from string import Template

from tamzoo.paper import PAPER_TITLE

PAPER_URL = "https://openreview.net/forum?id=r1xBoxBYDH"
ATTENTION_TEXTS = {
    "plain": "without attention: the baseline of the paper's tables",
    "se": "with Squeeze-and-Excitation (reduction 16) at the end of every residual branch",
    "cbam": "with CBAM (reduction 16) at the end of every residual branch",
    "tam": "with a Tree-structured Attention Module (TAM) at the end of every residual branch: "
    "grouped 1x1 convolutions and PReLUs that reduce all channels to one gate per position",
    "scalar": "with one learned gate at the end of every residual branch, the same for all channels, "
    "positions and images: what TAM comes to where its gates are static",
}
DATA_LICENCES = {
    "cifar10": "CIFAR-10 is published without a licence; ask its authors before commercial use.",
    "cifar100": "CIFAR-100 is published without a licence; ask its authors before commercial use.",
    "svhn": "SVHN is for non-commercial use only, which covers weights trained on it.",
}
FIGURES = {  # name of the picture -> what it shows
    "spreads": "Variance of each gate within an image against its mean, over positions (TAM, CBAM spatial) "
    "or channels (SE, CBAM channel); at most 1e-12 is no variance to float32 (as the paper's Figure 3)",
    "gates": "Mean and range of every gate",
    "lesions": "Errors with one gate at a time replaced by 1 (as the paper's Figure 4b)",
    "straightened": "Accuracy as the PReLUs of the gates' trees are set to slope 1 in turn, that of "
    "the mean slope nearest to 1 first (as the paper's Figure 5a); below, what it does to the logits",
    "weights": "Variance of the convolution weights in each residual branch (as the paper's Figure 5b)",
    "curves": "Test error after each epoch (as the paper's Figure 6)",
}

TRAINED = Template("""\
---
$front
---
# $name

$what Trained on $trained_on; one of the models of
[$source](https://github.com/$source), an implementation of [$paper]($paper_url).

## Results

$results

Ours is of the $selection on $n test images$note$theirs.
Expected calibration error $calibration % (15 bins), mean cross-entropy $loss.

## How it was trained

$training

Every setting is in `record.json`, every epoch$last in `log.csv`.

## How to use it

With timm (`pip install git+https://github.com/$source`);
weights are checked against the SHA-256 in tamzoo's catalogue:

```python
${whose}import tamzoo  # registers the architectures
import timm
import torch
from PIL import Image

model = timm.create_model("$name", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = Image.open("photo.png").convert("RGB")
with torch.inference_mode():
    probabilities = model(transform(image).unsqueeze(0)).softmax(-1)[0]
label_names = model.pretrained_cfg["label_names"]
print(label_names[int(probabilities.argmax())], float(probabilities.max()))
```

Straight from this repository:

```python
import tamzoo
import timm

model = timm.create_model("hf-hub:$hub_id", pretrained=True).eval()
```

With torch.hub:

```python
${whose}import torch

options = dict(tag="$tag", pretrained=True, trust_repo=True)
model = torch.hub.load("$source", "$model", **options).eval()
```

With onnxruntime, without PyTorch (`pip install onnxruntime huggingface_hub pillow`):

```python
import json

import numpy as np
import onnxruntime
from huggingface_hub import hf_hub_download
from PIL import Image

file = hf_hub_download("$hub_id", "onnx/model.onnx")
session = onnxruntime.InferenceSession(file)
told = session.get_modelmeta().custom_metadata_map
mean, std, labels = (json.loads(told[key]) for key in ("mean", "std", "labels"))
image = Image.open("photo.png").convert("RGB")
short = min(image.size)  # its shorter side to the model's size, then the centre, as timm does it
image = image.resize(tuple(side * $w // short for side in image.size), Image.Resampling.BICUBIC)
left, top = (round((side - $w) / 2) for side in image.size)
image = image.crop((left, top, left + $w, top + $h))
pixels = (np.asarray(image, dtype=np.float32) / 255 - mean) / std
pixel_values = pixels.transpose(2, 0, 1)[None].astype(np.float32)
(logits,) = session.run(None, {"pixel_values": pixel_values})
probabilities = np.exp(logits[0] - logits.max())
print(labels[int(logits.argmax())], float(probabilities.max() / probabilities.sum()))
```
$gates
## Limits

- The model knows $h x $w pixel images of $classes classes; it gives one of them to any image.
- One run with one seed: differences of a few tenths of a percent between entries are noise.
- $licence The code and, as far as they are ours to license, the weights are under Apache 2.0.

## Citation

$citation
""")

UNCLAIMED = "**Not trained.** There are no weights for this entry, and nothing is claimed about its accuracy."
UNTRAINED = Template("""\
---
$front
---
# $name

$claim

$what Set up for $dataset; one of the models of
[$source](https://github.com/$source), an implementation of [$paper]($paper_url).
$cell
## How to use it

With timm (`pip install git+https://github.com/$source`), from random weights:

```python
import tamzoo  # registers the architectures
import timm

model = timm.create_model("$name")
```

Train it with `tamzoo train $name --data hub --out runs/$name`; large backbones want a GPU.

## Limits

- $licence The code is under Apache 2.0.

## Citation

$citation
""")

CITATION = f"""\
```bibtex
@misc{{tam2020,
  title = {{{PAPER_TITLE}}},
  howpublished = {{ICLR 2020 submission, OpenReview r1xBoxBYDH}},
  url = {{{PAPER_URL}}}
}}
```"""


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as Markdown, the first one the head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])
