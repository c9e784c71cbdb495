"""A text put into marks, markup, code or a set phrase."""

import random

from ..draws import Operation, draw_name
from ..rows import Row, series, table
from ..words import pool, pool_part

_FORMATS = ("plain",)  # the wrapping is the dress


def _text(rng: random.Random, split: str) -> tuple[str, str]:
    """Two or three words."""
    text = " ".join(rng.sample(pool_part(pool("common"), split), rng.randint(2, 3)))
    return text, text


def _person(rng: random.Random, split: str) -> tuple[str, str]:
    name = " ".join(draw_name(rng, split))
    return name, name


def _in(template: str, told: str, test: str) -> Row:
    """`template`: with {} for the text; other braces stand for themselves."""
    before, _, after = template.partition("{}")
    return Row(
        lambda text: f"{before}{text}{after}",
        (f"put the text {told}", f"wrap the text {told}"),
        (f"the text {test}",),
    )


def _saying(template: str, told: str, test: str) -> Row:
    before, _, after = template.partition("{}")
    return Row(
        lambda text: f"{before}{text}{after}",
        (f"write {told}", f"compose {told}"),
        (test,),
    )


_BRACKETS = {
    "parentheses": _in("({})", "in parentheses", "between round brackets"),
    "square-brackets": _in("[{}]", "in square brackets", "between [ and ]"),
    "braces": _in("{{}}", "in curly braces", "between braces"),
    "angle-brackets": _in("<{}>", "in angle brackets", "between < and >"),
    "double-brackets": _in("[[{}]]", "in double square brackets", "as a wiki link"),
    "double-braces": _in("{{{}}}", "in double curly braces", "as a template variable"),
    "single-quotes": _in("'{}'", "in single quotes", "between apostrophes"),
    "guillemets": _in("«{}»", "in guillemets", "between French quotation marks"),
    "german-quotes": _in("„{}“", "in German quotation marks", "quoted as in German print"),
    "pipes": _in("|{}|", "between vertical bars", "with a pipe on both sides"),
    "dashes": _in("- {} -", "between dashes", "with a hyphen and a blank on both sides"),
    "slashes": _in("/{}/", "between slashes", "as a regular expression literal"),
    "percent-signs": _in("%{}%", "between percent signs", "as a Windows variable"),
    "ellipsis": _in("{}...", "before three dots", "with an ellipsis after it"),
    "led-by-ellipsis": _in("...{}", "after three dots", "with an ellipsis before it"),
}
_MARKDOWN = {
    "bold": _in("**{}**", "in Markdown bold", "with double asterisks around it"),
    "italic": _in("*{}*", "in Markdown italics", "with single asterisks around it"),
    "code": _in("`{}`", "in back-ticks", "as Markdown inline code"),
    "strike": _in("~~{}~~", "in strike-through tildes", "crossed out in Markdown"),
    "block-quote": _in("> {}", "behind a > sign", "as a Markdown quotation"),
    "bullet": _in("- {}", "behind a hyphen", "as a single bullet point"),
    "star-bullet": _in("* {}", "behind an asterisk", "as a bullet with a star"),
    "check-box": _in("- [ ] {}", "behind an empty check box", "as an open Markdown task"),
    "ticked-box": _in("- [x] {}", "behind a ticked check box", "as a finished Markdown task"),
    "image": _in("![{}](image.png)", "as the label of image.png", "as alt text of image.png"),
    "footnote": _in("[^1]: {}", "as footnote one", "after the mark [^1]:"),
}
_HTML = {
    f"html-{tag}": _in(
        f"<{tag}>{{}}</{tag}>", f"in an HTML {tag} element", f"between <{tag}> and </{tag}>"
    )
    for tag in ("p", "b", "i", "em", "strong", "h1", "h2", "li", "td", "div", "span", "title")
}
_CODE = {
    "yaml": _in("title: {}", "as the YAML value of title", "after the key title and a colon"),
    "toml": _in('title = "{}"', "as the TOML value of title", "as a TOML string called title"),
    "env": _in("TITLE={}", "as the variable TITLE", "after TITLE= as in an env file"),
    "python-print": _in('print("{}")', "in a Python print call", "printed by Python code"),
    "python-comment": _in("# {}", "in a Python comment", "behind a hash sign"),
    "c-comment": _in("/* {} */", "in a C comment", "between /* and */"),
    "line-comment": _in("// {}", "in a JavaScript line comment", "behind two slashes"),
    "sql-comment": _in("-- {}", "in an SQL comment", "behind two hyphens"),
    "html-comment": _in("<!-- {} -->", "in an HTML comment", "hidden from an HTML page"),
    "latex-bold": _in("\\textbf{{}}", "in LaTeX bold", "set bold by LaTeX"),
    "shell-echo": _in('echo "{}"', "in a shell echo", "echoed by a shell"),
    "json-list": _in('["{}"]', "as the only string of a JSON list", "in a one-item JSON array"),
    "console-log": _in('console.log("{}")', "in a console.log call", "logged by JavaScript"),
}
_LABELS = {
    f"label-{label.lower()}": _in(
        f"{label}: {{}}", f"behind the label {label}:", f"led by {label} and a colon"
    )
    for label in ("Note", "Warning", "Title", "Re", "Todo", "Error", "Step", "Question", "Answer")
}
_FILES = {
    f"file-{ending}": Row(
        lambda text, ending=ending: f"{text.replace(' ', '_')}.{ending}",
        (f"a file name that ends in .{ending}, underscores for spaces", f"name the .{ending} file"),
        (f"what a {ending} file of this title would be called, with underscores",),
    )
    for ending in ("txt", "md", "csv", "py", "json", "pdf")
}
_GREETINGS = {
    "dear": _saying("Dear {},", "the salutation Dear ... with a comma", "how a letter begins"),
    "hello": _saying("Hello, {}!", "a hello to the person", "how one greets this person"),
    "thanks": _saying("Thank you, {}.", "thanks to the person", "a short thank-you by name"),
    "signature": _saying("Best regards,\n{}", "a signature below best regards", "the letter's end"),
    "sincerely": _saying("Sincerely, {}", "a line with sincerely", "a formal closing by name"),
    "happy-birthday": _saying("Happy birthday, {}!", "birthday wishes", "what one says on the day"),
    "invoice-to": _saying("Invoice to: {}", "the line Invoice to:", "whom the bill goes to"),
    "attention": _saying(
        "Attn: {}", "an attention line with Attn:", "for whose eyes the letter is"
    ),
    "welcome": _saying(
        "Welcome back, {}!", "welcome back to the person", "what a site says on log-in"
    ),
    "copyright": _saying("(c) {}", "a copyright mark (c) for the person", "who holds the rights"),
    "cc": _saying("CC: {}", "a CC line", "who gets a copy of the mail"),
    "author": _saying("by {}", "a by-line", "how an article names its author"),
}

WRAPPINGS: dict[str, Operation] = {
    **table("brackets", _text, _BRACKETS, formats=_FORMATS),
    **table("markdown", _text, _MARKDOWN, formats=_FORMATS),
    **table("html", _text, _HTML, formats=_FORMATS),
    **table("code", _text, _CODE, formats=_FORMATS),
    **table("labels", _text, _LABELS, formats=_FORMATS),
    **table("file-names", _text, _FILES, formats=_FORMATS),
    **table("greetings", _person, _GREETINGS, formats=("plain", "quotes", "caps")),
    **series(
        "markdown",
        _text,
        "heading",
        (1, 2, 3, 4),
        Row(
            lambda text, n: f"{'#' * n} {text}",
            ("make it a Markdown heading of level {n}", "put {word} hash sign{s} before the text"),
            ("the text as a level-{word} heading",),
        ),
        formats=_FORMATS,
    ),
    **series(
        "punctuation",
        _text,
        "exclamations",
        (1, 2, 3, 4),
        Row(
            lambda text, n: text + "!" * n,
            ("put {word} exclamation mark{s} at the end", "end the text with {n} !"),
            ("the text cried out with {word} !",),
        ),
    ),
    **series(
        "punctuation",
        _text,
        "question-marks",
        (1, 2, 3),
        Row(
            lambda text, n: text + "?" * n,
            ("put {word} question mark{s} at the end", "end the text with {n} ?"),
            ("the text as a doubt with {word} ?",),
        ),
    ),
    **series(
        "punctuation",
        _text,
        "indent",
        (2, 3, 4),
        Row(
            lambda text, n: ">" * n + " " + text,
            ("put {word} > signs and a space before the text", "quote it {n} levels deep"),
            ("the text as a mail reply nested {word} times",),
        ),
        formats=_FORMATS,
    ),
}
