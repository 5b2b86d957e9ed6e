"""The official JSON files of SQuAD, whose questions lie in paragraphs of articles, as rows of questions. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from salient_ds.data.conversation import Problem
from salient_ds.data.json_files import ONE_OBJECT, open_text_bytes
from salient_ds.data.sources import Source


def flattened(source: Source) -> Iterator[tuple[int, object | Problem]]:
    """The rows as they are, but a whole SQuAD file or an article of one becomes a row for each of its questions.

    Rows of a question have the columns of the Hub's data set: id, title, context, question and answers. They all carry
    the line of the object that they were in.
    """
    for line, row in source.rows():
        if isinstance(row, Problem) and row.kind == ONE_OBJECT:
            with open_text_bytes(Path(source.name).expanduser()) as file:  # it has been read without an error before
                whole = json.load(file)
            row = whole if isinstance(whole.get("data"), list) and "version" in whole else row
        if isinstance(row, Mapping) and isinstance(row.get("data"), list) and "version" in row:
            for article in row["data"]:
                yield from _questions(line, article)
        elif isinstance(row, Mapping) and isinstance(row.get("paragraphs"), list):
            yield from _questions(line, row)
        else:
            yield line, row


def _questions(line: int, article: Any) -> Iterator[tuple[int, object | Problem]]:
    try:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                yield (
                    line,
                    {
                        "id": question["id"],
                        "title": article.get("title", ""),
                        "context": paragraph["context"],
                        "question": question["question"],
                        "answers": question.get("answers"),
                    },
                )
    except (KeyError, TypeError, AttributeError) as error:
        title = article.get("title", "without a title") if isinstance(article, Mapping) else "of another type"
        what = f"article {title!r} is not as in SQuAD's files"
        yield line, Problem("SQuAD file", line, f"{what}: {type(error).__name__}: {error}")
