"""Text files as editors, spreadsheets and scrapers write them.

They are UTF-8 or UTF-16, with or without a byte order mark, and end lines in one of three ways.
Lines are counted as an editor counts them.
"""

import codecs
import csv
import json
from pathlib import Path

from crab_min.errors import DataError

# byte order mark -> encoding; that of UTF-32 begins with that of UTF-16
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def read_text(path: str | Path) -> str:
    r"""Read a text file; every line ends in "\n".

    Raises:
        DataError: the file cannot be read; names the line that is in another encoding.
    """
    try:
        content = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        raise DataError(f"{path}: cannot be read ({error})") from None
    encoding = next((MARKS[mark] for mark in MARKS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}, line {line}: byte 0x{content[error.start]:02x} is not {encoding.upper()}; "
            "save the file as UTF-8 (it may be in Windows-1252 or another encoding)"
        ) from None
    if "\0" in text:
        raise DataError(f"{path}: holds null characters; save it as a text file in UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def parse_json(text: str):
    """Return the value of a JSON text.

    Raises:
        ValueError: it is no JSON, has a key twice, is nested too deeply, or holds half a surrogate
            pair, which no tokenizer takes.
    """
    try:
        value = json.loads(text, object_pairs_hook=unique_keys)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if "\\ud" in text.lower():
        json.dumps(value, ensure_ascii=False).encode()  # UnicodeEncodeError is a ValueError
    return value


def unique_keys(pairs: list[tuple]) -> dict:
    """Make the dict of a JSON object. Raises ValueError for a key that stands there twice."""
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError(f"one of the keys {', '.join(key for key, _ in pairs)} stands there twice")
    return value


def read_json(path: str | Path):
    """Return the value of a JSON file. Raises DataError."""
    text = read_text(path)
    try:
        return parse_json(text)
    except ValueError as error:
        raise DataError(f"{path}: broken JSON ({error}); repair or download it again") from None


def read_csv(
    path: str | Path, columns: list[str] | None = None
) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Read a table with a heading; commas, semicolons or tabs stand between its columns.

    Args:
        columns: names of the columns of a table without a heading.

    Returns:
        The names of the columns in lower case, and for each row the line on which it begins and its
        cells by column. Blank rows are left out.

    Raises:
        DataError: two columns of one name, a row of more cells, or a quoted cell that does not end.
    """
    lines = [line + "\n" for line in read_text(path).split("\n")]
    if lines[0].startswith("sep="):  # for Excel
        lines[0] = "\n"
    heading = next((line for line in lines if line.strip()), "")
    delimiter = max(",;\t", key=heading.count)
    columns = list(columns or [])
    rows = []
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    line = 1  # on which the next row begins
    try:
        for cells in reader:
            values = [cell.strip() for cell in cells]
            if any(values) and not columns:
                columns = [value.lower() for value in values]
            elif any(values):
                if any(values[len(columns) :]):
                    raise csv.Error(f"{len(values)} cells, {len(columns)} columns")
                rows.append((line, dict(zip(columns, values))))
            line = reader.line_num + 1
    except csv.Error as error:
        advice = f"put a text with {delimiter!r} or a line break into quotes"
        raise DataError(f"{path}, line {line}: broken CSV ({error}); {advice}") from None
    named = [column for column in columns if column]
    if len(set(named)) < len(named):
        raise DataError(f"{path}: columns {', '.join(named)}; each name may stand there once")
    return columns, rows
