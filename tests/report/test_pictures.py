"""Pictures for pages: the right pixels have the right colors, and nothing a stranger wrote is markup."""

from __future__ import annotations

import base64
import io
import itertools
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib import colormaps
from PIL import Image, ImageCms

from feedfast.report.pictures import (
    IGNORE,
    MOST_BOXES,
    SIDE,
    Detected,
    Mapped,
    Segmented,
    Viewed,
    boxes_drawn,
    detected_html,
    map_pixels,
    mapped_html,
    overlay,
    palette,
    segmented_html,
    viewed_html,
)

CLASSES = ('<b>"car"</b>', "tree & bush", "road")
HOSTILE = "a/<script>alert(1)</script>\x1b.jpg"


class Reader(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[dict[str, str]] = []
        self.tags: list[str] = []
        self.text: list[str] = []
        self.styles: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = {key: value or "" for key, value in attrs}
        if tag == "img":
            self.images.append(values)
        if tag == "i":
            self.styles.append(values["style"])

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def decoded(uri: str) -> tuple[str, np.ndarray]:
    head, _, content = uri.partition(";base64,")
    return head, np.asarray(Image.open(io.BytesIO(base64.b64decode(content, validate=True))))


def gray(height: int, width: int, value: int = 100) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def test_colors_can_be_told_apart() -> None:
    many = palette(80)
    for count in (1, 3, 21):
        assert palette(count) == many[:count]
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    strip = Image.fromarray(np.array([[*many[:21], (0, 0, 0), (255, 255, 255)]], np.uint8))
    converted = ImageCms.applyTransform(strip, to_lab)
    assert converted is not None
    lab = np.asarray(converted)[0].astype(np.float64) * (100 / 255, 1, 1)
    lab[:, 1:] = np.where(lab[:, 1:] > 127, lab[:, 1:] - 256, lab[:, 1:])  # signed bytes
    distances = [np.linalg.norm(a - b) for a, b in itertools.combinations(lab, 2)]
    assert min(distances) > 20  # about 2 can just be seen, 100 from black to white
    assert len(set(palette(200))) == 200
    assert palette(500)[200:400] == palette(200)
    assert not {(0, 0, 0), (255, 255, 255)} & set(palette(200))


def test_an_overlay_mixes_each_pixel_with_its_class() -> None:
    image = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 10
    mask = np.array([[0, 1, IGNORE], [2, 2, 0]], np.uint8)
    found = overlay(image, mask, 3, opacity=0.25)
    colors = palette(3)
    for y, x in np.ndindex(2, 3):
        label = int(mask[y, x])
        expected = [int(v) if label == IGNORE else round(0.75 * int(v) + 0.25 * c) for v, c in zip(
            image[y, x], colors[label if label != IGNORE else 0], strict=True)]  # fmt: skip
        assert found[y, x].tolist() == expected
    with pytest.raises(ValueError, match=r"found \(3, 2\)"):
        overlay(image, mask.T, 3)
    with pytest.raises(ValueError, match="below 2, found 2"):
        overlay(image, mask, 2)
    assert (overlay(image, np.full((2, 3), IGNORE), 2) == image).all()


def test_boxes_are_drawn_where_they_are() -> None:
    image = gray(80, 100)
    box = np.array([[10.0, 30.0, 60.0, 70.0]])
    drawn = boxes_drawn(image, box, np.array([2]), CLASSES)
    color = np.array(palette(3)[2])
    for place in [(30, 59), (69, 10), (69, 59), (50, 10), (50, 59), (69, 40)]:
        assert (drawn[place] == color).all(), place
    for place in [(32, 57), (50, 35), (67, 12), (29, 90), (70, 30), (50, 9), (50, 60)]:
        assert (drawn[place] == 100).all(), place
    above = drawn[17:30, 10:60].reshape(-1, 3)  # the name, on its class's color
    assert (above == color).all(1).mean() > 0.2
    assert (image == 100).all()


def test_large_images_are_made_smaller_and_their_boxes_with_them() -> None:
    drawn = boxes_drawn(gray(4 * SIDE // 2, 4 * SIDE), np.array([[400.0, 400.0, 800.0, 600.0]]), np.array([0]), CLASSES)
    assert drawn.shape == (SIDE // 2, SIDE, 3)
    colored = (drawn[105:] == palette(3)[0]).all(2)  # below the name
    ys, xs = np.nonzero(colored)
    assert (ys.max() + 105, xs.min(), xs.max()) == (149, 100, 199)


def test_only_good_predictions_are_drawn() -> None:
    image, boxes = gray(100, 100), np.array([[10.0, 20.0, 40.0, 50.0], [50.0, 60.0, 90.0, 95.0]])
    drawn = boxes_drawn(image, boxes, np.array([0, 1]), CLASSES, np.array([0.29, 0.31]))
    assert (drawn[20, 11:39] == 100).all()
    assert (drawn[94, 60:80] == palette(3)[1]).all()
    many = np.tile(boxes[:1], (MOST_BOXES + 5, 1))
    many[:, 2] += np.arange(len(many)) * 2
    scores = np.linspace(0.5, 0.9, len(many))  # the last are the best
    drawn = boxes_drawn(image, many, np.zeros(len(many), int), CLASSES, scores)
    assert (drawn[40, 39] == 100).all()
    assert (drawn[40, 39 + 2 * (len(many) - 1)] == palette(3)[0]).all()
    assert (boxes_drawn(image, boxes[:0], np.zeros(0, int), CLASSES) == image).all()


def test_boxes_that_leave_the_image_or_have_no_area_are_drawn_still() -> None:
    boxes = np.array([[-20.0, -20.0, 400.0, 400.0], [30.0, 30.0, 30.0, 30.0]])
    assert boxes_drawn(gray(50, 60), boxes, np.array([0, 1]), ("x" * 300, "y")).shape == (50, 60, 3)


def test_a_map_is_shown_as_its_mean_over_channels() -> None:
    values = np.zeros((4, 2, 3))
    values[:, 1, 2], values[:2, 0, 0] = 3.0, -8.0  # means 3 and -4
    found = map_pixels(values)
    assert found.shape == (2, 3, 4)
    bright = found[..., :3].astype(int).sum(2)
    assert bright.argmin() == 0
    assert bright.argmax() == 5
    assert len(np.unique(map_pixels(np.full((3, 4, 4), 7.0)).reshape(-1, 4), axis=0)) == 1
    values[0, 0, 1] = np.nan
    found = map_pixels(values)
    assert found[0, 1].tolist() == [255, 0, 0, 255]
    assert (found[1, 2] > 0).any()
    assert (map_pixels(np.full((1, 2, 2), np.inf)) == (255, 0, 0, 255)).all()
    assert map_pixels(np.zeros((1, 500, 2))).shape == (500, 2, 4)


def test_maps_have_the_colors_of_viridis() -> None:
    ramp = np.linspace(-3.0, 5.0, 256)[None, None]
    expected = np.asarray(colormaps["viridis"](np.arange(256)))[:, :3] * 255
    assert np.abs(map_pixels(ramp)[0, :, :3] - expected).max() <= 2.5


def test_what_was_not_stored_is_blank_and_counts_for_nothing() -> None:
    values = np.array([[[5.0, 1.0], [9.0, 2.0]]] * 3)
    mask = np.array([[[False, False], [True, False]]] * 3)
    found = map_pixels(np.ma.MaskedArray(values, mask))
    assert found[1, 0].tolist() == [0, 0, 0, 0]
    assert found[0, 0].tolist() == map_pixels(values[:, :, :1] * 0 + [[[1.0], [0.0]]])[0, 0].tolist(), "the highest"
    said = mapped_html([Mapped("x", None, {"ofd1": {"a": np.ma.MaskedArray(values, mask)}})])
    assert "a, ofd1, 3x2x2, 75% of positions: 1 to 5" in said
    assert "left blank" in said


def test_segments_as_a_section() -> None:
    truth = np.zeros((40, 60), np.uint8)
    truth[:, 30:], truth[:4] = 1, IGNORE
    prediction = np.zeros((40, 60), np.int64)  # half of what is labeled is right
    html = segmented_html([Segmented(HOSTILE, gray(40, 60), truth, prediction)], CLASSES)
    found = Reader(html)
    assert {"script", "b"}.isdisjoint(found.tags)
    assert [image["alt"].partition(": ")[2] for image in found.images] == [
        "image",
        "ground truth",
        "prediction, 50.0% of pixels right",
    ]
    assert all(image["alt"].startswith(r"a/<script>alert(1)</script>\x1b.jpg") for image in found.images)
    said = "".join(found.text)
    assert CLASSES[0] in said
    assert CLASSES[1] in said
    assert CLASSES[2] not in said  # nowhere to be seen
    assert found.styles == [f"background:rgb{color}" for color in palette(3)[:2]]
    for image, mask in zip(found.images, (None, truth, prediction), strict=True):
        head, pixels = decoded(image["src"])
        expected = gray(40, 60) if mask is None else overlay(gray(40, 60), mask, 3)
        assert head == "data:image/png"
        assert (image["width"], image["height"]) == ("60", "40")
        np.testing.assert_array_equal(pixels, expected)


def test_detections_as_a_section() -> None:
    boxes, labels = np.array([[5.0, 20.0, 30.0, 39.0]]), np.array([1])
    found_boxes = np.array([[6.0, 20.0, 30.0, 39.0], [0.0, 0.0, 9.0, 9.0]])
    sample = Detected(HOSTILE, gray(40, 60), boxes, labels, found_boxes, np.array([1, 2]), np.array([0.8, 0.1]))
    found = Reader(detected_html([sample], CLASSES))
    assert {"script", "b"}.isdisjoint(found.tags)
    words = [image["alt"].partition(": ")[2] for image in found.images]
    assert words == ["ground truth, 1 boxes", "prediction, 1 boxes of score 0.3 or more"]
    assert found.styles == [f"background:rgb{palette(3)[1]}"]
    _, truth = decoded(found.images[0]["src"])
    assert np.abs(truth[38, 10:28].astype(int) - palette(3)[1]).mean() < 60


def test_maps_as_a_section() -> None:
    rng = np.random.default_rng(0)
    maps = {"teacher a": rng.normal(size=(8, 5, 5)), "student <b>": rng.normal(size=(2, 5, 5))}
    found = Reader(mapped_html([Mapped("x.jpg", gray(30, 30), {"ofd1": maps})]))
    assert [image["alt"].partition(": ")[2].rpartition(":")[0] for image in found.images] == [
        "",
        "teacher a, ofd1, 8x5x5",
        "student <b>, ofd1, 2x5x5",
    ]
    for image, values in zip(found.images[1:], maps.values(), strict=True):
        mean = values.mean(0)
        assert image["alt"].endswith(f": {mean.min():.3g} to {mean.max():.3g}")
        head, pixels = decoded(image["src"])
        assert head == "data:image/png"
        assert (image["width"], image["height"]) == ("5", "5")
        np.testing.assert_array_equal(pixels, map_pixels(values))


def test_photographs_are_jpeg_and_small_images_exact() -> None:
    rng = np.random.default_rng(0)
    small, large = (rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for side in (32, 2 * SIDE))
    found = Reader(viewed_html([Viewed(HOSTILE, [("view 0", small, ["<i>flip"]), ("view 1", large, [])])]))
    (exact, pixels), (head, fitted) = (decoded(image["src"]) for image in found.images)
    assert (exact, head) == ("data:image/png", "data:image/jpeg")
    np.testing.assert_array_equal(pixels, small)
    assert fitted.shape == (SIDE, SIDE, 3)
    assert "i" not in found.tags
    assert "<i>flip" in found.text


def test_nothing_to_show_is_no_section() -> None:
    assert segmented_html([], CLASSES) == detected_html([], CLASSES) == mapped_html([]) == viewed_html([]) == ""
