"""German-English sentence pairs for the translation example, out of gettext message catalogues.

Programs carry their translations in binary catalogues,
``<data>/locale/<language>/LC_MESSAGES/<program>.mo``, which pair an English message with its
translation. A machine with the usual command-line programs holds tens of thousands of them. Where
there are none, as in container images that strip them, :func:`number_pairs` writes out numbers in
both languages.
"""

from __future__ import annotations

import os
import random
import re
import site
import struct
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

__all__ = [
    "BOS",
    "EOS",
    "HOW_TO_GET",
    "PAD",
    "batch",
    "batches",
    "catalogue_paths",
    "clean",
    "encode",
    "message_pairs",
    "number_pairs",
    "number_words",
    "read_catalogue",
    "train_tokenizer",
]

Pair = tuple[str, str]  # German, English

PAD, BOS, EOS = 0, 1, 2
HOW_TO_GET = (
    "No German message catalogues were found. Debian's packages git, gnupg-l10n, krb5-locales, "
    "libc-l10n and libglib2.0-data have thousands of messages each (in container images, first "
    "delete the path-exclude of /usr/share/locale in /etc/dpkg/dpkg.cfg.d); on Ubuntu they are in "
    "language-pack-de-base. Using numbers in words instead."
)

_MAGIC = 0x950412DE
_LISTS_OF_NAMES = (
    "iso_",
    "iso-",
    "xkeyboard-config",
)  # languages, countries, keyboards: words, hardly sentences


# --------------------------------------------------------------------------------------- catalogues


def catalogue_paths(language: str = "de", roots: Sequence[Path] | None = None) -> list[Path]:
    """The catalogues of a language, sorted, without those that only list names.

    Args:
        roots: folders that hold ``<language>/LC_MESSAGES``; by default those of the system, of this
            Python, and of the packages that are installed in it.
    """
    if roots is None:
        data = os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
        roots = [
            Path(folder) / "locale"
            for folder in [*data.split(":"), "/usr/share", f"{sys.prefix}/share"]
        ]
        roots += [Path("/usr/share/locale-langpack")]
        for packages in site.getsitepackages():
            for depth in ("*", "*/*", "*/*/*"):
                roots += Path(packages).glob(f"{depth}/locale")
    found = {
        path.resolve() for root in roots for path in (root / language / "LC_MESSAGES").glob("*.mo")
    }
    return sorted(path for path in found if not path.name.startswith(_LISTS_OF_NAMES))


def read_catalogue(path: Path) -> Iterator[tuple[str, str]]:
    """The messages of a catalogue and their translations; a message with a plural counts twice.

    Not ``gettext.GNUTranslations``, which takes a whole catalogue for unreadable if its header is
    in an encoding other than the one it names, as some are.

    Raises:
        ValueError: the file is not a catalogue, or is cut off.
    """
    data = path.read_bytes()
    order = next((order for order in "<>" if data[:4] == struct.pack(order + "I", _MAGIC)), None)
    if order is None:
        raise ValueError(f"{path} is not a message catalogue.")

    def strings(table: int) -> Iterator[bytes]:
        for i in range(count):
            length, start = struct.unpack_from(order + "2I", data, table + 8 * i)
            if start + length > len(data):
                raise ValueError(f"{path} is cut off.")
            yield data[start : start + length]

    try:
        count, messages, translations = struct.unpack_from(order + "3I", data, 8)
        entries = list(zip(strings(messages), strings(translations), strict=True))
    except struct.error as error:
        raise ValueError(f"{path} is cut off.") from error
    header = next((value for key, value in entries if not key), b"")
    charset = re.search(rb"charset=([\w.:-]+)", header)
    encoding = charset[1].decode() if charset else "utf-8"
    for key, value in entries:
        if not key:
            continue
        forms, translated = (
            key.rpartition(b"\x04")[2].split(b"\0"),
            value.split(b"\0"),
        )  # \x04 ends a context
        for english, german in {(forms[0], translated[0]), (forms[-1], translated[-1])}:
            try:
                yield english.decode(encoding), german.decode(encoding)
            except (UnicodeDecodeError, LookupError):
                continue


_PLACEHOLDER = re.compile(
    r"%(?:\(\w+\)|\d+\$)?[-+#0']*(?:\*|\d+)?(?:\.(?:\*|\d+))?(?:hh|h|ll|l|j|z|t|L|q)?[diouxXeEfFgGaAcCspnmS]"
    r"|%<PRI\w+>|\{\w*\}|\$\{\w+\}|\$\d"
)
_DOUBLE_QUOTES = "\u201e\u201c\u201d\xbb\xab"
_SINGLE_QUOTES = "\u201a\u2018\u2019\u203a\u2039`\xb4"
_TYPOGRAPHY = str.maketrans(
    {
        **dict.fromkeys(_DOUBLE_QUOTES, '"'),
        **dict.fromkeys(_SINGLE_QUOTES, "'"),
        "\u2026": "...",
        "\xa0": " ",
    }
)


def clean(text: str) -> str | None:
    """A message as a line of plain text; ``None`` if it is not one.

    Placeholders of any kind become ``%s`` and typographic quotes plain ones. Messages of several
    lines, in columns, with web addresses or without two letters in a row are not plain text.
    """
    text = text.translate(_TYPOGRAPHY).strip()
    if re.search(r"\n|\t| {2}|://|@\w|[\\|]", text) or not re.search(r"[^\W\d_]{2}", text):
        return None
    return _PLACEHOLDER.sub("%s", text).replace("%%", "%")


def _without_mnemonics(english: str, german: str) -> Pair:
    """Drop the mark of a menu entry's keyboard shortcut, ``_Copy`` and ``K_opieren``; names keep
    their underscores.
    """
    marked = [[word for word in text.split() if "_" in word] for text in (english, german)]
    if english.count("_") == german.count("_") == 1 and marked[0] != marked[1]:
        english, german = english.replace("_", ""), german.replace("_", "")
    return english, german


def message_pairs(paths: Iterable[Path], max_length: int = 40) -> list[Pair]:
    """The clean pairs of the catalogues, shuffled. No German and no English text occurs in two of
    them.

    Args:
        max_length: characters of the longer of the two.
    """
    pairs: list[Pair] = []
    seen: set[tuple[str, str]] = set()
    for path in paths:
        try:
            found = sorted(read_catalogue(path))
        except (OSError, ValueError):
            continue
        for message, translation in found:
            english, german = clean(message), clean(translation)
            if not english or not german or max(len(english), len(german)) > max_length:
                continue
            english, german = _without_mnemonics(english, german)
            keys = {("de", _key(german)), ("en", _key(english))}
            if (
                _key(english) == _key(german) or keys & seen
            ):  # untranslated, or leaking from one part into another
                continue
            seen |= keys
            pairs.append((german, english))
    random.Random(0).shuffle(pairs)
    return pairs


def _key(text: str) -> str:
    return re.sub(r"[\W_]+", " ", text.casefold()).strip()


# ------------------------------------------------------------------------------------- number words

_ENGLISH = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_ENGLISH_TENS = [
    "",
    "ten",
    "twenty",
    "thirty",
    "forty",
    "fifty",
    "sixty",
    "seventy",
    "eighty",
    "ninety",
]
_GERMAN = [
    "null",
    "ein",
    "zwei",
    "drei",
    "vier",
    "fünf",
    "sechs",
    "sieben",
    "acht",
    "neun",
    "zehn",
    "elf",
    "zwölf",
    "dreizehn",
    "vierzehn",
    "fünfzehn",
    "sechzehn",
    "siebzehn",
    "achtzehn",
    "neunzehn",
]
_GERMAN_TENS = [
    "",
    "zehn",
    "zwanzig",
    "dreißig",
    "vierzig",
    "fünfzig",
    "sechzig",
    "siebzig",
    "achtzig",
    "neunzig",
]


def number_words(number: int) -> Pair:
    """A number from 0 to 999,999 in German and in English words."""
    if not 0 <= number < 10**6:
        raise ValueError(f"number has to be from 0 to 999999, got {number}.")
    german = _german(number) if number else _GERMAN[0]
    return german + ("s" if german.endswith("ein") else ""), _english(
        number
    ) if number else _ENGLISH[0]


def _german(n: int) -> str:
    if n >= 1000:
        return _german(n // 1000) + "tausend" + _german(n % 1000)
    if n >= 100:
        return _GERMAN[n // 100] + "hundert" + _german(n % 100)
    if n >= 20:
        return (_GERMAN[n % 10] + "und" if n % 10 else "") + _GERMAN_TENS[n // 10]
    return _GERMAN[n] if n else ""


def _english(n: int) -> str:
    if n >= 1000:
        rest = _english(n % 1000)
        return f"{_english(n // 1000)} thousand" + (
            f"{' and' if n % 1000 < 100 else ''} {rest}" if rest else ""
        )
    if n >= 100:
        return f"{_ENGLISH[n // 100]} hundred" + (f" and {_english(n % 100)}" if n % 100 else "")
    if n >= 20:
        return _ENGLISH_TENS[n // 10] + (f"-{_ENGLISH[n % 10]}" if n % 10 else "")
    return _ENGLISH[n] if n else ""


def number_pairs(count: int) -> list[Pair]:
    """Numbers in words, no number twice: the units come before the tens in German, and words are
    written together.
    """
    return [number_words(number) for number in random.Random(0).sample(range(10**6), count)]


# ------------------------------------------------------------------------------------------- tokens


def train_tokenizer(pairs: Sequence[Pair], vocabulary_size: int) -> Tokenizer:
    """Byte-level BPE over both languages: no text has unknown characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator((text for pair in pairs for text in pair), trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, pairs: Sequence[Pair]) -> list[tuple[list[int], list[int]]]:
    """Token ids of every pair: the German with an end mark, the English between a start and an end
    mark.
    """
    german, english = (tokenizer.encode_batch(list(texts)) for texts in zip(*pairs, strict=True))
    return [([*g.ids, EOS], [BOS, *e.ids, EOS]) for g, e in zip(german, english, strict=True)]


def batch(items: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor, Tensor]:
    """Pad to tensors: source ``(N, S)``, decoder input ``(N, T)``, labels ``(N, T)``, where S and T
    differ.

    The plugin matches padding masks by their length, so equal lengths would leave open which one is
    a layer's.
    """
    source = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(s) for s, _ in items], batch_first=True, padding_value=PAD
    )
    target = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(t) for _, t in items], batch_first=True, padding_value=PAD
    )
    decoder_input, labels = target[:, :-1], target[:, 1:]
    decoder_input = decoder_input.where(
        decoder_input != EOS, PAD
    )  # the end mark of a shorter sentence is no input
    if source.shape[1] == decoder_input.shape[1]:
        source = F.pad(source, (0, 1), value=PAD)
    return source, decoder_input, labels


def batches(
    items: Sequence[tuple[list[int], list[int]]], size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Full batches without end, epoch after epoch, of sentences of similar lengths (which saves
    padding).
    """
    pool = 16 * size
    while True:
        order = torch.randperm(len(items), generator=generator).tolist()
        groups: list[list[int]] = []
        for start in range(0, len(order), pool):
            part = sorted(
                order[start : start + pool], key=lambda i: len(items[i][0]) + len(items[i][1])
            )
            groups += [part[k : k + size] for k in range(0, len(part) - size + 1, size)]
        for k in torch.randperm(len(groups), generator=generator).tolist():
            yield batch([items[i] for i in groups[k]])
