"""Images from tables to rows of bytes, and what is said of one that cannot be read."""

import importlib
import subprocess
from dataclasses import replace
from io import BytesIO
from typing import ClassVar

import numpy as np
import pyarrow
import pytest
from PIL import EpsImagePlugin, Image, ImageOps
from pyarrow import parquet

from fedlora.config.data import Files, Iid
from fedlora.config.schema import ImageClassification
from fedlora.data import load_corpus
from fedlora.data.corpus import Columns, corpus_from
from fedlora.data.huggingface import _encoded_images
from fedlora.data.images import Frame, decoded, images_of
from fedlora.data.records import Records, fingerprint
from fedlora.data.table import Table
from fedlora.data.texts import Picture
from fedlora.data.tokenise import fingerprint as fingerprint_of_rows
from fedlora.errors import DataError
from tests.pictures import encoded, picture, save_pictures

TASK = ImageClassification(kind="image-classification")
SQUARE = Frame(height=16, width=16, resize=(16, 16), resample=2)


def read(path, train="train.csv", test="test.csv"):
    data = Files(
        source="files", train=str(path / train), test=str(path / test), image="picture", label="shape",
        partition=Iid(kind="iid", clients=1),
    )  # fmt: skip
    return load_corpus(data, TASK, 0)


@pytest.fixture
def folder(tmp_path):
    save_pictures(tmp_path, {"train": 6, "test": 3})
    return tmp_path


def test_paths_begin_where_the_table_lies_and_rows_keep_its_order(folder):
    corpus = read(folder)
    assert corpus.classes == ("bars", "disc", "stripes")
    rows = images_of(corpus.train, SQUARE)
    assert rows.input_ids.dtype == np.uint8 and len(rows) == 6
    assert rows.labels.tolist() == [0, 1, 2, 0, 1, 2]
    for number in range(6):
        with Image.open(folder / "train" / f"{number}.png") as image:
            wanted = np.asarray(image.resize((16, 16), 2)).transpose(2, 0, 1)
        own = rows.select(np.array([number]))
        assert np.array_equal(own.input_ids.reshape(3, 16, 16), wanted)


def test_bytes_in_a_parquet_file_are_the_same_images(folder):
    files = [(folder / "train" / f"{number}.png").read_bytes() for number in range(6)]
    shapes = ["bars", "disc", "stripes"] * 2
    wanted = images_of(read(folder).train, SQUARE).input_ids
    for column in (files, [{"bytes": each, "path": None} for each in files]):
        parquet.write_table(pyarrow.table({"picture": column, "shape": shapes}), folder / "train.parquet")
        found = images_of(read(folder, train="train.parquet").train, SQUARE)
        assert np.array_equal(found.input_ids, wanted)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"train\.csv:3: column 'picture' names 'train/1\.png', but no such file lies in"),
        (b"GIF89a and then nothing", r"train\.csv:3: .* no image that can be read .*; save it again as PNG or JPEG"),
        (b"", r"train\.csv:3: .* no image that can be read"),
        ("half", r"train\.csv:3: .* no image that can be read"),
    ],
)  # fmt: skip
def test_a_bad_image_is_one_message_with_file_row_and_mend(folder, content, message):
    bad = folder / "train" / "1.png"
    if content is None:
        bad.unlink()
    else:
        bad.write_bytes(bad.read_bytes()[:400] if content == "half" else content)
    with pytest.raises(DataError, match=message):
        images_of(read(folder).train, SQUARE)


@pytest.mark.parametrize("value", [None, 3, {"bytes": None, "path": None}, ""])
def test_a_cell_that_is_no_image_is_refused(value):
    table = Table(origin="t", columns={"picture": [value], "shape": ["a"]}, lines=[1])
    with pytest.raises(DataError, match=r"t:1: column 'picture' holds .*, need the path or the bytes"):
        corpus_from(table, table, Columns(text=("picture",), label=None, form="image"), causal=False)


def test_without_pillow_the_message_names_the_extra(monkeypatch):
    def missing(name, *rest):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(DataError, match=r"pip install 'fedlora\[images\]'"):
        decoded(Picture(content=encoded(np.zeros((4, 4, 3), np.uint8)), where="t:1"), SQUARE)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "CMYK"])
def test_whatever_a_file_holds_has_three_channels(mode):
    out = BytesIO()
    Image.new("L", (20, 20), 255).convert("RGB").convert(mode).save(out, "TIFF")
    found = decoded(Picture(content=out.getvalue(), where="t"), SQUARE)
    assert found.shape == (3, 16, 16) and (found == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_stands_upright_however_the_camera_was_held(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    with Image.fromarray(picture("disc", np.random.Generator(np.random.Philox(1)))[:, :14]) as image:
        out = BytesIO()
        image.save(out, "PNG", exif=exif)
        found = decoded(Picture(content=out.getvalue(), where="t"), replace(SQUARE, resize=None))
        image.getexif()[0x0112] = orientation
        wanted = ImageOps.exif_transpose(image)
    with Image.fromarray(found.transpose(1, 2, 0)) as upright:
        inside = (
            upright.crop((1, 0, 15, 16)) if wanted.height > wanted.width else upright.crop((0, 1, 16, 15))
        )
    left, top = (wanted.width - inside.width) // 2, (wanted.height - inside.height) // 2
    cut = wanted.crop((left, top, left + inside.width, top + inside.height))
    assert np.array_equal(np.asarray(inside), np.asarray(cut))


def test_grey_of_sixteen_bits_is_refused_where_it_would_turn_white():
    wide = (np.arange(400, dtype=np.uint16) * 160).reshape(20, 20)
    for kind in ("PNG", "TIFF"):
        with pytest.raises(
            DataError, match=r"t:1 is an image of more than 8 bits a channel \(Pillow's mode I;16"
        ):
            decoded(Picture(content=encoded(wide, kind), where="t:1"), SQUARE)
    with pytest.raises(DataError, match="mode F"):
        decoded(Picture(content=encoded(wide.astype(np.float32), "TIFF"), where="t:1"), SQUARE)


def test_no_other_program_reads_an_image(monkeypatch):
    def started(*arguments, **options):
        raise AssertionError(f"{arguments} was run")

    for name in ("Popen", "run", "check_call", "check_output", "call"):
        monkeypatch.setattr(subprocess, name, started)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", "gs")  # as where Ghostscript is installed
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(DataError, match=r"no image that can be read \(UnidentifiedImageError\)"):
        decoded(Picture(content=script, where="t:1"), SQUARE)


def test_a_small_file_that_would_fill_the_memory_is_refused():
    def blank(width, height):
        out = BytesIO()
        Image.new("1", (width, height)).save(out, "PNG")
        assert len(out.getvalue()) < 50_000
        return Picture(content=out.getvalue(), where="t:1")

    with pytest.raises(DataError, match="t:1 is an image so long and narrow"):
        decoded(blank(1, 10_000), replace(SQUARE, resize=100))
    with pytest.raises(DataError, match="DecompressionBombWarning"):
        decoded(blank(10_000, 9_000), SQUARE)


def test_whatever_a_decoder_raises_is_the_same_message(monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("words of a record")

    monkeypatch.setattr(Image, "open", broken)
    with pytest.raises(DataError, match=r"t:1 is no image that can be read \(RuntimeError\)") as caught:
        decoded(Picture(content=b"", where="t:1"), SQUARE)
    assert "words" not in str(caught.value) and caught.value.__suppress_context__


def test_a_text_where_a_path_should_stand_is_not_quoted_whole():
    table = Table(origin="t", columns={"picture": ["The patient says. " * 40]}, lines=[1])
    with pytest.raises(
        DataError, match=r"t:1: column 'picture' names 'The patient says. The patient …', but"
    ) as caught:
        corpus_from(table, table, Columns(text=("picture",), label=None, form="image"), causal=False)
    assert str(caught.value).count("patient") == 2


def test_the_rim_is_lost_or_filled():
    draw = np.random.Generator(np.random.Philox(0))
    whole = picture("disc", draw)
    one = Picture(content=encoded(whole), where="t")
    kept = decoded(one, Frame(height=16, width=18, resize=None, resample=2))
    assert np.array_equal(kept, whole[2:18, 1:19].transpose(2, 0, 1))
    wider = decoded(one, Frame(height=20, width=24, resize=None, resample=2))
    assert np.array_equal(wider[:, :, 2:22], whole.transpose(2, 0, 1))
    assert not wider[:, :, :2].any() and not wider[:, :, 22:].any()


def test_a_fingerprint_is_of_what_files_hold_not_of_where_they_lie(folder):
    by_path = read(folder).train
    files = [(folder / "train" / f"{number}.png").read_bytes() for number in range(6)]
    by_bytes = Records(texts=[Picture(content=f, where="elsewhere") for f in files], labels=by_path.labels)
    assert fingerprint(by_path) == fingerprint(by_bytes)
    (folder / "train" / "0.png").write_bytes(files[1])
    assert fingerprint(by_path) != fingerprint(by_bytes)
    rows = images_of(by_bytes, SQUARE)
    assert fingerprint_of_rows(rows) != fingerprint_of_rows(images_of(by_path, SQUARE))


def test_images_of_a_data_set_stay_encoded():
    """The library's own class is called so, too; it is not installed everywhere."""

    class Image:
        def __init__(self, decode=True):
            self.decode = decode

    class Rows:
        features: ClassVar = {"picture": Image(), "text": object()}

        def cast_column(self, name, feature):
            self.cast = name, feature.decode
            return self

    assert _encoded_images(Rows(), ["text", "picture"]).cast == ("picture", False)
    assert not hasattr(_encoded_images(Rows(), ["text"]), "cast")
