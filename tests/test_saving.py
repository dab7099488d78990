"""The folder that a conversion writes: its files, its card, and that it is whole."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest
import tiny
from huggingface_hub import ModelCard
from huggingface_hub.errors import HTTPError

from mlx_flashhead import convert, saving
from mlx_flashhead.cli import convert_main

REPOSITORY = Path(__file__).parent.parent
TEMPLATE = "{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}"

# Stops in the middle of saving: weights and tokenizer are written, the rest is not.
PAUSED = """
import sys, time
from mlx_flashhead import saving
from mlx_flashhead.cli import convert_main

def pause(*args, **kwargs):
    print("paused", flush=True)
    time.sleep(120)

saving.model_card = pause
sys.exit(convert_main(sys.argv[1:]))
"""

# As on a full disk: no file may grow beyond 40 kB.
LIMITED = """
import resource, signal, sys
from mlx_flashhead.cli import convert_main

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, -1))
sys.exit(convert_main(sys.argv[1:]))
"""


@pytest.fixture
def source(tmp_path):
    return tiny.write_folder(tmp_path / "source")


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def start_paused(source: Path, target: Path) -> subprocess.Popen:
    """Start a conversion and return when it is in the middle of saving."""
    arguments = ["--hf-path", source, "--mlx-path", target]
    process = subprocess.Popen(
        [sys.executable, "-c", PAUSED, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "paused\n"
    return process


def test_killed_conversion_leaves_nothing_that_loads(source, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    process = start_paused(source, work / "target")

    process.kill()
    process.communicate()

    (partial,) = work.iterdir()
    assert partial.name.startswith(".target.")
    assert (partial / "model.safetensors").exists()
    with pytest.raises(FileNotFoundError):
        mlx_lm.load(str(partial))

    convert(source, work / "target")

    assert names_in(work) == ["target"]


def test_a_running_conversion_is_left_alone(source, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    process = start_paused(source, work / "target")
    try:
        convert(source, work / "target")

        assert len(names_in(work)) == 2
    finally:
        process.terminate()
        process.communicate()
    assert names_in(work) == ["target"]


@pytest.mark.parametrize(
    ("sent", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_stopped_conversion_cleans_up(sent, status, source, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    process = start_paused(source, work / "target")

    process.send_signal(sent)
    _, stderr = process.communicate(timeout=60)

    assert process.returncode == status
    assert "Traceback" not in stderr
    assert names_in(work) == []


def test_full_disk_leaves_nothing(source, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    arguments = ["--hf-path", source, "--mlx-path", work / "target"]

    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("error: The weights cannot be written")
    assert done.stderr.count("\n") == 1
    assert names_in(work) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_any_failure_while_saving_leaves_nothing(error, source, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(saving, "save_config", fail)
    before = names_in(tmp_path)

    with pytest.raises(error):
        convert(source, tmp_path / "target")

    assert names_in(tmp_path) == before


def test_existing_output_is_refused_before_any_work(tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "kept").write_text("as it was")

    # The source does not exist either: it is not looked at.
    with pytest.raises(FileExistsError, match=f"{target} exists already"):
        convert(tmp_path / "absent", target)

    assert (target / "kept").read_text() == "as it was"


def test_default_output_is_named_after_the_source(source, tmp_path, monkeypatch):
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    result = convert(f"{source}/")

    assert result.path == Path("source-FlashHead")
    assert names_in(work) == ["source-FlashHead"]


def test_files_of_the_source_come_along(source, tmp_path):
    generation = {"eos_token_id": [tiny.EOS, tiny.EOS_BY_CONFIG], "top_k": 3}
    (source / "generation_config.json").write_text(json.dumps(generation))
    (source / "chat_template.jinja").write_text(TEMPLATE)
    (source / "custom_code.py").write_text("answer = 42\n")
    target = tmp_path / "target"

    convert(source, target)

    assert json.loads((target / "generation_config.json").read_text()) == generation
    assert (target / "custom_code.py").read_text() == "answer = 42\n"
    _, plain = mlx_lm.load(str(source))
    _, tokenizer = mlx_lm.load(str(target))
    messages = [{"role": "user", "content": "word80 and 17"}]
    assert tokenizer.apply_chat_template(messages) == plain.apply_chat_template(
        messages
    )
    assert tokenizer.get_vocab() == plain.get_vocab()
    assert set(tokenizer.eos_token_ids) == {tiny.EOS, tiny.EOS_BY_CONFIG}
    config = json.loads((target / "config.json").read_text())
    of_source = tiny.model_config("llama")
    changed = {"model_type": "flashhead", "eos_token_id": generation["eos_token_id"]}
    assert config.pop("flashhead")["base_model_type"] == "llama"
    assert config == of_source | changed


def test_card_says_what_it_is_and_keeps_the_sources_licence(
    source, tmp_path, monkeypatch
):
    (source / "README.md").write_text(
        "---\nlicense: mit\nlanguage: [fr]\ntags: [chat, mlx]\n---\nOld text\n"
    )
    # As if it came from the Hub.
    monkeypatch.setattr("mlx_flashhead.loading._download", lambda name: source)
    monkeypatch.chdir(tmp_path)

    result = convert("org/Some-Model", cluster_size=8, num_probes=5)

    assert result.path == Path("Some-Model-FlashHead")
    card = ModelCard.load(result.path / "README.md")
    assert card.data.license == "mit"
    assert card.data.language == ["fr"]
    assert card.data.tags == ["chat", "mlx", "flashhead"]
    assert card.data.base_model == "org/Some-Model"
    assert card.data.library_name == "mlx"
    assert "Old text" not in card.text
    assert "pip install mlx-flashhead" in card.text
    assert "mlx_lm.generate --model Some-Model-FlashHead" in card.text
    assert "| clusters | 26 of 8 rows |" in card.text
    assert "| scored per token | 5 clusters |" in card.text
    assert f"{result.figures.agreement:.1%}" in card.text


def test_upload_goes_through_the_hub_client(source, tmp_path, monkeypatch, capsys):
    calls = []

    class FakeApi:
        def create_repo(self, repo_id, **options):
            calls.append(("create_repo", repo_id, options.get("exist_ok")))

        def upload_large_folder(self, repo_id, folder_path, repo_type):
            calls.append(("upload", repo_id, repo_type, names_in(Path(folder_path))))

    monkeypatch.setattr(saving, "HfApi", FakeApi)
    target = tmp_path / "target"
    arguments = ["--hf-path", str(source), "--mlx-path", str(target)]

    status = convert_main([*arguments, "--upload-repo", "me/tiny"])

    assert status == 0
    assert calls == [
        ("create_repo", "me/tiny", True),
        ("upload", "me/tiny", "model", names_in(target)),
    ]
    assert {"config.json", "model.safetensors", "README.md"} <= set(calls[1][3])
    assert capsys.readouterr().out.endswith("https://huggingface.co/me/tiny\n")


@pytest.mark.parametrize("error", [HTTPError("no route"), OSError("refused")])
def test_failed_upload_keeps_the_folder(error, source, tmp_path, monkeypatch, capsys):
    def create_repo(self, **options):
        raise error

    monkeypatch.setattr(saving.HfApi, "create_repo", create_repo)
    target = tmp_path / "target"
    arguments = ["--hf-path", str(source), "--mlx-path", str(target)]

    status = convert_main([*arguments, "--upload-repo", "me/tiny"])

    message = capsys.readouterr().err
    assert status == 1
    assert message.startswith(f"error: {target} is complete, but it cannot be uploaded")
    assert f"({error})" in message
    mlx_lm.load(str(target))


def test_command_line_is_the_python_function(source, tmp_path):
    options = {"cluster_size": 8, "num_probes": 5, "head_bits": 6, "seed": 2}
    arguments = [f"--{k.replace('_', '-')}={v}" for k, v in options.items()]
    convert(source, tmp_path / "expected", quantize=True, q_bits=3, **options)

    done = subprocess.run(
        [
            *(sys.executable, REPOSITORY / "convert.py", "-q", "--q-bits=3"),
            *("--hf-path", source, "--mlx-path", tmp_path / "target", *arguments),
        ],
        capture_output=True,
        text=True,
        check=True,
    )

    # Another process: nothing depends on the seed of Python's hashes.
    for name in ("model.safetensors", "config.json"):
        expected = (tmp_path / "expected" / name).read_bytes()
        assert (tmp_path / "target" / name).read_bytes() == expected
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"Wrote {tmp_path / 'target'} in ")
    assert "26 of 8 rows" in lines[1]
    assert "5 clusters per token (19.2% of the rows)" in lines[2]
    assert "rows 6 bits, group size 64; centroids 4 bits" in lines[3]
    assert lines[-1] == (
        f'  mlx_lm.generate --model {tmp_path / "target"} --prompt "Hello"'
    )


def test_help_names_every_option():
    done = subprocess.run(
        [sys.executable, REPOSITORY / "convert.py", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )

    wanted = (
        "--hf-path --mlx-path -q --q-bits --q-group-size --q-mode --dtype "
        "--upload-repo --trust-remote-code --cluster-size --num-probes --head-bits "
        "--centroid-bits --seed"
    )
    assert set(wanted.split()) <= set(re.findall(r"--?[a-z-]+\b", done.stdout))


def test_smollm2_card_figures_are_those_of_its_files(smollm2, smollm2_flashhead):
    arrays = tiny.read_weights(smollm2_flashhead)
    config = json.loads((smollm2_flashhead / "config.json").read_text())
    card = (smollm2_flashhead / "README.md").read_text("utf-8")

    figures = {
        name: [float(cell.strip(" %")) for cell in cells.split("|")]
        for name, cells in re.findall(r"^\| ([^|]+) \| ([\d.%| ]+) \|$", card, re.M)
    }
    (head_mb, dense_mb) = figures["MB of head read per token"]
    (all_mb, plain_mb) = figures["MB of all weights"]
    vocab_size, hidden_size = 49152, 576
    head_bytes = sum(
        a.nbytes for n, a in arrays.items() if n.startswith("model.embed_tokens.")
    )
    all_bytes = sum(array.nbytes for array in arrays.values())
    # 4 bits and, for each group of 64, a float32 scale and bias.
    dense_bytes = vocab_size * hidden_size * (4 / 8 + 2 * 4 / 64)
    assert all_mb == pytest.approx(all_bytes / 1e6, abs=0.06)
    assert dense_mb == pytest.approx(dense_bytes / 1e6, abs=0.06)
    assert plain_mb == pytest.approx(
        (all_bytes - head_bytes + dense_bytes) / 1e6, abs=0.06
    )
    # A cluster in 16 and the centroids of all: far less than the dense head.
    assert head_mb < 0.5 * dense_mb
    assert config["flashhead"]["rows"]["bits"] == 8
    # 8-bit rows find the float head's token more often than a dense 4-bit head.
    agreement, rival = figures["agreement with the source's head"]
    assert 93 < agreement <= 100
    assert agreement > rival
    rows = mx.load(str(smollm2 / "model.safetensors"))["model.embed_tokens.weight"]
    assert rows.shape == (vocab_size, hidden_size)
