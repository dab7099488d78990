"""What a conversion puts in its folder, says on the terminal and uploads."""

import json
import re
import subprocess
import sys
from pathlib import Path

import mlx_lm
import pytest
import tiny
from huggingface_hub import ModelCard
from huggingface_hub.errors import HTTPError

from mlx_flashhead import convert, saving
from mlx_flashhead.cli import convert_main

REPOSITORY = Path(__file__).parent.parent
TEMPLATE = "{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}"


@pytest.fixture
def source(tmp_path):
    return tiny.write_folder(tmp_path / "source")


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_default_output_is_named_after_the_source(source, tmp_path, monkeypatch):
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    result = convert(f"{source}/", calibrate=False)

    assert result.path == Path("source-FlashHead")
    assert names_in(work) == ["source-FlashHead"]


def test_files_of_the_source_come_along(source, tmp_path):
    generation = {"eos_token_id": [tiny.EOS, tiny.EOS_BY_CONFIG], "top_k": 3}
    (source / "generation_config.json").write_text(json.dumps(generation))
    (source / "chat_template.jinja").write_text(TEMPLATE)
    (source / "custom_code.py").write_text("answer = 42\n")
    target = tmp_path / "target"

    convert(source, target, calibrate=False)

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

    options = {"cluster_size": 8, "num_probes": 5, "calibration_positions": 256}
    result = convert("org/Some-Model", **options)

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
    assert "| base architecture | llama |" in card.text
    centroids = "26 for 8 rows each, 64 dimensions, 4 bits, group size 64"
    assert f"| centroids | {centroids} |" in card.text
    assert "| rows | float32 |" in card.text
    assert "| scored exactly | 40 rows per token (19.2%) |" in card.text
    assert "| always scored | 8 rows |" in card.text
    assert "| sampling | deterministic |" in card.text


def test_upload_goes_through_the_hub_client(source, tmp_path, monkeypatch, capsys):
    calls = []

    class FakeApi:
        def create_repo(self, repo_id, **options):
            calls.append(("create_repo", repo_id, options.get("exist_ok")))

        def upload_large_folder(self, repo_id, folder_path, repo_type):
            calls.append(("upload", repo_id, repo_type, names_in(Path(folder_path))))

    monkeypatch.setattr(saving, "HfApi", FakeApi)
    target = tmp_path / "target"
    folders = ["--hf-path", str(source), "--mlx-path", str(target)]
    arguments = [*folders, "--no-calibration"]

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
    folders = ["--hf-path", str(source), "--mlx-path", str(target)]
    arguments = [*folders, "--no-calibration"]

    status = convert_main([*arguments, "--upload-repo", "me/tiny"])

    message = capsys.readouterr().err
    assert status == 1
    assert message.startswith(f"error: {target} is complete, but it cannot be uploaded")
    assert f"({error})" in message
    mlx_lm.load(str(target))


def test_command_line_is_the_python_function(source, tmp_path):
    options = {"num_probes": 40, "head_bits": 6, "seed": 2, "sampling": "stochastic"}
    options |= {"calibration_positions": 300, "centroid_bits": 4}
    text = tmp_path / "a.txt"
    text.write_text("some words and 17 (numbers) " * 40)
    arguments = [f"--{k.replace('_', '-')}={v}" for k, v in options.items()]
    arguments += [f"--calibration-text={text}"] * 2
    options["calibration_texts"] = [text, text]
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
    assert lines[1] == "  centroids   203, 64 dimensions, 4 bits, group size 64"
    assert lines[2] == "  rows        6 bits, group size 64"
    assert lines[3] == "  probes      40 rows per token (19.7%)"
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
        "--centroid-bits --seed --target-recall --calibration-text "
        "--calibration-positions --no-calibration --sampling"
    )
    assert set(wanted.split()) <= set(re.findall(r"--?[a-z-]+\b", done.stdout))
