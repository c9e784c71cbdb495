"""READMEs that libraries write describe nothing; what somebody wrote does."""

from pathlib import Path

import peft
import pytest
from huggingface_hub import ModelCard, ModelCardData

from loraplex_server.adapters.adding.adapter_folders import describe
from tests.support.adapters.round_trip import randomise
from tests.support.bases.tiny_models import tiny_llama

TRL = """---
base_model: org/model
library_name: peft
---

# Model Card for out

This model is a fine-tuned version of [org/model](https://huggingface.co/org/model).
It has been trained using [TRL](https://github.com/huggingface/trl).

## Quick start

```python
from transformers import pipeline
```

## Training procedure

This model was trained with SFT.

### Framework versions

- PEFT 0.18.0

## Citations

Cite TRL as:
"""


def test_an_adapter_saved_by_peft_has_no_description(tmp_path: Path) -> None:
    model = tiny_llama()
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    randomise(tuned)
    tuned.save_pretrained(tmp_path / "adapters" / "echo")
    assert "made aware of the risks" in (tmp_path / "adapters/echo/README.md").read_text()
    assert describe(tmp_path / "adapters" / "echo") is None


@pytest.mark.parametrize(
    "text",
    [str(ModelCard.from_template(ModelCardData())), TRL, "# Only a title\n", ""],
    ids=["template of the hub", "TRL", "title", "empty"],
)
def test_a_generated_readme_describes_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text)
    assert describe(tmp_path) is None


def test_what_somebody_wrote_into_the_template_is_found(tmp_path: Path) -> None:
    card = ModelCard.from_template(ModelCardData(), direct_use="Answers as a pirate would.")
    (tmp_path / "README.md").write_text(str(card))
    assert describe(tmp_path) == "Answers as a pirate would."


def test_no_readme_is_no_description(tmp_path: Path) -> None:
    assert describe(tmp_path) is None
