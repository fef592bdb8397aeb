"""The translation example: its catalogue reader, its batches and model, and a short run of all of
it.
"""

from __future__ import annotations

import gettext
import io
import struct
from pathlib import Path
from types import ModuleType

import asdl
import pytest
import torch
import torch.nn.functional as F
from oracles.autograd import assert_equal
from torch import Tensor, nn

import asdl_ws_plugin

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("tokenizers")
    monkeypatch.syspath_prepend(EXAMPLES)
    import translation

    return translation


@pytest.fixture
def data(example: ModuleType) -> ModuleType:
    return example.data


# --------------------------------------------------------------------------------------- catalogues


def catalogue(
    entries: dict[str, str | bytes], charset: str | None = "UTF-8", order: str = "<"
) -> bytes:
    """A binary catalogue as ``msgfmt`` writes it, without its hash table."""
    messages = {
        key.encode(): value if isinstance(value, bytes) else value.encode()
        for key, value in entries.items()
    }
    if charset is not None:
        messages[b""] = (
            f"Project-Id-Version: x\nContent-Type: text/plain; charset={charset}\n".encode()
        )
    pairs = sorted(messages.items())
    start, tables, strings = 28 + 16 * len(pairs), (b"", b""), b""
    for pair in pairs:
        for k, text in enumerate(pair):
            entry = struct.pack(order + "2I", len(text), start + len(strings))
            tables = (tables[0] + entry, tables[1]) if k == 0 else (tables[0], tables[1] + entry)
            strings += text + b"\0"
    header = struct.pack(
        order + "7I", 0x950412DE, 0, len(pairs), 28, 28 + 8 * len(pairs), 0, 28 + 16 * len(pairs)
    )
    return header + tables[0] + tables[1] + strings


@pytest.mark.parametrize("order", ["<", ">"])
def test_reads_what_the_standard_library_reads(
    data: ModuleType, tmp_path: Path, order: str
) -> None:
    content = catalogue(
        {"file": "Datei", "menu\x04Open": "Öffnen", "one\nline": "eine\nZeile"}, order=order
    )
    path = tmp_path / "x.mo"
    path.write_bytes(content)
    stored = vars(gettext.GNUTranslations(io.BytesIO(content)))["_catalog"]
    expected = {key.rpartition("\x04")[2]: value for key, value in stored.items() if key}
    assert dict(data.read_catalogue(path)) == expected
    assert expected == {"file": "Datei", "Open": "Öffnen", "one\nline": "eine\nZeile"}


def test_plural_forms_are_two_messages(data: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "x.mo"
    path.write_bytes(catalogue({"menu\x04%d file\0%d files": "%d Datei\0%d Dateien"}))
    assert sorted(data.read_catalogue(path)) == [
        ("%d file", "%d Datei"),
        ("%d files", "%d Dateien"),
    ]


def test_catalogues_of_any_encoding_are_read(data: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "x.mo"
    path.write_bytes(catalogue({"size": "Größe".encode("latin-1")}, charset="ISO-8859-1"))
    assert list(data.read_catalogue(path)) == [("size", "Größe")]
    path.write_bytes(
        catalogue({"size": "Größe".encode("latin-1"), "file": "Datei"})
    )  # that message is lost
    assert list(data.read_catalogue(path)) == [("file", "Datei")]
    path.write_bytes(catalogue({"size": "Größe"}, charset=None))
    assert list(data.read_catalogue(path)) == [("size", "Größe")]
    path.write_bytes(catalogue({"size": "Größe"}, charset="no-such-encoding"))
    assert list(data.read_catalogue(path)) == []


def test_broken_catalogues_are_refused(data: ModuleType, tmp_path: Path) -> None:
    content = catalogue({"file": "Datei", "two files": "zwei Dateien"})
    path = tmp_path / "x.mo"
    for broken, message in (
        (b"", "not a"),
        (b"text", "not a"),
        (content[:10], "cut off"),
        (content[:40], "cut off"),
        (content[:-5], "cut off"),
    ):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=f"x.mo is {message}"):
            list(data.read_catalogue(path))
    (tmp_path / "y.mo").write_bytes(content)
    found = data.message_pairs(
        [tmp_path / "none.mo", path, tmp_path / "y.mo"]
    )  # the others are still read
    assert sorted(found) == [("Datei", "file"), ("zwei Dateien", "two files")]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("cannot open %s: %m\n", "cannot open %s: %s"),
        ("%1$s has %2$-5.3lu items", "%s has %s items"),
        ("%(name)s and {0} and {name} of ${total}", "%s and %s and %s of %s"),
        ("parameter $1 of %<PRIuMAX>", "parameter %s of %s"),
        (
            "100% of 50%% done",
            "100% of 50% done",
        ),  # "% o" is no placeholder, though printf would take it
        (
            "\xbbDatei\xab oder \u201eOrdner\u201c oder \u201ax\u2018",
            '"Datei" oder "Ordner" oder \'x\'',
        ),
        ("wait\u2026", "wait..."),
        ("two\nlines", None),
        ("  -h, --help   show help", None),
        ("see https://example.org", None),
        ("a@b", None),
        ("%d: %s", None),
        ("", None),
    ],
)
def test_messages_are_cleaned_or_left_out(
    data: ModuleType, message: str, expected: str | None
) -> None:
    assert data.clean(message) == expected


def test_messages_of_a_catalogue_become_pairs(data: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "de" / "LC_MESSAGES" / "x.mo"
    path.parent.mkdir(parents=True)
    path.write_bytes(
        catalogue(
            {
                "_Copy": "K_opieren",
                "use open_file": "benutze open_file",
                "Cancel": "Abbrechen",
                # The same but for case and punctuation: would leak from one part into another.
                "cancel!": "abbrechen?",
                "Abort": "abbrechen",
                "Debian": "Debian",  # not translated
                "a rather long message": "x" * 41,
                "a message that is long": "y" * 40,
            }
        )
    )
    (path.parent / "iso_639.mo").write_bytes(catalogue({"German": "Deutsch"}))
    paths = data.catalogue_paths("de", [tmp_path])
    assert paths == [path]
    assert data.catalogue_paths("fr", [tmp_path]) == []
    pairs = data.message_pairs(paths)
    assert len(pairs) == 4 and pairs == data.message_pairs(paths)
    assert {("Kopieren", "Copy"), ("benutze open_file", "use open_file")} < set(pairs)
    assert ("y" * 40, "a message that is long") in pairs
    assert len({german.casefold().strip("?") for german, _ in pairs}) == 4


def test_numbers_are_spelled_in_german_and_english(data: ModuleType) -> None:
    for number, pair in {
        0: ("null", "zero"),
        1: ("eins", "one"),
        16: ("sechzehn", "sixteen"),
        21: ("einundzwanzig", "twenty-one"),
        30: ("dreißig", "thirty"),
        101: ("einhunderteins", "one hundred and one"),
        777: ("siebenhundertsiebenundsiebzig", "seven hundred and seventy-seven"),
        1000: ("eintausend", "one thousand"),
        1_042: ("eintausendzweiundvierzig", "one thousand and forty-two"),
        300_017: ("dreihunderttausendsiebzehn", "three hundred thousand and seventeen"),
        101_100: ("einhunderteintausendeinhundert", "one hundred and one thousand one hundred"),
    }.items():
        assert data.number_words(number) == pair
    words = [data.number_words(number) for number in (*range(3000), *range(0, 10**6, 331))]
    distinct = len({*range(3000), *range(0, 10**6, 331)})
    assert (
        len({german for german, _ in words}) == len({english for _, english in words}) == distinct
    )
    for number in (-1, 10**6):
        with pytest.raises(ValueError, match="from 0 to 999999"):
            data.number_words(number)
    assert len(set(data.number_pairs(500))) == 500


# ---------------------------------------------------------------------------------- tokens, batches


def test_the_tokenizer_is_deterministic_and_loses_nothing(data: ModuleType) -> None:
    pairs = data.number_pairs(300)
    tokenizer = data.train_tokenizer(pairs, 320)
    assert tokenizer.to_str() == data.train_tokenizer(pairs, 320).to_str()
    assert tokenizer.get_vocab_size() == 320
    text = "dreißig Öfen, 千 %s"  # characters that it never saw
    ((source, target),) = data.encode(tokenizer, [(text, "thirty")])
    assert tokenizer.decode(source).strip() == text
    assert source[-1] == data.EOS and (target[0], target[-1]) == (data.BOS, data.EOS)
    assert len(source) < len(text.encode()) and data.PAD not in source + target


def test_a_batch_is_padded_and_shifted(data: ModuleType) -> None:
    bos, eos, pad = data.BOS, data.EOS, data.PAD
    source, decoder_input, labels = data.batch(
        [([5, eos], [bos, 6, 7, eos]), ([8, 9, eos], [bos, 4, eos])]
    )
    assert source.tolist() == [[5, eos, pad, pad], [8, 9, eos, pad]]  # one longer than the target
    assert decoder_input.tolist() == [[bos, 6, 7], [bos, 4, pad]]
    assert labels.tolist() == [[6, 7, eos], [4, eos, pad]]
    assert torch.equal(decoder_input != pad, labels != pad)


def test_batches_are_drawn_anew_in_every_epoch(data: ModuleType) -> None:
    items = [([i, data.EOS], [data.BOS, *[4] * (i % 7), data.EOS]) for i in range(10, 60)]
    first, second = (data.batches(items, 8, torch.Generator().manual_seed(1)) for _ in range(2))
    epochs = [[next(first) for _ in range(6)] for _ in range(2)]  # 50 // 8
    assert all(torch.equal(x, y) for x, y in zip(epochs[0][0], next(second), strict=True))
    orders = [[int(i) for source, _, _ in epoch for i in source[:, 0]] for epoch in epochs]
    assert [len(order) for order in orders] == [len(set(order)) for order in orders] == [48, 48]
    assert orders[0] != orders[1]
    waste = sum(int((target == data.PAD).sum()) for _, target, _ in epochs[0])
    assert waste < 48  # shuffled, it is some 150


# -------------------------------------------------------------------------------------------- model


@pytest.fixture
def model(example: ModuleType, double: None) -> nn.Module:
    model = example.Translator(30, width=8, depth=1)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    return model


def sentences(
    example: ModuleType, lengths: list[tuple[int, int]]
) -> list[tuple[list[int], list[int]]]:
    draw = lambda n: torch.randint(3, 30, (n,)).tolist()  # noqa: E731
    return [([*draw(s), example.EOS], [example.BOS, *draw(t), example.EOS]) for s, t in lengths]


def test_padding_and_the_future_are_not_seen(
    example: ModuleType, data: ModuleType, model: nn.Module
) -> None:
    items = sentences(example, [(3, 5), (6, 2), (4, 4)])
    source, target, _ = data.batch(items)
    logits = model(source, target)
    for i, item in enumerate(items):
        alone = model(torch.tensor([item[0]]), torch.tensor([item[1][:-1]]))[0]
        assert_equal(logits[i, : len(alone)], alone, 1e-12)
    changed = target.clone()
    changed[:, 2] = 3 + (changed[:, 2] + 1) % 27
    after = model(source, changed)
    assert_equal(after[:, :2], logits[:, :2], 1e-12)
    assert (after[:, 2] - logits[:, 2]).abs().max() > 1e-3


def test_evaluation_is_a_mean_over_tokens(example: ModuleType, model: nn.Module) -> None:
    items = sentences(example, [(3, 5), (6, 2), (4, 4)])
    terms = [
        -F.log_softmax(model(torch.tensor([s]), torch.tensor([t[:-1]]))[0], -1)[k, token]
        for s, t in items
        for k, token in enumerate(t[1:])
    ]
    assert len(terms) == 14
    expected = float(torch.stack(terms).detach().mean())
    for batch_size in (2, 128):
        assert example.evaluate(model, items, batch_size) == pytest.approx(expected, rel=1e-12)
    assert model.training


def test_greedy_decoding_takes_the_likeliest_token(
    example: ModuleType, data: ModuleType, double: None
) -> None:
    tokenizer = data.train_tokenizer(data.number_pairs(50), 270)
    model = example.Translator(270, width=16, depth=1).eval()
    with torch.no_grad():
        model.output.weight.mul_(0.5)
        model.output.bias[data.EOS] += 0.5  # some end early
    texts = ["eins", "zweiundzwanzig", "dreitausendvierhundert", "sieben", "acht", "elf"]
    expected, lengths = [], []
    for text in texts:  # one at a time, with the whole model
        ((source, _),) = data.encode(tokenizer, [(text, "")])
        ids = [data.BOS]
        while len(ids) < 9 and ids[-1] not in (data.EOS, data.PAD):
            ids.append(int(model(torch.tensor([source]), torch.tensor([ids]))[0, -1].argmax()))
        lengths.append(len(ids))
        expected.append(tokenizer.decode([i for i in ids if i > data.EOS]).strip())
    assert len(set(lengths)) > 1 and max(lengths) == 9
    assert example.translate(model, tokenizer, texts, max_length=8) == expected


@pytest.mark.parametrize("strategy", ["expand", "reduce"])
def test_factors_of_a_padded_batch(
    example: ModuleType, data: ModuleType, model: nn.Module, strategy: str
) -> None:
    """Those of the sentences one at a time, without padding: in the encoder, the decoder, and where
    they meet.

    Not of the keys, whose gradients sum to zero over the positions (a shift of all keys changes no
    attention weight).
    """
    items = sentences(example, [(3, 5), (6, 2), (4, 4)])
    names = [
        "transformer.encoder.layers.0.linear1",
        "transformer.encoder.layers.0.self_attn.v_proj",
        "transformer.decoder.layers.0.self_attn.q_proj",
        "transformer.decoder.layers.0.multihead_attn.v_proj",
        "transformer.decoder.layers.0.multihead_attn.out_proj",
        "output",
    ]
    asdl_ws_plugin.convert(model)
    A = dict.fromkeys(names, 0)
    B = dict.fromkeys(names, 0)
    tokens = dict.fromkeys(names, 0)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    in_source = [
        name for name in names if "encoder" in name or name.endswith("multihead_attn.v_proj")
    ]
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, args, out, name=name: seen.update({name: (args[0], out)})
        )
        for name in names
    ]
    for s, t in items:
        logits = model(torch.tensor([s]), torch.tensor([t[:-1]]))[0]
        loss = F.cross_entropy(logits, torch.tensor(t[1:]), label_smoothing=0.1, reduction="sum")
        for name, b in zip(
            names, torch.autograd.grad(loss, [seen[name][1] for name in names]), strict=True
        ):
            a, b = seen[name][0][0].detach(), b[0]
            assert len(a) == len(b) == (len(s) if name in in_source else len(t) - 1)
            tokens[name] += len(a)
            if strategy == "reduce":
                a, b = a.mean(0, keepdim=True), b.sum(0, keepdim=True)
            A[name], B[name] = A[name] + a.T @ a, B[name] + b.T @ b
    for handle in handles:
        handle.remove()

    asdl_ws_plugin.attach_padding(model, example.padding_masks)
    config = asdl.PreconditioningConfig(ema_decay=1.0, ignore_modules=[nn.LayerNorm, nn.Embedding])
    maker = asdl.KfacGradientMaker(model, config, fisher_type="fisher_emp", shared_dim=strategy)
    source, target, labels = data.batch(items)
    maker.setup_loss_call(example.token_loss, maker.setup_model_call(model, source, target), labels)
    maker.forward_and_backward()
    for name in names:
        kron = model.get_submodule(name).fisher.kron
        assert_equal(kron.A, A[name] / (tokens[name] if strategy == "expand" else len(items)))
        assert_equal(kron.B, B[name] / int((labels != data.PAD).sum()))


# --------------------------------------------------------------------------------------------- runs


def test_every_linear_layer_is_preconditioned(example: ModuleType) -> None:
    model = example.Translator(50, width=16)
    maker = example.gradient_maker(model, example.EXPAND)
    per_attention = ["q_proj", "k_proj", "v_proj", "out_proj"]
    expected = {"output"}
    for part, attentions in (
        ("encoder", ["self_attn"]),
        ("decoder", ["self_attn", "multihead_attn"]),
    ):
        for i in range(2):
            prefix = f"transformer.{part}.layers.{i}"
            expected |= {
                f"{prefix}.{attention}.{name}" for attention in attentions for name in per_attention
            }
            expected |= {f"{prefix}.linear1", f"{prefix}.linear2"}
    assert maker.shared_dim_for == dict.fromkeys(expected, "expand")


def test_quick_run_without_catalogues(
    example: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(example.data, "catalogue_paths", lambda *_: [])
    runs = example.main(["--quick", "--out", str(tmp_path)])
    assert [run.name for run in runs] == ["NAdamW", "K-FAC-expand", "K-FAC-reduce"]
    for run in runs:
        assert run.steps[0] == 0 and run.steps[-1] == 12 == len(run.laps)
        assert run.seconds[-1] == pytest.approx(sum(run.laps))
        assert run.values[-1] < 0.95 * run.values[0]
    assert len({run.values[0] for run in runs}) == 1  # the same model
    assert len({run.values[-1] for run in runs}) == 3
    printed = capsys.readouterr().out
    assert "language-pack-de-base" in printed.replace("\n", "")
    for text in (
        "K-FAC-expand",
        f"{runs[2].values[-1]:.3f}",
        runs[1].final["test loss"],
        "hundred",
    ):
        assert text in printed
    assert (tmp_path / "translation.png").read_bytes().startswith(b"\x89PNG")
    assert runs[1].reached(runs[1].values[-1]) is not None and runs[1].reached(0.0) is None
