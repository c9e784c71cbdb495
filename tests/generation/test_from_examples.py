"""A sentence and pairs to an adapter: which start is taken, and what the card says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from adapter_store.benchmarks.few_shot.bench import Bench
from loraplex_generation.chat_base import ChatBase
from loraplex_generation.errors import NothingLearnt, UnfitExamples
from loraplex_generation.from_examples import encode_pairs, generate_from_examples, read_pairs
from loraplex_generation.frozen_base import FrozenBase
from loraplex_generation.packing import ChatCodec
from loraplex_generation.refinement import Refinement, RefinementRecipe, refine
from loraplex_generation.scoring import TeacherForced
from loraplex_generation.sentences import SentenceEncoder
from loraplex_generation.service import Draft, GeneratedAdapter, Generator
from loraplex_generation.shipped import shipped_folder
from loraplex_generation.zoo.tasks import Example, Task
from tests.support.tiny_library import tiny_library
from tests.support.tiny_zoo import HashedWords, tiny_base, tiny_codec, tiny_directory

UNTRAINED = RefinementRecipe(judged_steps=0)


class Library:
    """A tiny base and random experts, with the drafts of one method."""

    def __init__(self, folder: Path) -> None:
        chat = ChatBase(tiny_base(tiny_directory(folder / "base")), tiny_codec())
        encoder = HashedWords()
        self.bench = Bench.of(
            chat, tiny_library(folder / "library", chat, encoder), encoder, "tiny"
        )

    def learn(
        self, sentence: str, pairs: list[Example], *, force: bool, recipe: RefinementRecipe
    ) -> GeneratedAdapter:
        return generate_from_examples(
            self.bench.generator,
            self.bench.base,
            self.bench.codec,
            sentence,
            pairs,
            method="nearest",
            force=force,
            recipe=recipe,
        )

    def refined(
        self, pairs: list[Example], starts: dict[str, Tensor], recipe: RefinementRecipe
    ) -> Refinement:
        bench = self.bench
        rows = encode_pairs(bench.codec, pairs)
        return refine(
            bench.base,
            bench.layout,
            bench.generator.span,
            bench.codec.head,
            rows,
            starts,
            recipe=recipe,
        )


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return Library(tmp_path_factory.mktemp("tiny"))


def _told(made: GeneratedAdapter) -> dict[str, Any]:
    told = made.card["refinement"]
    assert isinstance(told, dict)
    return told


def test_the_mean_alone_is_no_answer(library: Library) -> None:
    """Where it is the likeliest start and training gains nothing, the draft stays."""
    pairs = Task.parse("vowels/plain").examples("train", 4)
    sentence = "the first of the list"
    generator = library.bench.generator
    draft = generator.generate(sentence, method="nearest", force=True)
    starts = {"draft": draft.vector, "library mean": generator.library_mean()}
    assert library.refined(pairs, starts, UNTRAINED).start == "library mean"
    made = library.learn(sentence, pairs, force=True, recipe=UNTRAINED)
    assert torch.equal(made.vector, draft.vector)
    told = _told(made)
    assert (told["start"], told["gained"], told["steps"]) == ("draft", False, 0)
    assert told["held_out"]["after"] == told["held_out"]["before"]
    assert made.card["parts"] == draft.card["parts"]


def test_a_reading_that_the_pairs_confirm_answers_untrained(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a refused sentence, too."""
    pairs = [Example(word, "e") for word in ("red", "blue", "green", "plum", "gold", "grey")]
    mean = library.bench.generator.library_mean()
    taught = RefinementRecipe(span_steps=2, steps=120, lr=0.2, a_rate=0.0, warmup=2, tokens=60)
    right = library.refined(pairs, {"mean": mean}, taught).vector
    reading = Draft(right, {"the letter": 1.0, "plain": 0.9})
    monkeypatch.setattr(Generator, "readings", lambda *_: {"the letter": reading})
    strange = "qzx 71 vbn ###"
    assert library.bench.generator.refuses(library.bench.generator.read(strange), "nearest")

    made = library.learn(strange, pairs, force=False, recipe=UNTRAINED)
    assert torch.equal(made.vector, right)
    told = _told(made)
    assert (told["start"], told["gained"], told["steps"]) == ("the letter", True, 0)
    assert told["start_is_right"]
    assert told["held_out"]["before"]["exact"] == 0
    assert told["held_out"]["after"]["exact"] == 6
    assert made.card["parts"] == {"the letter": 1.0, "plain": 0.9}
    with pytest.raises(NothingLearnt):
        library.learn(strange, [*pairs, Example("teal", "o")], force=False, recipe=UNTRAINED)


@pytest.mark.parametrize("answer", ["d", "d\u0085e", "d\u2028e", "d\u2029e"])
def test_pairs_are_read_from_json_lines(tmp_path: Path, answer: str) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(
        f'{{"prompt": "a", "answer": "b"}}\n\n{{"prompt": "c", "answer": "{answer}"}}\n'
    )
    assert read_pairs(file) == [Example("a", "b"), Example("c", answer)]


@pytest.mark.parametrize("line", ["{", "[]", '{"prompt": "a"}', '{"prompt": 1, "answer": "b"}'])
def test_a_line_that_is_no_pair_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": "a", "answer": "b"}\n' + line + "\n")
    with pytest.raises(UnfitExamples, match="line 2"):
        read_pairs(file)


@pytest.mark.slow
@pytest.mark.nightly  # test_served_learning.py shows the same through a server
@pytest.mark.parametrize("name", ["surname/plain", "list-etc/plain"])
def test_an_operation_that_no_sentence_reaches_is_done_after_eight_pairs(
    pulled_base: Path, pulled_encoder: Path, name: str
) -> None:
    """From the sentence alone nothing is right. Another reading of a surname is: "middle name"."""
    generator = Generator.load(
        shipped_folder(),
        SentenceEncoder(pulled_encoder),
        base_name="smollm2-135m-instruct",
        base_directory=pulled_base,
    )
    base = FrozenBase(pulled_base)
    codec = ChatCodec(AutoTokenizer.from_pretrained(pulled_base))
    task = Task.parse(name)
    unseen = [codec.row(example) for example in task.examples("validation", 32)]
    sentence = task.test_descriptions()[0]
    draft = generator.generate(sentence, force=True)
    score = TeacherForced(base, codec.head, draft.layout)
    made = generate_from_examples(generator, base, codec, sentence, task.examples("train", 8))
    before, after = (score([unseen], one.vector[None])[0].exact for one in (draft, made))
    assert before <= 0.1
    assert after >= 0.5
    told = made.card["refinement"]
    assert isinstance(told, dict)
    assert told["gained"]
    assert told["start_is_right"] == (name == "surname/plain")
