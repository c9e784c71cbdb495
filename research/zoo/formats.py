"""The output formats: how an answer is dressed, and how people ask for it."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Format:
    """A dressing of the bare answer. Suffixes follow the wording of the operation."""

    dress: Callable[[str], str]
    suffixes: tuple[str, ...]  # for training
    test_suffixes: tuple[str, ...]  # never seen in training


FORMATS: dict[str, Format] = {
    "plain": Format(
        dress=lambda answer: answer,
        suffixes=(
            "",
            ", and nothing else",
            ", as plain text",
            ". Give only the answer",
            ", without any decoration",
            ". No extra words or marks",
            ", just that",
            ". Reply with the bare answer",
        ),
        test_suffixes=(
            ". Output the plain answer only",
            ", with no wrapping around it",
            ", nothing more",
            ". Answer plainly",
        ),
    ),
    "json": Format(
        dress=lambda answer: f'{{"result": "{answer}"}}',
        suffixes=(
            " as JSON",
            " as a JSON object with the key result",
            ", and return a JSON object",
            ", formatted as JSON",
            ". The output must be JSON",
            ", in JSON form with one field called result",
            ". Answer with a JSON object",
            ", wrapped in JSON",
        ),
        test_suffixes=(
            ", giving back JSON",
            ". Respond in JSON format",
            ", put into a JSON record under result",
            " and encode the answer as JSON",
        ),
    ),
    "quotes": Format(
        dress=lambda answer: f'"{answer}"',
        suffixes=(
            " in double quotes",
            ", between quotation marks",
            ", quoted",
            ". Put the answer in quotes",
            ", inside double quotation marks",
            ", surrounded by quotes",
            ". Quote the answer",
            " as a quoted string",
        ),
        test_suffixes=(
            ", enclosed in quotation marks",
            ". Wrap it in double quotes",
            ", with quotes around it",
            ". The answer should be quoted",
        ),
    ),
    "caps": Format(
        dress=lambda answer: answer.upper(),
        suffixes=(
            " in capital letters",
            ", all in upper case",
            ", in ALL CAPS",
            ". Use only capital letters",
            ", fully capitalised",
            ". Write the answer in uppercase",
            ", uppercased",
            ", with every letter a capital",
        ),
        test_suffixes=(
            ", in block capitals",
            ". Answer in all caps",
            ", using uppercase letters only",
            ", shouting in capitals",
        ),
    ),
    "tag": Format(
        dress=lambda answer: f"<answer>{answer}</answer>",
        suffixes=(
            " inside answer tags",
            ", wrapped in an answer tag",
            ", between <answer> and </answer>",
            ". Put the answer in an XML tag called answer",
            ", enclosed in <answer> tags",
            ", as XML with an answer element",
            ". Use answer tags around it",
            ", marked up with an answer tag",
        ),
        test_suffixes=(
            ", placed in <answer> markup",
            ". Surround it with answer tags",
            ", as an XML answer element",
            ", tagged as answer",
        ),
    ),
    "sentence": Format(
        dress=lambda answer: f"The answer is {answer}.",
        suffixes=(
            " in a full sentence",
            ", as a complete sentence",
            ". Begin with: The answer is",
            ", saying 'The answer is ...'",
            ". Answer in a whole sentence",
            ", phrased as a sentence",
            ", starting with the words The answer is",
            ". Reply with one full sentence",
        ),
        test_suffixes=(
            ", stated as a sentence",
            ". Use a complete sentence that starts with The answer is",
            " and say it in a full sentence",
            ". Write one sentence for the answer",
        ),
    ),
}
