"""Folders of images as samples: layout, size and values that the model takes, and what is refused."""

from __future__ import annotations

import shutil
import sys
from collections import namedtuple

import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from onnx_lowrank import compress
from onnx_lowrank.calibrate import data
from onnx_lowrank.calibrate.sources import pictures
from onnx_lowrank.calibrate.sources.source import Need, Options
from onnx_lowrank.engines.inputs import Spec
from onnx_lowrank.errors import InputError
from tiny import built, decaying

Disk = namedtuple("Disk", "total used free")


def spec(*shape, dtype="float32", name="x"):
    return Spec(name, np.dtype(dtype), shape)


CHW = spec("n", 3, 6, 4, dtype="uint8")
HWC = spec("n", 6, 4, 3, dtype="uint8")


def pixels(seed=0, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape or (6, 4, 3), np.uint8)


def written(folder, *images, ending="png"):
    """Save images as 00.png, 01.png and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:02}.{ending}")
    return folder


@pytest.fixture
def photos(tmp_path):
    """One image of 6 × 4 pixels in a folder."""
    return written(tmp_path / "photos", pixels())


def grey(level, height=6, width=4):
    return np.full((height, width, 3), level, np.uint8)


def opened(path, wanted, most=None, shapes=None, **options):
    given = Options(None, options.get("mean"), options.get("std"))
    return data.open_needed(path, Need((wanted,), {}, shapes or {}, most, given))


def read(path, wanted, **more):
    """All images, those of both shares; in their order if there are fewer than five."""
    with opened(path, wanted, **more) as samples:
        return np.concatenate([batch.feed["x"] for batch in samples.batches(100)])


class TestValues:
    def test_bytes_go_to_both_layouts_as_they_are(self, photos):
        np.testing.assert_array_equal(read(photos, HWC), pixels()[None], strict=True)
        np.testing.assert_array_equal(read(photos, CHW), pixels().transpose(2, 0, 1)[None], strict=True)

    @pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ml_dtypes.bfloat16])
    @pytest.mark.parametrize("axis", [1, 3])
    def test_floats_are_normalized_by_channel(self, photos, axis, dtype):
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        want = np.moveaxis((pixels()[None] / 255 - mean) / std, 3, axis).astype(dtype)
        found = read(photos, spec("n", *want.shape[1:], dtype=dtype), mean=mean, std=std)
        np.testing.assert_array_equal(found, want, strict=True)

    def test_without_mean_and_std_values_are_0_to_1_and_a_warning_says_so(self, photos):
        with opened(photos, spec("n", 6, 4, 3)) as samples:
            np.testing.assert_array_equal(samples.feed()["x"], (pixels()[None] / 255).astype(np.float32))
            assert samples.warnings[0].startswith("The values of the images are 0 to 1: pass the --mean and")

    def test_one_channel_is_grey(self, tmp_path):
        folder = written(tmp_path / "p", np.full((6, 4, 3), (200, 100, 50), np.uint8))
        level = round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)
        np.testing.assert_array_equal(
            read(folder, spec("n", 1, 6, 4, dtype="uint8")), np.full((1, 1, 6, 4), level, np.uint8)
        )

    @pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA"])
    def test_every_mode_of_bytes_becomes_rgb(self, tmp_path, mode):
        Image.fromarray(grey(255)).convert(mode).save(tmp_path / "a.png")
        np.testing.assert_array_equal(read(tmp_path, HWC), grey(255)[None])

    def test_models_without_a_batch(self, photos):
        with opened(photos, spec(3, 6, 4, dtype="uint8")) as samples:
            (batch,) = samples.batches(8)
        np.testing.assert_array_equal(batch.feed["x"], pixels().transpose(2, 0, 1), strict=True)


class TestSizes:
    @pytest.mark.parametrize(
        ("shape", "part"),
        [
            ((6, 10), np.s_[:, 3:7]),
            ((12, 4), np.s_[3:9, :]),
            ((6, 4), np.s_[:, :]),
        ],
    )
    def test_the_centre_is_cut_out(self, tmp_path, shape, part):
        image = pixels(1, *shape, 3)
        found = read(written(tmp_path / "p", image), HWC)
        np.testing.assert_array_equal(found, image[part][None], strict=True)

    def test_the_shorter_side_is_resized_first(self, tmp_path):
        # 12 × 16 pixels become 6 × 8, of which the columns 2 to 5 are kept: those from 4 to 11.
        image = grey(10, 12, 16)
        image[:, 4:12] = 200
        found = read(written(tmp_path / "p", image), HWC)
        assert set(found[0, :, 1:3].flat) == {200}
        assert 100 < found[0, 0, 0, 0] <= 200

    def test_small_images_are_enlarged_and_counted(self, tmp_path):
        folder = written(tmp_path / "p", grey(7, 3, 2), grey(9))
        with opened(folder, CHW) as samples:
            assert set(samples.feed()["x"][0].flat) == {7}
            assert "1 of 2 images are smaller than 4×6 pixels and were enlarged." in samples.warnings

    def test_an_extreme_shape_takes_no_more_memory(self, tmp_path):
        folder = written(tmp_path / "p", grey(5, 1, 20_000))
        assert set(read(folder, spec("n", 3, 512, 512, dtype="uint8")).flat) == {5}

    def test_a_photograph_is_turned_as_its_camera_says(self, tmp_path):
        image = Image.fromarray(pixels(2, 4, 6, 3))
        exif = image.getexif()
        exif[274] = 6  # Turn by 90 degrees, clockwise.
        image.save(tmp_path / "a.png", exif=exif)
        np.testing.assert_array_equal(read(tmp_path, HWC)[0], np.rot90(pixels(2, 4, 6, 3), -1))

    def test_a_large_jpeg_is_close_to_the_whole(self, tmp_path):
        small = Image.fromarray(pixels(4, 3, 4, 3)).resize((1600, 1200), Image.Resampling.BICUBIC)
        small.save(tmp_path / "a.jpg", quality=95)
        want = np.asarray(small.resize((64, 48), Image.Resampling.BILINEAR), int)
        found = read(tmp_path, spec("n", 48, 64, 3, dtype="uint8"))[0].astype(int)
        assert np.abs(found - want).max() <= 4

    def test_open_sizes_come_from_the_user(self, photos):
        wanted = spec("n", 3, "h", "w", dtype="uint8")
        found = read(photos, wanted, shapes={"x": (1, 3, 6, 4)})
        np.testing.assert_array_equal(found, pixels().transpose(2, 0, 1)[None])
        unknown = Spec("x", np.dtype("uint8"), None)
        np.testing.assert_array_equal(read(photos, unknown, shapes={"x": (1, 6, 4, 3)}), pixels()[None])


class TestFolders:
    def test_images_are_found_below_in_the_order_of_their_names(self, tmp_path):
        written(tmp_path / "b", grey(3))
        written(tmp_path / "a" / "deep", grey(2))
        written(tmp_path, grey(1))
        (tmp_path / "labels.txt").write_text("no image")
        (tmp_path / ".hidden.png").write_text("no image")
        (tmp_path / ".cache").mkdir()
        (tmp_path / ".cache" / "x.png").write_text("no image")
        assert read(tmp_path, HWC)[:, 0, 0, 0].tolist() == [1, 2, 3]

    def test_fewer_are_evenly_spaced(self, tmp_path):
        folder = written(tmp_path / "p", *map(grey, range(10)))
        assert read(folder, HWC, most=4)[:, 0, 0, 0].tolist() == [0, 2, 5, 7]
        with opened(folder, HWC, most=4) as samples:
            assert samples.description == "p: 4 of 10 images, 0 held out"

    def test_passes_are_equal_and_independent(self, tmp_path):
        folder = written(tmp_path / "p", *(pixels(seed) for seed in range(12)))
        with opened(folder, HWC) as samples:
            pairs = list(zip(samples.batches(3), samples.batches(3), strict=True))
            assert (samples.count, samples.held) == (12, 2)
        rows = np.concatenate([first.feed["x"] for first, _ in pairs])
        assert sorted(map(bytes, rows)) == sorted(pixels(seed).tobytes() for seed in range(12))
        assert all((first.feed["x"] == second.feed["x"]).all() for first, second in pairs)

    def test_one_image_is_a_source_too(self, photos):
        np.testing.assert_array_equal(read(photos / "00.png", HWC), pixels()[None])

    @pytest.mark.parametrize("ending", ["npy", "npz"])
    def test_arrays_beside_the_images_are_what_counts(self, photos, ending):
        (photos / f"x.{ending}").write_bytes(b"")
        with pytest.raises(InputError, match=r"x.npz is not an .npz archive|holds neither test_data_set_"):
            read(photos, HWC)

    def test_links_to_folders_are_not_followed(self, tmp_path):
        folder = written(tmp_path / "p", grey(1))
        (folder / "loop").symlink_to(folder)
        assert len(read(folder, HWC)) == 1


class TestRefused:
    @pytest.mark.parametrize("content", [b"", b"no image", b"%!PS-Adobe-3.0 EPSF-3.0\n"])
    def test_a_file_that_is_no_image(self, photos, content):
        (photos / "01.png").write_bytes(content)
        with pytest.raises(InputError, match=r"01\.png is no image that can be read: remove it, or save it"):
            read(photos, HWC)

    @pytest.mark.parametrize("cut", [30, 60, -40])
    def test_a_truncated_image(self, photos, cut):
        whole = (photos / "00.png").read_bytes()
        (photos / "01.png").write_bytes(whole[:cut])
        with pytest.raises(InputError, match=r"01\.png is (a damaged|no) image"):
            read(photos, HWC)

    def test_a_link_to_nothing(self, photos):
        (photos / "01.png").symlink_to("nothing.png")
        with pytest.raises(InputError, match=r"01\.png is a damaged image \(.*No such file"):
            read(photos, HWC)

    @pytest.mark.parametrize("limit", [23, 11])
    def test_a_decompression_bomb(self, photos, monkeypatch, limit):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(InputError, match=f"has more pixels than {limit}: pass a smaller image"):
            read(photos, HWC)

    def test_a_large_file(self, photos, monkeypatch):
        monkeypatch.setattr(pictures, "_FILE_BYTES", 10)
        with pytest.raises(InputError, match=r"00\.png has more than 0 MiB: pass a smaller image"):
            read(photos, HWC)

    def test_too_many_files(self, photos, monkeypatch):
        monkeypatch.setattr(pictures, "_MOST_FILES", 0)
        with pytest.raises(InputError, match="holds more than 0 files and folders: pass a"):
            read(photos, HWC)

    def test_sixteen_bits(self, photos):
        Image.fromarray(np.zeros((6, 4), np.uint16)).save(photos / "01.png")
        with pytest.raises(InputError, match=r"01\.png has no channels of 8 bits \(mode I;16.*\): save it"):
            read(photos, HWC)

    @pytest.mark.parametrize(
        ("wanted", "message"),
        [
            (
                spec("n", 3, "h", "w"),
                "size of the images is open, or 0, in the shape n×3×h×w of .*x=1,3,224,224",
            ),
            (
                spec("n", None, 6, 3),
                r"is open, or 0, in the shape n×\?×6×3 of the input 'x': .*x=1,224,224,3",
            ),
            (spec("n", 4, 6, 8), "the shape n×4×6×8 has no axis of 1 or 3 channels: pass --input-shape x="),
            (spec("n", 10), "the shape n×10 has no axis of 1 or 3 channels"),
            (spec("n", 3, 6, 4, dtype="int32"), "'x' is int32, neither a float nor uint8"),
            (Spec("x", np.dtype("float32"), None), "the input 'x' has no shape in the model: pass --input"),
        ],
    )
    def test_inputs_that_take_no_images(self, photos, wanted, message):
        with pytest.raises(InputError, match=message):
            read(photos, wanted)

    def test_several_inputs(self, photos):
        with pytest.raises(InputError, match=r"images, which fill one input, but .* the inputs 'x', 'y'"):
            data.open_samples(photos, (HWC, spec("n", 6, 4, 3, name="y")))

    def test_a_size_that_is_not_the_models(self, photos):
        with pytest.raises(InputError, match="'x' has the shape n×3×6×4 in the model, which --input-shape"):
            read(photos, CHW, shapes={"x": (1, 3, 8, 8)})

    def test_a_size_of_0(self, photos):
        with pytest.raises(InputError, match="size of the images is open, or 0, in the shape 1×3×0×8 of"):
            read(photos, spec("n", 3, "h", "w"), shapes={"x": (1, 3, 0, 8)})

    def test_a_size_of_no_use(self, photos):
        with pytest.raises(InputError, match=r"one image for the model takes 2794.0 GiB, more than 1 GiB"):
            read(photos, spec("n", 3, 10**6, 10**6, dtype="uint8"), shapes={"x": (1, 3, 10**6, 10**6)})

    @pytest.mark.parametrize(("given", "count"), [((0.5,), "1 value"), ((0.5, 0.5), "2 values")])
    @pytest.mark.parametrize("name", ["mean", "std"])
    def test_another_number_of_values_than_channels(self, photos, name, given, count):
        with pytest.raises(InputError, match=f"--{name} has {count}, but the images have 3 channels: give"):
            read(photos, spec("n", 3, 6, 4), **{name: given})

    @pytest.mark.parametrize("name", ["mean", "std"])
    def test_values_for_bytes(self, photos, name):
        with pytest.raises(InputError, match="'x' takes bytes as they are: leave --mean and --std out"):
            read(photos, HWC, **{name: (0.5,) * 3})

    def test_a_full_disk(self, photos, monkeypatch):
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: Disk(0, 0, 100))
        with pytest.raises(InputError, match=r"1 image of 0 MiB do not fit into .*, where 0 MiB are free"):
            read(photos, HWC)

    def test_a_missing_library(self, photos, monkeypatch):
        monkeypatch.setitem(sys.modules, "PIL.Image", None)
        with pytest.raises(InputError, match=r'the library Pillow, .*: pip install "onnx-lowrank\[im'):
            compress("absent.onnx", 0.5, calibration=photos)


MODEL = """
<ir_version: 8, opset_import: ["": 17]>
small (float[N, 3, 8, 8] x) => (float[N, 4] y) {
  a = Conv <pads = [1, 1, 1, 1]> (x, conv)
  b = Relu (a)
  c = GlobalAveragePool (b)
  d = Flatten (c)
  y = Gemm <transB = 1> (d, fc)
}
"""


def test_a_model_is_compressed_and_compared_on_images(tmp_path):
    folder = written(tmp_path / "p", *(pixels(seed, 12, 16, 3) for seed in range(10)), ending="jpg")
    proto = built(MODEL, {"conv": decaying(1, 16, 3, 3, 3), "fc": decaying(2, 4, 16)})
    given = {"calibration": folder, "mean": [0.5] * 3, "std": [0.25] * 3, "inputs": folder}
    result = compress(proto, 0.8, recipe="activation", **given)
    assert result.report.calibration.source == "p: 10 images, 2 held out"
    assert "float32 10×3×8×8" in str(result.report.validation)
