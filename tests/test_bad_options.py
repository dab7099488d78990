"""Options that make no sense: one sentence, before any work, nothing left behind."""

import mlx_lm
import pytest
import tiny
from mistakes import fails_everywhere

from mlx_flashhead import convert
from mlx_flashhead.cli import convert_main
from mlx_flashhead.options import HeadOptions


@pytest.fixture
def source(tmp_path):
    return tiny.write_folder(tmp_path / "source")


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"cluster_size": 0}, "cluster_size=0 must be at least 1"),
        ({"cluster_size": -4}, "cluster_size=-4 must be at least 1"),
        ({"cluster_size": 204}, r"=204 must be in \[1, 203\]"),
        # Four special tokens are always scored.
        ({"num_probes": 0}, r"=0 must be in \[4, 203\]: at least the clusters that"),
        ({"num_probes": -1}, r"=-1 must be in \[4, 203\]"),
        ({"num_probes": 3}, r"=3 must be in \[4, 203\]"),
        ({"num_probes": 204}, r"=204 must be in \[4, 203\]: .* at most all"),
        ({"num_probes": 0, "cluster_size": 16}, r"=0 must be in \[1, 13\]"),
        ({"num_probes": 14, "cluster_size": 16}, r"=14 must be in \[1, 13\]"),
        *(
            ({"target_recall": recall}, f"target_recall={recall} must lie between 0")
            for recall in (0.0, 1.0, 1.5, -0.5, float("nan"), float("inf"))
        ),
        ({"head_bits": 7}, "head_bits=7 must be one of source, 4, 5, 6, 8, 16"),
        ({"centroid_bits": 3}, "centroid_bits=3 must be one of 2, 4, 8, 16"),
        ({"centroid_bits": 0}, "centroid_bits=0 must be one of 2, 4, 8, 16"),
        ({"quantize": True, "q_bits": 7}, "7 bits"),
        ({"quantize": True, "q_group_size": 48}, "group size 48"),
        ({"quantize": True, "q_bits": 9}, "9 bits"),
        (
            {"quantize": True, "q_mode": "mxfp4", "q_bits": 3},
            "3 bits are not supported in mode mxfp4",
        ),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        *(
            (
                {"calibration_positions": count},
                f"positions={count} must be at least 256",
            )
            for count in (-1, 0, 10, 255)
        ),
    ],
    ids=str,
)
def test_option_out_of_range(options, pattern, source, tmp_path, capsys):
    fails_everywhere(source, tmp_path / "target", options, ValueError, pattern, capsys)


def words(count: int) -> str:
    return "word80 " * count


@pytest.mark.parametrize(
    ("contents", "options", "error", "pattern"),
    [
        ([None], {}, FileNotFoundError, "text0 is no file; name a text to read"),
        (
            [words(500), None],
            {},
            FileNotFoundError,
            "text1 is no file; name a text to read",
        ),
        ([b"\xff\xfe\x00word"], {}, ValueError, "text0 is no UTF-8 text; save it as"),
        ([""], {}, ValueError, "too short: it needs two stretches of 64 tokens"),
        ([words(127)], {}, ValueError, "too short: .* leave out --calibration-text"),
        # Enough tokens, but two files have no stretch in common.
        ([words(63), words(65)], {}, ValueError, "too short"),
        (
            [words(500)],
            {"calibrate": False},
            ValueError,
            "calibration_texts are given, but calibration is off: leave out one",
        ),
    ],
    ids=["absent", "second absent", "not UTF-8", "empty", "short", "cut", "off"],
)
def test_bad_calibration_text(
    contents, options, error, pattern, source, tmp_path, capsys
):
    paths = [tmp_path / f"text{number}" for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        if content is not None:
            is_text = isinstance(content, str)
            path.write_bytes(content.encode() if is_text else content)
    options = {"calibration_texts": paths, **options}

    fails_everywhere(source, tmp_path / "target", options, error, pattern, capsys)


def test_a_folder_is_no_calibration_text(source, tmp_path, capsys):
    options = {"calibration_texts": [source]}

    fails_everywhere(
        source, tmp_path / "target", options, FileNotFoundError, "is no file", capsys
    )


def test_quantized_model_is_not_quantized_again(source, tmp_path, capsys):
    mlx_lm.convert(str(source), str(tmp_path / "4bit"), quantize=True)

    fails_everywhere(
        tmp_path / "4bit",
        tmp_path / "target",
        {"quantize": True},
        ValueError,
        "is quantized already: leave out -q",
        capsys,
    )


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"quantize": True, "q_mode": "int4"}, "quantization mode 'int4' is unknown"),
        ({"dtype": "int8"}, "dtype='int8' must be one of float16"),
        ({"sampling": "greedy"}, "sampling='greedy' must be one of deterministic, st"),
    ],
    ids=str,
)
def test_names_that_the_command_line_would_refuse(options, pattern, source, tmp_path):
    with pytest.raises(ValueError, match=pattern):
        convert(source, tmp_path / "target", **options)


@pytest.mark.parametrize(
    "argv",
    [
        ["--hf-path", "x", "--head-bits", "many"],
        ["--hf-path", "x", "--q-mode", "int4"],
        ["--hf-path", "x", "--dtype", "int8"],
        ["--hf-path", "x", "--sampling", "bogus"],
        ["--hf-path", "x", "--target-recall", "most"],
        ["--hf-path", "x", "--calibration-positions", "1e4"],
        ["--hf-path", "x", "--calibration-text"],
        [],
    ],
    ids=str,
)
def test_command_line_that_makes_no_sense(argv, capsys):
    with pytest.raises(SystemExit) as exit:
        convert_main(argv)

    assert exit.value.code == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .startswith("mlx_flashhead.convert: error:")
    )


# (hidden size, cluster size, whether calibrated, length of a centroid)
@pytest.mark.parametrize(
    ("hidden_size", "cluster_size", "is_calibrated", "dims"),
    [
        (576, 1, True, 192),
        (640, 1, True, 192),
        (2048, 1, True, 704),
        (576, 2, True, 384),
        (576, 3, True, 576),
        (576, 16, True, 576),
        (576, 1, False, 576),
        (96, 1, True, 64),
        # At least one group, however short the rows.
        (64, 1, True, 64),
        (40, 1, True, 32),
        (40, 1, False, 32),
        # No group divides less than 32.
        (20, 1, True, 6),
        (20, 1, False, 20),
        (2, 1, True, 1),
    ],
)
def test_length_of_a_centroid(hidden_size, cluster_size, is_calibrated, dims):
    options = HeadOptions(cluster_size=cluster_size)

    assert options.centroid_dims(hidden_size, is_calibrated=is_calibrated) == dims


def test_single_rows_have_2_bit_centroids_and_clusters_4_bits():
    bits = {
        (size, given): HeadOptions(cluster_size=size, centroid_bits=given)
        for size in (1, 2)
        for given in (None, 8)
    }

    assert [o.stored_centroid_bits for o in bits.values()] == [2, 8, 4, 8]
