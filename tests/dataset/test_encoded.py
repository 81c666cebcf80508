"""From bytes to pixels. Witnesses: PIL itself, and values that were written."""

import io
import pickle
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps
from torch.utils.data import DataLoader

from dino.dataset.encoded import FORMATS, BrokenImage, EncodedImages, decode, quiet

RNG = np.random.default_rng(0)
PHOTO = Image.fromarray(RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((70, 50), Image.Resampling.BICUBIC)


def encoded(image, format="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray:
    return decode(data, "x").permute(1, 2, 0).numpy()


def by_pil(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


JPEG = encoded(PHOTO, "JPEG", quality=90)


# Right pixels


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(encoded(image, format, **options), id=f"{format} {image.mode} {''.join(options)}")
        for image, format, options in [
            (PHOTO, "JPEG", {}),
            (PHOTO, "JPEG", {"progressive": True}),
            (PHOTO, "JPEG", {"subsampling": 2}),
            (PHOTO, "JPEG", {"keep_rgb": True}),
            (PHOTO.convert("L"), "JPEG", {}),
            (PHOTO.convert("CMYK"), "JPEG", {}),
            (PHOTO, "PNG", {}),
            (PHOTO.convert("L"), "PNG", {}),
            (PHOTO.convert("1"), "PNG", {}),
            (PHOTO.convert("P", palette=Image.Palette.ADAPTIVE, colors=9), "PNG", {}),
            (PHOTO.convert("YCbCr"), "TIFF", {}),
            (PHOTO.convert("CMYK"), "TIFF", {}),
            (PHOTO, "TIFF", {"compression": "tiff_lzw"}),
            (PHOTO, "WEBP", {}),
            (PHOTO, "BMP", {}),
            (PHOTO, "PPM", {}),
            (PHOTO.convert("L"), "PPM", {}),
            (PHOTO, "GIF", {}),
        ]
    ],
)
def test_the_pixels_are_those_of_pil_and_lie_channels_last(data):
    image = decode(data, "x")
    assert image.dtype == torch.uint8 and image.shape == (3, 50, 70) and image.stride() == (1, 210, 3)
    assert np.array_equal(image.permute(1, 2, 0), by_pil(data))
    image.zero_()  # it is the caller's own
    assert np.array_equal(pixels(data), by_pil(data))


def jpeg_of_four_components(transform: int) -> bytes:
    """As Adobe writes CMYK (transform 0) or YCCK (2): PIL writes the first, and reads both as inverted."""
    data = encoded(PHOTO.convert("CMYK"), "JPEG", quality=95)
    at = data.index(b"Adobe") + 11
    assert data[at] in (0, 2)
    return data[:at] + bytes([transform]) + data[at + 1 :]


def test_four_colour_jpegs_are_told_apart_by_adobes_mark_as_pil_does():
    cmyk, ycck = (jpeg_of_four_components(transform) for transform in (0, 2))
    assert np.array_equal(pixels(cmyk), by_pil(cmyk)) and np.array_equal(pixels(ycck), by_pil(ycck))
    difference = [np.abs(pixels(data).astype(int) - np.asarray(PHOTO)).mean() for data in (cmyk, ycck)]
    assert min(difference) < 10 < max(difference)  # one of the two was true to the photo, the other misread on purpose


def test_transparency_is_dropped_and_not_mixed_in():
    color = (200, 100, 50)
    for image in (Image.new("RGBA", (4, 3), (*color, 0)), Image.new("RGBA", (4, 3), (*color, 128))):
        for format, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})):
            assert (pixels(encoded(image, format, **options)) == color).all(), format
    assert (pixels(encoded(Image.new("LA", (4, 3), (77, 5)))) == 77).all()


@pytest.mark.parametrize("transparency", [0, b"\x00\x80\xff"], ids=["one entry", "each entry"])
def test_a_palette_with_transparency_gives_its_colours_without_a_warning(transparency):
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.putdata([0, 1, 2])
    data = encoded(image, transparency=transparency)
    assert pixels(data).tolist() == [[[10, 20, 30], [40, 50, 60], [70, 80, 90]]]


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_gray_keeps_its_upper_eight(format):
    values = np.array([[0, 255, 256, 0x7FFF, 0x8000, 0xFFFF]], dtype=np.uint16)
    assert pixels(encoded(Image.fromarray(values), format))[0, :, 0].tolist() == [0, 0, 1, 0x7F, 0x80, 0xFF]
    big_endian = b"MM\x00*" if format == "TIFF" else b""
    if big_endian:
        image = Image.fromarray(values.astype(">u2"))
        assert pixels(encoded(image, "TIFF"))[0, :, 1].tolist() == [0, 0, 1, 0x7F, 0x80, 0xFF]


def test_sixteen_bit_colour_keeps_its_upper_eight_too():
    values = np.array([[[0x1234, 0xFFFF, 0x00FF]]], dtype=">u2")
    header = b"IHDR" + struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for chunk in (header, b"IDAT" + zlib.compress(b"\0" + values.tobytes()), b"IEND"):
        data += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    assert pixels(data).tolist() == [[[0x12, 0xFF, 0x00]]]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (np.array([[0.0, 0.5]], np.float32), "float32 pixels from 0 to 0.5, expected 8 or 16 bits"),
        (np.array([[-1, 7]], np.int32), "int32 pixels from -1 to 7, expected 8 or 16 bits"),
        (np.array([[0, 1 << 20]], np.int32), r"int32 pixels from 0 to 1.04858e\+06, expected 8 or 16 bits"),
    ],
)
def test_pixels_without_an_agreed_range_are_refused(values, sentence):
    with pytest.raises(BrokenImage, match=f"x.tif: a TIFF image of 2 x 1 pixels that cannot be decoded .{sentence}"):
        decode(encoded(Image.fromarray(values), "TIFF"), "x.tif")


@pytest.mark.parametrize(("format", "options"), [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})])
def test_of_several_frames_the_first_is_taken(format, options):
    frames = [Image.new("RGB", (4, 4), color) for color in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert (pixels(data) == (250, 0, 0)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_an_image_is_set_upright_as_exif_says(orientation, format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(PHOTO, format, exif=exif, **options)
    image = decode(data, "x")
    with Image.open(io.BytesIO(data)) as stored:
        expected = np.asarray(ImageOps.exif_transpose(stored).convert("RGB"))
    assert np.array_equal(image.permute(1, 2, 0), expected) and image.shape == (3, *expected.shape[:2])
    assert image.stride() == (1, 3 * image.shape[2], 3)
    if orientation > 1:
        assert not np.array_equal(expected, pixels(encoded(PHOTO, format, **options)))  # the mark was there


@pytest.mark.parametrize(
    "exif",
    [b"Exif\0\0nonsense", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01" * 9],
)
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_exif_that_cannot_be_read_does_not_spoil_an_image(exif, format):
    assert np.array_equal(pixels(encoded(PHOTO, format, exif=exif)), pixels(encoded(PHOTO, format)))


def test_what_an_image_says_of_its_colours_is_no_matter():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(pixels(encoded(PHOTO, "JPEG", quality=90, icc_profile=profile)), pixels(JPEG))


# Broken ones


@pytest.mark.parametrize("left", [1, 2, 3, 20, 150, 300, 600, len(JPEG) // 2, len(JPEG) - 10, -2, -1])
def test_a_cut_jpeg_is_broken_be_it_by_one_byte(left):
    with pytest.raises(BrokenImage, match=r"^a/b\.jpg: .*\. (Repair|Repair, convert) or remove it\.$") as error:
        decode(JPEG[:left], "a/b.jpg")
    assert error.value.name == "a/b.jpg" and "\n" not in str(error.value)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF"])
def test_a_half_file_of_any_format_is_broken(format):
    data = encoded(PHOTO, format)
    with pytest.raises(
        BrokenImage, match=rf"x: a {format} image of 70 x 50 pixels that cannot|x: cannot be read as an"
    ):
        decode(data[: len(data) // 2], "x")


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "x: an empty file, where an image was expected. Copy it again or remove it."),
        (b"<html>404</html>", r"x: cannot be opened as an image \(JPEG, PNG, .*\). Repair, convert or remove it."),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "x: cannot be opened as an image"),
        (
            encoded(PHOTO, "BMP")[:18] + bytes(4) + encoded(PHOTO, "BMP")[22:],
            "x: cannot be opened as an image",
        ),
    ],
    ids=["empty", "html", "a program", "no width"],
)
def test_what_is_no_image_is_said_in_a_sentence(data, sentence):
    with pytest.raises(BrokenImage, match=sentence):
        decode(data, "x")


def huge_png(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + data + struct.pack(">I", 1000) + b"IDAT" + bytes(1000)


def test_a_huge_image_is_refused_by_its_header():
    assert Image.MAX_IMAGE_PIXELS == 89_478_485
    with pytest.raises(BrokenImage, match="x: an image of more than 178,956,970 pixels, the most that is decoded"):
        decode(huge_png(60_000, 60_000), "x")


def test_a_large_image_is_decoded_without_a_warning(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)  # PIL warns above it, the photo has 3,500
    with pytest.warns(Image.DecompressionBombWarning), Image.open(io.BytesIO(JPEG)):
        pass
    for data in (JPEG, encoded(PHOTO), encoded(PHOTO, "GIF")):
        assert decode(data, "x").shape == (3, 50, 70)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1749)
    with pytest.raises(BrokenImage, match="more than 3,498 pixels"):
        decode(JPEG, "x")


SEEDS = [JPEG, encoded(PHOTO, "JPEG", progressive=True), encoded(PHOTO.convert("CMYK"), "JPEG")]
SEEDS += [encoded(PHOTO, format) for format in ("PNG", "WEBP", "GIF", "BMP", "PPM")]
SEEDS += [encoded(PHOTO, "TIFF", compression=c) for c in (None, "tiff_lzw", "tiff_adobe_deflate", "jpeg")]
SEEDS += [encoded(PHOTO.convert("P"), transparency=b"\0\x80"), encoded(Image.new("I;16", (9, 9), 999))]
EXIF = Image.Exif()
EXIF[0x0112] = 6
SEEDS += [encoded(PHOTO, format, exif=EXIF) for format in ("JPEG", "PNG", "WEBP")]


@st.composite
def damaged(draw) -> bytes:
    data = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(0, 4))):
        where = draw(st.one_of(st.integers(0, 60), st.integers(0, len(data) - 1))) % len(data)
        data[where] = draw(st.one_of(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]), st.integers(0, 255)))
    if draw(st.booleans()):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 40))] = draw(st.binary(max_size=40))
    return bytes(data[: draw(st.one_of(st.just(len(data)), st.integers(0, len(data))))])


@given(st.one_of(damaged(), st.binary(max_size=200)))
@settings(max_examples=500, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_whatever_the_bytes_it_is_an_image_or_broken(data):
    try:
        image = decode(data, "x")
    except BrokenImage as error:
        assert error.name == "x" and str(error).startswith("x: ")
    else:
        assert image.dtype == torch.uint8 and image.shape[0] == 3 and image.permute(1, 2, 0).is_contiguous()


def test_a_broken_image_keeps_its_name_on_the_way_from_a_worker():
    error = pickle.loads(pickle.dumps(BrokenImage("a.jpg: broken.", "a.jpg")))
    assert (type(error), str(error), error.name) == (BrokenImage, "a.jpg: broken.", "a.jpg")


# Warnings


def test_threads_that_decode_leave_the_filters_of_warnings_as_they_were():
    before = warnings.filters[:]
    with ThreadPoolExecutor(8) as pool:
        images = list(pool.map(lambda i: decode(SEEDS[3 + i % 2], "x"), range(200)))
    assert len(images) == 200 and warnings.filters == before and quiet.inside == 0


# A data set of them


class InMemory(EncodedImages):
    def __init__(self, images: dict[str, bytes], labels: list[int]) -> None:
        self.images, self.labels, self.classes = images, np.array(labels), None

    def name(self, index):
        return list(self.images)[index]

    def encoded(self, index):
        return list(self.images.values())[index]

    def listed(self):
        yield from (name.encode() for name in self.images)


def test_a_data_set_gives_images_and_labels_and_ends():
    dataset = InMemory({"a": JPEG, "b": SEEDS[3], "c": b"?"}, [4, 5, 6])
    assert len(dataset) == 3 and dataset[1][1] == 5 and torch.equal(dataset[0][0], decode(JPEG, "a"))
    with pytest.raises(BrokenImage, match="^c: "):
        dataset[2]
    assert [label for _, label in InMemory({"a": JPEG, "b": JPEG}, [1, 2])] == [1, 2]


def test_the_fingerprint_is_of_names_labels_and_order():
    one = InMemory({"a": b"1", "b": b"2"}, [0, 1])
    assert one.fingerprint == InMemory({"a": b"3", "b": b"4"}, [0, 1]).fingerprint
    others = [({"b": b"", "a": b""}, [0, 1]), ({"a": b"", "b": b""}, [0, 2]), ({"a": b"", "bc": b""}, [0, 1])]
    others += [({"ab": b"", "": b""}, [0, 1]), ({"a": b""}, [0])]
    assert len({one.fingerprint, *(InMemory(*other).fingerprint for other in others)}) == 6


def test_broken_images_arrive_from_a_worker_as_such():
    loader = DataLoader(InMemory({"a": b"?"}, [0]), batch_size=None, num_workers=1)
    with pytest.raises(BrokenImage, match="a: cannot be opened"):
        next(iter(loader))


def test_only_formats_that_pil_reads_itself_are_opened():
    Image.init()
    assert set(FORMATS) <= set(Image.OPEN) and "EPS" not in FORMATS
