"""Where a piece of code stands, found by its tokens: lines may move, be indented anew or be wrapped elsewhere.

Two pieces are the same if their tokens are: comments, line breaks, indentation and a comma before a closing bracket
do not count. A place has a dotted name, ``diveq_core.estimators.radii.Cosine.log_r_gradients`` say.
"""

from __future__ import annotations

import ast
import functools
import io
import itertools
import textwrap
import tokenize
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAYOUT = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT, tokenize.ENDMARKER)
# No token holds it.
BETWEEN = "\0"
# More than any piece closes without opening; inside of brackets indentation means nothing.
OPEN = "(" * 16


class Unanchored(LookupError):
    """A piece of code that is not there, or there more than once."""


@dataclass(frozen=True)
class Token:
    """A token, and where it stands in its text."""

    string: str
    start: int
    end: int
    line: int
    indentation: str
    """Of the statement that it belongs to."""


@dataclass(frozen=True)
class Source:
    """A file of the project, in tokens."""

    path: Path
    text: str
    tokens: tuple[Token, ...]
    joined: str
    scopes: tuple[tuple[int, int, str], ...]

    def scope(self, token: Token) -> str:
        return [name for first, last, name in self.scopes if first <= token.line <= last][-1]


@dataclass(frozen=True)
class Place:
    """Tokens from the first to the last, in a source."""

    source: Source
    first: int
    last: int

    @property
    def name(self) -> str:
        return self.source.scope(self.source.tokens[self.first])

    def __str__(self) -> str:
        tokens = self.source.tokens[self.first : self.last + 1]
        text = " ".join(self.source.text[tokens[0].start : tokens[-1].end].split())
        return f"{text!r} in {self.name}, line {tokens[0].line}"


def tokens_of(text: str, *, piece: bool = False) -> list[Token]:
    """Tokens that mean something; a piece may begin and end inside of brackets."""
    starts = list(itertools.accumulate(map(len, io.StringIO(text)), initial=0))
    before = 1 if piece else 0
    found, indentation = [], ""
    statement_begins = True
    try:
        for kind, string, start, end, _ in tokenize.generate_tokens(io.StringIO(f"{OPEN}\n" * before + text).readline):
            statement_begins |= kind == tokenize.NEWLINE
            if kind in LAYOUT or start[0] <= before:
                continue
            if statement_begins:
                indentation, statement_begins = " " * start[1], False
            begin, stop = (starts[row - 1 - before] + column for row, column in (start, end))
            if string in (")", "]", "}") and found and found[-1].string == ",":
                found.pop()
            found.append(Token(string, begin, stop, start[0] - before, indentation))
    except tokenize.TokenError:
        # The brackets that were opened for a piece stay open; a whole file has none.
        if not piece:
            raise
    return found


def joined(tokens: list[Token] | tuple[Token, ...]) -> str:
    return BETWEEN + BETWEEN.join(token.string for token in tokens) + BETWEEN


def scopes_of(text: str, module: str) -> list[tuple[int, int, str]]:
    """First line, last line and dotted name of a module, then of each class and function in it."""
    found = [(1, text.count("\n") + 1, module)]

    def visit(node: ast.AST, name: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                first = min([child.lineno, *(decorator.lineno for decorator in child.decorator_list)])
                found.append((first, child.end_lineno, f"{name}.{child.name}"))
                visit(child, f"{name}.{child.name}")
            else:
                visit(child, name)

    visit(ast.parse(text), module)
    return found


@functools.lru_cache(maxsize=1024)
def parsed(path: Path, module: str, text: str) -> Source:
    tokens = tuple(tokens_of(text))
    return Source(path, text, tokens, joined(tokens), tuple(scopes_of(text, module)))


def sources(root: Path = ROOT) -> list[Source]:
    """Every source file of the project in a folder."""
    found = []
    for top in (root, root / "backends"):
        for package in sorted(top.glob("diveq_*")):
            for path in sorted(package.rglob("*.py")):
                parts = path.relative_to(top).with_suffix("").parts
                module = ".".join(part for part in parts if part != "__init__")
                found.append(parsed(path, module, path.read_text(encoding="utf-8")))
    return found


def stands_within(name: str, within: str) -> bool:
    """Whether the parts of ``within`` occur in a dotted name, in this order."""
    left = iter(name.split("."))
    return all(part in left for part in within.split(".") if part)


def places(piece: str, within: str, among: list[Source]) -> list[Place]:
    """Each place of a piece of code."""
    wanted = tokens_of(piece, piece=True)
    needle, found = joined(wanted), []
    for source in among:
        at = source.joined.find(needle)
        while at >= 0:
            first = source.joined.count(BETWEEN, 0, at)
            place = Place(source, first, first + len(wanted) - 1)
            if stands_within(place.name, within):
                found.append(place)
            at = source.joined.find(needle, at + 1)
    return found


def nearest(piece: str, among: list[Source]) -> Place:
    """The longest part of a piece that stands somewhere."""
    wanted = [token.string for token in tokens_of(piece, piece=True)]
    best, size = None, -1
    for source in among:
        strings = [token.string for token in source.tokens]
        match = SequenceMatcher(None, wanted, strings, autojunk=False).find_longest_match()
        if match.size > size:
            # As much of the source as the piece is long.
            first = max(match.b - match.a, 0)
            best, size = Place(source, first, min(first + len(wanted), len(strings)) - 1), match.size
    return best


def the_place(piece: str, within: str, among: list[Source]) -> Place:
    """The one place of a piece of code; where there is none or more than one, an error that shows what is there."""
    found = places(piece, within, among)
    if len(found) == 1:
        return found[0]
    where = f" within {within}" if within else ""
    if found:
        raise Unanchored(f"{piece!r} stands at {len(found)} places{where}: {'; '.join(map(str, found))}")
    elsewhere = places(piece, "", among)
    if elsewhere:
        raise Unanchored(f"{piece!r} does not stand{where}, but here: {'; '.join(map(str, elsewhere))}")
    raise Unanchored(f"{piece!r} stands nowhere; the nearest is {nearest(piece, among)}")


def spliced(text: str, place: Place, new: str) -> str:
    """A text with other code in a place, indented as the code that was there."""
    first, last = (place.source.tokens[i] for i in (place.first, place.last))
    begin, *rest = textwrap.dedent(new).strip("\n").split("\n")
    lines = [begin, *(first.indentation + line if line.strip() else line for line in rest)]
    return text[: first.start] + "\n".join(lines) + text[last.end :]
